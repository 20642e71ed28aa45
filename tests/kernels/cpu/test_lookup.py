"""Rows that are looked up, and the sums of their gradients, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparselab.kernels import PaddedCSR
from sparselab.kernels.cpu.csr import lookup


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_workers", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_rows_and_sums(dtype: Any, n_workers: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "worker_count", lambda work: n_workers)
    rng = np.random.default_rng(0)
    W = PaddedCSR.random((7, 11), 0.6, 0)
    values = W.values.astype(dtype)
    dense = W.to_dense().astype(dtype)
    tokens, grad = rng.integers(0, 7, n), rng.standard_normal((n, 11)).astype(dtype)
    for each in (tokens, grad, values):
        each.flags.writeable = False
    out = np.full(n * 11, np.nan, dtype)
    lookup.look_up(tokens, W.indptr, W.indices, values, 11, out)
    np.testing.assert_array_equal(out.reshape(n, 11), dense[tokens])
    sums = np.zeros(len(values), dtype)
    lookup.add_up(tokens, W.indptr, W.indices, grad.reshape(-1), 11, sums)
    expected = np.zeros((7, 11))
    np.add.at(expected, tokens, grad.astype(np.float64))
    np.testing.assert_allclose(sums, expected.reshape(-1)[W.positions()], rtol=1e-5, atol=1e-5)


def test_read_only_operands_compile_nothing() -> None:
    W, tokens = PaddedCSR.random((7, 11), 0.6, 0), np.arange(7)
    out = np.empty(77, np.float32)
    counts = []
    for flag in (True, False):
        values, numbers = W.values.copy(), tokens.copy()
        values.flags.writeable = numbers.flags.writeable = flag
        lookup.look_up(numbers, W.indptr, W.indices, values, 11, out)
        counts.append(len(lookup._look_up.signatures))
    assert counts[0] == counts[1]
