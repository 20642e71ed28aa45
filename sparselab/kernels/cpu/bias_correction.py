"""Moves of Adam and its kin, corrected for bias by each connection's age instead of the optimizer's step.

Such an optimizer moves a weight by ``-lr n / d``, where ``n = A m + G g`` and ``d = B s + D``: m is the mean
of the gradients g, s their root mean square or their largest size, and A, G, B and D follow from the number
of steps that m and s have been summed over. The optimizer takes the number of its own steps for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.runtime.jit import jit
from sparselab.kernels.cpu.runtime.launch import launch, worker_count
from sparselab.kernels.cpu.runtime.team import spread

#: Work of an entry, in multiply-adds.
_WORK = 16

#: Slots that are looked at for young ones together.
_RUN = 512


class Factors(NamedTuple):
    """A, G, B and D, of one number of steps or by number; that of none means nothing."""

    A: Any
    G: Any
    B: Any
    D: Any


@jit
def _correct(  # type: ignore[no-untyped-def]
    worker, n_workers, ages, size, weights, m, s, g, A, G, B, D, now, lr, sign, decay, is_squared, warmup,
    all_young, counts,
):  # fmt: skip
    """Undo the optimizer's move of what is young, and do its own; then it is a step older.

    Young slots are listed run by run, since a branch for each slot would be foreseen wrongly too often.
    """
    if spread(worker, n_workers):
        return
    n, oldest, n_left, young = len(ages), len(A), 0, all_young[worker]
    one = weights.dtype.type(1)
    last = (worker + 1) * n // n_workers
    for run in range(worker * n // n_workers, last, len(young)):
        n_young = 0
        for k in range(run, min(run + len(young), last)):
            young[n_young] = k
            n_young += 1 if ages[k] != 0 else 0
        for place in range(n_young):
            k = young[place]
            age = np.int64(ages[k])
            share = one if age >= warmup else weights.dtype.type(age / warmup)
            for i in range(k * size, (k + 1) * size):
                scale = np.sqrt(s[i]) if is_squared else s[i]
                had, own = now[2] * scale + now[3], B[age] * scale + D[age]
                moved, move = now[0] * m[i], A[age] * m[i]
                if len(g) > 0:
                    # What decays by the gradient decays by the weight before the move.
                    gradient = sign * g[i]
                    before = (weights[i] + lr * (moved + now[1] * gradient) / had) / (
                        one - lr * decay * now[1] / had
                    )
                    gradient += decay * before
                    moved += now[1] * gradient
                    move += G[age] * gradient
                weights[i] += lr * (moved * own - share * move * had) / (had * own)
            age += 1
            ages[k] = age if age < oldest else 0
            n_left += 1 if age < oldest else 0
    counts[worker] = n_left


class Kept(NamedTuple):
    """What an optimizer keeps of weights, entry by entry, and their gradient, or an empty array."""

    m: Array
    s: Array
    g: Array


class Rate(NamedTuple):
    """The rate of a step.

    Parameters
    ----------
    lr : float
    sign : float
        -1 if the optimizer goes up the gradients.
    decay : float
        What it adds of the weights to gradients that it moves by.
    warmup : int
        Own steps over which moves grow from nothing to their whole.
    """

    lr: float
    sign: float = 1.0
    decay: float = 0.0
    warmup: int = 0


def correct_moves(
    ages: Array, weights: Array, kept: Kept, factors: Factors, now: Factors, rate: Rate, is_squared: bool
) -> int:
    """Correct the move that weights have just made, and let them age.

    Parameters
    ----------
    ages : int16 array, (slots,)
        The step of its own that each slot has just taken, from 1; 0 for what is as old as the optimizer, or
        old enough, and is left as it is to the bit. What reaches the end of the factors becomes 0.
    weights : array, (slots * entries of a slot,), float32 or float64
        Changed.
    kept : Kept
        As long.
    factors, now : Factors
        By own step, arrays of the weights' dtype, and of the optimizer's step, numbers.
    rate : Rate
    is_squared : bool
        Whether ``kept.s`` is the square of what it stands for.

    Returns
    -------
    int
        How many are still young.
    """
    if len(ages) == 0:
        return 0
    n_workers = min(worker_count(len(weights) * _WORK), len(ages))
    counts, young = np.zeros(n_workers, np.int64), np.empty((n_workers, _RUN), np.int64)
    numbers = np.array([*now, *rate[:3]], weights.dtype)
    launch(
        _correct, n_workers, ages, len(weights) // len(ages), weights, *kept, *factors, numbers[:4],
        *numbers[4:], is_squared, rate.warmup, young, counts,
    )  # fmt: skip
    return int(counts.sum())
