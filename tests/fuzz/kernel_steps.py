"""Steps on one matrix that are no products: constructing, editing, rewriting, converting, saving."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from sparselab.kernels import BlockCSR, PaddedCSR
from tests.fuzz import adapter
from tests.fuzz.case import REFUSED, Case, Found, Skipped
from tests.fuzz.judge import Twin, expect_equal
from tests.fuzz.kernel_state import State, block_arrays, expect_matrix, padded_arrays

Array = np.ndarray[Any, Any]
Step = Callable[[Case, State], None]


# --- constructing -----------------------------------------------------------------------------------------


def _hostile(case: Case, arrays: dict[str, Array]) -> tuple[str, str, dict[str, Array]]:
    """Arrays of which one is wrong: its name, how, and all of them."""
    name = case.pick(sorted(arrays))
    array = arrays[name].copy()
    how = case.pick(("short", "long", "dtype", "huge", "negative", "2-D", "descending", "list"))
    if how == "short":
        array = array[:-1]
    elif how == "long":
        array = np.concatenate([array, array[-1:]])
    elif how == "dtype":
        array = array.astype(case.pick((np.int8, np.uint64, np.float16, object, bool)))
    elif how == "2-D":
        array = array[None]
    elif how == "list":
        array = array.tolist()
    else:
        if name == "values" or array.size == 0 or (how == "negative" and array.dtype.kind == "u"):
            raise Skipped
        at = int(case.rng.integers(array.size))
        huge = int(np.iinfo(array.dtype).max)
        array[at] = {"huge": huge, "negative": -1 - at, "descending": 0}[how]
    return name, how, {**arrays, name: array}


def _is_valid(shape: tuple[int, int], columns: int, arrays: dict[str, Any]) -> bool:
    """Whether the arrays are a matrix after all, although one was changed."""
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        return False
    indptr, indices, values = arrays["indptr"], arrays["indices"], arrays["values"]
    row_nnz = arrays.get("row_nnz", np.diff(indptr))
    if indptr.dtype != np.int64 or row_nnz.dtype != np.int64 or indices.dtype not in ("u2", "i4", "i8"):
        return False
    if values.dtype not in ("f4", "f8") or any(a.ndim != 1 for a in (indptr, row_nnz, indices)):
        return False
    if len(indptr) != len(row_nnz) + 1 or np.any(np.diff(indptr) < row_nnz) or np.any(row_nnz < 0):
        return False
    if indptr[0] < 0 or len(indices) != indptr[-1] or len(values) != indptr[-1]:
        return False
    for begin, n in zip(indptr, row_nnz, strict=False):
        row = indices[begin : begin + n].astype(np.int64)
        if np.any(row < 0) or np.any(row >= columns) or np.any(np.diff(row) <= 0):
            return False
    return True


def construct_wrong(case: Case, state: State) -> None:
    """Arrays that are no matrix must be refused."""
    if state.twin.shape[0] == 0:
        raise Skipped
    is_blocks = adapter.is_blocks(state.W)
    arrays = (block_arrays if is_blocks else padded_arrays)(case, state.twin)
    name, how, arrays = _hostile(case, arrays)
    case.note("BlockCSR" if is_blocks else "PaddedCSR", f"{name} {how}")
    block = (state.twin.block,) if is_blocks else ()
    make = adapter.blocks if is_blocks else adapter.padded
    related = "indptr", "indices", "values", "row_nnz"
    made = case.attempt(lambda: make(state.twin.shape, *block, **arrays), *related)
    if made is REFUSED:
        return
    whole = arrays["values"].ndim == (3 if is_blocks else 1)
    if not (whole and _is_valid(state.twin.grid, state.twin.grid[1], arrays)):
        raise Found("wrong", f"accepted {name} {how}")
    if is_blocks and np.any(np.diff(np.concatenate([[0], arrays["indptr"]])) < 0):
        raise Found("wrong", f"accepted {name} {how}")


def from_positions(case: Case, state: State) -> None:
    """Positions that ascend make a matrix; others must be refused."""
    W, twin = state.W, state.twin
    positions, how = twin.positions.copy(), case.pick(("valid", "descending", "twice", "huge", "negative"))
    if how != "valid" and len(positions) < 2:
        raise Skipped
    if how == "descending":
        positions[:2] = positions[1::-1]
    elif how == "twice":
        positions[1] = positions[0]
    elif how == "huge":
        positions[-1] = twin.grid[0] * twin.grid[1] + int(case.rng.integers(100))
    elif how == "negative":
        positions[0] = -1 - int(case.rng.integers(100))
    case.note(f"{type(W).__name__}.from_positions", how)
    block = (twin.block,) if adapter.is_blocks(W) else ()
    make = lambda: adapter.from_positions(type(W), twin.shape, block, positions)  # noqa: E731
    if how != "valid":
        case.refuse(make, "positions", what=f"positions that are {how}")
        return
    new = case.valid(make)
    expect_matrix(new, Twin(twin.shape, twin.block).set(positions, np.zeros(twin.weights.shape)), "from it")


def from_scipy(case: Case, state: State) -> None:
    """SciPy matrices: unsorted and doubled entries are made canonical, columns out of range refused."""
    import scipy.sparse

    if adapter.is_blocks(state.W) or not hasattr(PaddedCSR, "from_scipy"):
        raise Skipped
    rows, columns = state.twin.shape
    row, column = np.divmod(state.twin.positions, max(columns, 1))
    weights = state.twin.weights.reshape(-1)
    how = case.pick(("valid", "unsorted", "twice", "column huge", "column -1"))
    if how != "valid" and (len(column) == 0 or rows == 0):
        raise Skipped
    indptr = np.searchsorted(row, np.arange(rows + 1))
    order = np.arange(len(row))
    if how == "unsorted":
        order = np.lexsort((-column, row))
    column, weights = column[order].astype(np.int32), weights[order]
    if how.startswith("column"):
        column[int(case.rng.integers(len(column)))] = 65_536 + 50 if how == "column huge" else -1
    matrix = scipy.sparse.csr_matrix((rows, columns))
    if how == "twice":
        half = weights / 2
        row, column, weights = np.tile(row, 2), np.tile(column, 2), np.tile(half, 2)
        matrix = scipy.sparse.coo_matrix((weights, (row, column)), shape=(rows, columns))
    else:
        matrix.indptr, matrix.indices, matrix.data = indptr.astype(np.int32), column, weights
    case.note("PaddedCSR.from_scipy", how)
    if how.startswith("column") and columns <= 65_000:
        case.refuse(lambda: PaddedCSR.from_scipy(matrix), what=f"a matrix with a {how}")
        return
    if how.startswith("column"):
        raise Skipped
    new = case.valid(lambda: PaddedCSR.from_scipy(matrix))
    expect_matrix(new, state.twin, "from_scipy")


# --- editing ----------------------------------------------------------------------------------------------


def edit(case: Case, state: State) -> None:
    """Writing into an array that the matrix hands out must raise, or leave the matrix as it is."""
    exposed = [each for each in adapter.exposed(state.W) if each[2].size]
    if not exposed:
        raise Skipped
    _, name, array = case.pick(exposed)
    at = int(case.rng.integers(array.size))
    number = case.pick((0, 1, int(np.iinfo(array.dtype).max), int(array.flat[at]) + 1))
    case.note("edit", name)
    before = array.copy()
    case.attempt(lambda: array.__setitem__(at, min(number, int(np.iinfo(array.dtype).max))))
    after = adapter.part(state.W, name)
    if after is not None and not np.array_equal(before, after):
        raise Found("wrong", f"{name}[{at}] = {number} changed the topology of a live matrix")


def edit_given(case: Case, state: State) -> None:
    """Writing into an array that the matrix was made of must leave the matrix as it is."""
    names = [name for name in state.given if name != "values" and state.given[name].size]
    if not names:
        raise Skipped
    name = case.pick(names)
    array = state.given[name]
    case.note("edit what was given", name)
    before = np.array(adapter.part(state.W, name))
    case.attempt(lambda: array.__setitem__(int(case.rng.integers(array.size)), np.iinfo(array.dtype).max))
    after = adapter.part(state.W, name)
    if not np.array_equal(before, after):
        raise Found("wrong", f"an edit of the {name} that was given changed the topology of a live matrix")


def set_attribute(case: Case, state: State) -> None:
    """Replacing an array of a frozen matrix must raise."""
    owner, name, array = case.pick(list(adapter.exposed(state.W)))
    case.note("set attribute", name)
    try:
        setattr(owner, name, array[::-1].copy())
    except (AttributeError, TypeError):
        return
    raise Found("wrong", f"{type(owner).__name__}.{name} could be replaced")


# --- rewriting --------------------------------------------------------------------------------------------


def rewrite(case: Case, state: State) -> None:
    """Drop and grow; what came from where must be right, and the old matrix stay as it was."""
    W, twin = state.W, state.twin
    live, _ = adapter.slots(W)
    kind = case.pick(("same rows", "any", "grow much", "drop much", "regrow", "nothing"))
    drop, grow = _choose(case, twin, kind)
    compact = case.chance(0.3)
    case.note("rewrite", kind)
    chosen = live[drop].astype(case.pick((np.int64, np.int64, np.int32)))
    grown = case.rng.permutation(grow)
    new, source = case.valid(lambda: adapter.rewrite(W, case.rng.permutation(chosen), grown, compact))
    after = twin.rewritten(drop, grow)
    expect_matrix(new, after, "rewritten")
    new_live, positions = adapter.slots(new)
    old = np.full(len(positions), -1, np.int64)
    where = np.searchsorted(twin.positions, positions).clip(max=max(twin.nnz - 1, 0))
    if twin.nnz:
        kept = twin.positions[where] == positions
        old[kept] = live[where[kept]]
    expect_equal(np.asarray(source)[new_live], old, "source")
    state.replace(new, after)


def _choose(case: Case, twin: Twin, kind: str) -> tuple[Array, Array]:
    """Numbers of live positions to drop, and positions to grow."""
    nothing, columns = np.empty(0, np.int64), twin.grid[1]
    if kind == "nothing" or columns == 0:
        return nothing, nothing
    free = twin.free()
    drop = np.flatnonzero(case.rng.random(twin.nnz) < (0.8 if kind == "drop much" else 0.2))
    if kind == "grow much":
        return drop[:3], case.rng.permutation(free)[: min(len(free), 200)]
    if kind == "regrow":
        return drop, twin.positions[drop[::2]]
    if kind == "drop much":
        return drop, case.rng.permutation(free)[:2]
    if kind == "any":
        return drop, case.rng.permutation(free)[: min(len(free), len(drop) + 1)]
    rows = twin.positions[drop] // columns
    grow, used = [], []
    for k, row in enumerate(rows):
        candidates = free[(free >= row * columns) & (free < (row + 1) * columns)]
        candidates = np.setdiff1d(candidates, grow)
        if len(candidates):
            # Late columns too, which a narrow index type may not hold.
            grow.append(candidates[-1] if case.chance(0.3) else case.pick(candidates))
            used.append(k)
    return drop[used], np.array(grow, np.int64)


def rewrite_wrong(case: Case, state: State) -> None:
    """Slots and positions that cannot be dropped or grown must be refused."""
    W, twin = state.W, state.twin
    live, _ = adapter.slots(W)
    size = twin.grid[0] * twin.grid[1]
    none = np.empty(0, np.int64)
    spare = np.setdiff1d(np.arange(len(W.values)), live)
    wrong = {
        "drop twice": (live[[0, 0]] if len(live) else none, none),
        "drop spare": (spare[:1], none),
        "drop huge": (np.array([len(W.values) + int(case.rng.integers(5))]), none),
        "drop negative": (np.array([-1]), none),
        "drop float": (np.array([0.0]), none),
        "drop 2-D": (np.zeros((1, 1), np.int64), none),
        "drop bool": (np.array([True]), none),
        "grow live": (none, twin.positions[:1]),
        "grow twice": (none, twin.free()[[0, 0]] if size > twin.nnz else none),
        "grow huge": (none, np.array([size + int(case.rng.integers(5))])),
        "grow uint64": (none, np.array([2**64 - 1], np.uint64)),
        "grow negative": (none, np.array([-1 - int(case.rng.integers(5))])),
        "grow float": (none, np.array([0.5])),
    }
    how = case.pick(sorted(wrong))
    drop, grow = wrong[how]
    if len(drop) + len(grow) == 0:
        raise Skipped
    case.note("rewrite", how)
    case.refuse(lambda: adapter.rewrite(W, drop, grow, case.chance(0.5)), how.split()[0], what=how)


# --- converting and saving --------------------------------------------------------------------------------


def with_values(case: Case, state: State) -> None:
    """Other values for the same topology; wrong ones must be refused."""
    W, twin = state.W, state.twin
    values = case.rng.standard_normal(W.values.shape).astype(W.values.dtype)
    how = case.pick(("valid", "valid", "short", "int", "2-D", "beyond the matrix", "list"))
    bad: Any = {
        "short": values[:-1],
        "int": values.astype(np.int64),
        "2-D": values[None],
        "list": values.tolist(),
    }
    if how == "beyond the matrix":
        beyond = twin.gather(np.ones(twin.shape)) == 0
        if not adapter.is_blocks(W) or not beyond.any():
            raise Skipped
        values[beyond] = np.nan
        case.note("with_values", how)
        case.refuse(lambda: W.with_values(values), "values", what="NaN beyond the matrix")
        return
    if how != "valid":
        if how == "short" and len(values) == 0:
            raise Skipped
        case.note("with_values", how)
        case.refuse(lambda: W.with_values(bad[how]), "values", what=how)
        return
    if adapter.is_blocks(W):
        values *= twin.gather(np.ones(twin.shape)).astype(values.dtype)
    case.note("with_values")
    new = case.valid(lambda: W.with_values(values))
    live, positions = adapter.slots(W)
    state.replace(new, Twin(twin.shape, twin.block).set(positions, values[live]))


def convert(case: Case, state: State) -> None:
    """Copies and conversions hold the same matrix."""
    W, twin = state.W, state.twin
    how = case.pick(("transpose", "copy.copy", "copy.deepcopy", "pickle", "astype", "to_dense", "numpy"))
    case.note("convert", how)
    if how == "to_dense":
        expect_equal(case.valid(W.to_dense), twin.dense().astype(W.values.dtype), how)
        return
    if how == "transpose":
        back = case.valid(W.transpose)
        expect_equal(back.to_dense(), twin.dense().T.astype(W.values.dtype), how)
        new = case.valid(back.transpose)
    elif how == "astype":
        new = case.valid(lambda: W.astype(case.pick((np.float32, np.float64))))
    elif how == "numpy":
        new = _through_numpy(case, W, twin)
    else:
        make = {
            "copy.copy": copy.copy,
            "copy.deepcopy": copy.deepcopy,
            "pickle": lambda W: pickle.loads(pickle.dumps(W)),
        }
        new = case.valid(lambda: make[how](W))
    state.replace(new, twin)


def _through_numpy(case: Case, W: Any, twin: Twin) -> Any:
    names = ("indptr", "indices") if adapter.is_blocks(W) else ("indptr", "row_nnz", "indices")
    file = io.BytesIO()
    np.savez(file, values=W.values, **{name: adapter.part(W, name) for name in names})
    file.seek(0)
    loaded = dict(np.load(file))
    if adapter.is_blocks(W):
        return case.valid(lambda: adapter.blocks(twin.shape, twin.block, **loaded))
    return case.valid(lambda: adapter.padded(twin.shape, **loaded))


def giant(case: Case, state: State) -> None:
    """Positions of a matrix with very many columns: none may be lost."""
    columns = case.pick((1 << 31, 1 << 40, 1 << 58, 1 << 60))
    rows = case.pick((2, 7, 16))
    case.note("giant", f"{rows} x 2^{columns.bit_length() - 1}")
    last = min(rows, 2**63 // columns) - 1  # of which all positions are int64
    position = last * columns + int(case.rng.integers(1, columns - 1))
    before = np.array([0, columns - 1], np.int64)
    W = case.attempt(lambda: adapter.from_positions(PaddedCSR, (rows, columns), (), before), "shape")
    if W is REFUSED:
        return
    made = case.attempt(lambda: adapter.rewrite(W, before[:0], np.array([position]), True), "shape", "grow")
    if made is REFUSED:
        return
    _, positions = adapter.slots(made[0])
    expect_equal(positions, [*before, position], "positions after a growth")


def empty_matrices(case: Case, state: State) -> None:
    """Shapes that are none must be refused."""
    shape = case.pick(((-1, 3), (3, -1), (3,), (2, 3, 4), (2.5, 3), "ab"))
    case.note("shape", str(shape))
    arrays = (block_arrays if adapter.is_blocks(state.W) else padded_arrays)(case, state.twin)
    if adapter.is_blocks(state.W):
        case.refuse(lambda: BlockCSR(shape, state.twin.block, **arrays), what=f"shape {shape}")
    else:
        case.refuse(lambda: adapter.padded(shape, **arrays), what=f"shape {shape}")


STEPS: list[tuple[Step, float]] = [
    (construct_wrong, 2), (from_positions, 1), (from_scipy, 1), (edit, 1), (edit_given, 0.5),
    (set_attribute, 0.2), (rewrite, 6), (rewrite_wrong, 2), (with_values, 2), (convert, 3), (giant, 0.3),
    (empty_matrices, 0.2),
]  # fmt: skip
