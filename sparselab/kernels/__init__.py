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

from sparselab.kernels import _block_gradient, _block_products, _plan, _rewrite, _sddmm_dw, _spmm, _spmm_t
from sparselab.kernels._block_plan import Strips, plan_product
from sparselab.kernels._few_tokens import MOST_TOKENS, address, matrix, multiply_few
from sparselab.kernels._jit import aligned_empty, cache_directory, worker_count
from sparselab.kernels._plan import Segments, TransposePlan
from sparselab.kernels._rewrite import Rewrite
from sparselab.kernels._sampling import sample_distinct
from sparselab.kernels.blocks import BlockCSR, BlockRewrite
from sparselab.kernels.layout import Array, PaddedCSR, index_dtype, n_connections, slot_dtype

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

#: What `plan_spmm`, `plan_spmm_t` and `plan_sddmm_dw` return.
Plan = Segments | TransposePlan | Strips


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
        tokens are multiplied without one.

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
    X = _check_matrix("X", X, (W.shape[1], None), W.dtype)
    if bias is not None:
        bias = _contiguous(_check_entries("bias", bias, W.shape[:1], W.dtype))
    Y, result = _output(out, (W.shape[0], X.shape[1]), W, X, bias)
    if isinstance(W, BlockCSR):
        strips = plan_spmm(W) if plan is None else _checked_strips(plan, W)
        _block_products.multiply(_contiguous(W.values).reshape(-1), strips, False, X, Y, bias)
        return _finish(Y, result)
    segments = None if plan is None else _checked(plan, W.nnz, W.capacity, W.shape)
    values, indices = _contiguous(W.values), _contiguous(W.indices)
    if X.shape[1] <= MOST_TOKENS:
        begin = W.indptr[:-1]
        offsets = np.zeros(W.shape[0], W.dtype) if bias is None else bias
        multiply_few(
            address(values), values, indices, begin, begin + W.row_nnz, address(offsets), offsets,
            matrix(X), matrix(Y), worker_count(),
        )  # fmt: skip
    else:
        _spmm.multiply(values, indices, segments or plan_spmm(W), X, Y, bias)
    return _finish(Y, result)


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
        ``spmm(W.transpose(), DY)`` bit for bit.

    Raises
    ------
    TypeError, ValueError
        As `spmm`.
    """
    DY = _check_matrix("DY", DY, (W.shape[0], None), W.dtype)
    DX, result = _output(out, (W.shape[1], DY.shape[1]), W, DY)
    if isinstance(W, BlockCSR):
        strips = plan_spmm_t(W) if plan is None else _checked_strips(plan, W)
        _block_products.multiply(_contiguous(W.values).reshape(-1), strips, True, DY, DX)
    else:
        transpose = plan_spmm_t(W) if plan is None else _checked_transpose(plan, W)
        _spmm_t.multiply_t(_contiguous(W.values), transpose, DY, DX)
    return _finish(DX, result)


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
    DY = _check_matrix("DY", DY, (W.shape[0], None), W.dtype)
    X = _check_matrix("X", X, (W.shape[1], DY.shape[1]), W.dtype)
    shape = W.values.shape
    if out is None:
        dW = target = aligned_empty(W.values.size, W.dtype).reshape(shape)
    else:
        dW = _check_writable(_check_entries("out", out, shape, W.dtype))
        direct = dW.flags.carray and not _overlaps(dW, W.indices, DY, X)
        target = dW if direct else aligned_empty(W.values.size, W.dtype).reshape(shape)
    if isinstance(W, BlockCSR):
        strips = plan_sddmm_dw(W) if plan is None else _checked_strips(plan, W)
        R, C = (X, DY) if strips.transposed else (DY, X)
        _block_gradient.sample(strips, R, C, target.reshape(-1))
        slots, outside = W.outside()
        target[slots] = np.where(outside, 0, target[slots])
    else:
        segments = plan_sddmm_dw(W) if plan is None else _checked(plan, W.nnz, W.capacity, W.shape)
        _sddmm_dw.sample(_contiguous(W.indices), segments, DY, X, target)
    return _finish(target, dW)


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
    drop = _ascending(_check_integers("drop", drop))
    grow = _ascending(_check_integers("grow", grow))
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
    W = W.unchecked(W.shape, *(_contiguous(part) for part in (W.indptr, W.row_nnz, W.indices, W.values)))
    return _rewrite.rewrite_topology(W, _narrow(drop, W.capacity), _narrow(grow, size), compact)


def _check_matrix(name: str, array: object, shape: tuple[int, int | None], dtype: np.dtype[Any]) -> Array:
    """The array, or an aligned copy: strides of a packed record's field are no whole number of items."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have W's dtype {dtype}, got {array.dtype}")
    expected = f"({shape[0]}, {'tokens' if shape[1] is None else shape[1]})"
    if array.ndim != 2 or array.shape[0] != shape[0] or shape[1] not in (None, array.shape[1]):
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    return array if _is_regular(array) else array.copy(order="K")


def _is_regular(array: Array) -> bool:
    return array.flags.aligned and not any(stride % array.itemsize for stride in array.strides)


def _check_entries(name: str, array: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have W's dtype {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def _check_writable(out: Array) -> Array:
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    return out


def _check_integers(name: str, array: object) -> Array:
    integers = np.asarray(array)
    if integers.size == 0:
        return np.empty(0, np.int64)
    if integers.ndim != 1 or integers.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a 1-D integer array, got {integers.dtype} of shape {integers.shape}")
    return np.ascontiguousarray(integers, np.int32 if integers.dtype == np.int32 else np.int64)


def _ascending(integers: Array) -> Array:
    return np.sort(integers) if np.any(integers[1:] < integers[:-1]) else _contiguous(integers)


def _narrow(ascending: Array, bound: int) -> Array:
    """In the one type for integers below `bound`, if they all are: every other type compiles kernels anew."""
    inside = len(ascending) == 0 or (ascending[0] >= 0 and ascending[-1] < bound)
    return ascending.astype(slot_dtype(bound), copy=False) if inside else ascending


def _checked(plan: Plan, nnz: int, capacity: int, shape: tuple[int, int]) -> Segments:
    """Refuse a plan of another matrix, as far as sizes tell: a foreign plan would read out of bounds."""
    if not isinstance(plan, Segments):
        raise TypeError(f"plan must be a Segments, got {type(plan).__name__}")
    rows, blocks = int(plan.chunk_rows[-1]), plan.ptr.shape[1] - 1
    expected = nnz, capacity, shape[0], max(-(-shape[1] // plan.block_columns), 1)
    came = plan.n_connections, plan.capacity, rows, blocks
    if came != expected or plan.block_columns > max(shape[1], 1):
        raise ValueError(
            f"plan must be made for this topology ({shape[0]} rows, {shape[1]} columns, {nnz} connections in "
            f"{capacity} slots), got one for {rows} rows, {blocks} blocks of {plan.block_columns} columns, "
            f"{plan.n_connections} connections in {plan.capacity} slots"
        )
    return plan


def _checked_transpose(plan: Plan, W: PaddedCSR) -> TransposePlan:
    if not isinstance(plan, TransposePlan):
        raise TypeError(f"plan must be a TransposePlan, got {type(plan).__name__}")
    _checked(plan.segments, W.nnz, W.nnz, W.shape[::-1])
    if plan.capacity != W.capacity:
        raise ValueError(
            f"plan must be made for this topology ({W.nnz} connections in {W.capacity} slots), "
            f"got one for {plan.capacity} slots"
        )
    return plan


def _checked_strips(plan: Plan, W: BlockCSR) -> Strips:
    """Refuse strips of another matrix, as far as sizes tell: they would read out of bounds."""
    if not isinstance(plan, Strips):
        raise TypeError(f"plan must be a Strips, got {type(plan).__name__}")
    turn = -1 if plan.transposed else 1
    expected = W.shape, W.block_shape, W.nnz
    came = plan.shape[::turn], (plan.height, plan.width)[::turn], len(plan.slots)
    if came != expected:
        raise ValueError(
            "plan must be made for this topology (shape {}, blocks {}, {} of them), got one for shape {}, "
            "blocks {}, {} of them".format(*expected, *came)
        )
    return plan


def _output(
    out: Array | None, shape: tuple[int, int], W: PaddedCSR | BlockCSR, X: Array, *others: Any
) -> tuple[Array, Array]:
    """The array to write and the array to return; they differ where a kernel cannot write to `out` itself."""
    if out is None:
        token_major = abs(X.strides[0]) < abs(X.strides[1]) if X.size else False
        Y = np.empty(shape, W.dtype, order="F" if token_major else "C")
        return Y, Y
    regular = _check_matrix("out", out, shape, W.dtype) is out
    _check_writable(out)
    inputs = [W.values, W.indices, X, *(other for other in others if other is not None)]
    return (out if regular and not _overlaps(out, *inputs) else np.empty(shape, W.dtype)), out


def _overlaps(out: Array, *others: Array) -> bool:
    return any(np.may_share_memory(out, other) for other in others)


def _finish(written: Array, result: Array) -> Array:
    if written is not result:
        result[...] = written
    return result


def _contiguous(array: Array) -> Array:
    """Contiguous and writable, as the compiled signatures expect; a copy only of what is not."""
    return np.require(array, requirements=["C", "W"])
