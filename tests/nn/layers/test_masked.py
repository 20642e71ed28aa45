"""MaskedLinear: the dense arithmetic of a sparse layer, with the same topology, state and manners."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselab import MaskedLinear, SparseLinear, measure_sparsity, memory_report, sparsify
from tests.nn.storage.test_rewrite import Seen
from tests.oracle import Exact, assert_close, product


def check(layer: MaskedLinear, x: Tensor, y: Tensor, dy: Tensor) -> None:
    """Output and gradients, already computed, against the oracle; nothing where there is no connection."""
    W, live, dtype = layer.weight.detach().numpy(), layer.mask.numpy(), layer.weight.detach().numpy().dtype
    tokens, upstream = x.detach().reshape(-1, layer.in_features), dy.reshape(-1, layer.out_features)
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    assert y.shape == (*x.shape[:-1], layer.out_features)
    # Dense sums: as many terms as there are inputs, though most of them are 0.
    y_exact = product(W * live, tokens.numpy().T, bias=bias)
    assert_close(y.detach().reshape(-1, layer.out_features).numpy().T, y_exact, dtype)
    assert x.grad is not None
    assert layer.weight.grad is not None
    dx_exact = product((W * live).T, upstream.numpy().T)
    assert_close(x.grad.reshape(-1, layer.in_features).numpy().T, dx_exact, dtype)
    dw = product(upstream.numpy().T, tokens.numpy())
    assert_close(layer.weight.grad.numpy(), Exact(dw.value * live, dw.magnitude * live, dw.terms), dtype)
    if layer.bias is not None:
        assert layer.bias.grad is not None
        sums = product(np.ones((1, len(tokens))), upstream.numpy())
        assert_close(layer.bias.grad.numpy()[None], sums, dtype)
    assert_clean(layer)


def assert_clean(layer: MaskedLinear) -> None:
    """Weight and gradient are exactly 0 wherever there is no connection."""
    assert not layer.weight[~layer.mask].any(), "a weight without a connection"
    if layer.weight.grad is not None:
        assert not layer.weight.grad[~layer.mask].any(), "a gradient without a connection"


@pytest.mark.parametrize("leading", [(7,), (), (2, 3), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_every_gradient(
    leading: tuple[int, ...], bias: bool, sparsity: float, dtype: torch.dtype
) -> None:
    layer = MaskedLinear(33, 20, bias, sparsity=sparsity, dtype=dtype)
    x = torch.randn(*leading, 33, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check(layer, x, y, dy)


def test_the_check_refuses_wrong_answers() -> None:
    layer = MaskedLinear(33, 20, sparsity=0.7)
    x = torch.randn(7, 33, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    check(layer, x, y, dy)
    for tensor in (x.grad, layer.weight.grad, layer.bias.grad):
        right = tensor.clone()
        tensor.view(-1)[3] += 1e-3
        with pytest.raises(AssertionError):
            check(layer, x, y, dy)
        tensor.copy_(right)
    with pytest.raises(AssertionError):
        check(layer, x, y + 1e-3, dy)
    dead = (~layer.mask).nonzero()[0].tolist()
    for tensor, message in ((layer.weight.data, "weight"), (layer.weight.grad, "gradient")):
        tensor[tuple(dead)] = 1e-30
        with pytest.raises(AssertionError, match=f"a {message} without a connection"):
            assert_clean(layer)
        tensor[tuple(dead)] = 0


def test_what_is_not_a_number_stays_where_it_is() -> None:
    layer = MaskedLinear(6, 4, sparsity=0.5)
    x, upstream = torch.randn(3, 6), torch.randn(3, 4)
    x[1, 2], upstream[2, 3] = torch.inf, torch.nan
    layer(x).backward(upstream)
    assert not layer.weight.grad[~layer.mask].any()
    assert layer.weight.grad[3, layer.mask[3]].isnan().all()
    with torch.no_grad():
        layer.weight[~layer.mask] = torch.nan
    assert torch.equal(layer(x[:1]), layer.to_dense()(x[:1]))


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_without_a_connection_stay_zero(name: str) -> None:
    layer = MaskedLinear(12, 9, sparsity=0.8)
    optimizer = OPTIMIZERS[name](layer.parameters())
    before = layer.weight.detach().clone()
    for _ in range(10):
        optimizer.zero_grad()
        layer(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()
        assert_clean(layer)
        for entry in optimizer.state[layer.weight].values():
            if entry.ndim:
                assert not entry[~layer.mask].any()
                assert entry[layer.mask].any()
    assert (layer.weight[layer.mask] != before[layer.mask]).all()


def assert_twins(masked: MaskedLinear, sparse: SparseLinear) -> None:
    assert torch.equal(masked.positions(), sparse.positions())
    assert torch.equal(masked.per_connection(masked.weight), sparse.weight_values.flatten())
    assert (masked.nnz, masked.shape, masked.sparsity) == (sparse.nnz, sparse.shape, sparse.sparsity)
    assert masked.bias is None if sparse.bias is None else torch.equal(masked.bias, sparse.bias)
    assert_clean(masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_draws_what_the_sparse_layer_draws(bias: bool, dtype: torch.dtype) -> None:
    layers: list[Any] = []
    for kind in (MaskedLinear, SparseLinear):
        torch.manual_seed(3)
        layers.append([kind(30, 20, bias, sparsity=0.8, dtype=dtype) for _ in range(2)])
        layers[-1][1].reset_parameters()
    for masked, sparse in zip(*layers, strict=True):
        assert_twins(masked, sparse)
        assert masked.weight.dtype == dtype
    with pytest.raises(AssertionError):
        assert_twins(layers[0][0], layers[1][1])


def test_drawing_anew_keeps_the_parameter_and_the_count() -> None:
    layer = MaskedLinear(30, 20, sparsity=0.83)
    parameter, nnz, mask = layer.weight, layer.nnz, layer.mask.clone()
    layer.reset_parameters()
    assert layer.weight is parameter
    assert layer.nnz == nnz == round(0.17 * 600)
    assert not torch.equal(layer.mask, mask)


def test_there_and_back() -> None:
    sparse = SparseLinear(30, 20, sparsity=0.8).eval()
    sparse.weight_values.requires_grad_(False)
    generator = torch.get_rng_state()
    masked = MaskedLinear.from_sparse(sparse)
    back = masked.to_sparse()
    assert torch.equal(torch.get_rng_state(), generator)
    assert_twins(masked, sparse)
    assert_twins(masked, back)
    for layer in (masked, back):
        assert (layer.training, layer.stored.requires_grad, layer.bias.requires_grad) == (False, False, True)
    assert torch.equal(masked.to_dense().weight, masked.weight)
    with torch.no_grad():
        masked.weight[masked.mask] = 0
    assert torch.equal(masked.to_sparse().positions(), sparse.positions())
    with pytest.raises(TypeError, match="layer must be a SparseLinear, got Linear"):
        MaskedLinear.from_sparse(nn.Linear(3, 2))


def test_the_largest_of_a_dense_layer() -> None:
    linear = nn.Linear(30, 20)
    assert_twins(MaskedLinear.from_dense(linear, 0.8), SparseLinear.from_dense(linear, 0.8))


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_a_model_and_its_twin_from_the_same_rules(init: Any) -> None:
    twins = []
    dense = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10, bias=False))
    for kind in ("masked", "sparse"):
        torch.manual_seed(1)
        twins.append(sparsify(copy.deepcopy(dense), {"0": 0.8, "2": 0.5}, init=init, layer=kind))
    for masked, sparse in zip(*twins, strict=True):
        if not isinstance(masked, nn.ReLU):
            assert_twins(masked, sparse)
    with pytest.raises(ValueError, match=r"layer must be one of .*, got 'dense'"):
        sparsify(dense, {"0": 0.8}, layer="dense")


@pytest.mark.parametrize(("n_drop", "n_grow"), [(0, 0), (10, 10), (10, 3), (3, 10), (60, 0), (0, 40)])
def test_rewritten_as_the_sparse_layer_is(n_drop: int, n_grow: int) -> None:
    sparse = SparseLinear(30, 20, sparsity=0.9)
    masked = MaskedLinear.from_sparse(sparse)
    parameter, x = masked.weight, torch.randn(4, 30)
    for layer in (sparse, masked):
        layer(x).square().sum().backward()
    masked.weight.grad[masked.mask] = (
        sparse.weight_values.grad.flatten()
    )  # equal bits, whatever the order of the sums
    drop = torch.randperm(60)[:n_drop]
    free = (~masked.mask).view(-1).nonzero().flatten()
    # Half of what is grown was just dropped, and comes back with what it had.
    grow = torch.cat((free[torch.randperm(len(free))], sparse.positions()[drop[: n_grow // 2]]))[
        -n_grow or 600 :
    ]
    moment = torch.where(masked.mask, torch.rand(20, 30), 0)
    moments = masked.per_connection(moment).view(-1, 1, 1), moment.clone()
    source = sparse.rewrite(drop, grow)
    assert torch.equal(masked.rewrite(drop, grow), source)
    assert masked.weight is parameter
    assert_twins(masked, sparse)
    assert torch.equal(masked.per_connection(masked.weight.grad), sparse.weight_values.grad.flatten())
    after = masked.moved(moments[1], source)
    assert after is moments[1]
    assert torch.equal(masked.per_connection(after), sparse.moved(moments[0], source).flatten())
    assert not after[~masked.mask].any()


def test_what_was_dropped_leaves_nothing_however_rotten() -> None:
    layer = MaskedLinear(6, 4, sparsity=0.5)
    layer(torch.randn(3, 6)).sum().backward()
    at = divmod(int(layer.positions()[2]), 6)
    with torch.no_grad():
        layer.weight[at], layer.weight.grad[at] = torch.nan, torch.inf
    layer.rewrite(torch.tensor([2]), torch.tensor([], dtype=torch.int64))
    assert_clean(layer)
    layer.rewrite(torch.tensor([], dtype=torch.int64), torch.tensor([at[0] * 6 + at[1]]))
    assert (layer.weight[at], layer.weight.grad[at]) == (0, 0)


@pytest.mark.parametrize(
    ("drop", "grow", "message"),
    [
        ([12], [], "drop must hold live slots, got 12"),
        ([1, 1], [], "drop must name each slot once"),
        ([], [24], r"grow must hold positions of 0\.\.23, got 24"),
        ([], "live", "grow must hold distinct positions that are free or dropped"),
    ],
)
def test_a_wrong_request_is_refused_and_changes_nothing(drop: list[int], grow: Any, message: str) -> None:
    layer = MaskedLinear(6, 4, sparsity=0.5)
    grown = layer.positions()[:1] if grow == "live" else torch.tensor(grow, dtype=torch.int64)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer.rewrite(torch.tensor(drop, dtype=torch.int64), grown)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_another_topology_is_loaded_with_the_state() -> None:
    source, target = MaskedLinear(6, 4, sparsity=0.5), MaskedLinear(6, 4, sparsity=0.75)
    assert set(source.state_dict()) == {"weight", "mask", "bias"}
    target(torch.randn(3, 6)).sum().backward()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.mask, source.mask)
    assert torch.equal(target.weight, source.weight)
    assert_clean(target)
    state = {**source.state_dict(), "weight": torch.full((4, 6), torch.nan)}
    target.load_state_dict(state)
    assert_clean(target)
    assert state["weight"].isnan().all()


def test_its_hook_sees_what_that_of_the_sparse_layer_sees() -> None:
    layer, seen = MaskedLinear(6, 4), Seen()
    layer.gradient_hook = seen
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        layer(x)
    loss = (layer(x) * 2).sum() + layer(x + 1).sum()
    assert not seen.operands
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(seen.operands) == 4
    pairs = {float(dy[0, 0]): (seen_x, dy) for seen_x, dy in seen.operands}
    assert torch.equal(pairs[2.0][0], x.reshape(6, 6))
    assert torch.equal(pairs[1.0][0], x.reshape(6, 6) + 1)
    assert not any(tensor.requires_grad for pair in pairs.values() for tensor in pair)
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert len(seen.operands) == 4


def test_a_hook_changes_no_result() -> None:
    plain = MaskedLinear(6, 4, sparsity=0.5)
    watched = copy.deepcopy(plain)
    watched.gradient_hook = Seen()
    inputs = [torch.ones(3, 6, requires_grad=True) for _ in range(2)]
    for layer, x in zip((plain, watched), inputs, strict=True):
        layer(x).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(plain.weight.grad, watched.weight.grad)
    assert torch.equal(plain.bias.grad, watched.bias.grad)


# Torch's own, when it compiles the part after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_it_compiles_with_a_hook_or_without() -> None:
    torch.compiler.reset()
    layer, seen = MaskedLinear(6, 4), Seen()
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6), layer), backend="aot_eager")
    x = torch.randn(3, 6)
    expected = compiled._orig_mod(x)
    for hook in (None, seen, None):
        layer.gradient_hook = hook
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
    assert len(seen.operands) == 1


def test_copies_have_no_hook() -> None:
    layer = MaskedLinear(6, 4)
    layer.gradient_hook = Seen()
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.gradient_hook is None
        assert torch.equal(twin.mask, layer.mask)
    assert layer.gradient_hook is not None


def test_it_is_measured_as_what_it_is() -> None:
    layer = MaskedLinear(20, 10, sparsity=0.75)
    assert measure_sparsity(nn.Sequential(layer, nn.Linear(10, 20, bias=False))) == pytest.approx(150 / 400)
    report = memory_report(layer)
    assert (report.parameters_live, report.parameters_dense) == (210, 210)
    assert (report.weight_bytes, report.dense_weight_bytes) == (210 * 4 + 200, 210 * 4)
    assert repr(layer) == "MaskedLinear(in_features=20, out_features=10, bias=True, sparsity=0.75, nnz=50)"


def test_misuse_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"input must have shape \(..., in_features=6\), got \(3, 5\)"):
        MaskedLinear(6, 4)(torch.randn(3, 5))
    with pytest.raises(NotImplementedError, match="its mask, which must hold data, got the device meta"):
        MaskedLinear(6, 4, device="meta")
    with pytest.raises(ValueError, match="sparsity must be a finite number"):
        MaskedLinear(6, 4, sparsity=2.0)
