"""The public functions: they check their arguments, find the products of the layout, and return."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from sparselab.kernels.arrays import Array, check_integers, for_kernels
from sparselab.kernels.backends import find
from sparselab.kernels.checks import (
    aligned_output,
    ascending,
    check_layout,
    check_matrix,
    check_vector,
    finish,
    output,
)
from sparselab.kernels.layouts.topology import SparseMatrix
from sparselab.kernels.rewiring.rewrite import move_entries

Matrix = TypeVar("Matrix", bound=SparseMatrix)


class Rewrite(NamedTuple, Generic[Matrix]):
    """What `rewrite` returns.

    `matrix` is the new matrix. ``source`` is an int64 array (new slots,): for each new slot the old slot its
    connection came from, or -1 for a grown connection and for spare slots. Whatever lives per slot follows by
    ``new[slot] = old[source[slot]]``.
    """

    matrix: Matrix
    source: Array


def spmm(
    W: SparseMatrix,
    X: Array,
    out: Array | None = None,
    *,
    bias: Array | None = None,
    device: str = "cpu",
) -> Array:
    """Sparse x dense: ``Y = W X + b``.

    Parameters
    ----------
    W : PaddedCSR or BlockCSR, (rows, columns)
    X : array of W's dtype, (columns, tokens), any strides
    out : array of W's dtype, (rows, tokens), any strides, optional
        Where Y is written. It may overlap any input.
    bias : array of W's dtype, (rows,), optional
        Added to every token.
    device : {"cpu", "reference"}
        What computes it: compiled kernels, or plain loops to compare with.

    Returns
    -------
    array, (rows, tokens)
        `out`, or a new array that is token-major (Fortran order) if X is.

    Raises
    ------
    TypeError
        If an argument is not an array of W's dtype, or W is no sparse matrix.
    ValueError
        If a shape does not match.
    NotImplementedError
        If the device has no products for this layout.

    Notes
    -----
    nnz x tokens multiply-adds. Beside them the tokens are packed once per group of rows. What is derived from
    the topology is kept with it.

    Examples
    --------
    >>> import numpy as np
    >>> from sparselab.kernels import PaddedCSR
    >>> W = PaddedCSR.from_dense([[0.0, 2.0], [3.0, 0.0]])
    >>> spmm(W, np.array([[1.0], [10.0]]))
    array([[20.],
           [ 3.]])
    """
    check_layout(W)
    X = check_matrix("X", X, (W.shape[1], None), W.dtype)
    if bias is not None:
        bias = check_vector("bias", bias, W.shape[:1], W.dtype)
    Y, result = output(out, (W.shape[0], X.shape[1]), W, X, bias)
    find(W.topology, device).product(W.topology, W.values, X, Y, bias)
    return finish(Y, result)


def spmm_t(W: SparseMatrix, DY: Array, out: Array | None = None, *, device: str = "cpu") -> Array:
    """Transposed sparse x dense: ``DX = W^T DY``, the gradient of `spmm` by X.

    Parameters
    ----------
    W : PaddedCSR or BlockCSR, (rows, columns)
    DY : array of W's dtype, (rows, tokens), any strides
    out : array of W's dtype, (columns, tokens), any strides, optional
        Where DX is written. It may overlap any input.
    device : {"cpu", "reference"}
        As of `spmm`.

    Returns
    -------
    array, (columns, tokens)
        `out`, or a new array that is token-major (Fortran order) if DY is. Equal to
        ``spmm(W.transpose(), DY)`` bit for bit; of blocks only from 65 tokens on.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `spmm`.
    """
    check_layout(W)
    DY = check_matrix("DY", DY, (W.shape[0], None), W.dtype)
    DX, result = output(out, (W.shape[1], DY.shape[1]), W, DY)
    find(W.topology, device).product_t(W.topology, W.values, DY, DX)
    return finish(DX, result)


def sddmm_dw(W: SparseMatrix, DY: Array, X: Array, out: Array | None = None, *, device: str = "cpu") -> Array:
    """Dense x dense, sampled at the connections: ``dW[i, j] = sum_t DY[i, t] X[j, t]``.

    The gradient of `spmm` by the values of W, which are not read.

    Parameters
    ----------
    W : PaddedCSR or BlockCSR, (rows, columns)
    DY : array of W's dtype, (rows, tokens), any strides
    X : array of W's dtype, (columns, tokens), any strides
    out : array of W's dtype, of the shape of its values, optional
        Where dW is written, one entry per slot. It may overlap any input.
    device : {"cpu", "reference"}
        As of `spmm`.

    Returns
    -------
    array, of the shape of W's values
        `out` or a new array; 0 in spare slots, and where blocks reach beyond the matrix.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `spmm`; ValueError also if X and DY differ in tokens.
    """
    check_layout(W)
    DY = check_matrix("DY", DY, (W.shape[0], None), W.dtype)
    X = check_matrix("X", X, (W.shape[1], DY.shape[1]), W.dtype)
    dW, result = aligned_output(out, W, DY, X)
    find(W.topology, device).gradient(W.topology, DY, X, dW)
    return finish(dW, result)


def rewrite(W: Matrix, drop: Array, grow: Array, *, compact: bool = False) -> Rewrite[Matrix]:
    """Remove connections, add others, and tell where each one went.

    Parameters
    ----------
    W : PaddedCSR or BlockCSR, (rows, columns)
        Not changed. Of a `BlockCSR` the connections are its blocks, and rows and columns those of the grid.
    drop : int array, (n,)
        Live slots to remove, each once.
    grow : int array, (m,)
        Positions ``row * columns + column`` to add with value 0, each once. A dropped position may be grown:
        it survives with its value, and its slot is its source.
    compact : bool
        Repack without spare slots.

    Returns
    -------
    Rewrite
        ``(matrix, source)``; nothing that can be written to is shared with W. Rows keep their place if all of
        them fit in their slots; otherwise they are repacked, into the same capacity if the total fits.

    Raises
    ------
    TypeError
        If drop or grow is not an integer array, or W is no sparse matrix.
    ValueError
        If a dropped slot is not live or named twice, or a grown position is out of range, live, or named
        twice.
    """
    check_layout(W)
    drop = ascending(check_integers("drop", drop))
    grow = ascending(check_integers("grow", grow))
    topology, source = W.topology.rewrite(drop, grow, compact=compact)
    values = for_kernels(W.values)
    if values.ndim == 1:
        moved = move_entries(values.view(f"i{values.itemsize}"), source).view(values.dtype)
    else:
        moved = np.zeros((len(source), *values.shape[1:]), values.dtype)
        moved[source >= 0] = values[source[source >= 0]]
    new: Any = W.of(topology, moved)
    return Rewrite(new, source)
