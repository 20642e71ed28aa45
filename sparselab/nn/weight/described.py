"""What the weight of a sparse layer tells of itself, at no cost."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparselab.nn.storage.narrow import find_narrow
from sparselab.nn.weight.writing import Writable, refuse_to_write


class Described(Writable):
    """Numbers, dtype, device, shape and gradient of the weight of a layer, in the words of torch."""

    transposed: bool
    _stamp: Any

    def values(self) -> Tensor:
        """The live weights, laid out as the layer's Parameter; 0 where `forward_mask` leaves one out.

        Raises
        ------
        RuntimeError
            If they were copied, by a change of dtype, and the layer has other connections now.
        """
        layer = self.layer
        if self._copied is None:
            values: Tensor = layer.in_use
            return values.detach() if self._detached else values
        if self._stamp is not None and self._stamp != layer.storage.stamp(layer):
            raise RuntimeError(
                "a weight in another dtype must be used before the connections change, got one of "
                "connections that are gone; make it anew of layer.weight"
            )
        return self._copied

    @property
    def _held(self) -> Tensor:
        """What dtype, device and requires_grad are those of, without computing anything if possible."""
        layer = self.layer
        held = layer._parameters.get(layer.storage.parameter) if self._copied is None else None
        if held is None and self._copied is None and (narrow := find_narrow(layer)) is not None:
            return narrow.values.new_empty(0, dtype=torch.float32)
        return self.values() if held is None else held

    @property
    def shape(self) -> torch.Size:
        """That of the dense weight."""
        shape = self.layer.weight_shape
        return torch.Size(shape[::-1] if self.transposed else shape)

    @property
    def ndim(self) -> int:
        """Dimensions of the dense weight."""
        return len(self.layer.weight_shape)

    def dim(self) -> int:
        """Dimensions of the dense weight."""
        return self.ndim

    def ndimension(self) -> NoReturn:
        """Refused: four functions of `torch.nn.init` begin with it, and would write what is not live."""
        raise TypeError(
            "torch.nn.init.orthogonal_, dirac_, eye_ and sparse_, which ask for ndimension(), must be given "
            f"a dense tensor, got {self!r}; normal_, uniform_, trunc_normal_, xavier_, kaiming_ and "
            "constant_ set live weights alone (and the number of dimensions is .ndim)"
        )

    def size(self, dim: int | None = None) -> Any:
        """That of the dense weight."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Entries of the dense weight."""
        return math.prod(self.layer.weight_shape)

    nelement = numel

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """That of the live weights."""
        return self._held.dtype

    @property
    def device(self) -> torch.device:
        """That of the live weights."""
        return self._held.device

    @property
    def is_meta(self) -> bool:
        """Whether the layer has no data."""
        return self._held.is_meta

    @property
    def requires_grad(self) -> bool:
        """Whether the layer's Parameter does, unless this is detached."""
        return self._held.requires_grad and not self._detached

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Say it of the layer's Parameter."""
        if self._detached or self._copied is not None:
            if requires_grad != self.requires_grad:
                raise TypeError("requires_grad must be set on layer.weight itself, got a weight made of it")
        elif requires_grad != self.requires_grad:
            self.layer.stored.requires_grad_(requires_grad)
        return self

    @property
    def is_leaf(self) -> bool:
        """False: the leaf is the layer's Parameter, and an optimizer refuses what is none."""
        return False

    #: Nor does it keep a gradient.
    retains_grad = False

    @property
    def grad(self) -> None:
        """None, unless the layer's Parameter has a gradient.

        Raises
        ------
        TypeError
            If it has.
        """
        if not self._detached and self._copied is None and self._held.grad is not None:
            raise TypeError(
                "the gradient of a sparse weight must be read as layer.weight_values.grad, one entry for "
                "each live weight, got .grad of layer.weight"
            )

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        if grad is not None:
            refuse_to_write(self, "grad")
        self.layer.stored.grad = None
