"""Products with sparse tokens, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparselab.kernels import PaddedCSR
from sparselab.kernels.cpu.csr import sparse_input
from sparselab.kernels.cpu.csr.plan import transpose_plan
from sparselab.kernels.cpu.csr.sparse_input import SparseTokens, multiply_sparse, sample_sparse


def tokens(n: int, n_columns: int, dtype: Any, index: Any, rng: np.random.Generator) -> SparseTokens:
    """Random ones whose entries come in no order, some of them twice."""
    count = rng.integers(0, 5, n)
    starts = np.concatenate([[0], np.cumsum(count)]).astype(index)
    columns = rng.integers(0, n_columns, starts[-1]).astype(index)
    return SparseTokens(starts, columns, rng.standard_normal(len(columns)).astype(dtype))


def dense(x: SparseTokens, n_columns: int) -> Any:
    entries, shape = x.entries.astype(np.float64), (len(x.starts) - 1, n_columns)
    return scipy.sparse.csr_array((entries, x.columns, x.starts), shape).toarray()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("n_workers", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_products(dtype: Any, index: Any, n_workers: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_input, "worker_count", lambda work: n_workers)
    rng = np.random.default_rng(0)
    W = PaddedCSR.random((7, 11), 0.6, 0)
    x, grad, bias = tokens(n, 11, dtype, index, rng), rng.standard_normal((n, 7)), rng.standard_normal(7)
    values, grad, bias = (each.astype(dtype) for each in (W.values, grad, bias))
    plan = transpose_plan(W.topology)
    for each in (*x, grad, bias, values):
        each.flags.writeable = False
    out, found = np.full(n * 7, np.nan, dtype), np.full(len(values), np.nan, dtype)
    multiply_sparse(x, values, W.topology.rows, plan, bias, out)
    expected = dense(x, 11) @ W.to_dense().T + bias
    np.testing.assert_allclose(out.reshape(n, 7), expected, rtol=1e-5, atol=1e-5)
    sample_sparse(x, W.topology.rows, plan, grad.reshape(-1), found)
    expected = (grad.astype(np.float64).T @ dense(x, 11)).reshape(-1)[W.positions()]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_sums_do_not_depend_on_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    W = PaddedCSR.random((30, 50), 0.8, 0)
    x, plan = tokens(200, 50, np.float32, np.int64, rng), transpose_plan(W.topology)
    grad = rng.standard_normal(6000).astype(np.float32)
    results = []
    for n_workers in (1, 3):
        monkeypatch.setattr(sparse_input, "worker_count", lambda work, n=n_workers: n)
        y, dw = np.empty(6000, np.float32), np.empty(W.nnz, np.float32)
        multiply_sparse(x, W.values, W.topology.rows, plan, np.zeros(30, np.float32), y)
        sample_sparse(x, W.topology.rows, plan, grad, dw)
        results.append((y.tobytes(), dw.tobytes()))
    assert results[0] == results[1]


def test_read_only_operands_compile_nothing() -> None:
    rng = np.random.default_rng(0)
    W = PaddedCSR.random((7, 11), 0.6, 0)
    plan, counts = transpose_plan(W.topology), []
    for flag in (True, False):
        x, bias = tokens(5, 11, np.float32, np.int64, rng), np.zeros(7, np.float32)
        for each in (*x, bias):
            each.flags.writeable = flag
        multiply_sparse(x, W.values, W.topology.rows, plan, bias, np.empty(35, np.float32))
        sample_sparse(x, W.topology.rows, plan, np.ones(35, np.float32), np.empty(W.nnz, np.float32))
        counts.append([len(each.signatures) for each in (sparse_input._multiply, sparse_input._sample)])
    assert counts[0] == counts[1]
