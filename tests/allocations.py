"""What a piece of code allocates: by torch, by NumPy, and as pages of its own."""

from __future__ import annotations

import tracemalloc
from types import TracebackType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparselab.kernels.cpu.runtime import memory


class Allocations(TorchDispatchMode):
    """Notes, while it is entered, the largest single allocation and who made it.

    Attributes
    ----------
    largest : int
        Bytes of the largest storage that an operator of torch returned, or of the largest pages of scratch
        and plans.
    who : str
    peak : int
        Most bytes that NumPy and Python held at once beyond those at the start: an upper bound of each.

    Notes
    -----
    What an operator allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.who, self.peak = 0, "nothing", 0
        self._patch = pytest.MonkeyPatch()

    def note(self, n_bytes: int, who: str) -> None:
        if n_bytes > self.largest:
            self.largest, self.who = n_bytes, who

    def __enter__(self) -> Allocations:
        real = memory._map

        def spied(n_bytes: int) -> Any:
            self.note(n_bytes, "mapped_empty")
            return real(n_bytes)

        self._patch.setattr(memory, "_map", spied)
        tracemalloc.start()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self.peak = max(self.peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        self._patch.undo()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        places = {each.untyped_storage()._cdata for each in given.values()}
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not each.is_meta:
                storage = each.untyped_storage()
                if storage._cdata not in places:
                    self.note(storage.nbytes(), str(func))
        return out
