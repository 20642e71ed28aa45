"""Sparse and nested inputs of linear layers, against the same input made dense."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedLinear,
    RigL,
    SparseLinear,
    TiedLinear,
    TransposedLinear,
)
from sparselab.nn.ops.cpu import sparse_input
from sparselab.nn.ops.inputs import product, sparse

F64 = torch.float64
KINDS: dict[str, Any] = {
    "sparse": lambda: SparseLinear(12, 7, sparsity=0.6, dtype=F64),
    "without bias": lambda: SparseLinear(12, 7, False, sparsity=0.6, dtype=F64),
    "fan_in": lambda: FanInLinear(12, 7, fan_in=3, dtype=F64),
    "block": lambda: BlockSparseLinear(12, 7, sparsity=0.5, block_shape=(2, 4), dtype=F64),
}
#: And layers that share a weight, or simulate sparsity.
ALL_KINDS: dict[str, Any] = {
    **KINDS,
    "tied": lambda: TiedLinear(SparseLinear(12, 7, sparsity=0.6, dtype=F64)),
    "transposed": lambda: TransposedLinear(SparseLinear(7, 12, sparsity=0.6, dtype=F64)),
    "tied to blocks": lambda: TiedLinear(
        BlockSparseLinear(12, 7, sparsity=0.5, block_shape=(2, 4), dtype=F64)
    ),
    "masked": lambda: MaskedLinear(12, 7, sparsity=0.6, dtype=F64),
    "tied to masked": lambda: TiedLinear(MaskedLinear(12, 7, sparsity=0.6, dtype=F64)),
    "transposed masked": lambda: TransposedLinear(MaskedLinear(7, 12, sparsity=0.6, dtype=F64)),
}


def trained(layer: Any) -> list[Any]:
    """The Parameters that an output depends on; those of a shared layer are not among the module's own."""
    shared = [layer.layer.stored] if isinstance(layer, TiedLinear) else []
    return [*layer.parameters(), *shared]


LAYOUTS: dict[str, Any] = {
    "coo": lambda x: x.to_sparse(),
    "doubled coo": lambda x: torch.sparse_coo_tensor(
        torch.cat([x.to_sparse().indices()] * 2, 1),
        torch.cat([x.to_sparse().values() / 2] * 2),
        x.shape,
        check_invariants=True,
    ),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse [CB]S. tensor support:UserWarning")


#: Of `torch.library.opcheck`: the operators have no gradients of their own.
CHECKS = ("test_schema", "test_faketensor")

#: By stored entries, and by dense chunks.
WAYS = pytest.mark.parametrize("dense_from", [2.0, 0.0], ids=["entries", "chunks"])


def bag(rows: int) -> Tensor:
    return torch.randn(rows, 12, dtype=F64) * (torch.rand(rows, 12) < 0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [0, 1, 9])
@WAYS
def test_a_sparse_matrix_is_multiplied_as_the_dense_one(
    kind: str, layout: str, rows: int, dense_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_input, "DENSE_FROM", dense_from)
    monkeypatch.setattr(sparse, "_CHUNK_BYTES", 4 * 12 * 8)  # several chunks, the last one shorter
    layer, dense = KINDS[kind](), bag(rows)
    upstream = torch.randn(rows, 7, dtype=F64)
    gradients = []
    for x in (dense, LAYOUTS[layout](dense)):
        layer.zero_grad()
        y = layer(x)
        torch.testing.assert_close(y, layer(dense))
        y.backward(upstream)
        gradients.append([each.grad for each in layer.parameters()])
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(layer(LAYOUTS[layout](dense)), layer(dense))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_growth_sees_what_a_dense_layer_has(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_CHUNK_BYTES", 4 * 12 * 8)
    layer, x, seen = KINDS["sparse"](), bag(9), []
    layer.gradient_hook = seen.append
    layer(LAYOUTS[layout](x)).square().sum().backward()
    dense = layer.to_dense()
    y = dense(x)
    y.retain_grad()
    y.square().sum().backward()
    (operands,), G = seen, dense.weight.grad
    block = torch.full((4, 12), torch.nan, dtype=F64)
    operands.add_rows(2, block, beta=0)
    torch.testing.assert_close(block, G[2:6])
    operands.add_rows(2, block, beta=0.5)
    torch.testing.assert_close(block, 1.5 * G[2:6])
    positions = np.array([0, 5, 17, 40, 83])
    np.testing.assert_allclose(operands.sampled(positions), G.flatten()[positions])
    signs = np.array([1.0, -1, 1, 1, -1, -1, 1, -1, 1])
    for given, rule in ((None, torch.abs), (signs, lambda t: t * torch.from_numpy(signs)[:, None])):
        found = operands.totals(given)
        np.testing.assert_allclose(found[0], rule(y.grad).sum(0))
        np.testing.assert_allclose(found[1], rule(x).sum(0))
    assert operands.is_finite()
    assert operands.n_tokens == 9
    kept = operands.with_input(operands.tensors[0].clone())
    operands.tensors[0].zero_()
    np.testing.assert_allclose(kept.to(torch.float32).sampled(positions), G.flatten()[positions], rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_masked_layer_grows_as_its_twin(layout: str) -> None:
    sparse_layer = SparseLinear(12, 7, sparsity=0.6, dtype=F64)
    x, before, found = bag(9), sparse_layer.positions(), []
    for layer in (sparse_layer, MaskedLinear.from_sparse(sparse_layer)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        algorithm = RigL(drop_fraction=0.5, update_freq=1)
        algorithm.attach(layer, optimizer)
        layer(LAYOUTS[layout](x)).sin().sum().backward()
        optimizer.step()
        assert not algorithm.last_update[0].skipped
        found.append((layer.positions(), layer(x)))
    assert not torch.equal(found[0][0], before)
    torch.testing.assert_close(*found)


def test_what_a_sparse_input_has_not_is_refused() -> None:
    layer, x = KINDS["sparse"](), bag(4).to_sparse()
    with pytest.raises(RuntimeError, match="input must not require a gradient if it is sparse"):
        layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match="in_features=12"):
        layer(torch.eye(5, dtype=F64).to_sparse())
    with pytest.raises(RuntimeError, match="dtype of the layer's values"):
        layer(bag(4).float().to_sparse())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_jagged_tensor_stays_jagged(kind: str) -> None:
    layer = ALL_KINDS[kind]()
    parts = [torch.randn(n, 12, dtype=F64) for n in (3, 1, 4)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = layer(x)
    assert y.is_nested
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))
    y.values().square().sum().backward()
    together = torch.cat(parts).requires_grad_()
    gradients = [each.grad.clone() for each in trained(layer)]
    for each in trained(layer):
        each.grad = None
    layer(together).square().sum().backward()
    torch.testing.assert_close(gradients, [each.grad for each in trained(layer)])
    torch.testing.assert_close(x.grad.values(), together.grad)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_takes_sparse_matrices(kind: str, layout: str) -> None:
    layer, x = ALL_KINDS[kind](), bag(5)
    gradients = []
    for each in (x, LAYOUTS[layout](x)):
        y = layer(each)
        torch.testing.assert_close(y, layer(x))
        y.square().sum().backward()
        gradients.append([parameter.grad for parameter in trained(layer)])
        for parameter in trained(layer):
            parameter.grad = None
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_sparse_vector_is_multiplied_as_the_dense_one(kind: str) -> None:
    layer, x = ALL_KINDS[kind](), bag(1)[0]
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))


@pytest.mark.parametrize(
    "kind", [kind for kind in ALL_KINDS if "transposed" not in kind and "masked" not in kind]
)
def test_sparse_tensors_that_are_no_matrices_of_numbers_are_refused(kind: str) -> None:
    layer = ALL_KINDS[kind]()
    for x in (bag(6).reshape(2, 3, 12).to_sparse(), bag(6).to_sparse(1)):
        with pytest.raises(RuntimeError, match="input must be a vector or a matrix of numbers"):
            layer(x)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_another_nested_layout_is_refused(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        x = torch.nested.nested_tensor([torch.ones(2, 12, dtype=F64)], layout=torch.strided)
        with pytest.raises(RuntimeError, match="input must be jagged if it is nested"):
            ALL_KINDS[kind]()(x)


BROKEN: dict[str, Any] = {
    "a column too far": lambda s, c, e: (s, c.clone().index_fill_(0, torch.tensor([1]), 12), e),
    "a negative column": lambda s, c, e: (s, c.clone().index_fill_(0, torch.tensor([1]), -1), e),
    "rows that end too late": lambda s, c, e: (s + (s == s[-1]), c, e),
    "rows that start too late": lambda s, c, e: (s + (s == 0), c, e),
    "rows that descend": lambda s, c, e: (torch.stack([s[0], s[-1], *s[2:]]), c, e),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_indices_that_make_no_matrix_are_refused(kind: str, how: str) -> None:
    x = bag(9).to_sparse_csr()
    broken = BROKEN[how](x.crow_indices(), x.col_indices(), x.values())
    with pytest.raises(RuntimeError, match="input must have"):
        KINDS[kind]()(torch.sparse_csr_tensor(*broken, x.shape, check_invariants=False))


#: Which of the two index tensors of a compressed matrix, where, and what is written there.
HOSTILE: dict[str, tuple[int, int, int]] = {
    "offsets that lead out of memory": (0, -1, 1 << 40),
    "offsets that descend": (0, 1, 1 << 20),
    "a negative offset": (0, 1, -5),
    "offsets that begin late": (0, 0, 1),
    "an index too far": (1, -1, 12),
    "a negative index": (1, 0, -1),
}
COMPRESSED: dict[str, Any] = {
    "csr": (torch.sparse_csr_tensor, lambda x: x.to_sparse_csr()),
    "csc": (torch.sparse_csc_tensor, lambda x: x.to_sparse_csc()),
    "bsr": (torch.sparse_bsr_tensor, lambda x: x.to_sparse_bsr((1, 1))),
    "bsc": (torch.sparse_bsc_tensor, lambda x: x.to_sparse_bsc((1, 1))),
}


def numbers_of(x: Any) -> list[Tensor]:
    by_rows = x.layout in (torch.sparse_csr, torch.sparse_bsr)
    found = (x.crow_indices(), x.col_indices()) if by_rows else (x.ccol_indices(), x.row_indices())
    return [each.clone() for each in found]


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("layout", COMPRESSED)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_numbers_are_looked_at_before_torch_writes_by_them(kind: str, layout: str, how: str) -> None:
    make, convert = COMPRESSED[layout]
    x = convert(torch.ones(12, 12, dtype=F64))
    numbers, (part, at, number) = numbers_of(x), HOSTILE[how]
    numbers[part][at] = number
    broken = make(*numbers, x.values(), x.shape, check_invariants=False)
    with pytest.raises(RuntimeError, match="input must have"):
        ALL_KINDS[kind]()(broken)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_offsets_of_another_number_of_rows_are_refused(kind: str) -> None:
    parts = torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1, dtype=F64)
    with pytest.raises(RuntimeError, match="input must have 6 offsets"):
        ALL_KINDS[kind]()(torch.sparse_csr_tensor(*parts, (5, 12), check_invariants=False))


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("at", [(0, -1), (0, 9), (1, -1), (1, 12)])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_places_outside_of_a_coo_matrix_are_refused(kind: str, at: tuple[int, int], coalesced: bool) -> None:
    dimension, number = at
    indices = torch.tensor([[0, 1, 8], [2, 3, 4]])
    indices[dimension, 1] = number
    x = torch.sparse_coo_tensor(
        indices, torch.ones(3, dtype=F64), (9, 12), is_coalesced=coalesced, check_invariants=False
    )
    with pytest.raises(RuntimeError, match=r"input must have indices of 0\.\."):
        ALL_KINDS[kind]()(x)


@pytest.mark.parametrize("indices", [[[4, 2, 0], [1, 2, 3]], [[2, 2, 4], [5, 5, 1]]], ids=["order", "twice"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_is_said_to_be_coalesced_and_is_not_is_refused(kind: str, indices: Any) -> None:
    x = torch.sparse_coo_tensor(
        torch.tensor(indices), torch.ones(3, dtype=F64), (5, 12), is_coalesced=True, check_invariants=False
    )
    with pytest.raises(RuntimeError, match="if it is said to be coalesced"):
        ALL_KINDS[kind]()(x)


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_compressed_matrices_store_twice_is_summed(kind: str, layout: str) -> None:
    layer = ALL_KINDS[kind]()
    offsets = torch.tensor([0, 3, 4] + [4] * 10)
    parts = offsets, torch.tensor([5, 2, 5, 7]), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    x = COMPRESSED[layout][0](*parts, (12, 12), check_invariants=False)
    dense = torch.zeros(12, 12, dtype=F64)
    dense[0, 5], dense[0, 2], dense[1, 7] = 4.0, 2.0, 4.0
    torch.testing.assert_close(layer(x), layer(dense if layout == "csr" else dense.T))


def test_indices_that_change_before_the_backward_pass_are_refused() -> None:
    x, layer = bag(9).to_sparse_csr(), KINDS["sparse"]()
    y = layer(x)
    x.col_indices().fill_(1 << 40)
    with pytest.raises(RuntimeError, match=r"input must have columns of 0\.\.11|modified by an inplace"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@WAYS
def test_narrow_dtypes(dtype: Any, dense_from: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_input, "DENSE_FROM", dense_from)
    layer, x = KINDS["sparse"]().to(dtype), bag(9).to(dtype)
    y = layer(x.to_sparse_csr())
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    found = layer.weight_values.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(found, layer.weight_values.grad)
    wide = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wide(x.float().to_sparse_csr()), wide(x.float()))


@WAYS
def test_operations_are_counted(dense_from: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_input, "DENSE_FROM", dense_from)
    layer, x = SparseLinear(12, 7, sparsity=0.5), bag(9).float().to_sparse_csr()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * x._nnz() * layer.nnz // 12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_are_whole(kind: str) -> None:
    layer, rows = KINDS[kind](), sparse.token_rows(bag(9).to_sparse_csr())
    words, values = layer.topology_arguments(), layer.weight_values.detach()
    torch.library.opcheck(
        product.sparse_input, (*rows.tensors, values, layer.bias, *words), test_utils=CHECKS
    )
    grad = torch.randn(9, 7, dtype=F64)
    torch.library.opcheck(product.sparse_input_values_grad, (grad, *rows.tensors, *words), test_utils=CHECKS)


SPOILT: dict[str, Any] = {
    "short": lambda t: t[:-1],
    "float32": lambda t: t.float(),
    "complex": lambda t: t.to(torch.complex64),
    "one more dimension": lambda t: t.unsqueeze(0),
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", ["starts", "columns", "entries", "values", "bias", "grad"])
def test_an_operand_that_does_not_fit_is_refused(name: str, how: str) -> None:
    layer, rows = KINDS["sparse"](), sparse.token_rows(bag(9).to_sparse_csr())
    tokens = dict(zip(("starts", "columns", "entries"), rows.tensors, strict=True))
    weights = {"values": layer.weight_values.detach(), "bias": layer.bias.detach()}
    grad = {"grad": torch.randn(9, 7, dtype=F64)}
    words = layer.topology_arguments()
    for operator, given in (
        (product.sparse_input, {**tokens, **weights}), (product.sparse_input_values_grad, {**grad, **tokens}),
    ):  # fmt: skip
        operator(*given.values(), *words)
        if name in given:
            with pytest.raises((RuntimeError, TypeError)):
                operator(*{**given, name: SPOILT[how](given[name])}.values(), *words)
