"""Everything the fuzzer knows of the package's names, asked for where they may differ between versions."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparselab import kernels
from sparselab.kernels import BlockCSR, PaddedCSR

Array = np.ndarray[Any, Any]
Matrix = Any

#: Where the smallest work that is worth a thread has been kept.
_LAUNCHERS = (
    "sparselab.kernels.cpu.runtime.jit",
    "sparselab.kernels.cpu.runtime.launch",
    "sparselab.kernels._jit",
)


def use_threads_for_little_work() -> None:
    """Small matrices run the code of several threads too."""
    for name in _LAUNCHERS:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            for constant in ("_MIN_WORK", "MIN_WORK"):
                if hasattr(module, constant):
                    setattr(module, constant, 1)


def use_threads(count: int) -> None:
    """So many threads for the kernels that are called without torch, if the machine has them."""
    import numba

    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


# --- matrices ---------------------------------------------------------------------------------------------


def _by_name(kind: type, given: dict[str, Any]) -> Any:
    """Construct with those of the given arguments that the constructor asks for."""
    wanted = inspect.signature(kind).parameters
    if "topology" in wanted and "topology" not in given:
        given = {**given, "topology": _topology(given)}
    return kind(**{name: given[name] for name in wanted if name in given})


def _topology(given: dict[str, Any]) -> Any:
    given = dict(given)
    if (block := given.get("block_shape")) is not None:
        rows, columns = given["shape"]
        given["row_nnz"] = np.diff(given["indptr"])
        if "block_shape" not in inspect.signature(kernels.Topology).parameters:  # type: ignore[attr-defined]
            given["shape"] = -(-rows // block[0]), -(-columns // block[1])
    return _by_name(kernels.Topology, given)  # type: ignore[attr-defined]


def padded(shape: tuple[int, int], indptr: Array, row_nnz: Array, indices: Array, values: Array) -> Matrix:
    """A `PaddedCSR` of these arrays."""
    arrays = {"indptr": indptr, "row_nnz": row_nnz, "indices": indices, "values": values}
    return _by_name(PaddedCSR, {"shape": shape, **arrays})


def blocks(
    shape: tuple[int, int], block_shape: tuple[int, int], indptr: Array, indices: Array, values: Array
) -> Matrix:
    """A `BlockCSR` of these arrays."""
    arrays = {"indptr": indptr, "indices": indices, "values": values}
    return _by_name(BlockCSR, {"shape": shape, "block_shape": block_shape, **arrays})


def from_positions(kind: type, shape: tuple[int, int], block: tuple[Any, ...], positions: Array) -> Matrix:
    """A matrix of zeros with connections at these positions; `block` holds the block shape, if any."""
    if hasattr(kind, "from_positions"):
        return kind.from_positions(shape, *block, positions)
    topology = kind.topology_class.from_positions(shape, *block, positions)  # type: ignore[attr-defined]
    return kind.of(topology, np.zeros(topology.values_shape, np.float32))  # type: ignore[attr-defined]


def is_blocks(W: Matrix) -> bool:
    """Whether the connections of a matrix are blocks."""
    return isinstance(W, BlockCSR)


def _owners(W: Matrix) -> list[Any]:
    topology = getattr(W, "topology", None)
    return [W] if topology is None or callable(topology) else [W, topology]


def part(W: Matrix, name: str) -> Array | None:
    """``indptr``, ``row_nnz`` or ``indices``, of the matrix or of its topology."""
    for owner in _owners(W):
        with contextlib.suppress(AttributeError):
            found = getattr(owner, name)
            if isinstance(found, np.ndarray):
                return found
    return None


def slots(W: Matrix) -> tuple[Array, Array]:
    """The live slots, row by row, and their positions; by no function of the package."""
    indptr, indices = part(W, "indptr"), part(W, "indices")
    assert indptr is not None
    assert indices is not None
    row_nnz = part(W, "row_nnz")
    counts = np.diff(indptr) if row_nnz is None else row_nnz
    before = np.cumsum(counts) - counts
    live = np.repeat(indptr[:-1] - before, counts) + np.arange(counts.sum())
    columns = W.shape[1] if not is_blocks(W) else -(-W.shape[1] // W.block_shape[1])
    return live, np.repeat(np.arange(len(counts)), counts) * columns + indices[live].astype(np.int64)


def exposed(W: Matrix) -> Iterator[tuple[Any, str, Array]]:
    """The arrays of a topology that a matrix hands out: who has them, under which name, and the array."""
    for owner in _owners(W):
        names = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        for name in sorted({*names, "indptr", "row_nnz", "indices"} - {"values", "topology"}):
            array = getattr(owner, name, None)
            if isinstance(array, np.ndarray):
                yield owner, name, array


# --- products and plans -----------------------------------------------------------------------------------


def product(name: str) -> Any:
    """``spmm``, ``spmm_t`` or ``sddmm_dw``."""
    return getattr(kernels, name)


def takes_plans() -> bool:
    """Whether plans are values that a caller holds."""
    return "plan" in inspect.signature(kernels.spmm).parameters


def plan(name: str, W: Matrix) -> Any:
    """The plan of a product, where `takes_plans`."""
    return getattr(kernels, f"plan_{name}")(W)


def plan_arrays(made: Any) -> Iterator[tuple[tuple[str, ...], Array]]:
    """The arrays of a plan, and by which names they are found."""
    for name, value in zip(getattr(made, "_fields", ()), made, strict=False):
        if isinstance(value, np.ndarray):
            yield (name,), value
        elif hasattr(value, "_fields"):
            yield from (((name, *path), array) for path, array in plan_arrays(value))


def replaced(made: Any, path: tuple[str, ...], array: Array) -> Any:
    """A plan with another array in that place."""
    first, *rest = path
    new = replaced(getattr(made, first), tuple(rest), array) if rest else array
    return made._replace(**{first: new})


def rewrite(W: Matrix, drop: Any, grow: Any, compact: bool) -> tuple[Matrix, Array]:
    """The new matrix and the source of its slots."""
    if is_blocks(W) and "compact" not in inspect.signature(kernels.rewrite).parameters:
        new, source = kernels.rewrite(W, drop, grow)
    else:
        new, source = kernels.rewrite(W, drop, grow, compact=compact)
    return new, source


# --- layers -----------------------------------------------------------------------------------------------


def make_layer(
    kind: str, sizes: tuple[int, int], *, bias: bool, density: float, dtype: Any, **others: Any
) -> Any:
    """A layer of that class with random connections; `sizes` are inputs and outputs, or rows and columns."""
    import sparselab

    if kind == "FanInLinear":
        others = {"fan_in": round(density * sizes[0]), **others}
    else:
        others = {"sparsity": 1 - density, **others}
    if kind != "SparseEmbedding":
        others["bias"] = bias
    return getattr(sparselab, kind)(*sizes, dtype=dtype, **others)


def masked(layer: Any) -> Any:
    """The masked twin of a layer."""
    import sparselab

    name = type(layer).__name__
    kind = name.replace("Sparse", "Masked") if "Conv" in name else "MaskedLinear"
    return getattr(sparselab, kind).from_sparse(layer)


def tied(kind: str, owner: Any, bias: bool) -> Any:
    """A layer of that class with the weight of the owner."""
    import sparselab

    return getattr(sparselab, kind)(owner, bias)


def owner(layer: Any) -> Any:
    """The layer that has the weights: of several that share them, the one that they are listed under."""
    return getattr(layer, "owner", layer)


def has_mask(layer: Any) -> bool:
    """Whether the weights are dense, with a mask."""
    return hasattr(owner(layer), "mask")


def is_transposed_conv(layer: Any) -> bool:
    """Whether it is a transposed convolution, of which the rows of W are inputs."""
    return getattr(layer, "row_channels", "") == "in_channels"


def stored(layer: Any) -> Any:
    """The Parameter of the weights."""
    layer = owner(layer)
    for name in ("weight_values", "values", "stored"):
        found = layer._parameters.get(name)
        if found is not None:
            return found
    return layer.stored


def can_be_narrow(layer: Any) -> bool:
    """Whether it is a linear layer that can be frozen in few bits."""
    kinds = ("SparseLinear", "FanInLinear", "BlockSparseLinear")
    takes = type(layer).__name__ in kinds and "weights" in inspect.signature(layer.freeze).parameters
    return takes and stored(layer).dtype.itemsize <= 4


def block_of(layer: Any) -> tuple[int, int]:
    """Rows and columns of one connection."""
    return tuple(getattr(owner(layer), "block_shape", (1, 1)))  # type: ignore[return-value]


def per_connection(layer: Any, entries: Any) -> Array:
    """Entries laid out as `stored`, in the order of positions, (nnz, *block), float64."""
    if has_mask(layer) and entries.shape == owner(layer).mask.shape:
        entries = entries[owner(layer).mask]
    return entries.detach().double().numpy().reshape(-1, *block_of(layer))  # type: ignore[no-any-return]


def matrix_shape(layer: Any) -> tuple[int, int]:
    """Rows and columns of W."""
    return int(layer.shape[0]), int(layer.shape[1])


def layer_positions(layer: Any) -> Array:
    """Positions on the grid of connections."""
    return layer.positions().numpy()  # type: ignore[no-any-return]


def topology_tensors(layer: Any) -> dict[str, Any]:
    """The integer buffers by name."""
    buffers = owner(layer).named_buffers()
    return {name: tensor for name, tensor in buffers if not tensor.is_floating_point()}


# --- operators --------------------------------------------------------------------------------------------

#: Other names of an argument.
ALIASES = {
    "weight_values": "values", "grad_output": "grad", "dy": "grad", "input": "x", "numbers": "geometry",
}  # fmt: skip


def record_operators(run: Any) -> list[tuple[Any, list[Any]]]:
    """The operators of the package that a function calls, with their arguments."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "sparselab":
                known = func._schema.arguments
                given = {**dict(zip((each.name for each in known), args, strict=False)), **(kwargs or {})}
                calls.append((func, [given.get(each.name, each.default_value) for each in known]))
            return func(*args, **(kwargs or {}))

    with Record():
        run()
    return [
        (func, [arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args])
        for func, args in calls
    ]


def named(func: Any, args: list[Any]) -> dict[str, Any]:
    """The arguments of an operator by the names that the fuzzer knows."""
    names = [argument.name for argument in func._schema.arguments]
    found = {ALIASES.get(name, name): arg for name, arg in zip(names, args, strict=True)}
    if "sizes" in found:  # outputs and inputs of the layer, and of a block
        sizes = found["sizes"] if len(found["sizes"]) == 4 else [-1] * 4
        found["out_features"], found["in_features"], *block = sizes
        found["block_shape"] = block
    return found
