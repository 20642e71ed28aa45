"""A layout and a device from outside the package: each is one class here and one registration."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparselab.kernels import backends
from sparselab.kernels.arrays import frozen
from sparselab.kernels.layouts.topology import SparseMatrix, Topology

Array = NDArray[Any]


class PairTopology(Topology):
    """Connections as pairs (row, column)."""

    layout: ClassVar[str] = "pairs"

    def __init__(self, shape: tuple[int, int], positions: Array) -> None:
        super().__init__()
        self._shape = shape
        row, column = np.divmod(positions.astype(np.int64), max(shape[1], 1))
        self.row, self.column = frozen(row), frozen(column)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nnz(self) -> int:
        return len(self.row)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.nnz,)

    def positions(self) -> Array:
        return self.row * self.shape[1] + self.column

    def rewrite(self, drop: Array, grow: Array, *, compact: bool = False) -> tuple[PairTopology, Array]:
        slots = dict(zip(self.positions().tolist(), range(self.nnz), strict=True))
        kept = {position: slot for position, slot in slots.items() if slot not in set(drop.tolist())}
        kept.update({position: slots.get(position, -1) for position in grow.tolist()})
        order = sorted(kept)
        return PairTopology(self.shape, np.array(order, np.int64)), np.array(
            [kept[p] for p in order], np.int64
        )


class Pairs(SparseMatrix):
    """A matrix of such connections."""

    topology_class = PairTopology

    def transpose(self) -> Pairs:
        positions = self.topology.column * self.shape[0] + self.topology.row  # type: ignore[attr-defined]
        order = np.argsort(positions)
        return self.of(PairTopology(self.shape[::-1], positions[order]), self.values[order])

    def to_dense(self) -> Array:
        dense = np.zeros(self.shape, self.dtype)
        dense.flat[self.positions()] = self.values
        return dense


class PairProducts:
    """Products by NumPy's unbuffered additions."""

    def product(self, topology: PairTopology, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
        Y[...] = 0 if bias is None else bias[:, None]
        np.add.at(Y, topology.row, values[:, None] * X[topology.column])

    def product_t(self, topology: PairTopology, values: Array, DY: Array, DX: Array) -> None:
        DX[...] = 0
        np.add.at(DX, topology.column, values[:, None] * DY[topology.row])

    def gradient(self, topology: PairTopology, DY: Array, X: Array, dW: Array) -> None:
        dW[...] = (DY[topology.row] * X[topology.column]).sum(1)


class OneByOne:
    """A device that computes the products of compressed rows, one row at a time."""

    def product(self, topology: Any, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
        for i, (slots, columns) in enumerate(self._rows(topology)):
            Y[i] = values[slots] @ X[columns] + (0 if bias is None else bias[i])

    def product_t(self, topology: Any, values: Array, DY: Array, DX: Array) -> None:
        DX[...] = 0
        for i, (slots, columns) in enumerate(self._rows(topology)):
            DX[columns] += np.multiply.outer(values[slots], DY[i])

    def gradient(self, topology: Any, DY: Array, X: Array, dW: Array) -> None:
        dW[...] = 0
        for i, (slots, columns) in enumerate(self._rows(topology)):
            dW[slots] = X[columns] @ DY[i]

    def _rows(self, topology: Any) -> Any:
        for begin, n in zip(topology.indptr, topology.row_nnz, strict=False):
            yield slice(begin, begin + n), topology.indices[begin : begin + n].astype(np.int64)


backends.register("pairs", "cpu", PairProducts())
backends.register("csr", "one by one", OneByOne())
