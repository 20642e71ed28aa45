"""Which connections go, and which empty positions are there to grow.

Scores rank live slots only. A weight that happens to be exactly zero is therefore never confused with an
empty position, which a top-k over a masked dense matrix cannot tell apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sparselab.kernels._growth import skip_kept
from sparselab.kernels._sampling import sample_distinct
from sparselab.kernels._select import select
from sparselab.kernels.layout import Array


def magnitude(values: torch.Tensor) -> npt.NDArray[np.float32 | np.float64]:
    """``|w|`` of every slot, as an array of its own."""
    scores: npt.NDArray[np.float32 | np.float64] = values.detach().abs().cpu().numpy()
    return scores


def lowest(scores: npt.NDArray[np.float32 | np.float64], k: int) -> Array:
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
