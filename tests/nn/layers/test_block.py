"""BlockSparseLinear: outputs and gradients beside a dense oracle, and its way through torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparselab
from sparselab import BlockSparseLinear, MaskedLinear, SparseLinear, densify, measure_sparsity, memory_report
from sparselab.kernels import BlockCSR
from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.base import as_matrix, is_sparse
from sparselab.nn.ops import linear as functional
from sparselab.nn.ops.cpu import bsr, variants
from sparselab.nn.ops.cpu.programs import blocks as programs
from sparselab.nn.ops.cpu.variants import BLOCKS, FORWARD, possible
from tests.nn.blocks import SIZES, array, every_block, outside
from tests.nn.storage.test_rewrite import Seen
from tests.oracle import Exact, assert_close, product


@every_block
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 20, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_are_those_of_dense(
    block_shape: tuple[int, int], sparsity: float, tokens: int, dtype: torch.dtype
) -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=sparsity, block_shape=block_shape, dtype=dtype)
    x = torch.randn(tokens, SIZES[0], dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, SIZES[1], dtype=dtype)
    y = layer(x)
    y.backward(dy)
    assert layer.bias is not None
    W = array(layer.to_dense().weight)
    kind = np.dtype(str(dtype).removeprefix("torch."))
    assert_close(array(y).T, product(W, array(x).T, bias=array(layer.bias)), kind)
    assert_close(array(x.grad).T, product(W.T, array(dy).T), kind)  # type: ignore[arg-type]
    full = product(array(dy).T, array(x))
    value, magnitude = (
        array(layer.cut(torch.from_numpy(part))[layer.positions()]) for part in (full.value, full.magnitude)
    )
    assert_close(array(layer.weight_values.grad), Exact(value, magnitude, np.array(tokens)), kind)  # type: ignore[arg-type]
    wide = array(dy).astype(np.float64)
    sums = Exact(wide.sum(0), np.abs(wide).sum(0), np.array(tokens))
    assert_close(array(layer.bias.grad), sums, kind)  # type: ignore[arg-type]
    assert not layer.weight_values.grad[outside(layer)].any()  # type: ignore[index]


@pytest.mark.parametrize("block_shape", [(4, 1), (1, 8), (4, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_true(block_shape: tuple[int, int], bias: bool) -> None:
    layer = BlockSparseLinear(7, 9, bias, sparsity=0.5, block_shape=block_shape, dtype=torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    inside = (~outside(layer)).double()

    def run(x: Tensor, values: Tensor, *rest: Tensor) -> Any:
        parameters = {"weight_values": values * inside, **dict(zip(("bias",), rest, strict=False))}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_the_operators_satisfy_torch() -> None:
    layer = BlockSparseLinear(7, 9, sparsity=0.5, block_shape=(4, 4))
    x = torch.randn(3, 7, requires_grad=True)
    arguments = layer.topology_arguments()
    torch.library.opcheck(functional.linear_operator, (x, layer.weight_values, layer.bias, *arguments))
    dy, values = torch.randn(3, 9), layer.weight_values.detach()
    torch.library.opcheck(functional.linear_input_grad, (dy, values, *arguments))
    torch.library.opcheck(functional.linear_values_grad, (dy, x.detach(), *arguments, True))


def test_compiled_layers_follow_a_rewrite() -> None:
    layer = BlockSparseLinear(16, 12, sparsity=0.5, block_shape=(4, 4))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 16)
    for _ in range(2):
        y = compiled(x)
        torch.testing.assert_close(y, layer.to_dense()(x))
        y.sum().backward()
        free = next(p for p in range(12) if p not in layer.positions())
        layer.rewrite(torch.tensor([0]), torch.tensor([free]))


@every_block
def test_training_leaves_alone_what_lies_outside(block_shape: tuple[int, int]) -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.5, block_shape=block_shape)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(30, SIZES[0])
    x[3] = torch.inf
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).nan_to_num().square().mean().backward()
        optimizer.step()
    edge = outside(layer)
    state = optimizer.state[layer.weight_values]
    for entries in (layer.weight_values, layer.weight_values.grad, state["exp_avg"], state["exp_avg_sq"]):
        assert not entries[edge].any()


@every_block
def test_counts_are_those_of_blocks_and_densities_those_of_weights(block_shape: tuple[int, int]) -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.6, block_shape=block_shape)
    assert layer.grid == (-(-50 // block_shape[0]), -(-70 // block_shape[1]))
    assert layer.nnz == len(layer.positions()) == n_connections(layer.grid, 0.6)
    live = int(layer.cut(torch.ones(layer.shape))[layer.positions()].sum())
    assert layer.n_weights == live
    assert layer.density == pytest.approx(live / 3500)
    assert measure_sparsity(layer) == pytest.approx(1 - live / 3500, abs=1e-3)
    assert len(layer.to_sparse_csr().values()) == live
    assert as_matrix(layer).shape == layer.grid
    assert f"block_shape={block_shape}" in repr(layer)


def test_density_and_sparsity_are_two_ways_to_say_it() -> None:
    counts = [
        BlockSparseLinear(64, 64, **how, block_shape=(8, 8)).nnz
        for how in ({}, {"sparsity": 0.9}, {"density": 0.1}, {"density": 1}, {"sparsity": 1.0})
    ]
    assert counts == [6, 6, 6, 64, 0]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"density": 0.1, "sparsity": 0.9},
            ValueError,
            "only one of sparsity or density must be given, got 0.9 and 0.1",
        ),
        ({"density": 1.5}, ValueError, "density must be a finite number"),
        ({"density": "half"}, TypeError, "density must be a number"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be a finite number"),
        ({"block_shape": (0, 4)}, ValueError, "block_shape must be two integers of at least 1"),
        ({"block_shape": 4}, TypeError, "block_shape must be two integers, got 4"),
        ({"dtype": torch.complex64}, TypeError, "dtype must be torch.float32"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockSparseLinear(8, 8, **settings)


@every_block
def test_weights_are_drawn_by_the_inputs_that_an_output_has(block_shape: tuple[int, int]) -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.5, block_shape=block_shape)
    live = layer.cut(torch.arange(3500.0).view(50, 70) + 1)[layer.positions()]
    fan_in = torch.bincount(((live[live > 0] - 1) // 70).long(), minlength=50)
    rows = ((live - 1).clamp(min=0) // 70).long()
    bound = fan_in.clamp(min=1)[rows].rsqrt()
    assert (layer.weight_values.abs() <= bound).all()
    assert not layer.weight_values[live == 0].any()
    assert layer.weight_values.detach().abs().div(bound)[live > 0].mean() == pytest.approx(0.5, abs=0.06)
    assert layer.bias is not None
    assert (layer.bias.abs() <= fan_in.clamp(min=1).rsqrt()).all()


def test_the_meta_device() -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.5, block_shape=(8, 8), device="meta")
    assert layer(torch.empty(3, 70, device="meta")).shape == (3, 50)
    assert layer.sparsity == pytest.approx(0.5, abs=0.1)
    sparselab.materialize(layer)
    assert layer(torch.randn(3, 70)).isfinite().all()


def test_precisions_and_modes() -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.5, block_shape=(4, 4))
    x = torch.randn(2, 9, 70)
    y = layer(x)
    assert y.shape == (2, 9, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    half = copy.deepcopy(layer).bfloat16()
    z = half(x.bfloat16().requires_grad_())
    z.float().square().mean().backward()
    assert z.dtype == half.weight_values.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    torch.testing.assert_close(z.float(), y, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.to_scipy().toarray(), array(half.to_dense().weight.float()))
    doubled = torch.func.functional_call(
        layer, {"weight_values": 2 * layer.weight_values, "bias": 2 * layer.bias}, (x,)
    )
    torch.testing.assert_close(doubled, 2 * y)
    for wrong in (x[..., :-1], x.double()):
        with pytest.raises(RuntimeError, match="input must have"):
            layer(wrong)


@pytest.mark.parametrize("block_shape", [(4, 4), (1, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.2])
def test_dense_products_of_chunks_give_the_same(
    block_shape: tuple[int, int], sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bsr, "_CHUNK_BYTES", 4 * 70 * 10)
    layer = BlockSparseLinear(*SIZES, sparsity=sparsity, block_shape=block_shape)
    x, dy = torch.randn(130, 70), torch.randn(130, 50)
    results = []
    for bound in (2.0, 0.5):
        for operation in variants.BLOCK_DENSE_FROM:
            monkeypatch.setitem(variants.BLOCK_DENSE_FROM, operation, bound)
            assert (layer.variant(130, operation).name == "dense blocks") is (bound < 1)
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(dy)
        assert layer.bias is not None
        results.append([y, inputs.grad, layer.weight_values.grad, layer.bias.grad])
    torch.testing.assert_close(*results)


@every_block
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 64, 65])
def test_every_variant_gives_the_numbers_of_dense(
    block_shape: tuple[int, int], bias: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for module, name, kernel in (
        (bsr, "multiply_skinny_blocks", "skinny"),
        (bsr, "multiply", "tiles"),
        (programs, "add_skinny_blocks", "skinny"),  # when a program is made
        (programs.direct, "add_direct", "tiles"),
        (programs.spmm, "add_multiply", "tiles"),
    ):
        monkeypatch.setattr(module, name, noting(taken, kernel, getattr(module, name)))
    layer = BlockSparseLinear(*SIZES, bias, sparsity=0.6, block_shape=block_shape)
    x = torch.randn(SIZES[0], tokens).T
    exact = product(array(layer.to_dense().weight), array(x).T, bias=array(layer.bias) if bias else None)
    ways = layer.ways(x)
    assert tuple(ways) == possible(tokens, BLOCKS) == (FORWARD if tokens <= 64 else FORWARD[1:])
    for way in ways.values():
        assert_close(array(way()).T, exact, np.float32)
    assert (*taken, "dense blocks") == tuple(ways)
    taken.clear()
    layer(x)
    assert taken == [layer.variant(tokens).name] == ["skinny" if tokens <= 64 else "tiles"]


def noting(taken: list[str], name: str, run: Callable[..., None]) -> Callable[..., None]:
    def noted(*arguments: Any) -> None:
        taken.append(name)
        run(*arguments)

    return noted


def test_a_hook_sees_the_operands_of_the_gradient() -> None:
    layer, seen = BlockSparseLinear(*SIZES, block_shape=(4, 4)), Seen()
    layer.gradient_hook = seen
    layer(torch.randn(3, 70)).sum().backward()
    assert [(x.shape, dy.shape) for x, dy in seen.operands] == [((3, 70), (3, 50))]
    assert is_sparse(layer)


def test_what_is_masked_out_is_zero_in_the_output_and_gets_gradients() -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.5, block_shape=(4, 4))
    x = torch.randn(3, 70)
    layer(x).sum().backward()
    full = layer.weight_values.grad
    layer.zero_grad()
    layer.forward_mask = torch.zeros_like(layer.weight_values, dtype=torch.bool)
    assert layer.bias is not None
    assert torch.equal(layer(x), layer.bias.expand(3, 50))
    layer(x).sum().backward()
    assert torch.equal(layer.weight_values.grad, full)  # type: ignore[arg-type]


def test_plans_are_counted_frozen_and_let_go() -> None:
    layer = BlockSparseLinear(64, 64, sparsity=0.5, block_shape=(4, 4))
    assert layer.plan_bytes() == 0
    layer(torch.randn(20, 64, requires_grad=True)).sum().backward()
    trained = layer.plan_bytes()
    assert memory_report(layer).plan_bytes == trained > 0
    assert 0 < layer.freeze().plan_bytes() < trained
    assert not layer.weight_values.requires_grad


def test_a_model_becomes_dense_again() -> None:
    model = nn.Sequential(BlockSparseLinear(16, 8, sparsity=0.5, block_shape=(4, 4)), nn.ReLU())
    x = torch.randn(3, 16)
    expected = model(x)
    assert type(densify(model)[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_the_masked_twin_knows_no_blocks() -> None:
    with pytest.raises(TypeError, match="layer must be a SparseLinear, got BlockSparseLinear"):
        MaskedLinear.from_sparse(BlockSparseLinear(8, 8, block_shape=(4, 4)))
    assert isinstance(MaskedLinear.from_sparse(SparseLinear(8, 8)), MaskedLinear)


def test_the_layout_of_the_kernels_is_that_of_the_layer() -> None:
    layer = BlockSparseLinear(*SIZES, sparsity=0.5, block_shape=(3, 5))
    W = BlockCSR(
        layer.shape, layer.block_shape, array(layer.indptr), array(layer.indices), array(layer.weight_values)
    )
    np.testing.assert_array_equal(W.to_dense(), array(layer.to_dense().weight))
