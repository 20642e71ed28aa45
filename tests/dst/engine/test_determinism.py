"""Under `torch.use_deterministic_algorithms` every algorithm runs, and does what it does without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import optim

from sparselab import SET, BlockSparseLinear, FanInLinear, MaskedLinear, RigL, SparseConv2d, SparseLinear
from sparselab.dst.parts.grown import FanInUniform
from sparselab.nn import constant_fan_in_
from tests.dst.contract_rows import ROWS
from tests.dst.harness import assert_same_state, build, train


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Torch told so, or not; it then fills new memory with NaN, too."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def judge(start: Callable[[], tuple[Any, Any, Any]], steps: int) -> None:
    """Train twice, and compare bit by bit."""
    runs = []
    for wanted in (True, False):
        with deterministic(wanted):
            runs.append(run := start())
            train(*run, 1, steps)
    assert_same_state(*runs[0][:2], *runs[1][:2])


@pytest.mark.parametrize("kind", ["real", "masked"])
@pytest.mark.parametrize("name", ROWS)
def test_every_algorithm_does_the_same(name: str, kind: str) -> None:
    row = ROWS[name]

    def start() -> tuple[Any, Any, Any]:
        model = row.prepare(build(kind, torch.float32, 0, row.start))
        model.apply(algorithm := row.make())
        return model, optim.AdamW(model.parameters(), lr=0.01), algorithm

    judge(start, 8)


SETTINGS: dict[str, dict[str, Any]] = {
    "a number": {"grown_value": 0.1},
    "drawn": {"grown_value": FanInUniform()},
    "mean": {"grown_state": "mean"},
    "both": {"grown_value": -0.2, "grown_state": "mean"},
}
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: optim.Adafactor(p),
}
CASES = [
    *(
        (kind, settings, "sgd")
        for kind in ("real", "masked", "block", "fan-in", "conv")
        for settings in SETTINGS
    ),
    *(("real", settings, "rprop") for settings in ("a number", "mean")),
    *(("block", settings, "adafactor") for settings in ("a number", "mean")),
]


@pytest.mark.parametrize(("kind", "settings", "optimizer"), CASES)
def test_what_new_connections_start_with(kind: str, settings: str, optimizer: str) -> None:
    def start() -> tuple[Any, Any, Any]:
        model = build(kind)
        scope = {"scope": "row"} if kind == "fan-in" else {}
        algorithm = (SET if settings == "drawn" else RigL)(update_freq=4, **scope, **SETTINGS[settings])
        model.apply(algorithm)
        return model, OPTIMIZERS[optimizer](model.parameters()), algorithm

    judge(start, 9)


MAKE: dict[str, Callable[[], Any]] = {
    "single": lambda: SparseLinear(20, 30, sparsity=0.8),
    "masked": lambda: MaskedLinear(20, 30, sparsity=0.8),
    "fan-in": lambda: FanInLinear(20, 30, fan_in=4),
    "blocks": lambda: BlockSparseLinear(20, 30, sparsity=0.8, block_shape=(4, 3)),
    "conv": lambda: SparseConv2d(4, 6, 3, sparsity=0.6),
}
CHANGES: dict[str, Callable[[Any], object]] = {
    "constant fan-in": constant_fan_in_,
    "drawn anew": lambda layer: layer.reset_parameters(),
    "set": lambda layer: layer.set_topology(layer.to_dense().weight.detach().reshape(layer.shape) > 0),
    "loaded": lambda layer: layer.load_state_dict(layer.state_dict()),
    "rewritten": lambda layer: layer.rewrite(torch.tensor([0, 2]), torch.empty(0, dtype=torch.int64)),
    "dense": lambda layer: layer.to_dense(),
}


#: What cannot be: blocks have no fan-in of single ones, and some kinds cannot have any topology.
NOT = {("blocks", "constant fan-in"), ("blocks", "set"), ("fan-in", "set"), ("fan-in", "rewritten")}


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind in MAKE for change in CHANGES if (kind, change) not in NOT]
)
def test_every_change_of_a_layer_does_the_same(kind: str, change: str) -> None:
    states = []
    for wanted in (True, False):
        with deterministic(wanted):
            torch.manual_seed(0)
            layer = MAKE[kind]()
            CHANGES[change](layer)
            states.append(layer.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
