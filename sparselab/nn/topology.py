"""What an algorithm may see of a sparse layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeGuard

import numpy as np
from torch import Tensor, nn

from sparselab.kernels import PaddedCSR, index_dtype
from sparselab.nn._threads import use_torch_threads
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


def as_matrix(layer: SparseTopology) -> PaddedCSR:
    """The connections of a layer, for the compiled functions of `sparselab.kernels`.

    Nothing is copied where the layer keeps compressed rows as `sparselab.SparseLinear` does; else they are
    made from its positions. Kernels launched by this Python thread use as many threads as torch from now on.

    Returns
    -------
    PaddedCSR
        Without spare slots. Its values are not to be read.
    """
    use_torch_threads()
    begin, indices = getattr(layer, "indptr", None), getattr(layer, "indices", None)
    if isinstance(begin, Tensor) and isinstance(indices, Tensor):
        indptr, columns = begin.cpu().numpy(), indices.cpu().numpy()
    else:
        rows, n_columns = layer.shape
        row, column = np.divmod(layer.positions().cpu().numpy(), max(n_columns, 1))
        indptr = np.searchsorted(row, np.arange(rows + 1))
        columns = column.astype(index_dtype(n_columns))
    no_values = np.broadcast_to(np.float32(0), columns.shape)
    return PaddedCSR.unchecked(layer.shape, indptr, np.diff(indptr), columns, no_values)
