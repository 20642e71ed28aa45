"""Topologies that the user brings: every form of a matrix makes the layer that its dense twin describes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given

from sparselab import SET, MaskedLinear, SparseLinear
from sparselab.kernels import PaddedCSR
from tests.strategies import build, matrices

LAYERS = (SparseLinear, MaskedLinear)
BETA = "ignore:Sparse CSR tensor support is in beta"


def csr(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tensor.to_sparse_csr()


#: Forms of a boolean array that are a topology only.
TOPOLOGIES: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "array": lambda live: live,
    "array in Fortran order": np.asfortranarray,
    "tensor": torch.from_numpy,
    "SciPy CSR": sp.csr_array,
    "SciPy COO matrix": sp.coo_matrix,
    "torch CSR": lambda live: csr(torch.from_numpy(live)),
}
#: Forms of a float array that have weights; what is 0 has no connection.
WEIGHTS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "SciPy CSR": sp.csr_array,
    "SciPy CSR matrix": sp.csr_matrix,
    "SciPy CSC": sp.csc_array,
    "SciPy COO": sp.coo_array,
    "SciPy LIL": sp.lil_array,
    "SciPy DOK": sp.dok_array,
    "SciPy DIA": sp.dia_array,
    "SciPy BSR": lambda W: sp.bsr_array(W, blocksize=(1, 1)),
    "torch CSR": lambda W: csr(torch.from_numpy(W)),
}


def draw(kind: str = "unequal") -> np.ndarray[Any, Any]:
    return build((9, 33), kind, np.random.default_rng(0), dtype=np.float64).to_dense()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", TOPOLOGIES)
def test_a_boolean_pattern_gets_fresh_weights(form: str, layer: type[SparseLinear]) -> None:
    live = draw() != 0
    new = layer.from_pattern(TOPOLOGIES[form](live))
    assert new.shape == live.shape
    assert torch.equal(new.positions(), torch.from_numpy(np.flatnonzero(live)))
    weights = new.to_dense().weight.detach().numpy()
    bound = np.maximum(live.sum(1), 1) ** -0.5
    assert np.all(np.abs(weights) <= bound[:, None])
    assert np.unique(weights[live]).size > live.sum() // 2
    assert new.bias is not None
    assert np.all(np.abs(new.bias.detach().numpy()) <= bound)
    assert new.bias.detach().unique().numel() > 1


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", WEIGHTS)
def test_a_floating_pattern_has_the_weights(form: str, layer: type[SparseLinear]) -> None:
    W = draw()
    new = layer.from_pattern(WEIGHTS[form](W), bias=False, dtype=torch.float64)
    assert new.bias is None
    assert np.array_equal(new.to_dense().weight.detach().numpy(), W)
    assert torch.equal(new.positions(), torch.from_numpy(np.flatnonzero(W)))
    x = torch.randn(5, 33, dtype=torch.float64)
    torch.testing.assert_close(new(x), x @ torch.from_numpy(W).T)


@given(matrix=matrices())
def test_any_matrix_becomes_a_layer(matrix: PaddedCSR) -> None:
    layer = SparseLinear.from_pattern(matrix.to_scipy(), dtype=torch.float64)
    assert np.array_equal(layer.positions().numpy(), matrix.positions())
    assert np.array_equal(layer.to_dense().weight.detach().numpy(), matrix.to_dense())


@pytest.mark.filterwarnings(BETA)
@pytest.mark.parametrize("form", ["SciPy", "torch"])
def test_stored_zeros_are_connections_and_duplicates_are_summed_without_touching_the_pattern(
    form: str,
) -> None:
    data, indices, indptr = np.array([1.0, 2.0, 0.0, 4.0]), np.array([3, 0, 1, 3]), np.array([0, 0, 4])
    pattern = sp.csr_array((data, indices, indptr), shape=(2, 5))
    if form == "torch":
        parts = (torch.from_numpy(part) for part in (indptr, indices, data))
        pattern = torch.sparse_csr_tensor(*parts, (2, 5), check_invariants=False)
    layer = SparseLinear.from_pattern(pattern)
    assert layer.positions().tolist() == [5, 6, 8]
    assert layer.weight_values.flatten().tolist() == [2, 0, 5]
    with torch.no_grad():
        layer.weight_values.zero_()
    assert data.tolist() == [1, 2, 0, 4]
    assert indices.tolist() == [3, 0, 1, 3]


def test_room_after_the_last_row_is_not_read() -> None:
    pattern = sp.csr_array((np.ones(2), np.array([0, 2]), np.array([0, 1, 2])), shape=(2, 3))
    pattern.data, pattern.indices = np.append(pattern.data, np.nan), np.append(pattern.indices, 99)
    assert SparseLinear.from_pattern(pattern).weight_values.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("columns", [65_536, 65_537, 200_000])
def test_wide_patterns(columns: int) -> None:
    rows, at = [0, 0, 2], [0, columns - 1, columns // 2]
    pattern = sp.coo_array((np.array([1.0, 2.0, 3.0]), (rows, at)), shape=(3, columns))
    layer = SparseLinear.from_pattern(pattern)
    assert layer.indices.dtype == (torch.uint16 if columns <= 1 << 16 else torch.int32)
    assert layer.indices.tolist() == at
    assert layer.indptr.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("given_dtype", "asked", "expected"),
    [
        (np.float64, None, torch.float32),
        (np.float32, torch.float64, torch.float64),
        (np.longdouble, None, torch.float32),
        (np.float32, torch.bfloat16, torch.bfloat16),
        (np.bool_, torch.float64, torch.float64),
    ],
)
def test_dtypes(given_dtype: type, asked: torch.dtype | None, expected: torch.dtype) -> None:
    layer = SparseLinear.from_pattern(sp.csr_array(np.eye(3, dtype=given_dtype)), dtype=asked)
    assert layer.weight_values.dtype == expected
    assert layer.bias is not None
    assert layer.bias.dtype == expected


BROKEN = sp.csr_array(np.eye(3, 4))
BROKEN.indices = np.array([0, 1, 4])
FALLING = sp.csr_array(np.eye(3, 4))
FALLING.indptr = np.array([0, 2, 1, 3])
WRONG = {
    "a list": ([[True]], TypeError, "pattern must be a SciPy sparse matrix, .* got list"),
    "floats": (np.eye(2), TypeError, "a dense pattern must be boolean, got float64; pass pattern != 0"),
    "a float tensor": (torch.eye(2), TypeError, "a dense pattern must be boolean, got torch.float32"),
    "COO tensor": (torch.eye(2).to_sparse(), TypeError, "got Tensor of layout torch.sparse_coo"),
    "integers": (
        sp.csr_array(np.eye(2, dtype=int)),
        TypeError,
        "must have boolean entries, or floating .* got int64",
    ),
    "complex": (csr(torch.eye(2).to(torch.complex64)), TypeError, "got torch.complex64"),
    "one dimension": (np.ones(3, bool), ValueError, r"shape \(out_features, in_features\), got \(3,\)"),
    "SciPy's one dimension": (sp.coo_array(np.ones(3)), ValueError, r"got \(3,\)"),
    "three dimensions": (csr(torch.ones(2, 2, 2)), ValueError, r"got \(2, 2, 2\)"),
    "column out of range": (BROKEN, ValueError, r"columns of 0\.\.3, got 0\.\.4"),
    "falling row pointers": (FALLING, ValueError, "row pointers from 0 that never decrease"),
    "shape": (np.ones((4, 3), bool), ValueError, r"shape of the layer, \(3, 4\), got \(4, 3\)"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_patterns_are_named_and_change_nothing(what: str, layer: type[SparseLinear]) -> None:
    pattern, error, message = WRONG[what]
    if what != "shape":
        with pytest.raises(error, match=message):
            layer.from_pattern(pattern)
    old = layer(4, 3, sparsity=0.5)
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    with pytest.raises(error, match=message):
        old.set_topology(pattern)
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())


def test_wrong_dtypes_and_devices_are_named() -> None:
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32"):
        SparseLinear.from_pattern(np.eye(2, dtype=bool), dtype=torch.int32)
    with pytest.raises(ValueError, match="one on the device meta"):
        SparseLinear(2, 2, device="meta").set_topology(np.eye(2, dtype=bool))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("nnz", [60, 100])
def test_a_layer_in_a_model_changes_its_topology(nnz: int, layer: type[SparseLinear]) -> None:
    old = layer(30, 20, sparsity=0.9)
    parameter, bias = old.stored, old.bias.detach().clone()
    x = torch.randn(4, 30)
    old(x).sum().backward()
    old.forward_mask = torch.zeros_like(old.stored, dtype=torch.bool)
    live = np.zeros((20, 30), bool)
    live.flat[np.random.default_rng(0).choice(600, nnz, replace=False)] = True
    old.set_topology(live)
    assert old.stored is parameter
    assert old.stored.grad is None
    assert old.forward_mask is None
    assert torch.equal(old.bias, bias)
    assert np.array_equal(old.positions().numpy(), np.flatnonzero(live))
    y = old(x)
    assert y.abs().max() > 0.1
    torch.testing.assert_close(y, old.to_dense()(x))
    y.sum().backward()
    assert old.stored.grad is not None


def test_both_layers_draw_the_same() -> None:
    live = draw() != 0
    states = []
    for layer in LAYERS:
        torch.manual_seed(3)
        states.append(layer.from_pattern(live).to_dense().state_dict())
    assert torch.equal(states[0]["weight"], states[1]["weight"])
    assert torch.equal(states[0]["bias"], states[1]["bias"])


def test_training_leaves_the_topology_and_an_algorithm_moves_it() -> None:
    layer = SparseLinear.from_pattern(draw() != 0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    positions, weights = layer.positions(), layer.weight_values.detach().clone()

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(4, 33)).square().sum().backward()
            optimizer.step()

    train()
    assert torch.equal(layer.positions(), positions)
    assert not torch.equal(layer.weight_values, weights)
    SET(drop_fraction=0.5, update_freq=1).attach(layer, optimizer)
    train()
    assert not torch.equal(layer.positions(), positions)
