"""The contract of a storage: what a layer holds, and where its connections lie in it."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.cpu.variants import Measured
from sparselab.nn.ops.topologies import HookPlace


class Storage(abc.ABC):
    """How a layer holds W (out_features, in_features): in which tensors, and which entry is which connection.

    The tensors are parameters and buffers of the layer, which every method is given. A *slot* is the number
    of a connection in the order of `positions`.

    Parameters
    ----------
    shape : (int, int)
        Of W.
    block_shape : (int, int)
        Outputs and inputs that one connection joins.

    Attributes
    ----------
    hook_place : HookPlace
        Where the layer's gradient hook is.
    measured : Measured or None
        Which way forward passes go at the density for which it was measured.
    follower : callable or None
        Called with the old slot of each new slot when connections have been replaced other than by `rewrite`.
    kin : Kin or None
        Copies and originals of the layer, by which an average by slots is told from one by positions.
    """

    #: Name of the Parameter that holds the weights, and of all tensors that a saved state has of W.
    parameter: ClassVar[str] = "weight_values"
    saved: ClassVar[tuple[str, ...]]
    #: Names of the buffers that hold the topology.
    pattern: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: tuple[int, int], block_shape: tuple[int, int] = (1, 1)) -> None:
        self.shape = shape
        self.block_shape = block_shape
        self.hook_place = HookPlace()
        self.measured: Measured | None = None
        self.follower: Callable[[Tensor], None] | None = None
        self.kin: Any = None

    def foresee_change(self, layer: Any) -> None:
        """Tell the layer's copies and originals that it is about to get other connections."""
        if self.kin is not None:
            self.kin.foresee(layer)

    def check_kin(self, layer: Any) -> None:
        """Raise RuntimeError if the layer was averaged slot by slot with one of other connections."""
        if self.kin is not None:
            self.kin.check(layer)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the positions that a connection may take: `shape`, or that in blocks."""
        (rows, columns), (height, width) = self.shape, self.block_shape
        return -(-rows // height), -(-columns // width)

    @abc.abstractmethod
    def nnz(self, layer: Any) -> int:
        """Live connections."""

    @abc.abstractmethod
    def positions(self, layer: Any) -> Tensor:
        """int64 (nnz,): ``row * columns + column`` of each connection on the `grid`, ascending."""

    @abc.abstractmethod
    def take(self, layer: Any, entries: Tensor) -> Tensor:
        """Entries in slot order of a tensor laid out as the Parameter: (nnz,), or (nnz, *block_shape)."""

    @abc.abstractmethod
    def put(self, layer: Any, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots, int64 (n,), in a tensor laid out as the Parameter."""

    @abc.abstractmethod
    def move(self, layer: Any, entries: Tensor, source: Tensor) -> Tensor:
        """What lives per entry, after a `rewrite` that returned `source`: 0 where nothing survived.

        In place where the shape stays, so that other references see it; else a new tensor.
        """

    @abc.abstractmethod
    def rewrite(self, layer: Any, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop slots and grow positions in place, moving weights and gradient.

        Returns each new slot's old slot, or -1. Raises before anything is changed.
        """

    def n_weights(self, layer: Any) -> int:
        """Live weights."""
        return self.nnz(layer)

    def matrix(self, layer: Any) -> RowTopology:
        """The connections on the grid, for the compiled functions of `sparselab.kernels`."""
        return RowTopology.from_positions(self.grid, self.positions(layer).cpu().numpy())

    def stamp(self, layer: Any) -> tuple[tuple[int, int], ...]:
        """What changes whenever the topology is written to: where it is, and how often it was written."""
        held = (layer._buffers[name] for name in self.pattern)
        return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in held)

    def memory(self, layer: Any) -> list[tuple[int, int]]:
        """First and last byte of the tensors of W: layers that share some cannot be rewired."""
        held = layer._parameters.get(self.parameter), *map(layer._buffers.get, self.pattern)
        return [
            (each.data_ptr(), each.data_ptr() + each.nbytes - 1)
            for each in held
            if each is not None and not each.is_meta and each.numel() and each.data_ptr()
        ]

    def refresh(self, layer: Any) -> None:  # noqa: B027
        """See to it that operators which are given the tensors of the layer find its gradient hook."""

    def held(self, layer: Any) -> nn.Parameter:
        """The Parameter.

        Raises
        ------
        TypeError
            If the layer computes its weights (as under a parametrization) and has none of that name.
        """
        parameter = layer._parameters.get(self.parameter)
        if parameter is None and self.parameter in layer._buffers:
            dtype = str(layer._buffers[self.parameter].dtype).removeprefix("torch.")
            raise TypeError(
                f"{self.parameter} must be a Parameter of the layer, got weights that are frozen in {dtype}, "
                "which are neither trained nor written to; layer.freeze(weights=torch.float32) makes a "
                "Parameter of them again"
            )
        if parameter is None:
            raise TypeError(
                f"{self.parameter} must be a Parameter of the layer, got one that is computed; remove its "
                "parametrization (torch.nn.utils.parametrize.remove_parametrizations) first"
            )
        return parameter  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to nobody: neither hook nor plans nor measurements go with it.
        gone = {"hook_place": HookPlace(), "measured": None, "follower": None, "kin": None}
        return {**self.__dict__, **gone}


def draw_seed() -> int:
    """A seed from torch's random generator."""
    return int(torch.randint(2**62, (), device="cpu").item())


def as_positions(tensor: Tensor) -> Any:
    """Positions or slots as an array, and kernels launched from here on use as many threads as torch."""
    use_torch_threads()
    return np.ascontiguousarray(tensor.cpu().numpy())
