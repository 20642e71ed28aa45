"""Watches updates: how many connections came and went, how much was explored, what has died."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from sparselab.dst.engine.base import SparsityAlgorithm
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.engine.group import Group
from sparselab.dst.monitor.position_set import PositionSet
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.view import UpdateReport
from sparselab.nn.layers.base import SparseLayer, as_matrix

TOTAL = "total"
_COUNTS = ("nnz", "dropped", "grown", "regrown", "dead_neurons", "unused_inputs", "ablated_rows")
#: Positions looked up together, which bounds what that allocates.
_AT_ONCE = 1 << 16


class ScalarWriter(Protocol):
    """What takes numbers down, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


@dataclass
class _Watched:
    """One layer, and what is remembered of it."""

    layer: SparseLayer
    first: PositionSet
    explored: PositionSet


class Monitor:
    """Records what every update does to the layers of an algorithm, one by one and in total.

    Parameters
    ----------
    algorithm : SparsityAlgorithm or Group
        Already attached; layers that are attached later are not watched.
    positions : bool
        Whether to remember the first topology and all positions ever used, which takes a quarter of a byte
        for each position (not connection) of the layers. Without, `overlap_with_first` and `explored` are
        not known.

    Attributes
    ----------
    history : list of dict
        ``{"step", "total": numbers, "layers": {name: numbers}}``, first of the layers as they were found,
        then of each update; plain values, fit for JSON.

    Raises
    ------
    TypeError
        If `algorithm` is neither an algorithm nor a group.
    ValueError
        If it has no layers yet, or two of one name.

    Notes
    -----
    The numbers, each of a layer and in total:

    - ``target_sparsity``: what the algorithm was told, where it was; with a scope or a redistribution that
      moves connections among layers, only in total
    - ``sparsity``, ``nnz``: what the layer has
    - ``dropped``, ``grown``, ``regrown``: as in `UpdateReport`
    - ``survived``: share of the connections before the update that outlived it
    - ``overlap_with_first``: share of the first connections that are there now
    - ``explored``: share of all positions that have ever had a connection, the in-time over-parameterization
      rate R_s of Liu et al.
    - ``dead_neurons``, ``unused_inputs``: rows and columns without a connection
    - ``ablated_rows``: rows that the algorithm has switched off, if it has a method ``ablated_rows()`` that
      returns them for each layer; else those without a connection

    An update costs O(nnz + rows + columns) beside the update itself; other steps cost nothing.

    References
    ----------
    Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
    Training", ICML 2021, section 3.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import SET, Monitor
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.9))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = SET(0.9, drop_fraction=0.5, update_freq=10)
    >>> handle = algorithm.attach(model, optimizer)
    >>> monitor = Monitor(algorithm)
    >>> for _ in range(20):
    ...     optimizer.step()
    >>> [record["step"] for record in monitor.history], monitor.latest["0/dropped"]
    ([0, 10, 20], 102)
    """

    def __init__(self, algorithm: SparsityAlgorithm | Group, *, positions: bool = True) -> None:
        if not isinstance(algorithm, (SparsityAlgorithm, Group)):
            raise TypeError(
                f"algorithm must be a sparsity algorithm or a Group, got {type(algorithm).__name__}"
            )
        self._algorithms = list(algorithm) if isinstance(algorithm, Group) else [algorithm]
        self._names = {each: each.names for each in self._algorithms}
        names = [name for each in self._names.values() for name in each]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"algorithm must have been attached to layers of different names before it is watched, got "
                f"{names}"
            )
        self._positions = positions
        self._layers = {
            name: _Watched(layer, PositionSet(size), PositionSet(size))
            for each in self._algorithms
            for name, layer in zip(each.names, each.layers, strict=True)
            for size in [math.prod(layer.grid) if positions else 0]
        }
        self._counts: dict[str, dict[str, float]] = {}
        self.history: list[dict[str, Any]] = []
        self._n_told = 0
        for watched in self._layers.values() if positions else ():
            watched.first.add(as_matrix(watched.layer).positions())
        for each in self._algorithms:
            self._measure(each)
        self._record(max(each.steps_done for each in self._algorithms))
        self._handles: list[RemovableHandle] = [
            each.register_update_hook(self._updated)
            for each in self._algorithms
            if isinstance(each, DynamicSparsityAlgorithm)
        ]

    @property
    def latest(self) -> dict[str, float]:
        """The numbers of the last update, as ``{"layer/number" or "total/number": value}``."""
        return _flat(self.history[-1])

    def remove(self) -> None:
        """Stop watching; what was recorded stays."""
        for handle in self._handles:
            handle.remove()

    def news(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The step and the numbers (as in `latest`) of each record that has not been returned before."""
        while self._n_told < len(self.history):
            record = self.history[self._n_told]
            self._n_told += 1
            yield record["step"], _flat(record)

    def write(self, writer: ScalarWriter) -> None:
        """Write the `news`; call it as often as you like.

        Parameters
        ----------
        writer : ScalarWriter
            Such as ``torch.utils.tensorboard.SummaryWriter``.
        """
        for step, numbers in self.news():
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw sparsity, counts, exploration and the connections of each layer, over the steps.

        Parameters
        ----------
        path : path
            Where to write; the suffix says how (``.png``, ``.pdf``, ``.svg``).

        Raises
        ------
        ModuleNotFoundError
            If matplotlib is not installed.
        """
        from sparselab.dst.monitor.picture import draw

        draw(path, self.history)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, in plain values and tensors."""
        return {
            "history": copy.deepcopy(self.history),
            "told": self._n_told,
            "positions": {
                name: {
                    kind: {"bits": torch.from_numpy(known.bits.copy()), "count": known.count}
                    for kind, known in (("first", watched.first), ("explored", watched.explored))
                }
                for name, watched in self._layers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; load the model's state first.

        Parameters
        ----------
        state : mapping
            Read only.

        Raises
        ------
        ValueError
            If it was saved for other layers, or with another choice of `positions`. Nothing has been changed
            then.
        """
        saved = state["positions"]
        lengths = {name: each["first"]["bits"].numel() for name, each in saved.items()}
        ours = {name: watched.first.bits.size for name, watched in self._layers.items()}
        if lengths != ours:
            raise ValueError(
                f"state must be of a monitor of the same layers and the same `positions`; it remembers "
                f"(bytes for each layer) {lengths}, this one {ours}"
            )
        for name, watched in self._layers.items():
            for kind, known in (("first", watched.first), ("explored", watched.explored)):
                known.bits = saved[name][kind]["bits"].cpu().numpy().copy()
                known.count = saved[name][kind]["count"]
        self.history = copy.deepcopy(state["history"])
        self._n_told = state["told"]
        for each in self._algorithms:
            self._measure(each)

    def _updated(self, algorithm: DynamicSparsityAlgorithm) -> None:
        watched = tuple(self._layers[name].layer for name in self._names[algorithm])
        if any(a is not b for a, b in zip_longest(watched, algorithm.layers[: len(watched)])):
            raise RuntimeError(
                f"a Monitor must watch the layers that its algorithm has, got a {type(algorithm).__name__} "
                f"that was attached to others since. remove() the monitor, and make a new one"
            )
        step = algorithm.steps_done
        if self.history[-1]["step"] == step:
            # Another algorithm of the group has updated at this step too; one record tells of both.
            self.history.pop()
            self._n_told = min(self._n_told, len(self.history))
        else:
            for counts in self._counts.values():
                counts.update(dropped=0, grown=0, regrown=0, before=counts["nnz"], survived=counts["nnz"])
        self._measure(algorithm, algorithm.last_update)
        self._record(step)

    def _measure(self, algorithm: SparsityAlgorithm, reports: tuple[UpdateReport, ...] | None = None) -> None:
        """Count what the layers of an algorithm have now; without reports, nothing has happened to them."""
        ablated = algorithm.ablated_rows() if hasattr(algorithm, "ablated_rows") else None
        target = _target(algorithm, algorithm.steps_done, started=reports is not None)
        for index, name in enumerate(self._names[algorithm]):
            layer = self._layers[name].layer
            W = as_matrix(layer)
            used = np.zeros(W.shape[1], np.bool_)
            used[W.indices] = True
            dead = int(np.count_nonzero(W.row_nnz == 0))
            report = UpdateReport(nnz=layer.nnz) if reports is None else reports[index]
            counts: dict[str, float] = {
                "size": W.shape[0] * W.shape[1],
                "nnz": layer.nnz,
                "dropped": report.dropped,
                "grown": report.grown,
                "regrown": report.regrown,
                "before": report.nnz - report.grown + report.dropped,
                "survived": report.nnz - report.grown + report.regrown,
                "dead_neurons": dead,
                "unused_inputs": int(used.size - np.count_nonzero(used)),
                "ablated_rows": dead if ablated is None else len(ablated[index]),
            }
            if target is not None:
                counts["target"] = target * counts["size"]
            if self._positions:
                counts.update(_remember(self._layers[name], W.positions()))
            self._counts[name] = counts

    def _record(self, step: int) -> None:
        layers = {name: _numbers(counts) for name, counts in self._counts.items()}
        for each in self._algorithms:
            for name in self._names[each] if _moves_among_layers(each) else ():
                layers[name].pop("target_sparsity", None)
        shared = set.intersection(*(set(counts) for counts in self._counts.values()))
        total = {key: sum(counts[key] for counts in self._counts.values()) for key in shared}
        self.history.append({"step": step, TOTAL: _numbers(total), "layers": layers})


def _remember(watched: _Watched, positions: Any) -> dict[str, int]:
    kept = 0
    for start in range(0, positions.size, _AT_ONCE):
        some = positions[start : start + _AT_ONCE]
        watched.explored.add(some)
        kept += int(np.count_nonzero(watched.first.has(some)))
    return {"first": watched.first.count, "of_first": kept, "explored": watched.explored.count}


def _target(algorithm: SparsityAlgorithm, step: int, started: bool) -> float | None:
    """The sparsity an algorithm was told to have. Before the first update a schedule is not yet in force."""
    if isinstance(algorithm.sparsity, Schedule):
        return algorithm.sparsity(step) if started else None
    return algorithm.sparsity


def _moves_among_layers(algorithm: SparsityAlgorithm) -> bool:
    return isinstance(algorithm, DynamicSparsityAlgorithm) and (
        algorithm.scope == "network" or algorithm.redistribute is not None
    )


def _numbers(counts: Mapping[str, float]) -> dict[str, float]:
    """What is recorded of one layer, or of all of them together."""
    size = counts["size"]
    numbers = {"sparsity": 1 - _share(counts["nnz"], size)}
    if "target" in counts:
        numbers["target_sparsity"] = counts["target"] / size if size else 0.0
    numbers.update({name: counts[name] for name in _COUNTS})
    numbers["survived"] = _share(counts["survived"], counts["before"])
    if "explored" in counts:
        numbers["overlap_with_first"] = _share(counts["of_first"], counts["first"])
        numbers["explored"] = _share(counts["explored"], size)
    return numbers


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    groups = {**record["layers"], TOTAL: record[TOTAL]}
    return {
        f"{group}/{name}": number for group, numbers in groups.items() for name, number in numbers.items()
    }
