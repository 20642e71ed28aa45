"""Copies of a layer that somebody averages slot by slot with one another.

Averages of weights, target networks and the like are written for dense layers: they go through the parameters
of two models and mix entry with entry. That is right while both layers have the same connections, and a wrong
number without any sign once one of them was rewired. So a layer and its copies know each other. Before one of
them is rewired the others take note of their weights; and before one that no optimizer trains computes, or is
saved, copied or made dense, it looks whether its weights were written to since.
"""

from __future__ import annotations

import weakref
from typing import Any

from sparselab.nn.follow.checksums import of_connections, of_weights
from sparselab.nn.follow.optimizers import is_stepped

_ADVICE = (
    "an average by slots is wrong once connections differ. Average with sparselab.soft_update, "
    "sparselab.average or sparselab.AveragedModel, which go by position. If all of this was meant, tell the "
    "layer so: layer.forget_origin()"
)


class Kin:
    """What a layer remembers of itself, and who its copies and originals are.

    Parameters
    ----------
    layer : SparseLayer
    relatives : WeakSet
        Shared by all of them, and the layer is among them.
    """

    def __init__(self, layer: Any, relatives: weakref.WeakSet[Any]) -> None:
        self.relatives = relatives
        relatives.add(layer)
        self.settle(layer)

    def settle(self, layer: Any) -> None:
        """Take connections and weights of the layer for what they should be."""
        self._tensors = [weakref.ref(each) for each in _tensors(layer)]
        self._stamp, self._checksum = layer.storage.stamp(layer), of_connections(layer)
        #: Of the weights, when a relative got other connections.
        self._noted: tuple[Any, int] | None = None

    def leave(self, layer: Any) -> None:
        """Let the layer be nobody's relative."""
        self.relatives.discard(layer)
        layer.storage.kin = None

    def foresee(self, layer: Any) -> None:
        """Let the relatives note their weights, because the layer is about to get other connections."""
        for each in list(self.relatives):
            kin = each.storage.kin
            if each is not layer and kin is not None and kin.relatives is self.relatives:
                kin.note(each)

    def note(self, layer: Any) -> None:
        """Note the weights, but for those that were noted before."""
        if self._noted is None:
            self._noted = of_weights(layer)

    def check(self, layer: Any) -> None:
        """Raise RuntimeError if the weights were mixed with those of other connections."""
        stamp = layer.storage.stamp(layer)
        if self._noted is None and stamp == self._stamp:
            return
        if any(mine() is not each for mine, each in zip(self._tensors, _tensors(layer), strict=False)):
            return  # others are in the place of the layer's own, as under `torch.func.functional_call`
        if _is_trained(layer):
            self._stamp, self._noted = stamp, None
            return
        if stamp != self._stamp:
            self._stamp, found = stamp, of_connections(layer)
            if found is None:  # moved to the device meta, which says nothing
                self._checksum = None
            elif self._checksum not in (None, found):
                if not any(_equal(layer, other) for other in self._others(layer)):
                    raise RuntimeError(
                        f"the topology ({', '.join(layer.storage.pattern)}) of {_name(layer)}, a copy "
                        f"of another layer or its original, was written to in place: {_ADVICE}"
                    )
                self.settle(layer)
                return
        if self._noted is not None:
            self._check_weights(layer)

    def _check_weights(self, layer: Any) -> None:
        now = of_weights(layer)
        assert self._noted is not None
        if now is None or now[0] != self._noted[0]:  # in another dtype, or somewhere else
            self._noted = now
        elif now != self._noted:
            if any(of_connections(other) != self._checksum for other in self._others(layer)):
                raise RuntimeError(
                    f"the weights of {_name(layer)} were written to after a copy or the original of it had "
                    f"got other connections: {_ADVICE}"
                )
            self._noted = None

    def _others(self, layer: Any) -> list[Any]:
        return [each for each in list(self.relatives) if each is not layer]


def relate(copy: Any, layer: Any) -> None:
    """Let a layer be known as the copy of another one."""
    if layer.indices.is_meta or copy.indices.is_meta:
        return
    if layer.storage.kin is None:
        layer.storage.kin = Kin(layer, weakref.WeakSet())
    copy.storage.kin = Kin(copy, layer.storage.kin.relatives)


def _tensors(layer: Any) -> list[Any]:
    """The tensors that hold the connections and the weights; not the weights if they are computed."""
    storage = layer.storage
    held = [layer._buffers[name] for name in storage.pattern]
    weights = layer._parameters.get(storage.parameter)
    return held if weights is None else [*held, weights]


def _is_trained(layer: Any) -> bool:
    """Whether the layer's weights have a gradient, or an optimizer that has stepped."""
    held = layer._parameters.get(layer.storage.parameter)
    return held is not None and (held.grad is not None or is_stepped(held))


def _equal(layer: Any, other: Any) -> bool:
    return of_connections(layer) == of_connections(other) and of_weights(layer) == of_weights(other)


def _name(layer: Any) -> str:
    return f"a {type(layer).__name__} of shape {tuple(layer.shape)}"
