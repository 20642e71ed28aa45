"""Sparse kernels on NumPy arrays: the four products and updates that sparse training needs.

W is a `PaddedCSR` of shape (rows, columns) = (``out_features``, ``in_features``), or a `BlockCSR`, whose
connections are dense blocks. Dense matrices are feature-major, one token per column: X is (columns, tokens),
Y is (rows, tokens). They may have any strides, so a token-major PyTorch batch ``x`` of shape
(tokens, in_features) is passed as ``x.T`` without a copy.

Results are the same bits for any number of threads: each output has one writer and one order of summation.
A NaN or infinity goes through as in dense arithmetic, except that a connection that does not exist
contributes nothing (dense 0 x inf would be NaN).
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np

from sparselab.kernels.checks import (
    Plan,
    ascending,
    check_entries,
    check_integers,
    check_matrix,
    check_writable,
    checked,
    checked_strips,
    checked_transpose,
    contiguous,
    finish,
    narrow,
    output,
    overlaps,
)
from sparselab.kernels.cpu.bsr import products as _block_products
from sparselab.kernels.cpu.bsr import sddmm_dw as _block_gradient
from sparselab.kernels.cpu.bsr.plan import Strips, plan_product
from sparselab.kernels.cpu.bsr.skinny import MOST_BLOCK_TOKENS, multiply_few_blocks
from sparselab.kernels.cpu.csr import plan as _plan
from sparselab.kernels.cpu.csr import sddmm_dw as _sddmm_dw
from sparselab.kernels.cpu.csr import spmm as _spmm
from sparselab.kernels.cpu.csr import spmm_t as _spmm_t
from sparselab.kernels.cpu.csr.plan import Segments, TransposePlan
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS, address, matrix, multiply_few
from sparselab.kernels.cpu.runtime.jit import aligned_empty, cache_directory, worker_count
from sparselab.kernels.layouts.block_csr import BlockCSR, BlockRewrite
from sparselab.kernels.layouts.padded_csr import Array, PaddedCSR, index_dtype, n_connections
from sparselab.kernels.layouts.sampling import sample_distinct
from sparselab.kernels.rewiring import rewrite as _rewrite
from sparselab.kernels.rewiring.rewrite import Rewrite

__all__ = [
    "BlockCSR",
    "BlockRewrite",
    "PaddedCSR",
    "Rewrite",
    "Segments",
    "Strips",
    "TransposePlan",
    "cache_directory",
    "index_dtype",
    "n_connections",
    "plan_sddmm_dw",
    "plan_spmm",
    "plan_spmm_t",
    "rewrite",
    "sample_distinct",
    "sddmm_dw",
    "spmm",
    "spmm_t",
]


def plan_spmm(W: PaddedCSR | BlockCSR) -> Any:
    """Plan of `spmm` for the topology of W (values are not read): `Segments`, or `Strips` of blocks."""
    return plan_product(W, False) if isinstance(W, BlockCSR) else _plan.plan_spmm(W)


def plan_spmm_t(W: PaddedCSR | BlockCSR) -> Any:
    """Plan of `spmm_t` for the topology of W (values are not read): `TransposePlan`, or `Strips` of blocks.

    The former costs about 7 bytes per connection.
    """
    return plan_product(W, True) if isinstance(W, BlockCSR) else _plan.plan_spmm_t(W)


def plan_sddmm_dw(W: PaddedCSR | BlockCSR) -> Any:
    """Plan of `sddmm_dw` for the topology of W (values are not read): `Segments`, or `Strips` of blocks."""
    return plan_product(W, False) if isinstance(W, BlockCSR) else _plan.plan_sddmm_dw(W)


def spmm(
    W: PaddedCSR | BlockCSR,
    X: Array,
    out: Array | None = None,
    *,
    bias: Array | None = None,
    plan: Plan | None = None,
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
    plan : Segments or Strips, optional
        ``plan_spmm(W)``, kept from an earlier call for the same topology. Made anew if absent; up to 16
        tokens (64 with blocks) are multiplied without one.

    Returns
    -------
    array, (rows, tokens)
        `out`, or a new array that is token-major (Fortran order) if X is.

    Raises
    ------
    TypeError
        If an argument is not an array of W's dtype.
    ValueError
        If a shape does not match, or the plan was made for another topology.

    Notes
    -----
    nnz x tokens multiply-adds. Beside them the tokens are packed once per group of rows.

    Examples
    --------
    >>> import numpy as np
    >>> W = PaddedCSR.from_dense([[0.0, 2.0], [3.0, 0.0]])
    >>> spmm(W, np.array([[1.0], [10.0]]))
    array([[20.],
           [ 3.]])
    """
    X = check_matrix("X", X, (W.shape[1], None), W.dtype)
    if bias is None:
        bias = np.zeros(W.shape[0], W.dtype)
    else:
        bias = contiguous(check_entries("bias", bias, W.shape[:1], W.dtype))
    Y, result = output(out, (W.shape[0], X.shape[1]), W, X, bias)
    values, indices = contiguous(W.values), contiguous(W.indices)
    few = X.shape[1] <= (MOST_BLOCK_TOKENS if isinstance(W, BlockCSR) else MOST_TOKENS)
    if isinstance(W, BlockCSR):
        strips = None if plan is None else checked_strips(plan, W)
        if few:
            multiply_few_blocks(
                address(values), indices, contiguous(W.indptr), W.block_shape, address(bias), bias,
                matrix(X), matrix(Y), worker_count(),
            )  # fmt: skip
        else:
            _block_products.multiply(values.reshape(-1), strips or plan_spmm(W), False, X, Y, bias)
        return finish(Y, result)
    segments = None if plan is None else checked(plan, W.nnz, W.capacity, W.shape)
    if few:
        begin = W.indptr[:-1]
        multiply_few(
            address(values), values, indices, begin, begin + W.row_nnz, address(bias), bias,
            matrix(X), matrix(Y), worker_count(),
        )  # fmt: skip
    else:
        _spmm.multiply(values, indices, segments or plan_spmm(W), X, Y, bias)
    return finish(Y, result)


def spmm_t(
    W: PaddedCSR | BlockCSR,
    DY: Array,
    out: Array | None = None,
    *,
    plan: Plan | None = None,
) -> Array:
    """Transposed sparse x dense: ``DX = W^T DY``, the gradient of `spmm` by X.

    Parameters
    ----------
    W : PaddedCSR or BlockCSR, (rows, columns)
    DY : array of W's dtype, (rows, tokens), any strides
    out : array of W's dtype, (columns, tokens), any strides, optional
        Where DX is written. It may overlap any input.
    plan : TransposePlan or Strips, optional
        ``plan_spmm_t(W)``, kept from an earlier call for the same topology. Made anew if absent.

    Returns
    -------
    array, (columns, tokens)
        `out`, or a new array that is token-major (Fortran order) if DY is. Equal to
        ``spmm(W.transpose(), DY)`` bit for bit; of blocks only from 65 tokens on.

    Raises
    ------
    TypeError, ValueError
        As `spmm`.
    """
    DY = check_matrix("DY", DY, (W.shape[0], None), W.dtype)
    DX, result = output(out, (W.shape[1], DY.shape[1]), W, DY)
    if isinstance(W, BlockCSR):
        strips = plan_spmm_t(W) if plan is None else checked_strips(plan, W)
        _block_products.multiply(contiguous(W.values).reshape(-1), strips, True, DY, DX)
    else:
        transpose = plan_spmm_t(W) if plan is None else checked_transpose(plan, W)
        _spmm_t.multiply_t(contiguous(W.values), transpose, DY, DX)
    return finish(DX, result)


def sddmm_dw(
    W: PaddedCSR | BlockCSR,
    DY: Array,
    X: Array,
    out: Array | None = None,
    *,
    plan: Plan | None = None,
) -> Array:
    """Dense x dense, sampled at the connections: ``dW[i, j] = sum_t DY[i, t] X[j, t]``.

    The gradient of `spmm` by the values of W, which are not read.

    Parameters
    ----------
    W : PaddedCSR or BlockCSR, (rows, columns)
    DY : array of W's dtype, (rows, tokens), any strides
    X : array of W's dtype, (columns, tokens), any strides
    out : array of W's dtype, of the shape of its values, optional
        Where dW is written, one entry per slot. It may overlap any input.
    plan : Segments or Strips, optional
        ``plan_sddmm_dw(W)``, kept from an earlier call for the same topology. Made anew if absent.

    Returns
    -------
    array, of the shape of W's values
        `out` or a new array; 0 in spare slots, and where blocks reach beyond the matrix.

    Raises
    ------
    TypeError, ValueError
        As `spmm`; ValueError also if X and DY differ in tokens.
    """
    DY = check_matrix("DY", DY, (W.shape[0], None), W.dtype)
    X = check_matrix("X", X, (W.shape[1], DY.shape[1]), W.dtype)
    shape = W.values.shape
    if out is None:
        dW = target = aligned_empty(W.values.size, W.dtype).reshape(shape)
    else:
        dW = check_writable(check_entries("out", out, shape, W.dtype))
        direct = dW.flags.carray and not overlaps(dW, W.indices, DY, X)
        target = dW if direct else aligned_empty(W.values.size, W.dtype).reshape(shape)
    if isinstance(W, BlockCSR):
        strips = plan_sddmm_dw(W) if plan is None else checked_strips(plan, W)
        R, C = (X, DY) if strips.transposed else (DY, X)
        _block_gradient.sample(strips, R, C, target.reshape(-1))
        slots, outside = W.outside()
        target[slots] = np.where(outside, 0, target[slots])
    else:
        segments = plan_sddmm_dw(W) if plan is None else checked(plan, W.nnz, W.capacity, W.shape)
        _sddmm_dw.sample(contiguous(W.indices), segments, DY, X, target)
    return finish(target, dW)


@overload
def rewrite(W: PaddedCSR, drop: Array, grow: Array, *, compact: bool = False) -> Rewrite: ...


@overload
def rewrite(W: BlockCSR, drop: Array, grow: Array, *, compact: bool = False) -> BlockRewrite: ...


def rewrite(
    W: PaddedCSR | BlockCSR, drop: Array, grow: Array, *, compact: bool = False
) -> Rewrite | BlockRewrite:
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
    Rewrite or BlockRewrite
        ``(topology, source)``. Rows keep their place if all of them fit in their slots; otherwise they are
        repacked, into the same capacity if the total fits.

    Raises
    ------
    TypeError
        If drop or grow is not an integer array.
    ValueError
        If a dropped slot is not live or named twice, or a grown position is out of range, live, or named
        twice.
    """
    drop = ascending(check_integers("drop", drop))
    grow = ascending(check_integers("grow", grow))
    if isinstance(W, BlockCSR):
        topology, source = rewrite(W.topology(), drop, grow, compact=True)
        values = np.zeros((len(source), *W.block_shape), W.dtype)
        values[source >= 0] = W.values[source[source >= 0]]
        new = W.unchecked(W.shape, W.block_shape, topology.indptr, topology.indices, values)
        return BlockRewrite(new, source)
    size = W.shape[0] * W.shape[1]
    if len(grow) and (grow[0] < 0 or grow[-1] >= size):
        wrong = grow[0] if grow[0] < 0 else grow[-1]
        raise ValueError(f"grow must hold positions of 0..{size - 1}, got {wrong}")
    W = W.unchecked(W.shape, *(contiguous(part) for part in (W.indptr, W.row_nnz, W.indices, W.values)))
    return _rewrite.rewrite_topology(W, narrow(drop, W.capacity), narrow(grow, size), compact)
