"""What all parts of an algorithm have in common: a description, a state, and an eye on the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sparselab.dst.replicas import Ranks
from sparselab.dst.view import LayerView
from sparselab.nn.layers.base import SparseLayer


class Part:
    """One choice that an algorithm is made of; every method has a default, and few parts need another.

    Layers are numbered in the order in which they were attached: `attach` meets number 0 first, and
    ``view.index`` is that number. A part that keeps something for its layers belongs to one algorithm.

    Attributes
    ----------
    of_blocks : bool
        Whether it serves layers whose connections are blocks of weights.
    """

    of_blocks: bool = False

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return type(self).__name__

    def __repr__(self) -> str:
        description = self.describe()
        return description if description.endswith(")") else f"{description}()"

    def attach(self, layer: SparseLayer) -> None:
        """Take note of one more layer."""

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Forget all layers, and leave nothing behind on them."""

    def meet(self, views: Sequence[LayerView], ranks: Ranks) -> None:
        """Bring together what several processes know of the layers that an update may change.

        Called first of all in an update, and only where there are several: in all of them, for the same
        layers. Whatever an update depends on must be the same in all processes from then on. Weights, their
        gradient and topologies are; what a part has seen of a process's own share of the batch is not.

        Parameters
        ----------
        views : sequence of LayerView
            Of all layers that are trained.
        ranks : Ranks
            What the processes exchange numbers by.
        """

    def consolidate(self, ranks: Ranks) -> None:
        """Bring together what is in `state_dict`, if processes keep their own part of it; as `meet`."""

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be updated now; empty if it can."""
        return ""

    def follow(self, view: LayerView, source: torch.Tensor) -> None:
        """Move what is kept for each connection of a layer that has just been rewritten, or loaded.

        Loading and drawing anew may come before the first step.

        Parameters
        ----------
        view : LayerView
        source : int64 tensor, (new nnz,)
            Old slot of each new slot, or -1 where the connection is new.
        """

    def state_dict(self) -> dict[str, Any]:
        """What has been learnt so far and is needed to go on: plain values and tensors."""
        return {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if `load_state_dict` could not take this; change nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, once `check_state` has passed it."""
