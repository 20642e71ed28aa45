"""`sparselab.warmup` in a process of its own: nothing is left to compile, and no random number is used up."""

from __future__ import annotations

import pytest

from tests.kernels.process import run_python

PROGRAM = """
import sys
import numpy as np, torch
import sparselab
from sparselab import RigL, SET, SparseLinear
from sparselab.kernels.cpu.runtime import jit as _jit

wanted = []
load = _jit._KernelCache.load_overload
def record(cache, *arguments):
    wanted.append(cache._py_func.__name__)
    return load(cache, *arguments)
_jit._KernelCache.load_overload = record

torch.manual_seed(1), np.random.seed(1)
before = torch.get_rng_state(), np.random.get_state()[1].copy()
if "warm" in sys.argv:
    assert sparselab.warmup() > 0
assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()

wanted.clear()
for algorithm in (SET(update_freq=1), RigL(update_freq=1)):
    layer = SparseLinear(384, 512, sparsity=0.5)
    layer.apply(algorithm)
    for tokens in (1, 8, 16, 48, 128):
        layer(torch.randn(tokens, 384, requires_grad=True)).square().sum().backward()
        algorithm.step()
print(*wanted)
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_nothing_is_left_to_load_or_compile(threads: str) -> None:
    assert run_python("-c", PROGRAM, "warm", OMP_NUM_THREADS=threads).split() == []


def test_what_is_loaded_or_compiled_would_be_seen() -> None:
    assert "_multiply_tiles" in run_python("-c", PROGRAM).split()
