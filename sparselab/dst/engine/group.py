"""Different algorithms for different layers of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from sparselab._names import Key, first_keys, listed, match, matcher, told
from sparselab.dst.engine.base import SparsityAlgorithm
from sparselab.dst.engine.driven import Driven, StepHandle
from sparselab.dst.replicas import ALL_REPLICAS, Replicas
from sparselab.dst.view import UpdateReport
from sparselab.nn.follow.replicas import unwrapped
from sparselab.nn.layers.base import SparseLayer, find_sparse


class Group(Driven):
    """Several algorithms, each for the sparse layers that match its key.

    Parameters
    ----------
    algorithms : mapping of str, re.Pattern, type or callable to SparsityAlgorithm
        Key to algorithm, as the keys of `sparselab.sparsify`: globs of qualified layer names, regular
        expressions, classes of sparse layers, and functions of a layer and its name. Of the keys that match a
        layer, the first one counts. Layers that match none keep their topology.

    Raises
    ------
    TypeError, ValueError
        If a key is none, a value no algorithm, one algorithm given twice, or there is none.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import SET, Group, RigL
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.ModuleDict({"attn": SparseLinear(64, 64), "mlp": SparseLinear(64, 64)})
    >>> group = Group({"attn*": RigL(), SparseLinear: SET()})
    >>> group.attach(model)
    >>> [algorithm.names for algorithm in group]
    [('attn',), ('mlp',)]
    """

    def __init__(self, algorithms: Mapping[Any, SparsityAlgorithm]) -> None:
        self._algorithms: dict[Key, SparsityAlgorithm] = dict(algorithms)
        if not self._algorithms:
            raise ValueError("algorithms must have at least one key, got none")
        for key, algorithm in self._algorithms.items():
            matcher("algorithms", key)
            if not isinstance(algorithm, SparsityAlgorithm):
                raise TypeError(
                    f"algorithms must map keys to sparsity algorithms, got {told(key)}: "
                    f"{type(algorithm).__name__}"
                )
        if len(set(map(id, self._algorithms.values()))) < len(self._algorithms):
            raise ValueError("algorithms must hold each algorithm once; join the keys, or make another one")

    def __repr__(self) -> str:
        members = ", ".join(f"{told(key)}: {each!r}" for key, each in self._algorithms.items())
        return f"Group({{{members}}})"

    def __getitem__(self, key: Key) -> SparsityAlgorithm:
        return self._algorithms[key]

    def __iter__(self) -> Iterator[SparsityAlgorithm]:
        return iter(self._algorithms.values())

    def __len__(self) -> int:
        return len(self._algorithms)

    def __call__(self, module: torch.nn.Module) -> None:
        """Refused: ``model.apply(group)`` would show it layers without their names; use `attach`."""
        raise TypeError("a Group chooses by name; call group.attach(model) instead of model.apply(group)")

    @property
    def last_update(self) -> tuple[UpdateReport, ...] | None:
        """What the last update of each algorithm did to its layers, in the order of `layers`.

        None unless each has one.
        """
        found = [each.last_update for each in self]
        return None if None in found else tuple(report for each in found for report in each or ())

    @property
    def layers(self) -> tuple[SparseLayer, ...]:
        """The attached layers of all algorithms."""
        return tuple(layer for algorithm in self for layer in algorithm.layers)

    def attach(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | None = None,
        *,
        replicas: Replicas | None = ALL_REPLICAS,
    ) -> StepHandle | None:
        """Attach every algorithm to its layers, and optionally step along with an optimizer.

        Either all of it happens or nothing. What the algorithms draw at random differs from one to the other,
        also where their seeds are the same.

        Parameters
        ----------
        model : torch.nn.Module
        optimizer : torch.optim.Optimizer, optional
            Steps the group after each of its steps from now on; calling `step` is an error then.
        replicas : Replicas or None
            As of `SparsityAlgorithm.attach`.

        Returns
        -------
        StepHandle or None
            Its ``remove()`` ends the automatic steps; None without an optimizer.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            If a key is the first match of no sparse layer, or as `SparsityAlgorithm.attach` of one of
            them.
        """
        layers = dict(find_sparse(model := unwrapped(model)))
        first = first_keys(match("algorithms", self._algorithms, layers, "model's sparse layers"))
        chosen: dict[Key, list[tuple[str, SparseLayer]]] = {key: [] for key in self._algorithms}
        for name, layer in layers.items():
            if name in first:
                chosen[first[name]].append((name, layer))
        for key, pairs in chosen.items():
            if not pairs:
                raise ValueError(
                    f"algorithms must each have a layer, got {told(key)} without one that no key before it "
                    f"took; the model's sparse layers are: {listed(layers)}"
                )
        for key, algorithm in self._algorithms.items():
            algorithm._check_whole(chosen[key], model)
            algorithm._check_new(chosen[key], layers.values())
        matched = [pair for pairs in chosen.values() for pair in pairs]
        optimizer = self._check_optimizer(optimizer, matched)
        for key, algorithm in self._algorithms.items():
            if optimizer is not None:
                algorithm._check_follows(optimizer, [layer for _, layer in chosen[key]])
        for stream, (key, algorithm) in enumerate(self._algorithms.items()):
            algorithm.stream = stream
            algorithm._attach(chosen[key], replicas)
        return self._drive(optimizer)

    def detach(self) -> None:
        """Give all layers back; see `SparsityAlgorithm.detach`."""
        if self.handle is not None:
            self.handle.remove()
        for algorithm in self:
            algorithm.detach()

    def reset(self) -> None:
        """`detach`, and begin anew at step 0: the same settings for another model."""
        self.detach()
        for algorithm in self:
            algorithm.reset()

    def track(self, optimizer: Optimizer) -> None:
        """Name an optimizer to all algorithms; see `DynamicSparsityAlgorithm.track`."""
        for algorithm in self:
            algorithm.track(optimizer)

    def expect_passes(self, passes: int) -> None:
        """Tell all algorithms; see `DynamicSparsityAlgorithm.expect_passes`."""
        for algorithm in self:
            algorithm.expect_passes(passes)

    def consolidate(self) -> None:
        """In every algorithm; see `DynamicSparsityAlgorithm.consolidate`."""
        for algorithm in self:
            algorithm.consolidate()

    def _check_stepped(self) -> None:
        for algorithm in self:
            algorithm._check_stepped()

    def advance(self) -> None:
        """Do what `step` does in every algorithm, whoever asks."""
        for algorithm in self:
            algorithm.advance()

    def state_dict(self) -> dict[str, Any]:
        """The state of every algorithm, by key; a key that is no str goes by its name and place."""
        return {name: each.state_dict() for name, each in self._named().items()}

    def _named(self) -> dict[str, SparsityAlgorithm]:
        """The algorithms by what a file can keep of their keys."""
        return {
            key if isinstance(key, str) else f"{told(key)} at {place}": each
            for place, (key, each) in enumerate(self._algorithms.items())
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned.

        Parameters
        ----------
        state : mapping
            Read only.

        Raises
        ------
        TypeError, ValueError
            If the keys differ, or the state of one does not fit its algorithm. Nothing has been changed
            then, in none of them.
        """
        named = self._named()
        if list(state) != list(named):
            raise ValueError(f"the state was saved for keys {list(state)}, but this group has {list(named)}")
        for name, algorithm in named.items():
            algorithm._check_state(state[name])
        for name, algorithm in named.items():
            algorithm._load_state(state[name])
