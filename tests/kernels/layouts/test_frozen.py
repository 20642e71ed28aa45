"""Nothing a user can do to a matrix's arrays reaches the kernels, but for writing values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparselab.kernels import BlockCSR, PaddedCSR, rewrite, sddmm_dw, spmm, spmm_t
from sparselab.kernels.arrays import for_kernels, frozen
from sparselab.kernels.layouts.topology import SparseMatrix
from tests.kernels.contract import assert_same_bits
from tests.kernels.toy import Pairs, PairTopology

MATRICES: dict[str, SparseMatrix] = {
    "csr": PaddedCSR.random((20, 30), 0.5, 0, padding=0.5),
    "bsr": BlockCSR.random((20, 30), 0.5, (3, 4), 0),
    "pairs": Pairs.of(PairTopology((20, 30), np.arange(0, 600, 7)), np.ones(86)),
}
ARRAYS = {"csr": ("indptr", "row_nnz", "indices"), "bsr": ("indptr", "indices"), "pairs": ("row", "column")}
WAYS: dict[str, Callable[[SparseMatrix], SparseMatrix]] = {
    "new": lambda W: W,
    "copied": lambda W: W.copy(),
    "shallow": copy.copy,
    "deep": copy.deepcopy,
    "unpickled": lambda W: pickle.loads(pickle.dumps(W)),
    "rewritten": lambda W: rewrite(W, [0], []).matrix,  # type: ignore[arg-type]
    "with values": lambda W: W.with_values(2 * W.values),
}
every_kind = pytest.mark.parametrize("kind", sorted(MATRICES))
every_way = pytest.mark.parametrize("way", sorted(WAYS))


def arrays(W: SparseMatrix, kind: str) -> list[np.ndarray[Any, Any]]:
    holder: Any = W.topology if kind == "pairs" else W
    return [getattr(holder, name) for name in ARRAYS[kind]]


@every_way
@every_kind
def test_the_arrays_of_a_topology_cannot_be_written_to(kind: str, way: str) -> None:
    W = WAYS[way](MATRICES[kind])
    for array in arrays(W, kind):
        for view in (array, np.asarray(array), array[:], array.view(np.uint8), array.reshape(-1)):
            with pytest.raises(ValueError, match="read-only"):
                view[0] = 1
            with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                view.flags.writeable = True
        with pytest.raises(ValueError, match=r"cannot resize|resize only works|own its data|read-only"):
            array.resize(array.size + 1)


@every_way
@every_kind
def test_attributes_can_neither_be_set_nor_deleted(kind: str, way: str) -> None:
    W = WAYS[way](MATRICES[kind])
    for name in ("topology", "values", "shape", "indices", "anything"):
        with pytest.raises(AttributeError):
            setattr(W, name, None)
        with pytest.raises(AttributeError):
            delattr(W, name)
    for name in ("shape", "nnz", *vars(W.topology)):
        if name == "_plans":
            continue
        with pytest.raises(AttributeError):
            setattr(W.topology, name, None)
        with pytest.raises(AttributeError):
            delattr(W.topology, name)


@every_kind
def test_a_topology_is_its_own_copy_and_is_pickled_without_its_plans(kind: str) -> None:
    W = MATRICES[kind]
    topology = W.topology
    assert copy.copy(topology) is copy.deepcopy(topology) is topology
    spmm(W, np.ones((30, 70), W.dtype))
    again = pickle.loads(pickle.dumps(W))
    assert not [key for key in again.topology.plans() if key != "outside"]
    assert type(again) is type(W)
    assert_same_bits(again.positions(), W.positions())
    assert_same_bits(again.values, W.values)
    X = np.random.default_rng(0).standard_normal((30, 70)).astype(W.dtype)
    assert_same_bits(spmm(again, X), spmm(W, X))


def test_arrays_that_were_given_may_be_changed_afterwards() -> None:
    W = PaddedCSR.random((20, 30), 0.5, 0, padding=0.5)
    indptr, row_nnz, indices = (np.array(part) for part in (W.indptr, W.row_nnz, W.indices))
    mine = PaddedCSR(W.shape, indptr, row_nnz, indices, W.values)
    indptr[3], row_nnz[3], indices[3] = 10**9, 10**9, 65_535
    assert_same_bits(mine.positions(), W.positions())
    blocks = BlockCSR.random((20, 30), 0.5, (3, 4), 0)
    indptr, indices = np.array(blocks.indptr), np.array(blocks.indices)
    copied = BlockCSR(blocks.shape, (3, 4), indptr, indices, blocks.values)
    indptr[1], indices[0] = 10**9, 65_535
    assert_same_bits(copied.positions(), blocks.positions())


@pytest.mark.parametrize("kind", ["csr", "bsr"])
def test_edits_of_one_matrix_do_not_spread(kind: str) -> None:
    W = MATRICES[kind].copy()
    before = W.copy()
    new, source = rewrite(W, [0], [])  # type: ignore[arg-type]
    new.values[...], source[...] = 7, 7
    other = W.with_values(2 * W.values)
    other.values[...] = 9
    assert_same_bits(W.values, before.values)
    assert_same_bits(W.positions(), before.positions())
    slots = W.topology.rewrite(np.array([0]), np.empty(0, np.int64))[1]
    slots[...] = -5
    for part in (W.positions(), new.positions()):
        part[...] = -1
    assert_same_bits(W.positions(), before.positions())


def test_indptr_is_shared_between_rewrites_without_a_chain_of_views() -> None:
    W = PaddedCSR.random((20, 30), 0.5, 0, padding=0.5)
    topology = W.topology
    for _ in range(20):
        topology, _ = topology.rewrite(np.empty(0, np.int64), np.empty(0, np.int64))
    assert topology.indptr is W.indptr


def test_for_kernels_copies_nothing_that_is_contiguous_and_marks_nothing_read_only() -> None:
    array = np.arange(12.0)
    assert for_kernels(array) is array
    read_only = array.view()
    read_only.flags.writeable = False
    for each in (read_only, frozen(array), frozen(array).reshape(3, 4)):
        alias = for_kernels(each)
        assert alias.flags.writeable
        assert np.shares_memory(alias, array)
        assert (alias.shape, alias.dtype) == (each.shape, each.dtype)
    assert not np.shares_memory(for_kernels(array[::2]), array)
    assert for_kernels(frozen(np.empty((0, 3)))).flags.writeable
    alias = for_kernels(frozen(np.arange(5)))
    assert alias.tolist() == [0, 1, 2, 3, 4], "it keeps the memory alive"


def test_frozen_arrays_are_made_of_any_array() -> None:
    for array in (np.arange(6).reshape(2, 3), np.arange(6)[::2], np.empty(0), np.ones((2, 2), np.bool_)):
        kept = frozen(array)
        np.testing.assert_array_equal(kept, array)
        assert frozen(kept) is kept or not array.size
        assert not kept.flags.writeable


@pytest.mark.parametrize("kind", ["csr", "bsr"])
def test_writing_values_is_seen_by_the_next_product(kind: str) -> None:
    W = MATRICES[kind].copy()
    rng = np.random.default_rng(0)
    X, DY = (rng.standard_normal((n, 70)).astype(W.dtype) for n in (30, 20))
    first = spmm(W, X), spmm_t(W, DY), sddmm_dw(W, DY, X)
    W.values[...] *= 2
    for before, after, factor in zip(
        first, (spmm(W, X), spmm_t(W, DY), sddmm_dw(W, DY, X)), (2, 2, 1), strict=True
    ):
        assert_same_bits(after, factor * before)
