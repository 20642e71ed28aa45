"""``python -m tests.kills 5``: a run that is killed at random moments ends as one that never was.

One process imports everything and forks the run, kills it, looks at what it left, and forks it again.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from sparselab import CheckpointError, load_checkpoint, save_checkpoint
from tests.nn.models.saved.test_checkpoint import Run

STEPS_PER_KILL, LONGEST_S = 12, 0.04


def saved(folder: Path) -> list[Path]:
    """The checkpoints that are there, the newest first."""
    return sorted(folder.glob("step-????"), reverse=True)


def go_on(folder: Path, n_steps: int) -> list[float]:
    """Train from the newest checkpoint on, and save after every step; returns all losses since the start."""
    run, losses = Run(0), list[float]()
    for path in saved(folder):
        try:
            losses = load_checkpoint(path, **run.parts)["losses"]
            break
        except CheckpointError:
            continue
    for step in range(len(losses) + 1, n_steps + 1):
        losses += run.train(1)
        save_checkpoint(folder / f"step-{step:04}", **run.parts, losses=losses)
        for old in saved(folder)[2:]:
            old.unlink()
    return losses


def kill(folder: Path, n_steps: int, seconds: float) -> None:
    """Fork a process that goes on, and kill it so long after its first checkpoint."""
    before = saved(folder)[:1]
    child = os.fork()
    if child == 0:
        try:
            go_on(folder, n_steps)
            time.sleep(60)
        except BaseException as error:
            print(f"the run failed: {error!r}", flush=True)
        finally:
            os._exit(1)
    status = 0
    while saved(folder)[:1] == before and not status:
        time.sleep(0.001)
        status = os.waitpid(child, os.WNOHANG)[1]
    assert not status, "the run failed by itself"
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(kills: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    n_steps, draw = STEPS_PER_KILL * kills, random.Random(seed)
    uninterrupted = Run(0).train(n_steps)
    with tempfile.TemporaryDirectory() as name:
        folder, done, cut_short = Path(name), 0, 0
        for _ in range(kills):
            kill(folder, n_steps, draw.uniform(0, LONGEST_S))
            cut_short += len(list(folder.glob("*.unfinished")))
            for unfinished in folder.glob("*.unfinished"):
                unfinished.unlink()
            for path in saved(folder):
                step = len(load_checkpoint(path)["losses"])  # each one that is there is whole
                assert path.name == f"step-{step:04}", path
                done, before = max(done, step), done
                assert done >= before, "a step that had been saved is gone"
        # The newest one is damaged by something else: the one before it is as good.
        newest = next(iter(saved(folder)))
        newest.write_bytes(newest.read_bytes()[:-100])
        assert go_on(folder, n_steps) == uninterrupted, "the run went on another way"
    print(f"{kills} kills, {cut_short} of them within a save, the last after step {done} of {n_steps}: same")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
