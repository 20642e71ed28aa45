"""The contract of a layout: a topology, and a matrix that has values beside it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, TypeVar

import numpy as np

from sparselab.kernels.arrays import VALUE_DTYPES, Array, check_array, frozen

Plan = TypeVar("Plan")
Same = TypeVar("Same", bound="Topology")
Matrix = TypeVar("Matrix", bound="SparseMatrix")


class Topology(abc.ABC):
    """Which positions have a connection, and in which order their values lie. It never changes.

    Kernels run without bounds checks, so a topology checks its arrays when it is made, owns them, and shows
    them read-only. What a kernel derives from a topology (a *plan*) is kept with it, so no plan can belong to
    another topology than the one it is used with.

    A layout is a subclass and its `SparseMatrix` (which names it as `topology_class`). Each attribute of a
    topology can be set once, and arrays should be `sparselab.kernels.arrays.frozen`. The products of a layout
    on a device are registered with `sparselab.kernels.backends.register`.
    """

    #: Name under which the products of this layout are registered.
    layout: ClassVar[str]

    def __init__(self) -> None:
        self._plans: dict[Hashable, Any] = {}

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows (``out_features``) and columns (``in_features``) of the matrix."""

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of one connection; (1, 1) unless it is a block of values."""
        return 1, 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the positions that a connection may take: `shape`, or that in blocks."""
        return self.shape

    @property
    @abc.abstractmethod
    def nnz(self) -> int:
        """Live connections."""

    @property
    @abc.abstractmethod
    def values_shape(self) -> tuple[int, ...]:
        """Shape of an array of values; its first dimension is the slots."""

    @abc.abstractmethod
    def positions(self) -> Array:
        """int64 (nnz,): ``row * columns + column`` on the `grid`, of each connection, ascending."""

    @abc.abstractmethod
    def rewrite(self, drop: Array, grow: Array, *, compact: bool = False) -> tuple[Topology, Array]:
        """Another topology, without the connections in some slots and with those at some positions.

        Parameters
        ----------
        drop : int array, (n,)
            Live slots, strictly ascending.
        grow : int array, (m,)
            Positions of the grid, strictly ascending.
        compact : bool
            Leave no spare slots.

        Returns
        -------
        Topology
        int64 array, (new slots,)
            The old slot of each new one, or -1 where it was grown or is spare.

        Raises
        ------
        ValueError
            If a dropped slot is not live or named twice, or a grown position is out of range, live, or named
            twice.
        """

    @property
    def density(self) -> float:
        """Fraction of positions that are live (1 for a matrix without positions)."""
        size = self.grid[0] * self.grid[1]
        return self.nnz / size if size else 1.0

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    def plan(self, key: Hashable, make: Callable[[Any], Plan]) -> Plan:
        """What ``make(topology)`` returned when the key was first asked for.

        Parameters
        ----------
        key : hashable
            Names the device, the operation, and whatever else the plan depends on.
        make : callable
        """
        found: Plan | None = self._plans.get(key)
        # Two threads may both make a plan; both are right, and the first one stays.
        return self._plans.setdefault(key, make(self)) if found is None else found

    def plans(self) -> dict[Hashable, Any]:
        """The plans made so far, by key; never to be written to, since kernels trust them."""
        return dict(self._plans)

    def forget(self, keep: Callable[[Hashable], bool] | None = None) -> None:
        """Let go of the plans, but for those whose key `keep` accepts; they are made anew if needed."""
        self._plans = {key: plan for key, plan in self._plans.items() if keep is not None and keep(key)}

    def __copy__(self: Same) -> Same:
        return self

    def __deepcopy__(self: Same, memo: dict[int, Any]) -> Same:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What pickle makes of a read-only array can be written to.
        self.__dict__.update(
            {name: frozen(part) if isinstance(part, np.ndarray) else part for name, part in state.items()}
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name != "_plans":
            raise AttributeError(f"a topology never changes; rewrite() makes another one, got {name} set")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a topology never changes; rewrite() makes another one, got {name} deleted")


class SparseMatrix(abc.ABC):
    """A topology, and a value for each of its slots.

    Attributes
    ----------
    topology : Topology
    values : float32 or float64 array, ``topology.values_shape``
        May be written to; what is outside the topology is never read.
    """

    topology: Topology
    values: Array

    #: The class of its topologies.
    topology_class: ClassVar[type[Topology]]

    def _hold(self, topology: Any, values: Array) -> None:
        """Take a topology and values for good."""
        if not isinstance(topology, self.topology_class):
            raise TypeError(
                f"topology must be a {self.topology_class.__name__}, got {type(topology).__name__}"
            )
        values = check_array("values", values, VALUE_DTYPES, topology.values_shape)
        object.__setattr__(self, "topology", topology)
        object.__setattr__(self, "values", values)
        self.check_values()

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{type(self).__name__} keeps its arrays; write into values, or use with_values() or rewrite()"
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    @classmethod
    def of(cls: type[Matrix], topology: Any, values: Array) -> Matrix:
        """A matrix with this topology (shared) and these values (not copied).

        Parameters
        ----------
        topology : Topology
            Of this layout.
        values : float32 or float64 array, ``topology.values_shape``

        Raises
        ------
        TypeError, ValueError
            If they are not that.
        """
        self = object.__new__(cls)
        self._hold(topology, values)
        return self

    def check_values(self) -> None:  # noqa: B027
        """Raise ValueError if values are stored that no product may see; called before each product."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (``out_features``) and columns (``in_features``)."""
        return self.topology.shape

    @property
    def nnz(self) -> int:
        """Live connections."""
        return self.topology.nnz

    @property
    def density(self) -> float:
        """Fraction of positions that are live (1 for a matrix without positions)."""
        return self.topology.density

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""
        return self.values.dtype

    def positions(self) -> Array:
        """int64 (nnz,): ``row * columns + column`` on the grid, of each connection, ascending."""
        return self.topology.positions()

    def with_values(self: Matrix, values: Array) -> Matrix:
        """The same topology (shared) with other values (not copied)."""
        return self.of(self.topology, values)

    def astype(self: Matrix, dtype: Any) -> Matrix:
        """The same topology (shared) with values of another dtype (float32 or float64)."""
        return self.with_values(self.values.astype(dtype))

    def copy(self: Matrix) -> Matrix:
        """The same topology (shared: it never changes) with a copy of the values."""
        return self.with_values(self.values.copy())

    @abc.abstractmethod
    def transpose(self: Matrix) -> Matrix:
        """W^T, without spare slots."""

    @abc.abstractmethod
    def to_dense(self) -> Array:
        """Dense array, ``(rows, columns)``."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={self.shape}, nnz={self.nnz}, sparsity={self.sparsity:.4f}, "
            f"dtype={self.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).of, (self.topology, self.values)
