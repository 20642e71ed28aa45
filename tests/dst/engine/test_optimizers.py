"""Every optimizer of torch, and wrappers of some: state follows the connections, or is refused at once.

The definition is dense: W lies in one leaf whose gradient is cut to the connections before each step; at an
update what is dropped or grown gets the state that the optimizer gives to a weight that it has never seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from sparselab import BlockSparseLinear, FanInLinear, Group, MaskedLinear, RigL, SparseLinear, Static
from tests.dst.harness import assert_followed, by_position
from tests.hazards.textbook import rigl_update

IN, OUT, EVERY, FRACTION, UPDATES = 14, 10, 4, 0.3, 3
F64 = torch.float64

#: Whether each follows the connections weight by weight. Names are of torch.optim, with what is set.
FOLLOWING: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.05}),
    "SGD momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "SGD nesterov": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "SGD foreach": ("SGD", {"lr": 0.05, "momentum": 0.9, "foreach": True}),
    "SGD fused": ("SGD", {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "SGD maximize": ("SGD", {"lr": 1e-3, "momentum": 0.9, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 1e-3}),
    "Adam amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "Adam foreach": ("Adam", {"lr": 0.01, "foreach": True}),
    "Adam fused": ("Adam", {"lr": 0.01, "fused": True, "amsgrad": True}),
    "Adam maximize": ("Adam", {"lr": 1e-3, "maximize": True}),
    "AdamW": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW amsgrad": ("AdamW", {"lr": 0.01, "amsgrad": True}),
    "AdamW foreach": ("AdamW", {"lr": 0.01, "foreach": True}),
    "AdamW fused": ("AdamW", {"lr": 0.01, "fused": True}),
    "Adamax": ("Adamax", {"lr": 0.01}),
    "Adamax foreach": ("Adamax", {"lr": 0.01, "foreach": True}),
    "NAdam": ("NAdam", {"lr": 0.01}),
    "NAdam decoupled": ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": ("RAdam", {"lr": 0.01}),
    "RAdam foreach": ("RAdam", {"lr": 0.01, "foreach": True}),
    "RMSprop": ("RMSprop", {"lr": 0.01}),
    "RMSprop centered": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "Rprop": ("Rprop", {"lr": 0.01}),
    "Rprop foreach": ("Rprop", {"lr": 0.01, "foreach": True}),
    "Adagrad": ("Adagrad", {"lr": 0.05, "lr_decay": 1e-3}),
    "Adagrad started": ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "Adagrad fused": ("Adagrad", {"lr": 0.05, "fused": True}),
    "Adadelta": ("Adadelta", {"lr": 1.0}),
    "Adadelta foreach": ("Adadelta", {"lr": 1.0, "foreach": True}),
    "ASGD": ("ASGD", {"lr": 0.05, "t0": 5}),
    "ASGD foreach": ("ASGD", {"lr": 0.05, "foreach": True}),
}  # fmt: skip
#: What state of a new weight starts with where that is not 0.
STARTS = {"step_size": "lr", "sum": "initial_accumulator_value"}
KINDS: dict[str, Callable[[], Any]] = {
    "single": lambda: SparseLinear(IN, OUT, sparsity=0.7, dtype=F64),
    "masked": lambda: MaskedLinear(IN, OUT, sparsity=0.7, dtype=F64),
    "fan-in": lambda: FanInLinear(IN, OUT, fan_in=4, dtype=F64),
    "blocks": lambda: BlockSparseLinear(IN, OUT, sparsity=0.5, block_shape=(2, 2), dtype=F64),
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return KINDS[kind]()


def algorithm_of(kind: str, **settings: Any) -> RigL:
    scope = {"scope": "row"} if kind == "fan-in" else {}
    return RigL(**{"update_freq": EVERY, "drop_fraction": FRACTION, **scope, **settings})


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, IN, generator=generator, dtype=F64)
    return x, torch.randn(6, OUT, generator=generator, dtype=F64)


def train(layer: Any, optimizer: Any, steps: int, first: int = 1, loss_scale: float = 1.0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x, y = batch(step)
        (layer(x) - y).square().mean().mul(loss_scale).backward()
        optimizer.step()


class Dense:
    """W in one leaf, 0 where there is no connection."""

    def __init__(self, layer: Any, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.weight = nn.Parameter(layer.to_dense().weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.mask = torch.zeros(OUT, IN, dtype=torch.bool)
        self.mask.view(-1)[layer.positions()] = True
        self.optimizer = make([self.weight, self.bias])

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        x, y = batch(step)
        (nn.functional.linear(x, self.weight, self.bias) - y).square().mean().backward()
        gradient = self.weight.grad.clone()
        self.weight.grad[~self.mask] = 0
        self.optimizer.step()
        assert not self.weight[~self.mask].any()
        if step % EVERY == 0:
            before = self.mask.clone()
            rigl_update(self.weight, self.mask, gradient, FRACTION)
            for name, entry in self.optimizer.state[self.weight].items():
                if isinstance(entry, Tensor) and entry.shape == self.mask.shape:
                    entry[~(before & self.mask)] = self.optimizer.defaults.get(STARTS.get(name), 0.0)

    def state(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self.weight]
        return {
            name: entry[self.mask] for name, entry in state.items() if torch.is_tensor(entry) and entry.ndim
        }


@pytest.mark.parametrize("kind", ["single", "masked"])
@pytest.mark.parametrize("name", FOLLOWING)
def test_state_follows_as_in_a_dense_layer_whose_update_is_masked(name: str, kind: str) -> None:
    class_name, settings = FOLLOWING[name]
    layer = made(kind)
    dense = Dense(layer, lambda given: getattr(optim, class_name)(given, **settings))
    optimizer = getattr(optim, class_name)(layer.parameters(), **settings)
    algorithm = algorithm_of(kind, grown_state="zero")  # bias is corrected by age in test_bias_correction
    algorithm.attach(layer, optimizer)
    born = layer.positions().clone()
    for step in range(1, UPDATES * EVERY + 3):
        train(layer, optimizer, 1, step)
        dense.step(step)
        assert layer.positions().tolist() == dense.mask.view(-1).nonzero().flatten().tolist(), (
            f"at step {step}"
        )
        close(layer.to_dense().weight.detach(), dense.weight.detach())
        theirs = dense.state()
        for key, entry in optimizer.state[layer.stored].items():
            if torch.is_tensor(entry) and entry.ndim:
                close(layer.per_connection(entry), theirs.pop(key))
        assert not theirs
    assert len(set(born.tolist()) - set(layer.positions().tolist())) > 5


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["single", "fan-in", "blocks"])
def test_adafactor_keeps_what_it_knows_of_a_connection(kind: str) -> None:
    """Of a block, numbers for its rows and its columns; they go with it."""
    layer = made(kind)
    optimizer = optim.Adafactor(layer.parameters(), lr=0.05)
    layer.apply(algorithm := algorithm_of(kind, update_freq=1))
    for update in range(UPDATES):
        train(layer, optimizer, EVERY, update * EVERY)
        before = by_position(layer, optimizer)
        assert {"row_var", "col_var"} <= before.keys()
        algorithm.step()
        after = by_position(layer, optimizer)
        assert before["value"].keys() != after["value"].keys()
        assert_followed(before, after)
        assert optimizer.state[layer.stored]["row_var"].shape[0] == layer.nnz
    train(layer, optimizer, 2)
    assert layer.stored.isfinite().all()


@pytest.mark.parametrize("grown", ["zero", "mean"])
def test_what_blocks_share_may_start_with_the_mean(grown: str) -> None:
    layer = BlockSparseLinear(13, 9, sparsity=0.5, block_shape=(2, 3), dtype=F64)  # blocks that hang over
    optimizer = optim.Adafactor([layer.weight_values], lr=0.05)
    layer.apply(algorithm := RigL(update_freq=1, drop_fraction=FRACTION, grown_state=grown))
    x = torch.randn(5, 13, dtype=F64)
    layer(x).square().sum().backward()
    optimizer.step()
    old = layer.positions().tolist()
    algorithm.step()
    rows = optimizer.state[layer.weight_values]["row_var"]
    new = torch.tensor([at not in old for at in layer.positions().tolist()])
    assert new.any()
    expected = rows[~new].mean(0).expand_as(rows[new]) if grown == "mean" else torch.zeros_like(rows[new])
    close(rows[new], expected)


def attached(layer: Any, optimizer: Any) -> None:
    algorithm_of("single").attach(layer, optimizer)


def grouped(layer: Any, optimizer: Any) -> None:
    Group({"*": algorithm_of("single")}).attach(layer, optimizer)


def driven_by_hand(layer: Any, optimizer: Any) -> None:
    """Said before the first step of the optimizer: nothing has been changed by it."""
    layer.apply(algorithm := algorithm_of("single"))
    before = copy.deepcopy(layer.state_dict())
    try:
        x, y = batch(0)
        optimizer.step(lambda: (layer(x) - y).square().mean())
    finally:
        assert all(torch.equal(each, before[name]) for name, each in layer.state_dict().items())
        assert algorithm.steps_done == 0


REFUSED: dict[str, tuple[str, Callable[[Any], torch.optim.Optimizer], str]] = {
    "LBFGS": ("single", lambda p: optim.LBFGS(p), "LBFGS.*one vector over all parameters"),
    "LBFGS, blocks": ("blocks", lambda p: optim.LBFGS(p), "LBFGS.*one vector over all parameters"),
    "LBFGS, masked": ("masked", lambda p: optim.LBFGS(p), "LBFGS.*one vector over all parameters"),
    "Adafactor, masked": ("masked", lambda p: optim.Adafactor(p), "Adafactor.*rows and columns of a matrix"),
}  # fmt: skip


@pytest.mark.parametrize("how", [attached, driven_by_hand, grouped], ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", REFUSED)
def test_state_that_cannot_follow_is_refused_before_the_first_step(name: str, how: Any) -> None:
    kind, make, message = REFUSED[name]
    layer = made(kind)
    model, positions = nn.Sequential(layer), layer.positions().tolist()
    with pytest.raises(RuntimeError, match=message):
        how(layer if how is not grouped else model, make(list(layer.parameters())))
    assert layer.positions().tolist() == positions
    if how is not driven_by_hand:
        layer.apply(Static())  # nothing was attached


@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_refuses_says_so_before_the_first_step(kind: str) -> None:
    layer = made(kind)
    optimizer = optim.SparseAdam(layer.parameters())
    before = layer.stored.detach().clone()
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        train(layer, optimizer, 1)
    assert torch.equal(layer.stored, before)
    if hasattr(optim, "Muon") and kind != "masked":
        with pytest.raises(ValueError, match="only supports 2D parameters"):
            optim.Muon([layer.stored])


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch has no Muon yet")
def test_muon_trains_a_mask_and_what_lies_outside_stays_without_effect() -> None:
    layer = made("masked")
    optimizer = optim.Muon([layer.weight], lr=0.05)
    layer.apply(algorithm := algorithm_of("masked"))
    for step in range(1, 10):
        train(layer, optimizer, 1, step)
        algorithm.step()
        x = batch(step)[0]
        assert not layer.to_dense().weight[~layer.mask].any()
        close(layer(x), layer.to_sparse()(x))
    assert algorithm.last_update[0].grown


@pytest.mark.parametrize("how", ["the updates are over", "frozen", "other weights", "Static"])
def test_any_optimizer_serves_where_no_connection_moves(how: str) -> None:
    layer, head = made("single"), nn.Linear(OUT, 2, dtype=F64)
    algorithm: Any = Static() if how == "Static" else algorithm_of("single", stop=6)
    model = nn.Sequential(layer, head)
    algorithm.attach(model)
    if how == "the updates are over":
        sgd = optim.SGD(model.parameters(), lr=0.01)
        for step in range(6):
            model(batch(step)[0]).square().mean().backward()
            sgd.step()
            algorithm.step()
    layer.weight_values.requires_grad_(how != "frozen")
    lbfgs = optim.LBFGS((head if how == "other weights" else model).parameters(), max_iter=4)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = model(batch(0)[0]).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(3):
        lbfgs.step(closure)
    assert closure().item() < first


class Coded(torch.optim.Optimizer):
    """Keeps a moment in one byte a weight, as 8-bit optimizers do, with or without a scale for each block."""

    def __init__(self, params: Any, block: int = 0, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__(params, {"lr": 0.01})
        self.block, self.dtype = block, dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if self.block:
                state["scales"] = p.grad.new_ones(-(-p.numel() // self.block))
            state["codes"] = (p.grad * 10 + 128).to(self.dtype)
            p.sub_(0.01 * (state["codes"].to(p.dtype) - 128) / 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"'codes' is a Tensor of torch.uint8, whose 0 may be a code"),
        ({"dtype": torch.int16}, r"'codes' is a Tensor of torch.int16"),
        ({"dtype": torch.float8_e4m3fn}, r"'codes' is a Tensor of torch.float8_e4m3fn"),
        ({"block": 8}, r"'scales' has shape \(6,\), not \(42, 1, 1\)"),
    ],
)
@pytest.mark.parametrize("attach", [True, False])
def test_codes_are_refused_with_the_first_step(settings: Any, message: str, attach: bool) -> None:
    layer = made("single")
    optimizer = Coded(layer.parameters(), **settings)
    algorithm = algorithm_of("single")
    algorithm.attach(layer, optimizer if attach else None)
    with pytest.raises(RuntimeError, match=f"Coded keeps.*{message}"):
        train(layer, optimizer, 1)
    algorithm.reset()
    with pytest.raises(RuntimeError, match=f"Coded keeps.*{message}"):  # what it has is seen at once
        algorithm.attach(layer, optimizer)
    assert algorithm.layers == ()


@pytest.mark.filterwarnings("ignore:.*was called again without a step:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_of_another_precision_follow(dtype: torch.dtype) -> None:
    layer = made("single")
    optimizer = optim.SGD([layer.weight_values], lr=0.0, momentum=0.9)
    layer.apply(algorithm := algorithm_of("single"))
    train(layer, optimizer, 3)
    state = optimizer.state[layer.weight_values]
    state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
    algorithm.step(), algorithm.step(), algorithm.step()
    before = by_position(layer, optimizer)["momentum_buffer"]
    optimizer.zero_grad()
    (layer(batch(4)[0]) - batch(4)[1]).square().mean().backward()
    algorithm.step()
    after = by_position(layer, optimizer)["momentum_buffer"]
    assert state["momentum_buffer"].dtype == dtype
    assert algorithm.last_update[0].grown
    assert after == {at: before.get(at, 0.0) for at in after}
