"""No kernel reads or writes outside what it was given, nor outside its work memory and its plans."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from sparselab.kernels import PaddedCSR, sddmm_dw, spmm, spmm_t
from tests.kernels.process import ROOT, run_python
from tests.shared import usual

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")
each_side = pytest.mark.parametrize("side", ["end", "front"])


@on_linux
@each_side
@pytest.mark.parametrize("how", ["half", usual(False, "all")])
def test_products_stay_within_their_memory(side: str, how: str) -> None:
    assert run_python("-m", "tests.kernels.guarded", side, how).strip() == "no step over an edge"


@on_linux
@each_side
def test_the_guard_catches_one_byte(side: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kernels.guarded", side, "overrun"], capture_output=True, cwd=ROOT
    )
    assert ended.returncode < 0, ended


@on_linux
@pytest.mark.parametrize("stride", [(1 << 31) + 8, (1 << 32) + 16])
def test_strides_beyond_31_bits(stride: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("huge") / "matrix"
    try:
        whole = np.memmap(path, np.float32, "w+", shape=(3, stride))  # a file of holes
    except OSError as error:
        pytest.skip(f"no sparse file of {12 * stride} bytes: {error}")
    try:
        rng = np.random.default_rng(0)
        whole[:, :5] = rng.standard_normal((3, 5))
        near = np.array(whole[:, :5])
        W, tall = PaddedCSR.random((4, 3), 0.3, 0), PaddedCSR.random((3, 4), 0.3, 0)
        for X, plain in ((whole[:, :5], near), (whole[:, :5].T[:3], near.T[:3])):
            assert max(X.strides) == 4 * stride
            np.testing.assert_array_equal(spmm(W, X), spmm(W, plain.copy()))
            Y = rng.standard_normal((4, X.shape[1])).astype(np.float32)
            np.testing.assert_array_equal(sddmm_dw(W, Y, X), sddmm_dw(W, Y, plain.copy()))
            np.testing.assert_array_equal(sddmm_dw(tall, X, Y), sddmm_dw(tall, plain.copy(), Y))
        Y = rng.standard_normal((4, 5)).astype(np.float32)
        assert spmm_t(W, Y, whole[:, :5]).strides[0] == 4 * stride
        np.testing.assert_array_equal(whole[:, :5], spmm_t(W, Y))
    finally:
        del whole
        path.unlink()
