"""What an algorithm may see of a sparse layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import index_dtype
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.rewrite import move_entries
from sparselab.kernels.rewiring.select import select
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.linear import GradientWatcher


class SparseTopology(Protocol):
    """A layer whose connections can be dropped and grown."""

    gradient_watcher: GradientWatcher | None
    #: Laid out as `stored`: the connections in use in the forward pass, or None if all are. It follows a
    #: rewrite, with nothing grown in it. The gradient of `stored` is the same with it as without.
    forward_mask: Tensor | None

    @property
    def stored(self) -> nn.Parameter:
        """The weights as optimizers see them: ``(nnz,)`` in slot order, or dense with zeros elsewhere."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the positions that a connection may take: `shape`, or that in blocks."""

    @property
    def block_shape(self) -> tuple[int, int]:
        """Outputs and inputs that one connection joins: (1, 1), unless it is a block of weights."""

    @property
    def nnz(self) -> int:
        """Live connections; live blocks, where each connection is one."""

    @property
    def sparsity(self) -> float:
        """Fraction of positions that are structurally zero."""

    def positions(self) -> Tensor:
        """int64 (nnz,): ``row * columns + column`` of each slot on the `grid`, ascending."""

    def per_connection(self, entries: Tensor) -> Tensor:
        """Entries in slot order of a tensor laid out as `stored`: weights, a gradient, a moment.

        One for each connection, (nnz,), or (nnz, *block_shape) where a connection is a block.
        """

    def put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots, int64 (n,), in a tensor laid out as `stored`.

        `numbers` is laid out as what `per_connection` returns.
        """

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop slots and grow positions in place, moving weights and gradient.

        Returns each new slot's old slot, or -1.
        """

    def moved(self, entries: Tensor, source: Tensor) -> Tensor:
        """A tensor laid out as `stored`, after a `rewrite` that returned `source`.

        What survived keeps its entry; whatever was grown or has no connection gets 0. In place where the
        shape stays, so that other references see it; else a new tensor.
        """


_MEMBERS = (
    "forward_mask", "gradient_watcher", "stored", "shape", "grid", "block_shape", "nnz", "sparsity",
    "positions", "per_connection", "put", "rewrite", "moved",
)  # fmt: skip

#: Moving a number needs its width only.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def as_matrix(layer: SparseTopology) -> RowTopology:
    """The connections of a layer on its grid, for the compiled functions of `sparselab.kernels`.

    Nothing is copied where the layer keeps compressed rows as `sparselab.SparseLinear` does; else they are
    made from its positions. Kernels launched by this Python thread use as many threads as torch from now on.

    Returns
    -------
    RowTopology
        Without spare slots.
    """
    use_torch_threads()
    begin, indices = getattr(layer, "indptr", None), getattr(layer, "indices", None)
    if isinstance(begin, Tensor) and isinstance(indices, Tensor):
        indptr, columns = begin.cpu().numpy(), indices.cpu().numpy().reshape(-1)
    else:
        rows, n_columns = layer.grid
        row, column = np.divmod(layer.positions().cpu().numpy(), max(n_columns, 1))
        indptr = np.searchsorted(row, np.arange(rows + 1))
        columns = column.astype(index_dtype(n_columns))
    return RowTopology.adopt(layer.grid, indptr, np.diff(indptr), columns)


@torch.no_grad()
def move_slots(entries: Tensor, source: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """``new[i] = old[source[i]]``, and 0 where ``source[i] == -1``: in place if the shape stays the same.

    In place, so that other references to the tensor see it.

    Parameters
    ----------
    entries : (n,) or any shape in C order, any dtype
    source : int64 (m,)
        Old slot of each new slot, or -1.
    shape : tuple of int
        Of the result; (m,) if None.

    Raises
    ------
    IndexError
        If a source is neither a slot nor -1.
    """
    integers = _INTEGERS.get(entries.itemsize)
    if integers is not None and entries.is_contiguous() and not entries.is_complex():
        old = entries.detach().cpu().view(integers).reshape(-1).numpy()
        moved = torch.from_numpy(move_entries(old, source.cpu().numpy())).view(entries.dtype)
    else:
        # One more entry, so that -1 reads a zero.
        moved = torch.cat((entries.reshape(-1), entries.new_zeros(1)))[source.to(entries.device)]
    moved = moved.view(source.shape if shape is None else shape)
    if entries.shape == moved.shape:
        return entries.copy_(moved)
    return moved.to(entries.device)


@torch.no_grad()
def move_blocks(entries: Tensor, source: Tensor) -> Tensor:
    """As `move_slots`, for entries (n, ...): in place if there are as many after it."""
    moved = entries.new_zeros((len(source), *entries.shape[1:]))
    kept = (source >= 0).to(entries.device)
    moved[kept] = entries[source.to(entries.device)[kept]]
    return entries.copy_(moved) if entries.shape == moved.shape else moved


def as_scores(entries: Tensor) -> npt.NDArray[np.float32 | np.float64]:
    """Magnitudes, row by row, as an array of its own for `sparselab.kernels`, which knows no bfloat16."""
    scores = entries.detach().abs().reshape(-1).cpu()
    known = scores.dtype in (torch.float32, torch.float64)
    magnitudes: npt.NDArray[np.float32 | np.float64] = (scores if known else scores.float()).numpy()
    return magnitudes


def slot_scores(entries: Tensor) -> npt.NDArray[np.float32 | np.float64]:
    """Magnitudes of what `SparseTopology.per_connection` returns, the norm of each block, as `as_scores`.

    Blocks are summed in float64, so that no square overflows.
    """
    if entries.ndim == 1:
        return as_scores(entries)
    norms = torch.linalg.vector_norm(entries.detach().flatten(1), dim=1, dtype=torch.float64)
    return as_scores(norms.to(entries.dtype))


def largest_positions(entries: Tensor, k: int) -> Tensor:
    """int64 (k,), ascending: where the largest magnitudes are, row by row; of equal ones the first.

    NaN ranks below every number.
    """
    use_torch_threads()
    return torch.from_numpy(select(as_scores(entries), k)).long().to(entries.device)
