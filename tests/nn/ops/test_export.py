"""W as other libraries have it, and back."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselab import BlockSparseLinear, MaskedLinear, SparseLinear
from sparselab.kernels import PaddedCSR
from tests.kernels.process import run_python
from tests.strategies import matrices

LAYERS = (SparseLinear, MaskedLinear)


@given(matrix=matrices(), layer=st.sampled_from(LAYERS), zero=st.booleans())
def test_exports_and_round_trips(matrix: PaddedCSR, layer: type[SparseLinear], zero: bool) -> None:
    source = layer.from_pattern(matrix.to_scipy(), bias=False, dtype=torch.float64)
    if zero and source.nnz:
        with torch.no_grad():
            source.put(source.stored, torch.tensor([0]), torch.zeros(1, dtype=torch.float64))
    W = source.to_dense().weight.detach()
    array, tensor = source.to_scipy(), source.to_sparse_csr()
    assert isinstance(array, sp.csr_array)
    assert array.has_canonical_format
    assert tensor.layout == torch.sparse_csr
    assert not tensor.requires_grad
    for shape, nnz, dense in (
        (array.shape, array.nnz, array.toarray()),
        (tuple(tensor.shape), tensor.values().numel(), tensor.to_dense().numpy()),
    ):
        assert shape == source.shape
        assert nnz == source.nnz == matrix.nnz
        assert np.array_equal(dense, W.numpy())
    for pattern in (array, tensor):
        again = layer.from_pattern(pattern, bias=False, dtype=torch.float64)
        assert torch.equal(again.positions(), source.positions())
        assert torch.equal(again.stored, source.stored)


def test_a_layer_of_one_weight_that_is_a_block() -> None:
    layer = BlockSparseLinear(1, 1, bias=False, sparsity=0.0, block_shape=(2, 2))
    assert layer.to_scipy().toarray().tolist() == layer.to_dense().weight.tolist()


@pytest.mark.parametrize("columns", [65_536, 65_537, 200_000])
def test_wide_layers(columns: int) -> None:
    layer = SparseLinear(columns, 3, sparsity=1 - 100 / (3 * columns))
    for pattern in (layer.to_scipy(), layer.to_sparse_csr()):
        again = SparseLinear.from_pattern(pattern)
        assert torch.equal(again.positions(), layer.positions())
        assert torch.equal(again.weight_values, layer.weight_values)


@pytest.mark.parametrize("layer", LAYERS)
def test_exports_are_copies(layer: type[SparseLinear]) -> None:
    source = layer(30, 20)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    array, tensor = source.to_scipy(), source.to_sparse_csr()
    for part in (array.data, array.indices, array.indptr):
        part[:] = 0
    for part in (tensor.values(), tensor.col_indices(), tensor.crow_indices()):
        part.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("layer", LAYERS)
def test_what_the_forward_pass_leaves_out_is_zero(layer: type[SparseLinear]) -> None:
    source = layer(30, 20)
    source.forward_mask = torch.rand_like(source.stored) < 0.5
    W = source.to_dense().weight.detach()
    assert torch.equal(source.to_sparse_csr().to_dense(), W)
    assert np.array_equal(source.to_scipy().toarray(), W.numpy())
    assert 0 < W.count_nonzero() < source.nnz == source.to_scipy().nnz


def test_bfloat16_stays_in_torch_and_is_widened_in_scipy() -> None:
    layer = SparseLinear(30, 20).to(torch.bfloat16)
    assert torch.equal(layer.to_sparse_csr().values(), layer.weight_values.flatten())
    assert layer.to_scipy().dtype == np.float32
    assert np.array_equal(layer.to_scipy().data, layer.weight_values.detach().float().flatten().numpy())


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        SparseLinear(30, 20).to_scipy()


def test_patterns_work_without_scipy_and_the_beta_of_torch_is_not_announced() -> None:
    output = run_python(
        "-W", "error", "-c",
        "import sys; sys.modules['scipy'] = None\n"
        "import torch; from sparselab import SparseLinear\n"
        "tensor = SparseLinear(30, 20).to_sparse_csr()\n"
        "print(SparseLinear.from_pattern(tensor).nnz, SparseLinear.from_pattern(torch.eye(3) > 0).nnz)",
    )  # fmt: skip
    assert output.split() == ["60", "3"]
