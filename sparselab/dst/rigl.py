"""RigL: drop the weakest connections, grow where the dense gradient is largest."""

from __future__ import annotations

from collections.abc import Callable

from sparselab.dst._checks import require_count
from sparselab.dst.base import DynamicSparsityAlgorithm, Vacancy
from sparselab.dst.gradient import GradientCollector
from sparselab.dst.schedule import Schedule
from sparselab.kernels.layout import Array


class RigL(DynamicSparsityAlgorithm):
    """Grow the positions of largest ``|G|``, ``G = dY^T X``, among all that are not kept.

    Parameters
    ----------
    sparsity, drop_fraction, update_freq, start, stop, seed
        See `DynamicSparsityAlgorithm`. Nothing is drawn at random, so `seed` has no effect.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    The selection is exact and layer-wide, and ties go to the lower position. G is formed only on the step
    that updates, inside its backward pass, in blocks of rows of at most 4 MiB: O(nnz) memory beside one
    block, and the time of one dense weight gradient. With several backward passes, or a layer used several
    times in one, the operands of all but the last call are copied until then.

    The update follows the optimizer step, where the paper puts it in place of the step, and weights are
    ranked after it. A layer that no backward pass reached, or whose gradient is not finite, keeps its
    topology; ``last_update`` says so. The gradient is that of this process alone.

    References
    ----------
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import Cosine, RigL
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> algorithm = RigL(sparsity=0.9, drop_fraction=Cosine(0.3, half_period=40), update_freq=10)
    >>> _ = model.apply(algorithm)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     algorithm.step()
    >>> algorithm.last_update[0].grown, model[0].nnz
    (30, 205)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
        update_freq: int = 100,
        start: int = 0,
        stop: int | None = None,
        seed: int = 0,
        grad_accumulation: int = 1,
    ) -> None:
        super().__init__(sparsity, drop_fraction, update_freq, start, stop, seed)
        self.grad_accumulation = require_count("grad_accumulation", grad_accumulation, minimum=1)
        self._collectors: list[GradientCollector] = []

    def _prepare_step(self, step: int) -> None:
        self._collectors = []
        due = self.is_update_step(step)
        fraction = self._fraction(step) if due else 0.0
        for layer in self._layers:
            layer.gradient_watcher = None
            if due:
                collector = GradientCollector(layer, fraction, self.grad_accumulation)
                self._collectors.append(collector)
                layer.gradient_watcher = collector

    def _check(self) -> None:
        for collector in self._collectors:
            collector.check()

    def _reason_to_skip(self, layer_index: int) -> str:
        if reason := super()._reason_to_skip(layer_index):
            return reason
        # Empty if the settings were changed since the last step, so that nobody knew an update was coming.
        summary = self._collectors[layer_index].summary() if self._collectors else None
        if summary is None:
            return "no gradient"
        return "" if summary.finite else "gradient is not finite"

    def _grow(self, vacancy: Vacancy) -> Array:
        collector = self._collectors[vacancy.layer_index]
        summary = collector.summary()
        assert summary is not None
        collector.release()
        return summary.best(vacancy.matrix, vacancy.drop, vacancy.drop.size)

    def _config(self) -> dict[str, object]:
        return {**super()._config(), "grad_accumulation": self.grad_accumulation}
