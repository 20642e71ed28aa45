"""Different algorithms for different layers of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from sparselab._names import first_match, listed
from sparselab.dst.engine.base import SparsityAlgorithm
from sparselab.dst.engine.driven import Driven, StepHandle
from sparselab.nn.layers.base import SparseLayer, find_sparse


class Group(Driven):
    """Several algorithms, each for the sparse layers whose names match its pattern.

    Parameters
    ----------
    algorithms : mapping of str to SparsityAlgorithm
        Pattern of qualified layer names to algorithm. ``*`` matches any characters, dots included, ``?`` one
        character, ``[...]`` a set. Of the patterns that match a layer, the first one counts. Layers that
        match none keep their topology.

    Raises
    ------
    TypeError, ValueError
        If a pattern is not a string, a value no algorithm, one algorithm given twice, or there is none.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import SET, Group, RigL
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.ModuleDict({"attn": SparseLinear(64, 64), "mlp": SparseLinear(64, 64)})
    >>> group = Group({"attn*": RigL(), "*": SET()})
    >>> group.attach(model)
    >>> [algorithm.names for algorithm in group]
    [('attn',), ('mlp',)]
    """

    def __init__(self, algorithms: Mapping[str, SparsityAlgorithm]) -> None:
        self._algorithms = dict(algorithms)
        if not self._algorithms:
            raise ValueError("algorithms must name at least one pattern, got none")
        for pattern, algorithm in self._algorithms.items():
            if not isinstance(pattern, str) or not isinstance(algorithm, SparsityAlgorithm):
                raise TypeError(
                    f"algorithms must map patterns to sparsity algorithms, got {pattern!r}: "
                    f"{type(algorithm).__name__}"
                )
        if len(set(map(id, self._algorithms.values()))) < len(self._algorithms):
            raise ValueError(
                "algorithms must hold each algorithm once; join the patterns, or make another one"
            )

    def __repr__(self) -> str:
        members = ", ".join(f"{pattern!r}: {each!r}" for pattern, each in self._algorithms.items())
        return f"Group({{{members}}})"

    def __getitem__(self, pattern: str) -> SparsityAlgorithm:
        return self._algorithms[pattern]

    def __iter__(self) -> Iterator[SparsityAlgorithm]:
        return iter(self._algorithms.values())

    def __len__(self) -> int:
        return len(self._algorithms)

    def __call__(self, module: torch.nn.Module) -> None:
        """Refused: ``model.apply(group)`` would show it layers without their names; use `attach`."""
        raise TypeError("a Group chooses by name; call group.attach(model) instead of model.apply(group)")

    @property
    def layers(self) -> tuple[SparseLayer, ...]:
        """The attached layers of all algorithms."""
        return tuple(layer for algorithm in self for layer in algorithm.layers)

    def attach(self, model: torch.nn.Module, optimizer: Optimizer | None = None) -> StepHandle | None:
        """Attach every algorithm to its layers, and optionally step along with an optimizer.

        Either all of it happens or nothing. What the algorithms draw at random differs from one to the other,
        also where their seeds are the same.

        Parameters
        ----------
        model : torch.nn.Module
        optimizer : torch.optim.Optimizer, optional
            Steps the group after each of its steps from now on; calling `step` is an error then.

        Returns
        -------
        StepHandle or None
            Its ``remove()`` ends the automatic steps; None without an optimizer.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            If a pattern is the first match of no sparse layer, or as `SparsityAlgorithm.attach` of one of
            them.
        """
        chosen: dict[str, list[tuple[str, SparseLayer]]] = {pattern: [] for pattern in self._algorithms}
        found = list(find_sparse(model))
        for name, layer in found:
            if (first := first_match(name, self._algorithms)) is not None:
                chosen[first].append((name, layer))
        for pattern, matches in chosen.items():
            if not matches:
                raise ValueError(
                    f"algorithms must each have a layer, got {pattern!r} without one that no pattern before "
                    f"it took; the model's sparse layers are: {listed([name for name, _ in found])}"
                )
        for pattern, algorithm in self._algorithms.items():
            algorithm._check_whole(chosen[pattern], model)
            algorithm._check_new(chosen[pattern], [layer for _, layer in found])
        matched = [pair for matches in chosen.values() for pair in matches]
        optimizer = self._check_optimizer(optimizer, matched)
        for stream, (pattern, algorithm) in enumerate(self._algorithms.items()):
            algorithm.stream = stream
            algorithm._attach(chosen[pattern])
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

    def _check_stepped(self) -> None:
        for algorithm in self:
            algorithm._check_stepped()

    def advance(self) -> None:
        """Do what `step` does in every algorithm, whoever asks."""
        for algorithm in self:
            algorithm.advance()

    def state_dict(self) -> dict[str, Any]:
        """The state of every algorithm, by pattern."""
        return {pattern: algorithm.state_dict() for pattern, algorithm in self._algorithms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned.

        Parameters
        ----------
        state : mapping
            Read only.

        Raises
        ------
        TypeError, ValueError
            If the patterns differ, or the state of one does not fit its algorithm. Nothing has been changed
            then, in none of them.
        """
        if list(state) != list(self._algorithms):
            raise ValueError(
                f"the state was saved for patterns {list(state)}, but this group has {list(self._algorithms)}"
            )
        for pattern, algorithm in self._algorithms.items():
            algorithm._check_state(state[pattern])
        for pattern, algorithm in self._algorithms.items():
            algorithm._load_state(state[pattern])
