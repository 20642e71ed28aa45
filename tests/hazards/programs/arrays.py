"""NumPy arrays: plans kept over a rewrite, edited arrays, columns that wrap, outputs over inputs."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from sparselab.kernels import BlockCSR, PaddedCSR, rewrite, sddmm_dw, spmm, spmm_t
from tests.hazards.cases import demand, hazard
from tests.hazards.programs.names import plan, rewritten


def matrix(rows: int = 40, columns: int = 30, padding: float = 0.0) -> PaddedCSR:
    return PaddedCSR.random((rows, columns), 0.7, 0, padding=padding, dtype=np.float64)


def tokens(rows: int, n: int = 100, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, n))


def swapped(W, rng):
    """W with as many connections dropped as grown in each row."""
    drop, grow = [], []
    for i in range(W.shape[0]):
        begin, n = int(W.indptr[i]), int(W.row_nnz[i])
        free = np.setdiff1d(np.arange(W.shape[1]), W.indices[begin : begin + n])
        k = min(n, len(free)) // 2
        drop += [begin + j for j in rng.permutation(n)[:k]]
        grow += [i * W.shape[1] + int(j) for j in rng.permutation(free)[:k]]
    return np.sort(drop), np.sort(grow)


def agree(got, expected, what: str) -> None:
    demand(
        np.allclose(got, expected, equal_nan=False), f"{what} is off by {np.abs(got - expected).max():.2g}"
    )


@hazard("plans", "spmm with the plan of before, rows swapped their columns")
def stale_spmm() -> None:
    W = matrix(400, 3000)
    kept = plan("spmm", W)
    W = rewritten(W, *swapped(W, np.random.default_rng(0)))
    X = tokens(3000)
    agree(spmm(W, X, **kept), W.to_dense() @ X, "Y")


@hazard("plans", "sddmm_dw with the plan of before")
def stale_sddmm() -> None:
    W = matrix(400, 3000)
    kept = plan("sddmm_dw", W)
    W = rewritten(W, *swapped(W, np.random.default_rng(0)))
    DY, X = tokens(400), tokens(3000)
    dW = sddmm_dw(W, DY, X, **kept)
    agree(W.with_values(dW).to_dense(), (DY @ X.T) * (W.with_values(np.ones_like(dW)).to_dense() != 0), "dW")


@hazard("plans", "spmm_t with the plan of before, between padded rows")
def stale_spmm_t() -> None:
    W = matrix(padding=0.5)
    kept = plan("spmm_t", W)
    old = W
    drop = np.array([W.indptr[0]])
    free = np.setdiff1d(np.arange(30), W.indices[W.indptr[1] : W.indptr[1] + W.row_nnz[1]])
    W = rewritten(W, drop, np.array([30 + free[0]]))
    W.values[np.setdiff1d(np.arange(W.capacity), W.live_slots())] = np.nan
    demand(W.nnz == old.nnz, "the rewrite")
    DY = tokens(40)
    agree(spmm_t(W, DY, **kept), W.to_dense().T @ DY, "DX")


@hazard("plans", "blocks with the plan of before")
def stale_blocks() -> None:
    W = BlockCSR.random((40, 32), 0.7, (4, 4), 0, dtype=np.float64)
    kept = plan("spmm", W)
    drop = np.arange(5)
    grow = np.setdiff1d(np.arange(80), W.positions())[-5:]
    W = rewritten(W, drop, grow)
    W = W.with_values(np.random.default_rng(0).standard_normal(W.values.shape))
    X = tokens(32)
    agree(spmm(W, X, **kept), W.to_dense() @ X, "Y")


@hazard("plans", "a plan whose rows were moved by 10**7")
def forged_plan() -> None:
    W = matrix()
    kept = plan("spmm", W)
    if kept:
        kept["plan"] = kept["plan"]._replace(row=kept["plan"].row + 10**7)
    X = tokens(30)
    agree(spmm(W, X, **kept), W.to_dense() @ X, "Y")


def edited(name: str, at: int, number: int) -> None:
    W = PaddedCSR.random((40, 30), 0.7, 0, dtype=np.float64)
    X = tokens(30)
    expected = W.to_dense() @ X
    getattr(W, name)[at] = number
    agree(spmm(W, X), expected, f"Y after W.{name}[{at}] = {number}")


@hazard("arrays", "W.indices[3] = 2**30")
def edited_indices() -> None:
    W = PaddedCSR.random((40, 70_000), 0.999, 0, dtype=np.float64)
    X = tokens(70_000, 20)
    expected = W.to_dense() @ X
    W.indices[3] = 2**30
    agree(spmm(W, X), expected, "Y")


@hazard("arrays", "W.indices[3] = 65535 of 30 columns")
def edited_narrow() -> None:
    edited("indices", 3, 65535)


@hazard("arrays", "W.row_nnz[3] = 10**8")
def edited_row_nnz() -> None:
    edited("row_nnz", 3, 10**8)


@hazard("arrays", "W.indptr[3] = 10**8")
def edited_indptr() -> None:
    edited("indptr", 3, 10**8)


@hazard("arrays", "an edit of what with_values returned reaches its source")
def shared() -> None:
    W = matrix()
    V = W.with_values(W.values.copy())
    before = W.to_dense()
    V.indices[:2] = V.indices[:2][::-1].copy()
    agree(W.to_dense(), before, "the source")


@hazard("columns", "column 66,000 grown where columns are uint16")
def wide_growth() -> None:
    indptr, row_nnz = np.array([0, 2]), np.array([1])
    W = PaddedCSR((1, 70_000), indptr, row_nnz, np.array([5, 0], np.uint16), np.ones(2))
    W = rewritten(W, np.empty(0, np.int64), np.array([66_000]))
    demand(W.positions().tolist() == [5, 66_000], f"positions {W.positions().tolist()}, not [5, 66000]")


@hazard("columns", "a SciPy matrix with column 65,586 of 100")
def scipy_out_of_range() -> None:
    csr = scipy.sparse.csr_array((np.ones(1), np.array([0], np.int32), np.array([0, 1])), shape=(1, 100))
    csr.indices[0] = 65_586
    W = PaddedCSR.from_scipy(csr)
    demand(False, f"accepted as column {W.indices[0]}")


@hazard("columns", "a SciPy matrix with column -1")
def scipy_negative() -> None:
    csr = scipy.sparse.csr_array((np.ones(1), np.array([0], np.int32), np.array([0, 1])), shape=(1, 70_000))
    csr.indices[0] = -1
    W = PaddedCSR.from_scipy(csr)
    demand(False, f"accepted as column {W.indices[0]}")


@hazard("columns", "from_positions((2, 3), [4, 0])")
def unsorted_positions() -> None:
    home = PaddedCSR if hasattr(PaddedCSR, "from_positions") else type(matrix().topology)
    W = home.from_positions((2, 3), np.array([4, 0]))
    demand(sorted(W.positions().tolist()) == [0, 4], f"positions {W.positions().tolist()}, not [0, 4]")


@hazard("columns", "16 x 2**60 positions")
def too_many_positions() -> None:
    indptr = np.zeros(17, np.int64)
    W = PaddedCSR((16, 2**60), indptr, np.zeros(16, np.int64), np.empty(0, np.int64), np.empty(0))
    W, _ = rewrite(W, np.empty(0, np.int64), np.array([7 * 2**60 + 5]))
    demand(W.nnz == 1 and len(W.indices) == 1 and W.row_nnz[7] == 1, f"{W.nnz} connections")


@hazard("aliasing", "out over the memory of indptr")
def out_over_indptr() -> None:
    indptr = np.arange(0, 404, 4)
    rng = np.random.default_rng(0)
    columns = np.concatenate([np.sort(rng.permutation(30)[:4]) for _ in range(100)]).astype(np.uint16)
    W = PaddedCSR((100, 30), indptr, np.diff(indptr), columns, rng.standard_normal(400))
    X = tokens(30, 1)
    expected = W.to_dense() @ X
    agree(spmm(W, X, out=indptr[:100].view(np.float64)[:, None]), expected, "Y")
    agree(spmm(W, X), expected, "Y of the next call")


@hazard("aliasing", "out over the memory of a plan")
def out_over_plan() -> None:
    W = matrix(4096, 30)
    kept = plan("spmm", W)
    X = tokens(30, 100)
    expected = W.to_dense() @ X
    if kept:
        raw = kept["plan"].start
        n = raw.nbytes // 8 // 4096
        if n:
            spmm(W, X[:, :n], out=raw.view(np.float64)[: 4096 * n].reshape(4096, n), **kept)
    agree(spmm(W, X, **kept), expected, "Y of the next call")


@hazard("aliasing", "NaN where blocks hang over the edge, by with_values")
def nan_outside() -> None:
    W = BlockCSR.random((6, 7), 0.0, (4, 4), 0, dtype=np.float64)
    values = W.values.copy()
    slots = np.flatnonzero(W.positions() % 2 == 1)
    values[slots, :, 3] = np.nan
    X = tokens(7)
    expected = W.to_dense() @ X
    agree(spmm(W.with_values(values), X), expected, "Y")
