"""Where new connections go: the part of an algorithm that chooses among the positions that are not kept."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from sparselab.dst.checks import require_count
from sparselab.dst.part import Part
from sparselab.dst.parts.agreed import Meeting
from sparselab.dst.parts.dense_gradient import GradientSummary
from sparselab.dst.parts.passes import GradientCollector, PassCount
from sparselab.dst.replicas import Ranks
from sparselab.dst.view import LayerUpdate, LayerView
from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.sampling import sample_distinct
from sparselab.kernels.rewiring.positions import kept_positions, skip_kept
from sparselab.kernels.rewiring.rows import sample_rows
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.ops.operands import GradientOperands, LinearOperands


class Growth(Part, abc.ABC):
    """Chooses the positions that a layer grows.

    An algorithm calls `begin` and `prepare` before every optimizer step, and on a step that updates
    `reason_to_skip` and `room` for each layer, and `choose` for each layer that grows.

    A growth of one's own is a class with the one method `choose`. It knows the connections that stay
    (``update.kept``), the layer as it was before the drop (``update.view``, with weights, optimizer state and
    the gradient of its connections), and draws from ``update.view.rng()``. The gradient at positions without
    a weight exists only while the backward pass runs: to see it, derive from `GradientGrowth`, whose
    `GradientGrowth.gradient` tells the largest ``|G|``, and of all connections.

    Attributes
    ----------
    by_row : bool
        Whether `choose` heeds ``update.row_grow``, as ``scope="row"`` needs.
    grad_accumulation : int
        Backward passes per optimizer step, as declared.

    Examples
    --------
    Half of them by gradient, the others anywhere:

    >>> import numpy as np
    >>> from sparselab.dst import GradientGrowth, random_free
    >>> class Mixed(GradientGrowth):
    ...     by_row = False
    ...
    ...     def choose(self, update):
    ...         view, half = update.view, update.n_grow // 2
    ...         steep = self.gradient(view).best(view.matrix, update.drop, half)
    ...         taken = np.union1d(update.kept, steep)
    ...         others = random_free(view.rng(), taken, view.size, update.n_grow - half)
    ...         return np.union1d(steep, others)
    """

    by_row = False
    grad_accumulation: int = 1

    def begin(self, step: int, seed: int) -> None:
        """Take note of the number of the step to come, and of the seed that its draws depend on."""

    def prepare(self, layers: Sequence[SparseLayer], most: Callable[[int], int | Array] | None) -> None:
        """Get ready for the next optimizer step.

        Parameters
        ----------
        layers : sequence of layers
            All attached layers.
        most : callable or None
            Says how many connections layer i may grow at most (or, as an array, each of its rows), where the
            step ends with an update.
        """

    def expect_passes(self, passes: int) -> None:
        """Say how many backward passes the optimizer step under way sums over, and those after it."""

    def settle(self, parameters: set[int]) -> None:
        """Take note that an optimizer has made its step: later backward passes are of the next one.

        Parameters
        ----------
        parameters : set of int
            The `id` of every Parameter that it has.
        """

    def detach(self, layers: Iterable[SparseLayer]) -> None:
        """Take off the layers whatever `prepare` has put on them."""
        self.prepare(list(layers), None)

    def room(self, view: LayerView) -> int:
        """The most positions that it can choose now; all of the layer's unless it saw only some."""
        return view.size

    @abc.abstractmethod
    def choose(self, update: LayerUpdate) -> Array:
        """``update.n_grow`` distinct positions ``row * columns + column``, none of ``update.kept``."""

    def checked_choice(self, update: LayerUpdate) -> Array:
        """What `choose` returns, once it is known to be what it must be.

        Raises
        ------
        TypeError, ValueError
            If it is not. (Whether positions are distinct and free is seen when the layer is rewritten.)
        """
        positions = self.choose(update)
        expected = f"{type(self).__name__}.choose must return a NumPy array of {update.n_grow} positions"
        if not isinstance(positions, np.ndarray) or not np.issubdtype(positions.dtype, np.integer):
            came = positions.dtype if isinstance(positions, np.ndarray) else type(positions).__name__
            raise TypeError(f"{expected}, which are integers, got {came}")
        if positions.shape != (update.n_grow,):
            raise ValueError(f"{expected}, got shape {positions.shape}")
        return positions


class RandomGrowth(Growth):
    """Uniformly at random among all positions that are not kept, of the layer or of each row.

    Parameters
    ----------
    regrow : bool
        Whether connections that the same update drops may grow back.
    """

    of_blocks = True

    def __init__(self, regrow: bool = True) -> None:
        self.regrow = regrow
        self.by_row = regrow

    def room(self, view: LayerView) -> int:
        """All positions; without `regrow` those that are free before the drop."""
        return view.size if self.regrow else view.size - view.nnz

    def choose(self, update: LayerUpdate) -> Array:
        """Every set equally likely; depends on the seed, the layer and the step only."""
        view = update.view
        if update.row_grow is not None:
            free = view.grid[1] - update.row_kept
            return skip_kept(sample_rows(view.rng(), free, update.row_grow), update.kept)
        taken = update.kept if self.regrow else kept_positions(view.matrix, np.empty(0, np.int64))
        return random_free(view.rng(), taken, view.size, update.n_grow)

    def describe(self) -> str:
        """Name and settings, for comparing a saved run with the one that resumes it."""
        return "RandomGrowth" if self.regrow else "RandomGrowth(regrow=False)"


class GradientGrowth(Growth):
    """The positions of largest ``|G|``, ``G = dY^T X``, exactly: of the whole layer, or of each row.

    Where connections are blocks of weights, those whose blocks of G have the largest Euclidean norms.

    Parameters
    ----------
    grad_accumulation : int
        The most backward passes in an optimizer step, if somebody knows that they are more than one. It need
        not be given: the first update holds what G is made of until the step, the tokens and output
        gradients of all layers together, and later ones go by what was seen. Where that is too much memory,
        ``algorithm.expect_passes(1)`` says that there is one.

    Notes
    -----
    G is what a dense layer would have in ``.grad`` at the step: the sum over all passes since that was
    cleared, whatever loop made them. `torch.autograd.grad` adds nothing to it. What is done to ``.grad``
    itself between the passes and the step is not seen at positions without a weight: clipping and unscaling,
    which change all entries alike, leave the choice as it is; a gradient put there by hand does not enter it.

    It is formed only on the step that updates, inside its last backward pass, in blocks of rows of at most
    4 MiB: O(nnz) memory beside one block, and the time of one dense weight gradient. If that pass turns out
    not to be the last one, the layer's update is skipped, with a warning that names `grad_accumulation`.
    Ties go to the lower position.

    Where several processes hold replicas, G is the mean over them, formed when all of them meet at the
    update: until then each holds the inputs of its layers and the gradients of their outputs.
    """

    by_row = True
    of_blocks = True

    def __init__(self, grad_accumulation: int = 1) -> None:
        self.grad_accumulation = require_count("grad_accumulation", grad_accumulation, minimum=1)
        self._passes = PassCount(0 if self.grad_accumulation == 1 else self.grad_accumulation)
        self._collectors: dict[int, GradientCollector] = {}

    def prepare(self, layers: Sequence[SparseLayer], most: Callable[[int], int | Array] | None) -> None:
        """Watch the next backward passes of every layer, or stop watching."""
        self.watch(dict(enumerate(layers)), most)

    def watch(self, layers: Mapping[int, SparseLayer], most: Callable[[int], int | Array] | None) -> None:
        """As `prepare`, of some layers by their numbers."""
        for collector in self._collectors.values():
            self._passes.learn(collector.passes_seen)
            collector.release()
        self._collectors = {}
        if most is not None:
            for index, layer in layers.items():
                self._collectors[index] = self._collector(layer, index, partial(most, index))

    def settle(self, parameters: set[int]) -> None:
        """Look at no more backward passes of the optimizer's layers until the next `prepare`."""
        for collector in self._collectors.values():
            collector.settle(parameters)

    def expect_passes(self, passes: int) -> None:
        """In place of `grad_accumulation`, from the step under way on: its end may be later or earlier.

        After so many passes nothing is held any more, at the first update neither.
        """
        self._passes.told = require_count("passes", passes, minimum=1)

    def _collector(
        self, layer: SparseLayer, index: int, most: Callable[[], int | Array]
    ) -> GradientCollector:
        return GradientCollector(layer, most, self._passes)

    def meet(self, views: Sequence[LayerView], ranks: Ranks) -> None:
        """Form the gradients of all processes, of the layers of which each knows its part."""
        offers = [self._offer(view) for view in views]
        known = [(-1 if each is None else len(each), _is_plain(each or ())) for each in offers]
        table = ranks.numbers(np.array(known, np.int64).reshape(-1)).reshape(ranks.size, -1, 2)
        counts = [each.n_tokens for offer in offers for each in offer or ()]
        tokens = ranks.lists(torch.tensor(counts, dtype=torch.int64))
        ends = np.cumsum(np.maximum(table[:, :, 0], 0), axis=1)
        for number, (view, offer) in enumerate(zip(views, offers, strict=True)):
            collector, n_operands = self._collectors.get(view.index), table[:, number, 0]
            if collector is None or offer is None or (n_operands < 0).any():
                if collector is not None:
                    unknown = ranks.named(np.flatnonzero(n_operands < 0))
                    collector.give_up(f"the gradient is not known in {unknown}")
            elif collector.needs_all and (n_operands == 0).any() and n_operands.any():
                collector.give_up(f"no gradient in {ranks.named(np.flatnonzero(n_operands == 0))}")
            elif n_operands.any():
                of_ranks = [
                    each[end - n : end].numpy()
                    for each, end, n in zip(tokens, ends[:, number], n_operands, strict=True)
                ]
                plain = bool(table[:, number, 1].all())
                collector.meet(Meeting(ranks, view.index % ranks.size, of_ranks, plain), offer)

    def _offer(self, view: LayerView) -> list[GradientOperands] | None:
        collector = self._collectors.get(view.index)
        return None if collector is None else collector.offer()

    def gradient(self, view: LayerView) -> GradientSummary:
        """What this step has shown of the dense gradient of a layer that `reason_to_skip` passed."""
        summary = self._collectors[view.index].summary()
        assert summary is not None
        return summary

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot grow now; empty if it can."""
        # Empty if the settings were changed since the last step, so that nobody knew an update was coming.
        collector = self._collectors.get(view.index)
        summary = None if collector is None else collector.summary()
        if summary is None:
            return (collector and collector.reason) or "no gradient"
        return "" if summary.finite else "gradient is not finite"

    def choose(self, update: LayerUpdate) -> Array:
        """The positions of largest ``|G|``, ascending."""
        summary = self.gradient(update.view)
        self._collectors[update.view.index].let_go()
        k = update.n_grow if update.row_grow is None else update.row_grow
        return summary.best(update.view.matrix, update.drop, k)


def _is_plain(operands: Iterable[GradientOperands]) -> bool:
    """Whether all operands are two matrices whose product is the gradient."""
    return all(isinstance(each, LinearOperands) for each in operands)


def random_free(rng: np.random.Generator, kept: Array, n_positions: int, k: int) -> Array:
    """Draw `k` distinct positions that are not kept, every set of `k` equally likely.

    Parameters
    ----------
    rng : numpy.random.Generator
        Advanced by the call.
    kept : int array, (n_kept,)
        Positions that may not be drawn, strictly ascending. Read only.
    n_positions : int
        Rows times columns.
    k : int
        How many to draw, at most ``n_positions - n_kept``.

    Returns
    -------
    int64 array, (k,)
        Strictly ascending.

    Raises
    ------
    ValueError
        If fewer than `k` positions are free.

    Notes
    -----
    O(n_kept + k) memory. Ranks among the free positions are drawn and then mapped to positions:
    ``kept[i] - i`` free positions lie before ``kept[i]``, so the one of rank r is preceded by as many kept
    positions as have ``kept[i] - i <= r``. Nothing is drawn in vain, however full the layer is.
    """
    return skip_kept(sample_distinct(rng, n_positions - kept.size, k), kept)
