"""A callback for Lightning's Trainer. Needs lightning, or pytorch-lightning."""

from __future__ import annotations

from typing import Any

from sparselab.dst import Group, Monitor, Replicas, SparsityAlgorithm, Static
from sparselab.dst.replicas import ALL_REPLICAS
from sparselab.integrations._driver import Driver
from sparselab.nn import AveragedModel, copy_topology

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sparselab.integrations.lightning needs lightning, which is not installed; install it, or "
            "sparselab with its 'lightning' extra: pip install '.[lightning]'",
            name=error.name,
        ) from error


class SparsityCallback(Callback):  # type: ignore[misc]
    """Drives an algorithm from Lightning's Trainer.

    Attaches to the module when training starts, steps after every step of the optimizer, and is saved and
    resumed with the Trainer's checkpoints. Do not attach the algorithm or call its ``step()`` yourself.
    Fitting the same model again goes on, fitting another begins anew.

    Parameters
    ----------
    algorithm : SparsityAlgorithm or Group
    monitor : bool
        Whether to watch the updates with a `Monitor` and to log its numbers, at the steps of the updates, to
        the Trainer's loggers.
    replicas : Replicas or None
        Of several processes, as of `SparsityAlgorithm.attach`; by default those of the strategy "ddp".

    Raises
    ------
    TypeError
        If `algorithm` is neither an algorithm nor a group; when training starts, if another callback averages
        weights and is not wrapped `by_position`, which would be wrong once connections move.

    Notes
    -----
    With automatic optimization the algorithm is told ``accumulate_grad_batches``, also where the last step of
    an epoch sums over fewer. With manual optimization, tell it yourself (``RigL(grad_accumulation=...)``) if
    one optimizer step sums over several backward passes. Exactly one optimizer may train the sparse layers.

    Examples
    --------
    >>> from sparselab.dst import RigL  # doctest: +SKIP
    >>> from sparselab.integrations.lightning import SparsityCallback  # doctest: +SKIP
    >>> callback = SparsityCallback(RigL(update_freq=100))  # doctest: +SKIP
    >>> lightning.Trainer(callbacks=[callback]).fit(module, batches)  # doctest: +SKIP
    """

    def __init__(
        self,
        algorithm: SparsityAlgorithm | Group,
        *,
        monitor: bool = False,
        replicas: Replicas | None = ALL_REPLICAS,
    ) -> None:
        self._driver = Driver(algorithm, monitor, replicas)
        self._saved: dict[str, Any] | None = None

    @property
    def monitor(self) -> Monitor | None:
        """What was recorded; None without one, or before training."""
        return self._driver.monitor

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the state of a checkpoint that was loaded for another stage."""
        self._saved = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, now that module and optimizers are there and restored."""
        _refuse_averages_by_slot(trainer.callbacks, self._driver.algorithm)
        passes = trainer.accumulate_grad_batches if pl_module.automatic_optimization else None
        self._driver.start(pl_module, trainer.optimizers, passes, self._saved)
        self._saved = None
        self._log(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Follow a `GradientAccumulationScheduler`."""
        if pl_module.automatic_optimization:
            self._driver.expect(trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Count the passes of this optimizer step."""
        self._driver.backward_seen()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the monitor has recorded."""
        self._log(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """No longer step along."""
        self._driver.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """No longer step along."""
        self._driver.stop()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the algorithm and the monitor; Lightning asks in all processes."""
        self._driver.consolidate()
        return self._driver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint held until training starts."""
        self._saved = state_dict

    def _log(self, trainer: Any) -> None:
        for step, numbers in self.monitor.news() if self.monitor is not None else ():
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)


class _ByPosition:
    """Before Lightning goes through parameters one by one, both models get the same connections."""

    _average_model: Any
    goes_by_position = True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)  # type: ignore[misc]
        if self._average_model is not None:
            self._average_model.__class__ = AveragedModel  # which adds a method, and no state

    def _swap_models(self, pl_module: Any) -> None:
        copy_topology(self._average_model.module, pl_module)
        super()._swap_models(pl_module)  # type: ignore[misc]

    def _copy_average_to_current(self, pl_module: Any) -> None:
        copy_topology(self._average_model.module, pl_module)
        super()._copy_average_to_current(pl_module)  # type: ignore[misc]


def by_position(callback: Any) -> Any:
    """Let a callback of Lightning that averages weights do so by position, and return it.

    Parameters
    ----------
    callback : WeightAveraging
        `lightning.pytorch.callbacks.WeightAveraging`, ``EMAWeightAveraging``, or a subclass of one's own.

    Raises
    ------
    TypeError
        If it is something else, such as ``StochasticWeightAveraging``, which keeps its average otherwise.

    Examples
    --------
    >>> from lightning.pytorch.callbacks import EMAWeightAveraging  # doctest: +SKIP
    >>> averaging = by_position(EMAWeightAveraging(decay=0.999))  # doctest: +SKIP
    >>> lightning.Trainer(callbacks=[SparsityCallback(RigL()), averaging])  # doctest: +SKIP
    """
    cls = type(callback)
    if "WeightAveraging" not in _names(callback):
        raise TypeError(f"callback must be a WeightAveraging of Lightning, got {cls.__name__}")
    if not hasattr(callback, "goes_by_position"):
        names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__}  # as checkpoints have them
        callback.__class__ = type(cls.__name__, (_ByPosition, cls), names)
    return callback


def _names(callback: Any) -> set[str]:
    """Of its class and their bases: of either package of Lightning, in versions that lack some."""
    return {base.__name__ for base in type(callback).__mro__}


def _refuse_averages_by_slot(callbacks: Any, algorithm: Any) -> None:
    if isinstance(algorithm, Static):
        return
    for callback in callbacks:
        averages = not _names(callback).isdisjoint(("WeightAveraging", "StochasticWeightAveraging"))
        if averages and not hasattr(callback, "goes_by_position"):
            raise TypeError(
                f"callbacks must not average weights slot by slot while connections move, got "
                f"{type(callback).__name__}; give sparselab.integrations.lightning.by_position("
                f"EMAWeightAveraging(...)) or another WeightAveraging in its place"
            )
