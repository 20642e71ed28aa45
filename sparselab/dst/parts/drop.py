"""Which connections go: a score for each of them, and the lowest go first.

Scores rank live slots only. A weight that happens to be exactly zero is therefore never confused with an
empty position, which a top-k over a masked dense matrix cannot tell apart.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparselab.dst.checks import require_finite
from sparselab.dst.part import Part
from sparselab.dst.schedules.schedule import ConstantSchedule, Schedule, as_schedule
from sparselab.dst.view import LayerView
from sparselab.kernels.arrays import Array
from sparselab.kernels.rewiring.rows import select_rows
from sparselab.kernels.rewiring.select import select
from sparselab.nn.storage.entries import slot_scores

Scores = npt.NDArray[np.floating[Any]]


class DropScore(Part, abc.ABC):
    """How much each connection is worth keeping: ``score(view)`` of a layer, the lowest go first.

    A score of one's own is a class with this one method. It may look at ``view.weights``, ``view.gradient``
    and ``view.momentum`` of the connections, at ``view.matrix`` (where they are), and draw from
    ``view.rng(purpose)``.

    Examples
    --------
    The sensitivity of SNIP, ``|w g|``:

    >>> class Sensitivity(DropScore):
    ...     def reason_to_skip(self, view):
    ...         return "no gradient" if view.gradient is None else ""
    ...
    ...     def __call__(self, view):
    ...         return (view.weights * view.gradient).abs().numpy()
    """

    @abc.abstractmethod
    def __call__(self, view: LayerView) -> Scores:
        """(nnz,): one score for each slot, as an array of its own; the lowest are dropped first."""

    def checked(self, view: LayerView) -> Scores:
        """The scores, once they are known to be what they must be.

        Raises
        ------
        TypeError
            If they are no NumPy array, or not of floating point.
        ValueError
            If there is not one for each connection.
        """
        scores: Any = self(view)
        expected = f"{type(self).__name__} must return a NumPy array of floats of shape ({view.nnz},)"
        if not isinstance(scores, np.ndarray):
            hint = "; convert it with .numpy()" if isinstance(scores, torch.Tensor) else ""
            raise TypeError(f"{expected}, got a {type(scores).__name__}{hint}")
        if not np.issubdtype(scores.dtype, np.floating):
            raise TypeError(f"{expected}, got dtype {scores.dtype}")
        if scores.shape != (view.nnz,):
            raise ValueError(f"{expected}, one for each connection, got shape {scores.shape}")
        checked: Scores = scores
        return checked


class Magnitude(DropScore):
    """``|w|``; of a block its Euclidean norm."""

    of_blocks = True

    def __call__(self, view: LayerView) -> Scores:
        """(nnz,): magnitudes."""
        return slot_scores(view.weights)


class MagnitudeAndGradient(DropScore):
    """``|w| + lam * |g|``, g being the gradient of the connection that the last backward pass left.

    Of blocks the Euclidean norms.

    Parameters
    ----------
    lam : float
        At least 0.

    Raises
    ------
    TypeError, ValueError
        If `lam` is not a finite number of at least 0.

    Notes
    -----
    A layer without gradient, or with one that is not finite, is not updated, unless `lam` is 0.
    """

    of_blocks = True

    def __init__(self, lam: float) -> None:
        require_finite("lam", lam)
        if lam < 0:
            raise ValueError(f"lam must be at least 0, got {lam!r}")
        self.lam = float(lam)

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be scored now; empty if it can."""
        if not self.lam:
            return ""
        if (gradient := view.gradient) is None:
            return "no gradient"
        return "" if bool(gradient.isfinite().all()) else "gradient is not finite"

    def __call__(self, view: LayerView) -> Scores:
        """(nnz,): sums of the two magnitudes."""
        scores = slot_scores(view.weights)
        if self.lam and (gradient := view.gradient) is not None:
            scores += self.lam * slot_scores(gradient)
        return scores

    def describe(self) -> str:
        """Name and settings."""
        return f"MagnitudeAndGradient({self.lam!r})"


class SignedMagnitude(DropScore):
    """``|w|`` among the weights of the same sign, so that positive and negative ones go in equal fractions.

    The score is the fraction of the weights of that sign that are no larger: dropping the fraction f drops
    that fraction of the positive weights, those closest to 0, and of the negative ones. Rounding leaves one
    connection at most, which comes from the sign that lost less. Zeros, which have no sign, go first.

    Notes
    -----
    O(nnz log nnz) time; the other scores are linear.

    References
    ----------
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 9:2383 (2018), Algorithm 1.
    """

    def __call__(self, view: LayerView) -> Scores:
        """(nnz,): ranks within the sign, in (0, 1], and 0 for zeros."""
        weights = view.weights.double().cpu().numpy()
        scores: Scores = np.where(np.isnan(weights), np.nan, 0.0)
        for of_sign in (weights > 0, weights < 0):
            # Backwards, so that of equal weights the one in the highest slot has the lowest rank.
            slots = np.flatnonzero(of_sign)[::-1]
            order = np.argsort(np.abs(weights[slots]), kind="stable")
            scores[slots[order]] = np.arange(1, slots.size + 1) / slots.size
        return scores


class RelativeImportance(DropScore):
    """``|w|`` as a part of its row's sum plus as a part of its column's.

    References
    ----------
    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ICLR 2024.
    """

    def __call__(self, view: LayerView) -> Scores:
        """(nnz,): float64, between 0 and 2."""
        size = view.weights.abs().double().cpu().numpy()
        scores = np.zeros(size.size)
        for line in np.divmod(view.matrix.positions(), view.grid[1]):
            total = np.bincount(line, weights=size)[line]
            scores += np.divide(size, total, out=np.zeros(size.size), where=total != 0)
        return scores


class Soft(DropScore):
    """Keep at random: connections are drawn without replacement with chances in proportion to ``score ** T``.

    Parameters
    ----------
    score : DropScore, optional
        Not negative; by default `Magnitude`.
    temperature : float, Schedule or callable
        T, not negative, called with the step if it is no number. 0 keeps any with equal chances; the larger,
        the more surely the lowest scores go.

    Raises
    ------
    TypeError, ValueError
        If `temperature` is none of these, or at a step not such a number.

    Notes
    -----
    The draws depend on the seed, the layer and the step only. Each connection gets ``T log(score)`` plus
    noise of the Gumbel distribution, and the highest are kept: that is the same as drawing one after the
    other. A score below 1e-12 counts as that, so that zeros, of which growth makes many, go in random order.

    References
    ----------
    Kool et al., "Stochastic Beams and Where to Find Them", ICML 2019 (the noise).
    """

    _PURPOSE = 2

    def __init__(
        self, score: DropScore | None = None, temperature: float | Schedule | Callable[[int], float] = 1.0
    ) -> None:
        self.score = Magnitude() if score is None else score
        self.of_blocks = self.score.of_blocks
        self.temperature = as_schedule(temperature, "temperature")
        if isinstance(self.temperature, ConstantSchedule):
            self._at(0)

    def _at(self, step: int) -> float:
        temperature = self.temperature(step)
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature must be 0 or above, got {temperature!r} at step {step}")
        return temperature

    def __call__(self, view: LayerView) -> Scores:
        """(nnz,): the order in which connections are kept, float64."""
        sizes = np.maximum(self.score(view).astype(np.float64), 1e-12)
        noise = -np.log(view.rng(self._PURPOSE).standard_exponential(sizes.size))
        scores: Scores = self._at(view.step) * np.log(sizes) + noise
        return scores

    def reason_to_skip(self, view: LayerView) -> str:
        """Why the layer cannot be scored now; empty if it can."""
        return self.score.reason_to_skip(view)

    def describe(self) -> str:
        """Name and settings."""
        return f"Soft({self.score.describe()}, {self.temperature.describe()})"


def lowest(scores: Scores, k: int) -> Array:
    """Slots of the `k` lowest scores, ascending.

    The order in which slots are kept is ``(score descending, slot ascending)``, so among equal scores the
    highest slots go first. NaN ranks below every number.

    Parameters
    ----------
    scores : float array, (nnz,)
        Read only.
    k : int
        How many, ``0 <= k <= nnz``.

    Returns
    -------
    int32 or int64 array, (k,)

    Raises
    ------
    ValueError
        If `k` is outside ``[0, nnz]``.
    """
    return select(scores, scores.size - k, rest=True)


def lowest_of_rows(scores: Scores, indptr: Array, k: Array) -> Array:
    """Slots of the ``k[r]`` lowest scores of every row r, ascending; in the order of `lowest`.

    Parameters
    ----------
    scores : float array, (nnz,)
        Read only.
    indptr : int array, (rows + 1,)
        Row r has the slots ``indptr[r] : indptr[r + 1]``.
    k : int array, (rows,)
        From 0 to the length of the row.

    Returns
    -------
    int32 or int64 array, (k.sum(),)

    Raises
    ------
    ValueError
        If an entry of `k` is outside its range.
    """
    return select_rows(scores, indptr, np.diff(indptr) - k, rest=True)


def lowest_of_network(scores: Sequence[Scores], k: int) -> list[Array]:
    """Slots of the `k` lowest scores over several layers together, by layer; no layer loses its best.

    Parameters
    ----------
    scores : sequence of float arrays
        One for each layer. Read only.
    k : int
        How many. At most as many as leave one connection to each layer that has any are returned.

    Returns
    -------
    list of int32 or int64 arrays
        Ascending slots of each layer. Of equal scores those of later layers and higher slots go first.
    """
    if not scores:
        return []
    together = np.concatenate([np.asarray(layer, np.float64) for layer in scores])
    start = np.cumsum([0, *(layer.size for layer in scores)])
    best = [
        start[i] + int(np.argmax(np.where(np.isnan(layer), -np.inf, layer)))
        for i, layer in enumerate(scores)
        if layer.size
    ]
    together[best] = np.inf
    dropped = lowest(together, min(k, together.size - len(best)))
    cuts = np.searchsorted(dropped, start)
    return [dropped[cuts[i] : cuts[i + 1]] - start[i] for i in range(len(scores))]
