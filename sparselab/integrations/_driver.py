"""What a callback does, whichever loop calls it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from sparselab.dst import DynamicSparsityAlgorithm, Group, Monitor, Replicas, SparsityAlgorithm


class Driver:
    """Steps an algorithm along with the optimizer of a training loop that is not ours.

    Parameters
    ----------
    algorithm : SparsityAlgorithm or Group
    monitored : bool
        Whether to watch it with a `Monitor`.
    replicas : Replicas or None
        As of `SparsityAlgorithm.attach`.
    """

    def __init__(
        self, algorithm: SparsityAlgorithm | Group, monitored: bool, replicas: Replicas | None
    ) -> None:
        if not isinstance(algorithm, (SparsityAlgorithm, Group)):
            raise TypeError(
                f"algorithm must be a sparsity algorithm or a Group, got {type(algorithm).__name__}"
            )
        self.algorithm = algorithm
        self.monitor: Monitor | None = None
        self._monitored = monitored
        self._replicas = replicas
        self._handle: RemovableHandle | None = None
        self._passes: int | None = None
        self._seen = 0

    def start(
        self,
        model: torch.nn.Module,
        optimizers: Iterable[Optimizer],
        passes: int | None,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach, take back a saved state, and step after each step of the optimizer from now on.

        An algorithm that has trained another model begins anew, and so does its monitor.

        Parameters
        ----------
        model : torch.nn.Module
        optimizers : iterable of torch.optim.Optimizer
            Exactly one must train the sparse layers.
        passes : int, optional
            Backward passes that the loop sums over in each optimizer step; None if nobody knows, and then
            what the algorithm was told is left alone.
        saved : mapping, optional
            What `state_dict` returned; the model and the optimizers have been restored already.

        Raises
        ------
        ValueError
            If the algorithm was told another number of passes, not exactly one optimizer trains the layers,
            or the state does not fit.
        """
        self.stop()
        if passes is not None:
            _check_passes(self._algorithms(), passes)
        self._leave_another(model)
        fresh = not self.algorithm.layers
        self.algorithm.attach(model, replicas=self._replicas)
        try:
            optimizer = self._the_optimizer(optimizers)
        except ValueError:
            if fresh:
                self.algorithm.detach()
            raise
        self.algorithm.track(optimizer)
        if passes is not None:
            self.algorithm.expect_passes(passes)
        if saved is not None:
            self.algorithm.load_state_dict(saved["algorithm"])
        if self._monitored:
            if self.monitor is None:
                self.monitor = Monitor(self.algorithm)
            if saved is not None and saved["monitor"] is not None:
                self.monitor.load_state_dict(saved["monitor"])
        self._passes, self._seen = passes, 0
        self._handle = optimizer.register_step_post_hook(lambda *_: self._stepped())

    def _leave_another(self, model: torch.nn.Module) -> None:
        modules = {id(module) for module in model.modules()}
        if self.algorithm.layers and not any(id(layer) in modules for layer in self.algorithm.layers):
            self.algorithm.reset()
            if self.monitor is not None:
                self.monitor.remove()
                self.monitor = None

    def expect(self, passes: int) -> None:
        """From this optimizer step on, the loop sums over another number of backward passes."""
        if passes != self._passes:
            self._passes = passes
            self.algorithm.expect_passes(passes)

    def stop(self) -> None:
        """No longer step along."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def backward_seen(self) -> None:
        """Count a backward pass: the last step of an epoch may sum over fewer than the others."""
        self._seen += 1

    def _stepped(self) -> None:
        cut_short = self._passes is not None and 0 < self._seen != self._passes
        if cut_short:
            self.algorithm.expect_passes(self._seen)
        self._seen = 0
        self.algorithm.advance()
        if cut_short and self._passes is not None:
            self.algorithm.expect_passes(self._passes)

    def consolidate(self) -> None:
        """Before a checkpoint is written, in all processes: bring together what each keeps for itself."""
        if self.algorithm.layers:
            self.algorithm.consolidate()

    def state_dict(self) -> dict[str, Any]:
        """The state of the algorithm and of the monitor, in plain values and tensors."""
        return {
            "algorithm": self.algorithm.state_dict(),
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
        }

    def _algorithms(self) -> list[SparsityAlgorithm]:
        return list(self.algorithm) if isinstance(self.algorithm, Group) else [self.algorithm]

    def _the_optimizer(self, optimizers: Iterable[Optimizer]) -> Optimizer:
        ours = {id(layer.stored) for each in self._algorithms() for layer in each.layers}
        found = [
            optimizer
            for optimizer in optimizers
            if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])
        ]
        if len(found) != 1:
            raise ValueError(
                f"exactly one optimizer must train the sparse layers of one callback, but {len(found)} do. "
                f"Give each optimizer's layers an algorithm of their own, attach and step them yourself"
            )
        return found[0]


def _check_passes(algorithms: Iterable[SparsityAlgorithm], passes: int) -> None:
    for each in algorithms:
        told = each.grad_accumulation if isinstance(each, DynamicSparsityAlgorithm) else 1
        if told not in (1, passes):
            raise ValueError(
                f"{type(each).__name__} was told grad_accumulation={told}, but the trainer sums over "
                f"{passes} backward passes in each optimizer step. Leave it out: the callback tells the "
                f"algorithm"
            )
