"""``python -m tests.dst.losses``: the losses that unusual loops end with, sparse, masked and dense."""

from __future__ import annotations

import sys
from typing import Any

import torch

from sparselab import RigL
from tests.dst.engine.test_model_loops import LOOPS, TOLD
from tests.dst.loop_run import EVERY, F64, FRACTION, IN, OUT, Run


def final_loss(run: Run) -> float:
    """On a batch that no loop has seen."""
    torch.manual_seed(0)
    x, y = torch.randn(64, IN, dtype=F64), torch.randn(64, OUT, dtype=F64)
    with torch.no_grad():
        return float((run.model(x) - y).square().mean())


def train(loop: Any, steps: int) -> list[Run]:
    """The sparse network, the masked one, and the dense one that a textbook's RigL rewires."""
    settings = {"update_freq": EVERY, "drop_fraction": FRACTION, **TOLD.get(loop, {})}
    runs = [
        Run("sparse", RigL(**settings)),
        Run("masked", RigL(**settings)),
        Run("textbook", None),
    ]
    for step in range(steps):
        for run in runs:
            torch.manual_seed(1000 + step)
            loop(run, step)
    return runs


def main(steps: int) -> int:
    """Print the table; 1 if a topology differs."""
    print(f"{'loop':38} {'sparse':>10} {'masked':>10} {'textbook':>10}  same connections after {steps} steps")
    differ = 0
    for loop in LOOPS:
        runs = train(loop, steps)
        positions = [[layer.positions().tolist() for layer in run.layers] for run in runs]
        same = all(each == positions[0] for each in positions)
        differ += not same
        losses = " ".join(f"{final_loss(run):10.6f}" for run in runs)
        print(f"{loop.__name__.replace('_', ' '):38} {losses}  {'yes' if same else 'NO'}", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 300))
