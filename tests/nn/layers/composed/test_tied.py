"""Layers that share the weight of another one: values, gradients, what is saved and counted, rewrites."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedConv2d,
    MaskedLinear,
    RigL,
    SparseConv2d,
    SparseLinear,
    TiedLinear,
    TransposedLinear,
    condense,
    densify,
    load_model,
    measure_sparsity,
    memory_report,
    plan_sparsify,
    save_model,
    sparsify,
)
from sparselab.nn import find_sparse

N_IN, N_HIDDEN = 14, 10
KINDS = {
    "sparse": lambda: SparseLinear(N_IN, N_HIDDEN, sparsity=0.7, dtype=torch.float64),
    "fan_in": lambda: FanInLinear(N_IN, N_HIDDEN, fan_in=4, dtype=torch.float64),
    "block": lambda: BlockSparseLinear(N_IN, N_HIDDEN, sparsity=0.5, block_shape=(3, 4), dtype=torch.float64),
    "masked": lambda: MaskedLinear(N_IN, N_HIDDEN, sparsity=0.7, dtype=torch.float64),
    "dense": lambda: nn.Linear(N_IN, N_HIDDEN, dtype=torch.float64),
}
of_every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


class Autoencoder(nn.Module):
    """An encoder, the same weights the other way round, and once more as they are."""

    def __init__(self, encoder: Any, bias: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = TransposedLinear(encoder, bias=bias)
        self.again = TiedLinear(encoder, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.decoder(torch.tanh(self.encoder(x))))


def dense_output(model: Any, weight: Tensor, x: Tensor) -> Tensor:
    h = torch.tanh(F.linear(x, weight, model.encoder.bias))
    return F.linear(F.linear(h, weight.T, model.decoder.bias), weight, model.again.bias)


def dense_weight(layer: Any) -> Tensor:
    weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.to_dense().weight.detach()
    return weight.clone().requires_grad_()


@torch.no_grad()
def spread(layer: Any, entries: Tensor) -> Tensor:
    """What lies as the weights do, as a dense matrix."""
    return entries * layer.mask if isinstance(layer, MaskedLinear) else layer.storage.spread(layer, entries)


@of_every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_values_and_all_gradients_are_those_of_a_dense_tied_twin(make: Any, bias: bool, shape: Any) -> None:
    model = Autoencoder(make(), bias)
    x = torch.randn(*shape, N_IN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*shape, N_HIDDEN, dtype=torch.float64)
    weight = dense_weight(model.encoder)
    parameters = {name: each for name, each in model.named_parameters() if name.endswith("bias")}
    expected = dense_output(model, weight, x)
    grads = torch.autograd.grad(expected, [weight, x, *parameters.values()], upstream)
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, grads[1])
    for each, grad in zip(parameters.values(), grads[2:], strict=True):
        torch.testing.assert_close(each.grad, grad)
    layer = model.encoder
    if isinstance(layer, nn.Linear):
        torch.testing.assert_close(layer.weight.grad, grads[0])
    else:
        live = spread(layer, torch.ones_like(layer.stored)) != 0
        torch.testing.assert_close(spread(layer, layer.stored.grad), torch.where(live, grads[0], 0))


@pytest.mark.parametrize("make", [KINDS[kind] for kind in ("sparse", "fan_in", "block", "masked")])
def test_growth_sees_the_sum_of_all_uses(make: Any) -> None:
    model = Autoencoder(make())
    weight = dense_weight(model.encoder)
    x = torch.randn(6, N_IN, dtype=torch.float64)
    dense_output(model, weight, x).square().sum().backward()
    seen: list[Any] = []
    model.encoder.gradient_hook = seen.append
    model(x).square().sum().backward()
    assert len(seen) == 3
    total = torch.zeros(N_HIDDEN, N_IN, dtype=torch.float64)
    for operands in seen:
        operands.add_rows(0, total)
    torch.testing.assert_close(total, weight.grad)


def test_rigl_grows_where_the_gradient_of_both_uses_is_largest() -> None:
    model = Autoencoder(KINDS["sparse"]())
    layer = model.encoder
    algorithm = RigL(drop_fraction=0.2, update_freq=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    algorithm.attach(model, optimizer)
    assert algorithm.layers == (layer,)
    x, grown = torch.randn(6, N_IN, dtype=torch.float64), 0
    for _ in range(4):
        weight, before = dense_weight(layer), set(layer.positions().tolist())
        dense_output(model, weight, x).square().sum().backward()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        after = set(layer.positions().tolist())
        scores = weight.grad.abs().reshape(-1)
        free = [float(scores[at]) for at in range(N_IN * N_HIDDEN) if at not in after | before]
        assert all(scores[at] >= max(free) for at in after - before)
        grown += len(after - before)
        torch.testing.assert_close(model(x), dense_output(model, dense_weight(layer), x))
    assert grown


@of_every_kind
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_share_as_the_model_does(make: Any, way: str) -> None:
    model = Autoencoder(make())
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.decoder.layer is other.encoder is other.again.layer
    assert other.encoder is not model.encoder
    x = torch.randn(3, N_IN, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(2)
    torch.testing.assert_close(other(x), dense_output(other, dense_weight(other.encoder), x))


@of_every_kind
def test_the_state_holds_the_shared_weight_once(make: Any, tmp_path: Any) -> None:
    model = Autoencoder(make())
    own = {f"encoder.{name}" for name in model.encoder.state_dict()}
    assert set(model.state_dict()) == {*own, "decoder.bias", "again.bias"}
    assert sum(1 for _ in model.named_modules()) == 4
    other = Autoencoder(make())
    x = torch.randn(3, N_IN, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    save_model(model, tmp_path / "model.safetensors")
    load_model(other := Autoencoder(make()), tmp_path / "model.safetensors")
    assert torch.equal(other(x), model(x))


def test_the_shared_weight_is_counted_once() -> None:
    model, layer = Autoencoder(KINDS["sparse"](), bias=False), KINDS["sparse"]()
    assert measure_sparsity(model) == measure_sparsity(layer)
    assert memory_report(model) == memory_report(layer)
    assert [name for name, _ in find_sparse(model)] == ["encoder"]
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("kind", ["sparse", "fan_in", "block"])
def test_sparsify_and_densify_are_followed(kind: str) -> None:
    model = Autoencoder(nn.Linear(64, 32, dtype=torch.float64))
    plan = plan_sparsify(model, 0.5, layer=kind)
    assert [each.name for each in plan.layers] == ["encoder"]
    assert plan.left == ()
    assert plan.parameters_elsewhere == 64 + 32
    assert sparsify(model, 0.5, layer=kind) is model
    assert model.decoder.layer is model.again.layer is model.encoder
    x = torch.randn(3, 64, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(y, dense_output(model, dense_weight(model.encoder), x))
    densify(model)
    assert type(model.again) is nn.Linear
    assert model.again.weight is model.encoder.weight
    assert model.decoder.layer is model.encoder
    torch.testing.assert_close(model(x), y)


def test_a_kind_that_cannot_be_shared_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Autoencoder(nn.Linear(6, 4))
    before = list(model.named_modules())
    monkeypatch.setattr(MaskedLinear, "is_shareable", False)  # all kinds of today can be
    with pytest.raises(TypeError, match="decoder shares the weight of a layer to replace: layer must be"):
        sparsify(model, 0.5, layer="masked")
    assert list(model.named_modules()) == before
    attention = nn.MultiheadAttention(4, 2)
    model = nn.ModuleList([attention, TiedLinear(attention.out_proj)])
    with pytest.raises(ValueError, match="must not share the weight of a part of what is replaced, got '1'"):
        sparsify(model, {"0.out_proj": 0.5})
    assert model[0] is attention


def test_condense_leaves_the_outputs_of_a_shared_layer() -> None:
    pattern = torch.eye(4, 6, dtype=torch.bool)
    pattern[1] = False
    first = SparseLinear.from_pattern(pattern)
    model = nn.ModuleList([nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2)), TransposedLinear(first)])
    with pytest.warns(UserWarning, match="'0.0' has its weight shared by '1'"):
        assert condense(model) == ()
    assert model[0][0] is first


def test_the_meta_device_and_other_dtypes() -> None:
    from sparselab import materialize

    with torch.device("meta"):
        model = Autoencoder(nn.Linear(64, 32))
    materialize(sparsify(model, 0.5))
    assert torch.isfinite(model(torch.randn(2, 64))).all()
    assert model.decoder.bias.abs().max() <= 1 / (0.5 * 32) ** 0.5
    assert model.double()(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64


def test_what_cannot_be_shared_is_refused() -> None:
    for layer in (SparseConv2d(2, 3, 3), MaskedConv2d(2, 3, 3), nn.Conv2d(2, 3, 1), torch.ones(2, 2)):
        with pytest.raises(TypeError, match="layer must be a SparseLinear or another"):
            TransposedLinear(layer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"for a sparsity write TransposedLinear\(layer, sparsity=0.9\)"):
        TransposedLinear(SparseLinear(4, 3), 0.9)  # type: ignore[arg-type]
    tied = TiedLinear(SparseLinear(4, 3))
    with pytest.raises(ValueError, match=r"layer must have a weight of shape \(3, 4\), got \(4, 3\)"):
        tied.tie(SparseLinear(3, 4))
    with pytest.raises(RuntimeError, match="in_features=4"):
        tied(torch.ones(2, 3))


def test_only_the_shared_weight_can_be_assigned() -> None:
    layer, dense = SparseLinear(4, 3), nn.Linear(4, 3)
    tied = TiedLinear(layer)
    tied.weight = layer.weight
    with pytest.raises(TypeError, match="weight of a TiedLinear must be that of its layer"):
        tied.weight = dense.weight
    tied.tie(dense)
    tied.weight = dense.weight
    assert dict(tied.named_parameters()).keys() == {"bias"}


def test_torch_compiles_it() -> None:
    model = Autoencoder(SparseLinear(8, 6))
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
