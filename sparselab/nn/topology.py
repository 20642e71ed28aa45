"""What an algorithm may see of a sparse layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeGuard

from torch import Tensor, nn

from sparselab.nn.functional import GradientWatcher


class SparseTopology(Protocol):
    """A layer whose connections can be dropped and grown."""

    values: nn.Parameter
    gradient_watcher: GradientWatcher | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""

    @property
    def nnz(self) -> int:
        """Live connections."""

    @property
    def sparsity(self) -> float:
        """Fraction of positions that are structurally zero."""

    def positions(self) -> Tensor:
        """int64 (nnz,): ``row * in_features + column`` of each slot, ascending."""

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop slots and grow positions in place, moving values and gradient.

        Returns each new slot's old slot, or -1.
        """


_MEMBERS = ("values", "gradient_watcher", "shape", "nnz", "sparsity", "positions", "rewrite")


def is_sparse(module: object) -> TypeGuard[SparseTopology]:
    """Whether a module has all of `SparseTopology`.

    Not by `isinstance`, which since Python 3.12 looks members up statically and so misses the parameters of a
    `torch.nn.Module`.
    """
    return all(hasattr(module, member) for member in _MEMBERS)


def find_sparse(module: nn.Module) -> Iterator[tuple[str, SparseTopology]]:
    """The sparse layers of a module (itself included) with their qualified names."""
    for name, child in module.named_modules():
        if is_sparse(child):
            yield name, child
