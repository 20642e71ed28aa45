"""An update in several processes: all of them begin it alike, and end it alike, or all of them stop."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sparselab.dst.replicas import Ranks
from sparselab.kernels.arrays import Array
from sparselab.nn.follow.checksums import of_tensor, of_text, of_weights
from sparselab.nn.follow.replicas import require_same_connections
from sparselab.nn.layers.base import SparseLayer


class CommonUpdate:
    """One update of the replicas that some processes hold.

    Parameters
    ----------
    ranks : Ranks
    step : int
        Finished optimizer steps.
    name, settings : str
        Of the algorithm.
    layers : mapping of str to SparseLayer
        All that it has, by name.

    Raises
    ------
    RuntimeError
        In all processes, if one of them is at another step, has other settings, other frozen layers, or a
        layer of other connections.

    Notes
    -----
    What is compared are checksums: six numbers of each process before an update, and two after it.
    """

    def __init__(
        self, ranks: Ranks, step: int, name: str, settings: str, layers: Mapping[str, SparseLayer]
    ) -> None:
        self._ranks, self._step, self._layers = ranks, step, layers
        require_same_connections(layers, ranks.group, f"before the update of step {step}", _WHO)
        # Addresses of objects are those of a process.
        told = re.sub(r" at 0x[0-9a-f]+", "", settings)
        frozen = [not layer.stored.requires_grad for layer in layers.values()]
        ours = [step, of_text(told), of_text(repr(frozen))]
        self._weights = [(of_weights(layer) or (None, 0))[1] for layer in layers.values()]
        table = ranks.numbers([*ours, of_tensor(torch.tensor(self._weights))])
        for column, what in zip(table.T, ("steps", "settings", "frozen layers"), strict=False):
            if (others := np.flatnonzero(column != column[0])).size:
                steps = f": {table[:, 0].tolist()}" if what == "steps" else f"; here it is {told}"
                raise RuntimeError(
                    f"all processes must step one {name} with the {what} of the first, but those of "
                    f"{ranks.named(others)} are others{steps}"
                )
        #: Of the processes whose weights differ from the first's.
        self._strangers: Array = np.flatnonzero(table[:, 3] != table[0, 3])

    def finish(self) -> None:
        """Compare the new connections.

        Raises
        ------
        RuntimeError
            In all processes, if those of one differ from those of the first.
        """
        hint = _PARTS
        if self._strangers.size:
            hint = _WEIGHTS.format(self._ranks.named(self._strangers))
        require_same_connections(
            self._layers, self._ranks.group, f"after the update of step {self._step}", hint
        )


_WHO = (
    ". They must begin with the same ones (DistributedDataParallel sees to that when it wraps a model), and "
    "whatever rewires a layer in one process must do so in all"
)
_PARTS = (
    ". A part of the algorithm went by what only one process knows: it must bring that together in `meet`, "
    "and draw from view.rng()"
)
_WEIGHTS = (
    ". Their weights had differed before in {}: gradients were not averaged over the processes, or weights "
    "changed in one alone. Use the output of the wrapped model, or average weights before the update "
    "(sparselab.average_over_ranks)"
)


def settings_of(config: Mapping[str, Any], layers: Sequence[SparseLayer], stream: int) -> str:
    """What replicas must have in common, as text."""
    return f"{dict(config)!r} of {[layer.shape for layer in layers]}, stream {stream}"
