"""Many callers at once, bit for bit: ``python -m tests.fuzz concurrency --calls N``.

The layers of every kind are run once by one caller. Then the same calls are made by 16 threads, by a parent
and its forked child at the same time, and by the workers of a DataLoader; every result must have the same
bits.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz import adapter

THREADS = 16
SETTINGS: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("SparseLinear", (300, 200), {}),
    ("FanInLinear", (300, 200), {}),
    ("BlockSparseLinear", (300, 200), {"block_shape": (4, 4)}),
    ("BlockSparseLinear", (300, 200), {"block_shape": (16, 16)}),
    ("SparseConv2d", (12, 20), {"kernel_size": 3, "padding": 1}),
    ("SparseConv2d", (12, 20), {"kernel_size": 3, "stride": 2, "groups": 2}),
]
TOKENS = 3, 40, 130


class Call:
    """Forward and backward passes of one layer on one batch, and the bits that one caller gets."""

    def __init__(self, name: str, layer: Any, x: Tensor) -> None:
        self.name, self.layer, self.x = name, layer, x
        with torch.no_grad():
            self.dy = torch.randn(layer(x).shape)
        self.expected = self.bits()

    def bits(self) -> bytes:
        """Output and gradients, as bytes. No state is shared: gradients are asked for, not accumulated."""
        x = self.x.clone().requires_grad_()
        leaves = [x, *self.layer.parameters()]
        y = self.layer(x)
        gradients = torch.autograd.grad(y, leaves, self.dy)
        with torch.no_grad():
            again = self.layer(self.x)
        return b"".join(tensor.detach().numpy().tobytes() for tensor in (y, again, *gradients))

    def is_right(self) -> bool:
        """Call once more."""
        return self.bits() == self.expected


def make_calls() -> list[Call]:
    """Calls of every kind of layer."""
    torch.manual_seed(0)
    calls = []
    for kind, sizes, others in SETTINGS:
        layer = adapter.make_layer(kind, sizes, bias=True, density=0.2, dtype=torch.float32, **others)
        for n in TOKENS:
            x = (
                torch.randn(n // 10 + 1, sizes[0], 9, 9)
                if kind == "SparseConv2d"
                else torch.randn(n, sizes[0])
            )
            calls.append(Call(f"{kind} {others or ''} {n}", layer, x))
    return calls


def repeat(calls: list[Call], count: int, seed: int) -> Counter[str]:
    """Make so many of the calls, in an order of one's own; how many of each were wrong."""
    order = np.random.default_rng(seed).integers(len(calls), size=count)
    return Counter(calls[k].name for k in order if not calls[k].is_right())


def by_threads(calls: list[Call], count: int) -> Counter[str]:
    """16 threads."""
    wrong: Counter[str] = Counter()
    lock = threading.Lock()

    def work(seed: int) -> None:
        try:
            mine = repeat(calls, count // THREADS + 1, seed)
        except Exception as error:
            mine = Counter([f"{type(error).__name__}: {error}"])
        with lock:
            wrong.update(mine)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def by_fork(calls: list[Call], count: int) -> Counter[str]:
    """A parent and its child, at the same time."""
    wrong: Counter[str] = Counter()
    rounds = max(1, count // 400)
    for k in range(rounds):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # torch's own threads do not survive a fork, as a DataLoader knows
            try:
                os._exit(min(sum(repeat(calls, count // rounds // 2, 2 * k).values()), 200))
            except BaseException:
                os._exit(201)
        wrong += repeat(calls, count // rounds // 2, 2 * k + 1)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            wrong["in the child" if 0 < code <= 200 else f"the child ended with {code}"] += max(code, 1)
    return wrong


class _Outcomes(torch.utils.data.Dataset[int]):
    """Item k: whether call k is right, in the process that is asked."""

    def __init__(self, calls: list[Call], count: int) -> None:
        self.calls, self.count = calls, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> int:
        return -1 if self.calls[k % len(self.calls)].is_right() else k % len(self.calls)


def by_loader(calls: list[Call], count: int) -> Counter[str]:
    """Two workers of a DataLoader, while the parent computes too."""
    loader = torch.utils.data.DataLoader(
        _Outcomes(calls, count), batch_size=20, num_workers=2, multiprocessing_context="fork"
    )
    wrong: Counter[str] = Counter()
    for outcomes in loader:
        wrong.update(calls[k].name for k in outcomes.tolist() if k >= 0)
        wrong += repeat(calls, 2, 0)
    return wrong


WAYS: dict[str, Callable[[list[Call], int], Counter[str]]] = {
    "threads": by_threads, "fork": by_fork, "DataLoader": by_loader,
}  # fmt: skip


def main(count: int) -> int:
    """Every way with a third of the calls; 1 if a result was wrong."""
    adapter.use_threads_for_little_work()
    calls = make_calls()
    single = repeat(calls, len(calls) * 2, 0)
    print(f"one caller: {sum(single.values())} of {2 * len(calls)} differ {dict(single) or ''}")
    failed = bool(single)
    # Children are forked before threads have run: libraries may hold locks of threads of their own.
    for name in ("fork", "DataLoader", "threads"):
        wrong = WAYS[name](calls, max(count // 3, 1))
        print(f"{name}: {sum(wrong.values())} of {max(count // 3, 1)} differ {dict(wrong) or ''}", flush=True)
        failed |= bool(wrong)
    return int(failed)
