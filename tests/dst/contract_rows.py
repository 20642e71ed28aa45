"""The contract table: one row for each algorithm, which then meets every test of all algorithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparselab.dst import (
    DSR,
    GMP,
    GSE,
    MEST,
    SET,
    SNFS,
    CHTs,
    CHTss,
    CosineSchedule,
    DeepR,
    GraNet,
    LinearSchedule,
    PolynomialSchedule,
    RigL,
    SigmoidSchedule,
    SparsityAlgorithm,
    SRigL,
    Static,
    TopKAST,
)  # fmt: skip
from sparselab.kernels.arrays import n_connections
from sparselab.nn import constant_fan_in_
from tests.dst.own import Own


def _sizes(layers):
    return [math.prod(layer.grid) for layer in layers]


def _counts(layers):
    return [layer.nnz for layer in layers]


def each_keeps(layers, born, step):
    """Every layer has as many connections as it was born with."""
    assert _counts(layers) == born


def together_keep(layers, born, step):
    """Layers trade connections, and have as many together as they were born with."""
    assert sum(_counts(layers)) == sum(born)
    assert min(_counts(layers)) >= 1


def each_follows(sparsity):
    """Every layer has the sparsity that `sparsity` gives for the step."""

    def check(layers, born, step):
        assert _counts(layers) == [n_connections((1, size), sparsity(step)) for size in _sizes(layers)]

    return check


def together_follow(sparsity):
    """All layers together have the sparsity that `sparsity` gives for the step."""

    def check(layers, born, step):
        assert sum(_counts(layers)) == n_connections((1, sum(_sizes(layers))), sparsity(step))

    return check


def whole_rows(layers, born, step):
    """Every row that is left has the same fan-in, as large as the budget allows."""
    for layer, budget in zip(layers, born, strict=True):
        n_rows = len((layer.positions() // layer.shape[1]).unique())
        assert layer.nnz == budget // n_rows * n_rows


@dataclass(frozen=True)
class Row:
    """An algorithm and what the contract may expect of it.

    Attributes
    ----------
    make : builds it, with an update every 7 steps or more often.
    start : sparsity of the layers before it begins.
    prepare : what is done to a model before it is attached.
    counts : ``(layers, connections at birth, step)``, asserts how many there are after an update.
    brings_weights : its new connections need not start at 0.
    walks : its updates change the weights of connections that stay.
    keeps_fan_in : rows of equal length stay so; it then runs on `FanInLinear` too.
    of_blocks : it also rewires `BlockSparseLinear`.
    """

    make: Callable[[], SparsityAlgorithm]
    start: float = 0.8
    prepare: Callable[[Any], Any] = lambda model: model
    counts: Callable[[Any, list[int], int], None] = each_keeps
    brings_weights: bool = False
    walks: bool = False
    keeps_fan_in: bool = False
    of_blocks: bool = False


COMMON = {"update_freq": 7, "seed": 3}
USUAL = {"drop_fraction": 0.3, **COMMON}
CUBIC = PolynomialSchedule(0.0, 0.9, 50)
HALFWAY = PolynomialSchedule(0.5, 0.9, 50)
BOUND = LinearSchedule(0.1, 0.02, 50)

ROWS = {
    "static": Row(lambda: Static(0.8), keeps_fan_in=True, of_blocks=True),
    "set": Row(lambda: SET(0.8, **USUAL), of_blocks=True),
    "set by row": Row(lambda: SET(0.8, **USUAL, scope="row"), keeps_fan_in=True, of_blocks=True),
    "rigl": Row(lambda: RigL(0.8, **USUAL), of_blocks=True),
    "rigl by row": Row(lambda: RigL(0.8, **USUAL, scope="row"), keeps_fan_in=True, of_blocks=True),
    "srigl": Row(
        lambda: SRigL(**USUAL, gamma_sal=0.95, exempt_last=False),
        prepare=constant_fan_in_,
        counts=whole_rows,
        keeps_fan_in=True,
    ),
    "snfs": Row(lambda: SNFS(0.8, **USUAL), counts=together_keep),
    "snfs by gradient": Row(lambda: SNFS(0.8, **USUAL, momentum_bytes=0), counts=together_keep),
    "dsr": Row(lambda: DSR(0.8, **COMMON, n_prune=0.3, threshold=0.1), counts=together_keep),
    "deepr": Row(lambda: DeepR(0.8, temperature=0.01, l1=1e-3, seed=3), walks=True),
    "deepr of the network": Row(
        lambda: DeepR(0.8, temperature=0.01, scope="network", seed=3), counts=together_keep, walks=True
    ),
    "gmp": Row(lambda: GMP(CUBIC, update_freq=7), 0.0, counts=each_follows(CUBIC), of_blocks=True),
    "gmp of the network": Row(
        lambda: GMP(CUBIC, update_freq=7, scope="network"), 0.0, counts=together_follow(CUBIC), of_blocks=True
    ),
    "granet": Row(
        lambda: GraNet(HALFWAY, drop_fraction=CosineSchedule(0.5, 250, 0.005), update_freq=7),
        0.5,
        counts=together_follow(HALFWAY),
        of_blocks=True,
    ),
    "mest em": Row(lambda: MEST(0.8, delta=0.05, **COMMON, soft_bound=False, lam=0.5), of_blocks=True),
    "mest em&s": Row(
        lambda: MEST(0.8, delta=BOUND, **COMMON),
        0.7,
        counts=each_follows(lambda step: 0.8 - BOUND(step)),
        of_blocks=True,
    ),
    "topkast": Row(lambda: TopKAST(0.8, forward_sparsity=0.9, **COMMON), brings_weights=True),
    "topkast sampled": Row(
        lambda: TopKAST(0.8, forward_sparsity=0.9, **COMMON, master_bytes=0), brings_weights=True
    ),
    "gse": Row(lambda: GSE(0.8, **USUAL)),
    "gse grabo": Row(lambda: GSE(0.8, **USUAL, sampler="grabo", gamma=2)),
    "gse graest of the network": Row(
        lambda: GSE(0.8, **USUAL, sampler="graest", scope="network"), counts=together_keep
    ),
    "chts": Row(lambda: CHTs(0.8, **USUAL, temperature=LinearSchedule(1, 9, 200))),
    "chts chained": Row(lambda: CHTs(0.8, **USUAL, chains=[("layer 0", "layer 1")])),
    "chtss": Row(
        lambda: CHTss(0.9, sparsity_stop=50, **COMMON),
        0.5,
        counts=each_follows(SigmoidSchedule(0.5, 0.9, 50)),
    ),
    "of one's own": Row(lambda: Own(0.8, **USUAL)),
}
