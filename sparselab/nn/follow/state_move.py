"""Optimizer state follows the connections.

An optimizer keeps momentum and the like in one tensor per parameter, entry for entry. When a layer drops and
grows connections the entries of its Parameter move, and whatever is kept per entry has to move with them;
else a moment silently ends up at a connection it was never measured on. (The layer itself moves the weights
and their gradient, and knows how.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sparselab.nn.follow.bias_correction import AGE, ages_in, begin_ages, corrects_bias, settle_ages


@dataclass(frozen=True)
class Young:
    """A state of 0, corrected for bias by the connection's own age; also called "young" where nothing is set.

    Parameters
    ----------
    warmup : int
        Steps over which its moves grow from nothing to their whole, linearly.

    Raises
    ------
    TypeError, ValueError
        If that is no number of steps.
    """

    warmup: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int):
            raise TypeError(f"warmup must be an integer, got {self.warmup!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup!r}")


#: What a new connection starts with.
GrownState = Literal["young", "zero", "mean"] | Young


class Connected(Protocol):
    """What is asked of a layer; see `sparselab.nn.layers.base.SparseLayer`."""

    @property
    def stored(self) -> nn.Parameter:
        """The Parameter that holds the weights."""

    @property
    def block_shape(self) -> tuple[int, int]:
        """Outputs and inputs that one connection joins."""

    def per_connection(self, entries: Tensor) -> Tensor:
        """Entries in slot order."""

    def put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots."""

    def moved(self, entries: Tensor, source: Tensor) -> Tensor:
        """Entries after a rewrite."""


def foreseen(optimizer: Any, layer: Connected) -> str:
    """Why the state that an optimizer will keep for a layer cannot follow, as far as its class says so.

    Empty where nothing is known against it. Of an optimizer that the class says nothing of, only the state
    that it has after a step can be looked at.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        why = "its state is one vector over all parameters"
    elif isinstance(optimizer, torch.optim.Adafactor) and layer.stored.ndim == 2:
        why = "it keeps numbers for the rows and columns of a matrix, not for its entries"
    else:
        return ""
    return "" if group_of(optimizer, layer.stored) is None else _unmovable(optimizer, why)


def group_of(optimizer: Any, weights: Tensor) -> dict[str, Any] | None:
    """The settings by which an optimizer steps a Parameter; None if it has not got it."""
    for group in optimizer.param_groups:
        if any(each is weights for each in group["params"]):
            return group  # type: ignore[no-any-return]
    return None


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
        If some state for ``layer.stored`` has not one floating entry for each entry of it, or, where weights
        lie block by block, of each block a part. Nothing has been changed then.
    """

    def __init__(self, layer: Connected, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._layer = layer
        #: With the number that a new connection starts with.
        self._places: list[tuple[dict[str, Any], str, float]] = []
        #: What optimizers have that correct for bias.
        self._owners: list[dict[str, Any]] = []
        weights = layer.stored
        seen: set[int] = set()
        for optimizer in optimizers:
            if why := foreseen(optimizer, layer):
                raise RuntimeError(why)
            state = optimizer.state.get(weights)
            # A wrapper may share its state with the optimizer that it wraps.
            if state is None:
                continue
            if corrects_bias(optimizer):
                settle_ages(optimizer, weights)
                if all(each is not state for each in self._owners):
                    self._owners.append(state)
            if id(state) not in seen:
                seen.add(id(state))
                self._collect(optimizer, state, weights)

    def _collect(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], weights: Tensor) -> None:
        for name, entry in state.items():
            if name == AGE:
                continue
            if isinstance(entry, Tensor):
                if not self._fits(entry, weights.shape):
                    if entry.numel() > 1:
                        shapes = f"{tuple(entry.shape)}, not {tuple(weights.shape)}"
                        raise RuntimeError(_unmovable(optimizer, f"state {name!r} has shape {shapes}"))
                elif not _is_number(entry):
                    what = (
                        f"{type(entry).__name__} of {entry.dtype}, whose 0 may be a code for another number"
                    )
                    raise RuntimeError(_unmovable(optimizer, f"state {name!r} is a {what}"))
                else:
                    self._places.append((state, name, _start(optimizer, weights, name)))
            elif _holds_tensor(entry):
                raise RuntimeError(_unmovable(optimizer, f"state {name!r} is a {type(entry).__name__}"))

    def _fits(self, entry: Tensor, shape: torch.Size) -> bool:
        """Whether there is an entry for each weight, or for each row or column of every block."""
        if entry.shape == shape:
            return True
        of_blocks = len(shape) == 3 and shape[1:] == self._layer.block_shape
        sizes = zip(entry.shape[1:], shape[1:], strict=False)
        return (
            of_blocks
            and entry.ndim == 3
            and entry.shape[0] == shape[0]
            and all(own in (1, whole) for own, whole in sizes)
        )

    @torch.no_grad()
    def apply(self, source: torch.Tensor, grown: GrownState = "young") -> None:
        """Move every entry with its connection.

        Parameters
        ----------
        source : int64 tensor, (new nnz,)
            Old slot of each new slot, or -1.
        grown : {"young", "zero", "mean"} or Young
            What new connections start with: what the optimizer starts any weight with, which is 0 but for
            ``step_size`` of Rprop and ``sum`` of Adagrad, corrected for bias by their own age or, with
            "zero", by the optimizer's; or the mean over those that are not new.
        """
        new = (source < 0).nonzero()[:, 0]
        for state, name, start in self._places:
            state[name] = entries = self._layer.moved(state[name], source)
            if grown == "mean" and 0 < new.numel() < source.numel():
                mean = self._layer.per_connection(entries)[source >= 0].mean(0)
                self._put(entries, new, mean.expand(new.numel(), *mean.shape))
            elif start and new.numel():
                self._put(entries, new, torch.full_like(self._layer.per_connection(entries)[new], start))
        age = Young() if grown == "young" else grown
        for state in self._owners:
            self._follow(state, source, new, age if isinstance(age, Young) else None)

    def _follow(self, state: dict[str, Any], source: Tensor, new: Tensor, young: Young | None) -> None:
        """Move the ages that are there, and begin those of young connections."""
        if AGE in state:
            state[AGE] = self._layer.moved(ages_in(state), source)
        if young is not None and new.numel():
            ages = begin_ages(state, self._age_shape(), young.warmup)
            self._put(ages, new, torch.ones_like(self._layer.per_connection(ages)[new]))

    def _age_shape(self) -> tuple[int, ...]:
        """One age for each connection, or, where weights lie as in a dense layer, for each weight."""
        shape = tuple(self._layer.stored.shape)
        return (shape[0], 1, 1) if len(shape) == 3 and shape[1:] == self._layer.block_shape else shape

    def _put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        if entries.shape == self._layer.stored.shape:
            self._layer.put(entries, slots, numbers)
        else:  # a part of each block
            entries[slots] = numbers


def _start(optimizer: torch.optim.Optimizer, weights: Tensor, name: str) -> float:
    """What an optimizer of torch starts a weight's state of some name with."""
    for kind, state, setting in _STARTS:
        if state == name and isinstance(optimizer, kind):
            group = group_of(optimizer, weights)
            return 0.0 if group is None else float(group[setting])
    return 0.0


#: State that does not start at 0: of which optimizer, its name, and the setting that it starts with.
_STARTS = (
    (torch.optim.Rprop, "step_size", "lr"),
    (torch.optim.Adagrad, "sum", "initial_accumulator_value"),
)


def _is_number(entry: Tensor) -> bool:
    """Whether entries are the numbers that they look like, and no codes."""
    plain = type(entry) in (Tensor, nn.Parameter)
    return plain and entry.itemsize > 1 and (entry.is_floating_point() or entry.is_complex())


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
        f"{what}. Only state with one number per weight can be moved; use an optimizer that keeps such "
        f"state (SGD, Adam, AdamW, RMSprop, ...) for sparse layers, or the Static algorithm"
    )
