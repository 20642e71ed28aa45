"""Copies averaged slot by slot with a layer that was rewired are refused; whatever is right is not."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from sparselab import (
    SET,
    BlockSparseLinear,
    MaskedLinear,
    RigL,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseEmbedding,
    SparseLinear,
    TiedLinear,
    TransposedLinear,
    average,
    densify,
    soft_update,
)

REFUSED = "average by slots is wrong once connections differ"


def models(kind: str = "single") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers: dict[str, Any] = {
        "single": lambda: SparseLinear(16, 12, sparsity=0.5),
        "blocks": lambda: BlockSparseLinear(16, 12, sparsity=0.5, block_shape=(4, 2)),
        "conv": lambda: SparseConv2d(4, 6, 3, sparsity=0.5),
        "transposed": lambda: SparseConvTranspose2d(4, 6, 3, sparsity=0.5),
        "embedding": lambda: SparseEmbedding(16, 12, sparsity=0.5),
        "masked": lambda: MaskedLinear(16, 12, sparsity=0.5),
    }
    inputs = {
        "conv": torch.randn(3, 4, 5, 5), "transposed": torch.randn(3, 4, 5, 5),
        "embedding": torch.randint(16, (5,)),
    }  # fmt: skip
    return nn.Sequential(layers[kind]()), inputs.get(kind, torch.randn(5, 16))


def driven(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, SET(update_freq=2).attach(model, optimizer)


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["single", "blocks", "conv", "transposed", "embedding"])
def test_torchs_averager_is_refused_once_connections_move(kind: str) -> None:
    model, x = models(kind)
    averaged = AveragedModel(model)
    optimizer, _ = driven(model)
    step(model, x, optimizer)
    averaged.update_parameters(model)
    averaged(x)
    step(model, x, optimizer)  # rewires
    averaged.update_parameters(model)
    with pytest.raises(RuntimeError, match=f"indices.* written to in place: an {REFUSED}.*AveragedModel"):
        averaged(x)


@pytest.mark.parametrize("kind", ["single", "blocks", "embedding"])
@pytest.mark.parametrize("tied", [TiedLinear, TransposedLinear])
def test_what_is_tied_to_a_wrong_average_is_refused(tied: Any, kind: str) -> None:
    model, x = models(kind)
    twin = copy.deepcopy(model)
    optimizer, _ = driven(model)
    for _ in range(2):  # the second rewires
        step(model, x, optimizer)
    with torch.no_grad():
        for own, other in zip(twin.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.5)
    head: Any = tied(twin[0])
    with pytest.raises(RuntimeError, match=REFUSED):
        head(torch.randn(5, head.in_features))


def test_torchs_averager_is_right_while_connections_stay() -> None:
    model, x = models()
    dense, _ = models("masked")
    averages = [AveragedModel(each, avg_fn=lambda a, m, n: 0.9 * a + 0.1 * m) for each in (model, dense)]
    for each, averaged in zip((model, dense), averages, strict=True):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(5):
            step(each, x, optimizer)
            averaged.update_parameters(each)
            averaged(x)
    torch.testing.assert_close(averages[0](x), averages[1](x))


def test_torchs_averager_may_begin_when_connections_have_come_to_rest() -> None:
    model, x = models()
    averaged = AveragedModel(model)
    optimizer, handle = driven(model)
    for _ in range(4):
        step(model, x, optimizer)
    handle.remove()
    averaged.update_parameters(model)
    assert torch.equal(averaged(x), model(x))
    step(model, x, optimizer)
    averaged.update_parameters(model)
    averaged(x)


def test_the_masked_twin_is_averaged_by_position_anyway() -> None:
    model, x = models("masked")
    averaged = AveragedModel(model)
    optimizer, _ = driven(model)
    for _ in range(4):
        step(model, x, optimizer)
        averaged.update_parameters(model)
        averaged(x)


def hard(target: nn.Module, model: nn.Module) -> None:
    for own, other in zip(target.parameters(), model.parameters(), strict=True):
        own.data.copy_(other.data)


def soft(target: nn.Module, model: nn.Module) -> None:
    for own, other in zip(target.parameters(), model.parameters(), strict=True):
        own.data.copy_(0.1 * other.data + 0.9 * own.data)


def in_place(target: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for own, other in zip(target.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.1)


COPIES = {
    "deepcopy": lambda model: copy.deepcopy(model),
    "load_state_dict": lambda model: loaded(model),
}


def loaded(model: nn.Module) -> nn.Module:
    target, _ = models()
    target.load_state_dict(model.state_dict())
    return target


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("update", [hard, soft, in_place])
def test_a_target_network_mixed_by_slots_is_refused(update: Any, made: str) -> None:
    model, x = models()
    target = COPIES[made](model)
    optimizer, _ = driven(model)

    def loop() -> None:
        for _ in range(6):
            target(x)
            step(model, x, optimizer)
            update(target, model)

    with pytest.raises(RuntimeError, match=f"had got other connections: an {REFUSED}.*soft_update"):
        loop()


@pytest.mark.parametrize("made", COPIES)
def test_a_target_network_mixed_by_position_is_right(made: str) -> None:
    model, x = models()
    target = COPIES[made](model)
    optimizer, _ = driven(model)
    for _ in range(6):
        target(x)
        step(model, x, optimizer)
        soft_update(target, model, 0.1)
    target.load_state_dict(model.state_dict())
    assert torch.equal(target(x), model(x))


def test_copies_that_go_their_own_way_are_left_alone() -> None:
    """A snapshot, a copy that is trained, one that is pruned, one that was read back, one that was told."""
    model, x = models()
    snapshot, trained, told = (copy.deepcopy(model) for _ in range(3))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    optimizer, _ = driven(model)
    own = torch.optim.SGD(trained.parameters(), lr=0.1)
    RigL(update_freq=2).attach(trained, own)
    kept = snapshot(x)
    for _ in range(6):
        step(model, x, optimizer)
        step(trained, x, own)
        assert torch.equal(snapshot(x), kept)
        with torch.no_grad():
            read[0].weight_values.mul_(0.9)
            read(x)
            told[0].weight_values.mul_(0.9)
        told[0].forget_origin()
        told(x)
    snapshot[0].set_topology(told[0].to_sparse_csr())
    snapshot(x)
    del model, optimizer
    with torch.no_grad():
        snapshot[0].weight_values.mul_(0.9)
    snapshot(x)


USES = {
    "forward": lambda target: target(torch.randn(5, 16)),
    "state_dict": lambda target: target.state_dict(),
    "to_dense": lambda target: target[0].to_dense(),
    "densify": lambda target: densify(target),
    "pickle": lambda target: pickle.dumps(target),
    "deepcopy": lambda target: copy.deepcopy(target),
    "torch.save": lambda target: torch.save(target, io.BytesIO()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("update", [hard, soft, in_place])
def test_a_target_network_that_was_never_used_is_refused_too(update: Any, made: str, use: str) -> None:
    model, x = models()
    target = COPIES[made](model)
    optimizer, _ = driven(model)
    for _ in range(6):
        step(model, x, optimizer)
        update(target, model)
    with pytest.raises(RuntimeError, match=f"had got other connections: an {REFUSED}"):
        USES[use](target)
    target[0].forget_origin()
    USES[use](target)


@pytest.mark.parametrize("use", USES)
def test_a_snapshot_that_nobody_writes_to_may_be_used(use: str) -> None:
    model, x = models()
    snapshot = copy.deepcopy(model)
    soft(snapshot, model)  # while connections are the same
    optimizer, _ = driven(model)
    for _ in range(6):
        step(model, x, optimizer)
    USES[use](snapshot)


ARRANGED = {
    "the target is the original": lambda model: (copy.deepcopy(model), model),
    "siblings": lambda model: (copy.deepcopy(model), copy.deepcopy(model)),
    "a copy of a copy": lambda model: (model, copy.deepcopy(copy.deepcopy(model))),
}


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("kind", ["single", "conv", "embedding"])
def test_whoever_is_the_copy(arranged: str, kind: str) -> None:
    first, x = models(kind)
    model, target = ARRANGED[arranged](first)
    optimizer, _ = driven(model)
    for _ in range(4):
        step(model, x, optimizer)
        soft(target, model)
    with pytest.raises(RuntimeError, match=f"had got other connections: an {REFUSED}"):
        target(x)


def test_a_copy_that_an_optimizer_without_state_trains_is_left_alone() -> None:
    model, x = models()
    trained = copy.deepcopy(model)
    optimizer, _ = driven(model)
    own = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(6):
        step(model, x, optimizer)
        step(trained, x, own)
    own.zero_grad()
    trained(x)
    trained.state_dict()


def test_a_copy_may_be_cast_or_moved() -> None:
    model, x = models()
    half, meta = copy.deepcopy(model), copy.deepcopy(model).to("meta")
    optimizer, _ = driven(model)
    for _ in range(4):
        step(model, x, optimizer)
    half.half()(x.half())
    half(x.half())
    assert meta.state_dict()["0.indices"].is_meta
    twin = copy.deepcopy(model)
    model.to("meta")
    twin(x)


def test_a_copy_whose_weights_are_computed_disturbs_nothing() -> None:
    model, x = models()
    pruned, computed = copy.deepcopy(model), copy.deepcopy(model)
    prune.l1_unstructured(pruned[0], "weight_values", 0.2)
    nn.utils.parametrize.register_parametrization(computed[0], "weight_values", nn.Identity())
    optimizer, _ = driven(model)
    for _ in range(4):
        step(model, x, optimizer)
        pruned(x), computed(x)


def test_what_functional_call_puts_in_place_is_no_write() -> None:
    model, x = models()
    other, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, _ = driven(other)
    for _ in range(4):
        step(other, x, optimizer)
    theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(twin, theirs, (x,)), other(x))
    ours = {name: each.detach() * 2 for name, each in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(twin, ours, (x,)), 2 * model(x))
    assert torch.equal(twin(x), model(x))


def test_a_rewrite_that_fails_changes_nothing() -> None:
    model, x = models()
    layer: Any = model[0]
    layer(x).sum().backward()
    weights, gradient, positions = (
        layer.weight_values.clone(),
        layer.weight_values.grad.clone(),
        layer.positions(),
    )
    free = next(each for each in range(16 * 12) if each not in positions.tolist())

    class Broken:
        def foresee(self, layer: Any) -> None:
            raise RuntimeError("no")

        check = settle = foresee

    layer.storage.kin = Broken()
    with pytest.raises(RuntimeError, match="no"):
        layer.rewrite(torch.tensor([0]), torch.tensor([free]))
    layer.storage.kin = None
    assert torch.equal(layer.weight_values, weights)
    assert torch.equal(layer.weight_values.grad, gradient)
    assert torch.equal(layer.positions(), positions)


def test_an_average_by_position_leaves_its_models_alone() -> None:
    first, x = models()
    second = copy.deepcopy(first)
    optimizer, _ = driven(second)
    for _ in range(2):
        step(second, x, optimizer)
    soup = average([first, second])
    soup(x)
    first.forward(x)
    second(x)
    assert average([soup, first])(x).shape == (5, 12)


def test_writing_before_the_origin_is_rewired_is_right() -> None:
    model, x = models()
    target = copy.deepcopy(model)
    soft(target, model)
    target(x)
    with torch.no_grad():
        target[0].weight_values.mul_(2)
    target(x)
