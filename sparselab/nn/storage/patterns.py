"""Topologies that the user brings, in the forms that NumPy, SciPy and torch have for them."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.layouts.block_csr import grid_of
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.storage.checks import check_size
from sparselab.nn.storage.entries import repeated

#: What `read_pattern` takes, in the words of its errors.
_KNOWN = "a SciPy sparse matrix, a boolean NumPy array or tensor, or a torch.sparse_csr tensor"


class Pattern(NamedTuple):
    """Connections of a layer, and their weights if they came with some."""

    #: ``(out_features, in_features)``.
    shape: tuple[int, int]
    #: int64 (nnz,): ``row * in_features + column``, ascending, without duplicates.
    positions: Tensor
    #: (nnz,), floating, or None.
    weights: Tensor | None


def read_pattern(pattern: Any) -> Pattern:
    """Connections, and weights where there are some, of a matrix (out_features, in_features).

    Parameters
    ----------
    pattern : SciPy sparse matrix or array, bool array or tensor, or torch.sparse_csr tensor
        Of a sparse matrix every stored entry is a connection, zeros (and False) included; of entries stored
        twice the sum counts. Boolean entries are a topology only, floating ones are weights too.

    Returns
    -------
    Pattern

    Raises
    ------
    TypeError
        If the pattern is of another kind, or its entries are neither boolean nor floating.
    ValueError
        If it does not have two dimensions, or its compressed rows are not valid.

    Notes
    -----
    Anything with ``tocsr()`` is taken for a SciPy matrix, and what is stored is what that method returns:
    SciPy fills the blocks of a BSR matrix up with zeros, and leaves zeros of a DIA matrix out.
    """
    sparse = hasattr(pattern, "tocsr") or (isinstance(pattern, Tensor) and pattern.layout == torch.sparse_csr)
    if not sparse and not (isinstance(pattern, np.ndarray) or _is_dense(pattern)):
        layout = f" of layout {pattern.layout}" if isinstance(pattern, Tensor) else ""
        raise TypeError(f"pattern must be {_KNOWN}, got {type(pattern).__name__}{layout}")
    if len(pattern.shape) != 2:
        raise ValueError(
            f"pattern must have the shape (out_features, in_features), got {tuple(pattern.shape)}"
        )
    shape = int(pattern.shape[0]), int(pattern.shape[1])
    if sparse:
        return _read_rows(shape, *(_parts_of_tensor if isinstance(pattern, Tensor) else _parts)(pattern))
    if pattern.dtype not in (np.bool_, torch.bool):
        raise TypeError(
            f"a dense pattern must be boolean, got {pattern.dtype}; pass pattern != 0, or a "
            "torch.nn.Linear to SparseLinear.from_dense"
        )
    live = pattern.cpu().numpy() if isinstance(pattern, Tensor) else pattern
    return Pattern(shape, torch.from_numpy(np.flatnonzero(live).astype(np.int64)), None)


def _is_dense(pattern: Any) -> bool:
    return isinstance(pattern, Tensor) and pattern.layout == torch.strided


def _parts(matrix: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers, columns and entries of a SciPy matrix, which may have room after its last row."""
    csr = matrix.tocsr()
    data = csr.data
    if data.dtype.kind == "f" and data.dtype != np.float32:
        data = data.astype(np.float64)
    if data.dtype.kind not in "bf":
        raise _wrong_entries(data.dtype)
    nnz = int(csr.indptr[-1])
    indptr, indices = (np.array(part, np.int64) for part in (csr.indptr, csr.indices[:nnz]))
    return torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(np.array(data[:nnz]))


def _parts_of_tensor(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = matrix.detach().cpu()
    entries = matrix.values()
    if not (entries.is_floating_point() or entries.dtype == torch.bool):
        raise _wrong_entries(entries.dtype)
    return matrix.crow_indices().long(), matrix.col_indices().long(), entries


def _wrong_entries(dtype: Any) -> TypeError:
    return TypeError(
        f"a sparse pattern must have boolean entries, or floating ones, which are its weights; got {dtype}"
    )


def _read_rows(shape: tuple[int, int], indptr: Tensor, indices: Tensor, entries: Tensor) -> Pattern:
    rows, columns = shape
    valid = indptr.shape == (rows + 1,) and indptr[0] == 0 and bool((indptr[1:] >= indptr[:-1]).all())
    if not valid or indptr[-1] != len(indices) or len(entries) != len(indices):
        raise ValueError(
            f"pattern must have row pointers from 0 that never decrease and end at the number of its "
            f"columns, and of its entries, got {len(indptr)} from {int(indptr[0])} to {int(indptr[-1])} for "
            f"{len(indices)} columns and {len(entries)} entries"
        )
    if len(indices) and not (indices.min() >= 0 and indices.max() < columns):
        raise ValueError(
            f"pattern must have columns of 0..{columns - 1}, got {int(indices.min())}..{int(indices.max())}"
        )
    positions = repeated(torch.arange(rows), torch.diff(indptr)) * columns + indices
    weights = entries if entries.is_floating_point() else None
    if bool((positions[1:] <= positions[:-1]).any()):
        positions, slot = torch.unique(positions, return_inverse=True)
        if weights is not None:
            weights = weights.new_zeros(len(positions)).index_add_(0, slot, weights)
    return Pattern(shape, positions, weights)


def read_edges(
    inputs: Any, outputs: Any, weights: Any, in_features: int | None, out_features: int | None
) -> Pattern:
    """Connections, and weights where there are some, of a list of edges.

    Parameters
    ----------
    inputs, outputs : int array or tensor, (n,)
        Where each edge begins and ends. If outputs is None, inputs is both: (2, n).
    weights : floating array or tensor, (n,), or None
        Of edges named twice the sum counts.
    in_features, out_features : int, optional
        One more than the largest number by default.

    Raises
    ------
    TypeError, ValueError
        As documented at `sparselab.SparseLinear.from_edges`.
    """
    if outputs is None:
        both = np.asarray(_as_array("inputs", inputs))
        if both.ndim != 2 or len(both) != 2:
            raise ValueError(
                f"inputs must be an edge_index of shape (2, n) if outputs is not given, got {both.shape}"
            )
        inputs, outputs = both
    ends = {}
    for name, numbers in (("inputs", inputs), ("outputs", outputs)):
        array = _as_array(name, numbers)
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
        ends[name] = array.astype(np.int64)
    column, row = ends["inputs"], ends["outputs"]
    if len(column) != len(row):
        raise ValueError(f"inputs and outputs must be equally long, got {len(column)} and {len(row)}")
    columns = _count("in_features", in_features, "inputs", column)
    rows = _count("out_features", out_features, "outputs", row)
    positions = torch.from_numpy(row * columns + column)
    if weights is None:
        return Pattern((rows, columns), torch.unique(positions), None)
    numbers = weights.detach().cpu() if isinstance(weights, Tensor) else torch.from_numpy(np.array(weights))
    if not numbers.is_floating_point():
        raise TypeError(f"weights must be floating, got {numbers.dtype}")
    if numbers.shape != positions.shape:
        raise ValueError(
            f"weights must be one for each of {len(positions)} edges, got shape {tuple(numbers.shape)}"
        )
    positions, slot = torch.unique(positions, return_inverse=True)
    return Pattern((rows, columns), positions, numbers.new_zeros(len(positions)).index_add_(0, slot, numbers))


def _as_array(name: str, numbers: Any) -> Any:
    if isinstance(numbers, Tensor):
        if numbers.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {numbers.layout}")
        return numbers.detach().cpu().numpy()
    return np.asarray(numbers)


def _count(name: str, features: int | None, of: str, numbers: Any) -> int:
    """The number of features, of which all numbers are some; by default as many as the numbers need."""
    if features is None and not numbers.size:
        raise ValueError(f"{name} must be given where there is no edge to tell it")
    n = int(numbers.max()) + 1 if features is None else check_size(name, features)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < n):
        limit = "" if features is None else f" and below {name}, {n}"
        raise ValueError(f"{of} must be at least 0{limit}, got {int(numbers.min())}..{int(numbers.max())}")
    return n


def read_blocks(
    pattern: Any, shape: tuple[int, int], block_shape: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Positions of the blocks of a pattern in the grid, and their weights if the pattern has some.

    Parameters
    ----------
    pattern : see `read_pattern`
        Of the shape of the matrix, in whole blocks, or boolean, of the shape of the grid.
    shape, block_shape : (int, int)

    Raises
    ------
    TypeError, ValueError
        As `read_pattern`; and if the pattern has another shape, or part of a block is missing.
    """
    grid = grid_of(shape, block_shape)
    given, positions, weights = read_pattern(pattern)
    if given == grid and weights is None:
        return positions, None
    if given != shape:
        raise ValueError(
            f"pattern must have the shape of the layer, {shape}, or if it is boolean that of its grid, "
            f"{grid}; got {given}"
        )
    (row, i), (column, j) = (
        (at // size, at % size)
        for at, size in zip((positions // shape[1], positions % shape[1]), block_shape, strict=True)
    )
    kept, slot, counts = torch.unique(row * grid[1] + column, return_inverse=True, return_counts=True)
    rows, columns = (
        (n - at * size).clamp(max=size)
        for at, n, size in zip((kept // grid[1], kept % grid[1]), shape, block_shape, strict=True)
    )
    if bool((counts != rows * columns).any()):
        raise ValueError(f"pattern must consist of whole blocks of shape {block_shape}")
    if weights is None:
        return kept, None
    values = weights.new_zeros((len(kept), *block_shape))
    values[slot, i, j] = weights
    return kept, values


def to_csr_tensor(topology: RowTopology, values: Tensor) -> Tensor:
    """A `torch.sparse_csr` tensor of connections without spare slots and of their weights, (nnz,).

    Weights that require a gradient get it.
    """
    place = values.device
    with warnings.catch_warnings():
        # Torch calls the layout a beta each time that a process first makes one.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(topology.indptr.copy()).to(place),
            torch.from_numpy(topology.indices.astype(np.int64)).to(place), values, topology.shape,
            check_invariants=False,
        )  # fmt: skip
