"""Optimizer state follows the connections.

An optimizer keeps momentum and the like in one tensor per parameter, entry for entry. When a layer drops and
grows connections the entries of its Parameter move, and whatever is kept per entry has to move with them;
else a moment silently ends up at a connection it was never measured on. (The layer itself moves the weights
and their gradient, and knows how.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

#: What a new connection starts with.
GrownState = Literal["zero", "mean"]


class Connected(Protocol):
    """What is asked of a layer; see `sparselab.nn.layers.base.SparseLayer`."""

    @property
    def stored(self) -> nn.Parameter:
        """The Parameter that holds the weights."""

    def per_connection(self, entries: Tensor) -> Tensor:
        """Entries in slot order."""

    def put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots."""

    def moved(self, entries: Tensor, source: Tensor) -> Tensor:
        """Entries after a rewrite."""


class StateMove:
    """What has to follow the connections of one layer; made before the rewrite, applied after it.

    Parameters
    ----------
    layer : Connected
    optimizers : iterable of optimizers
        Those that may keep state for its weights.

    Raises
    ------
    RuntimeError
        If the state of ``layer.stored`` has a tensor of another shape, or tensors inside a container. Nothing
        has been changed then.
    """

    def __init__(self, layer: Connected, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._layer = layer
        self._places: list[tuple[dict[str, Any], str]] = []
        weights = layer.stored
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                if any(p is weights for group in optimizer.param_groups for p in group["params"]):
                    raise RuntimeError(_unmovable(optimizer, "its state is one vector over all parameters"))
            elif weights in optimizer.state:
                self._collect(optimizer, optimizer.state[weights], weights.shape)

    def _collect(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], shape: torch.Size) -> None:
        for name, entry in state.items():
            if isinstance(entry, torch.Tensor):
                if entry.shape == shape:
                    self._places.append((state, name))
                elif entry.numel() > 1:
                    shapes = f"{tuple(entry.shape)}, not {tuple(shape)}"
                    raise RuntimeError(_unmovable(optimizer, f"state {name!r} has shape {shapes}"))
            elif _holds_tensor(entry):
                raise RuntimeError(_unmovable(optimizer, f"state {name!r} is a {type(entry).__name__}"))

    @torch.no_grad()
    def apply(self, source: torch.Tensor, grown: GrownState = "zero") -> None:
        """Move every entry with its connection.

        Parameters
        ----------
        source : int64 tensor, (new nnz,)
            Old slot of each new slot, or -1.
        grown : {"zero", "mean"}
            What new connections start with: 0, or the mean over those that are not new.
        """
        new = source < 0
        for state, name in self._places:
            state[name] = self._layer.moved(state[name], source)
            if grown == "mean" and 0 < (n_new := int(new.sum())) < source.numel():
                mean = self._layer.per_connection(state[name])[~new].mean(0)
                self._layer.put(state[name], new.nonzero()[:, 0], mean.expand(n_new, *mean.shape))


def _holds_tensor(entry: object) -> bool:
    if isinstance(entry, torch.Tensor):
        return True
    if isinstance(entry, dict):
        return any(_holds_tensor(item) for item in entry.values())
    if isinstance(entry, (list, tuple, set)):
        return any(_holds_tensor(item) for item in entry)
    return False


def _unmovable(optimizer: torch.optim.Optimizer, what: str) -> str:
    return (
        f"the state that {type(optimizer).__name__} keeps for a sparse layer cannot follow its connections: "
        f"{what}. Only state with one entry per connection can be moved; use an optimizer that keeps such "
        f"state (SGD, Adam, AdamW, RMSprop, ...) for sparse layers, or the Static algorithm"
    )
