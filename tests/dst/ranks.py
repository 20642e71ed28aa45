"""Several processes of one test: a function runs in each of them, and what they return comes back."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Seconds that one collective may wait for a process.
PATIENCE = 150


def _begin(
    rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            f"file://{folder / 'store'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=PATIENCE),
        )
        result = function(rank, *arguments)
        dist.destroy_process_group()
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def run_ranks(
    function: Callable[..., Any], world: int, folder: Path, *arguments: Any, seconds: float = 300
) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each of `world` processes of a group of gloo.

    Raises
    ------
    AssertionError
        If a process fails, ends without a result, or is not done after so many seconds; all are ended then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_begin, args=(rank, world, folder, function, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    try:
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + 5)
            assert time.monotonic() < deadline, _said(folder) or f"not done after {seconds} seconds"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    results = [folder / f"{rank}.result" for rank in range(world)]
    assert all(each.exists() for each in results), _said(folder) or "a process ended without a result"
    return [pickle.loads(each.read_bytes()) for each in results]


def _said(folder: Path) -> str:
    """The errors of all processes."""
    return "\n".join(f"{each.name}:\n{each.read_text()}" for each in sorted(folder.glob("*.error")))
