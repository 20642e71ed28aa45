"""What the public functions check of their arguments, and how they return what they were given."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparselab.kernels.cpu.bsr.plan import Strips
from sparselab.kernels.cpu.csr.plan import Segments, TransposePlan
from sparselab.kernels.layouts.block_csr import BlockCSR
from sparselab.kernels.layouts.padded_csr import Array, PaddedCSR, slot_dtype

#: What `plan_spmm`, `plan_spmm_t` and `plan_sddmm_dw` return.
Plan = Segments | TransposePlan | Strips


def check_matrix(name: str, array: object, shape: tuple[int, int | None], dtype: np.dtype[Any]) -> Array:
    """The array, or an aligned copy: strides of a packed record's field are no whole number of items."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have W's dtype {dtype}, got {array.dtype}")
    expected = f"({shape[0]}, {'tokens' if shape[1] is None else shape[1]})"
    if array.ndim != 2 or array.shape[0] != shape[0] or shape[1] not in (None, array.shape[1]):
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    return array if is_regular(array) else array.copy(order="K")


def is_regular(array: Array) -> bool:
    return array.flags.aligned and not any(stride % array.itemsize for stride in array.strides)


def check_entries(name: str, array: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have W's dtype {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def check_writable(out: Array) -> Array:
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    return out


def check_integers(name: str, array: object) -> Array:
    integers = np.asarray(array)
    if integers.size == 0:
        return np.empty(0, np.int64)
    if integers.ndim != 1 or integers.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a 1-D integer array, got {integers.dtype} of shape {integers.shape}")
    return np.ascontiguousarray(integers, np.int32 if integers.dtype == np.int32 else np.int64)


def ascending(integers: Array) -> Array:
    return np.sort(integers) if np.any(integers[1:] < integers[:-1]) else contiguous(integers)


def narrow(ascending: Array, bound: int) -> Array:
    """In the one type for integers below `bound`, if they all are: every other type compiles kernels anew."""
    inside = len(ascending) == 0 or (ascending[0] >= 0 and ascending[-1] < bound)
    return ascending.astype(slot_dtype(bound), copy=False) if inside else ascending


def checked(plan: Plan, nnz: int, capacity: int, shape: tuple[int, int]) -> Segments:
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


def checked_transpose(plan: Plan, W: PaddedCSR) -> TransposePlan:
    if not isinstance(plan, TransposePlan):
        raise TypeError(f"plan must be a TransposePlan, got {type(plan).__name__}")
    checked(plan.segments, W.nnz, W.nnz, W.shape[::-1])
    if plan.capacity != W.capacity:
        raise ValueError(
            f"plan must be made for this topology ({W.nnz} connections in {W.capacity} slots), "
            f"got one for {plan.capacity} slots"
        )
    return plan


def checked_strips(plan: Plan, W: BlockCSR) -> Strips:
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


def output(
    out: Array | None, shape: tuple[int, int], W: PaddedCSR | BlockCSR, X: Array, *others: Any
) -> tuple[Array, Array]:
    """The array to write and the array to return; they differ where a kernel cannot write to `out` itself."""
    if out is None:
        token_major = abs(X.strides[0]) < abs(X.strides[1]) if X.size else False
        Y = np.empty(shape, W.dtype, order="F" if token_major else "C")
        return Y, Y
    regular = check_matrix("out", out, shape, W.dtype) is out
    check_writable(out)
    inputs = [W.values, W.indices, X, *(other for other in others if other is not None)]
    return (out if regular and not overlaps(out, *inputs) else np.empty(shape, W.dtype)), out


def overlaps(out: Array, *others: Array) -> bool:
    return any(np.may_share_memory(out, other) for other in others)


def finish(written: Array, result: Array) -> Array:
    if written is not result:
        result[...] = written
    return result


def contiguous(array: Array) -> Array:
    """Contiguous and writable, as the compiled signatures expect; a copy only of what is not."""
    return np.require(array, requirements=["C", "W"])
