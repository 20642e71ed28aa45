"""What a kernel is given does not compile it anew: read-only arrays, empty ones, any strides."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sparselab.kernels import BlockCSR, PaddedCSR, rewrite, sddmm_dw, spmm, spmm_t
from sparselab.kernels.arrays import frozen
from sparselab.kernels.layouts.topology import SparseMatrix
from sparselab.kernels.rewiring.positions import kept_positions, merge_candidates, skip_kept
from sparselab.kernels.rewiring.rewrite import move_entries
from sparselab.kernels.rewiring.rows import RowTopK, sample_rows, select_rows
from sparselab.kernels.rewiring.select import select
from sparselab.kernels.rewiring.topk import StreamedTopK
from sparselab.kernels.rewiring.two_hop import TwoHops

Array = np.ndarray[Any, Any]


def dispatchers() -> Iterator[tuple[str, Any]]:
    for name, module in sorted(sys.modules.items()):
        if name.startswith("sparselab.kernels."):
            for attribute, thing in vars(module).items():
                if hasattr(thing, "signatures") and getattr(thing, "__module__", None) == name:
                    yield f"{name}.{attribute}", thing


def signatures() -> dict[str, int]:
    return {name: len(dispatcher.signatures) for name, dispatcher in dispatchers()}


def writable(array: Array) -> Array:
    return array


def read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def products(W: SparseMatrix, mark: Any, tokens: int) -> None:
    rng = np.random.default_rng(0)
    X, DY = (mark(rng.standard_normal((n, tokens)).astype(W.dtype)) for n in W.shape[::-1])
    W = W.with_values(mark(W.values))
    W.topology.forget()
    spmm(W, X, bias=mark(np.ones(W.shape[0], W.dtype)))
    spmm_t(W, DY)
    sddmm_dw(W, DY, X)
    rewrite(W, mark(np.arange(min(W.nnz, 1))), mark(np.empty(0, np.int64)))


def rewiring(W: PaddedCSR, mark: Any) -> None:
    rng = np.random.default_rng(0)
    dense = mark(rng.standard_normal(W.shape).astype(np.float32))
    scores = mark(rng.random(W.capacity).astype(np.float32))
    slots, k = mark(np.arange(2)), mark(np.ones(W.shape[0], np.int64))
    free = mark(np.setdiff1d(np.arange(W.shape[0] * W.shape[1]), W.positions())[:3])
    kept_positions(W.topology, slots)
    merge_candidates(W.topology, slots, scores, free, mark(np.ones(3, np.float32)))
    skip_kept(np.arange(2), mark(W.positions()))
    select(scores, 3), select_rows(scores, mark(W.indptr.copy()), k)
    sample_rows(rng, mark(np.full(W.shape[0], 5)), k)
    move_entries(mark(np.arange(4, dtype=np.int32)), mark(np.array([0, -1, 3])))
    for top in (
        RowTopK(k, W.topology, np.float32),
        StreamedTopK(3, W.topology, W.shape[1], np.float32),
        StreamedTopK(3, mark(W.positions()), W.shape[1], np.float32),
    ):
        top.push(0, dense)
        top.result()
    hops = TwoHops(W.topology, W.transpose().topology)
    hops.follow(mark(np.arange(2)), mark(np.full(2, 0.5)))


@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("block_shape", [None, (4, 1), (1, 8), (4, 4)])
def test_read_only_operands_compile_nothing(block_shape: Any, tokens: int) -> None:
    shape = (24, 32)
    if block_shape is None:
        W: SparseMatrix = PaddedCSR.random(shape, 0.5, 0, padding=0.2)
        empty: SparseMatrix = PaddedCSR.from_dense(np.zeros(shape, np.float32))
    else:
        W = BlockCSR.random(shape, 0.5, block_shape, 0)
        empty = BlockCSR.from_dense(np.zeros(shape, np.float32), block_shape)
    products(W, writable, tokens)
    before = signatures()
    assert sum(before.values()) > 3
    for matrix in (W, empty):
        for mark in (read_only, frozen, writable):
            products(matrix, mark, tokens)
    assert signatures() == before


def test_read_only_arrays_compile_nothing_of_rewiring() -> None:
    W = PaddedCSR.random((24, 32), 0.5, 0)
    rewiring(W, writable)
    before = signatures()
    rewiring(W, read_only)
    rewiring(W, frozen)
    assert signatures() == before


def test_a_kernel_that_is_compiled_again_would_be_seen() -> None:
    from sparselab.kernels.cpu.partition import first_not_below

    first_not_below(np.arange(3), 2)
    before = signatures()
    first_not_below(read_only(np.arange(3)), 2)
    assert signatures() != before
