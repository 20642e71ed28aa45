"""Sparse and nested inputs of linear layers, against the same input made dense."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedLinear,
    RigL,
    SparseLinear,
    TiedLinear,
    TransposedLinear,
)
from sparselab.nn.ops.inputs import sparse

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
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS. tensor support:UserWarning")


def bag(rows: int) -> Tensor:
    return torch.randn(rows, 12, dtype=F64) * (torch.rand(rows, 12) < 0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_a_sparse_matrix_is_multiplied_as_the_dense_one(
    kind: str, layout: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_growth_sees_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_CHUNK_BYTES", 4 * 12 * 8)
    layer, x, seen = KINDS["sparse"](), bag(9), []
    layer.gradient_hook = seen.append
    layer(x.to_sparse()).square().sum().backward()
    dense = layer.to_dense()
    dense(x).square().sum().backward()
    total = torch.zeros(7, 12, dtype=F64)
    for operands in seen:
        operands.add_rows(0, total)
    assert len(seen) == 3
    torch.testing.assert_close(total, dense.weight.grad)


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
