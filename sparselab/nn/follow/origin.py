"""Copies of a layer that somebody averages slot by slot with the layer they were copied from.

Averages of weights, target networks and the like are written for dense layers: they go through the parameters
of two models and mix entry with entry. That is right while both layers have the same connections, and a wrong
number without any sign once one of them was rewired. So a copy remembers its origin, which tells it before it
is rewired. Before the copy computes, or is saved, copied or made dense, it looks whether its weights were
written to since.
"""

from __future__ import annotations

import weakref
import zlib
from typing import Any

import torch
from torch import Tensor

from sparselab.nn.follow.optimizers import optimizers_of

_ADVICE = (
    "an average by slots is wrong once connections differ. Average with sparselab.soft_update, "
    "sparselab.average or sparselab.AveragedModel, which go by position. If all of this was meant, tell the "
    "layer so: layer.forget_origin()"
)


class Origin:
    """What a copy remembers of the layer that it was made from, or loaded from.

    Parameters
    ----------
    copy : SparseLayer
    layer : SparseLayer
        Held weakly.
    """

    def __init__(self, copy: Any, layer: Any) -> None:
        self._layer, self._copy = weakref.ref(layer), weakref.ref(copy)
        alive = [each for each in layer.storage.copies if each() is not None]
        layer.storage.copies = [*alive, weakref.ref(self)]
        self.settle(copy)

    def settle(self, copy: Any) -> None:
        """Take the connections of both layers, and the weights of the copy, for what they should be."""
        layer = self._layer()
        self._seen = None if layer is None else layer.storage.stamp(layer)
        self._own = copy.storage.stamp(copy)
        self._checksum = _checksum(copy)
        #: Of the weights, when the origin got other connections.
        self._weights: int | None = None

    def foresee(self) -> None:
        """Note the weights of the copy, because the layer is about to get other connections."""
        copy = self._copy()
        if copy is not None and self._weights is None and copy.storage.origin is self:
            self._weights = _hash(copy.stored)

    def check(self, copy: Any) -> None:
        """Raise RuntimeError if the weights of the copy were mixed with those of other connections."""
        layer, own = self._layer(), copy.storage.stamp(copy)
        if layer is None:
            copy.storage.origin = None
            return
        seen = layer.storage.stamp(layer)
        if own == self._own and seen == self._seen:
            return
        if optimizers_of(copy.stored):  # trained by itself
            copy.storage.origin = None
        elif own != self._own and _checksum(copy) != self._checksum:
            if not _equal(copy, layer):
                raise RuntimeError(
                    f"the topology ({', '.join(copy.storage.pattern)}) of {_name(copy)}, a copy of another "
                    f"layer, was written to in place: {_ADVICE}"
                )
            self.settle(copy)
        elif self._checksum == _checksum(layer):
            self.settle(copy)
        else:
            self._own = own
            weights = _hash(copy.stored)
            if self._weights is None:
                self._weights = weights
            elif weights != self._weights:
                raise RuntimeError(
                    f"the weights of {_name(copy)} were written to after the layer that it is a copy of had "
                    f"got other connections: {_ADVICE}"
                )


def _checksum(layer: Any) -> int:
    """Of the connections."""
    found = 0
    for name in layer.storage.pattern:
        found = _hash(layer._buffers[name], found)
    return found


def _hash(tensor: Tensor, start: int = 0) -> int:
    tensor = tensor.detach().cpu().contiguous()
    return zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, start) if tensor.numel() else start


def _equal(copy: Any, layer: Any) -> bool:
    return _checksum(copy) == _checksum(layer) and _hash(copy.stored) == _hash(layer.stored)


def _name(layer: Any) -> str:
    return f"a {type(layer).__name__} of shape {tuple(layer.shape)}"
