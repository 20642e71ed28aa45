"""Connections replaced as a whole, by loading or drawing anew: what belongs to one follows by position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.nn.follow.optimizers import optimizers_of
from sparselab.nn.follow.state_move import StateMove


@contextmanager
def connections_replaced(layer: Any) -> Iterator[None]:
    """Around whatever gives a layer other connections than a `rewrite` would.

    Gradient, optimizer state and what an algorithm keeps for each connection go with their positions, as in a
    dense layer; what is new starts at 0.

    Parameters
    ----------
    layer : SparseLayer

    Notes
    -----
    State that has no entry for each connection cannot follow and is dropped: the optimizer begins anew with
    this layer. O(nnz), and nothing at all where nobody keeps anything for the connections.
    """
    held = layer._parameters.get(layer.storage.parameter)
    if held is None or held.is_meta:
        yield
        return
    follower, optimizers = layer.storage.follower, optimizers_of(held)
    if not (optimizers or follower or held.grad is not None):
        yield
        return
    moves = [move for each in optimizers if (move := _move_of(layer, each)) is not None]
    before, gradient = layer.positions(), held.grad
    held.grad = None
    try:
        yield
    finally:
        source = sources(before, layer.positions())
        if source is None:
            held.grad = gradient
        else:
            if gradient is not None:
                held.grad = layer.moved(gradient, source)
            for move in moves:
                move.apply(source)
            if follower is not None:
                follower(source)


def _move_of(layer: Any, optimizer: Any) -> StateMove | None:
    try:
        return StateMove(layer, [optimizer])
    except RuntimeError:
        optimizer.state.pop(layer.stored, None)
        return None


def sources(before: Tensor, after: Tensor) -> Tensor | None:
    """The old slot of each new slot, int64, or -1 where there was none; None if the positions are the same.

    Parameters
    ----------
    before, after : int64, ascending
        Positions.

    Examples
    --------
    >>> sources(torch.tensor([1, 4, 7]), torch.tensor([0, 4, 7, 9]))
    tensor([-1,  1,  2, -1])
    """
    old, new = before.cpu().numpy(), after.cpu().numpy()
    if np.array_equal(old, new):
        return None
    return torch.from_numpy(_slots(old, new))


def difference(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The slots to drop and the positions to grow that make one set of positions another; ascending.

    Parameters
    ----------
    before, after : int64, ascending

    Examples
    --------
    >>> difference(torch.tensor([1, 4, 7]), torch.tensor([0, 4, 7, 9]))
    (tensor([0]), tensor([0, 9]))
    """
    old, new = before.cpu().numpy(), after.cpu().numpy()
    gone, come = np.flatnonzero(_slots(new, old) < 0), new[_slots(old, new) < 0]
    return torch.from_numpy(gone), torch.from_numpy(come)


def take_connections(layer: Any, positions: Tensor) -> None:
    """Rewire a layer to int64 positions, ascending; weights, gradient and state that stay go with theirs."""
    drop, grow = difference(layer.positions(), positions)
    if len(drop) or len(grow):
        with connections_replaced(layer):
            layer.rewrite(drop, grow)


def _slots(known: Array, wanted: Array) -> Array:
    """Where each wanted position is among the known ones, or -1."""
    if not known.size:
        return np.full(wanted.size, -1, np.int64)
    at = np.minimum(np.searchsorted(known, wanted), known.size - 1)
    return np.where(known[at] == wanted, at, -1).astype(np.int64)
