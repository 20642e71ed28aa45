"""Growth without gradients: where the topology itself has the most short ways round."""

from __future__ import annotations

import numpy as np

from sparselab.dst.parts.grow import Growth, random_free
from sparselab.dst.view import LayerUpdate
from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.rewiring.two_hop import TwoHops

_ROUNDS = 16


class PathGrowth(Growth):
    """Free positions drawn in proportion to CH2-L3n, a score of the paths of length three between their ends.

    In the bipartite graph of the kept connections, a row i and a column j without one are joined by paths
    ``i - c - l - j``. With ``N(l)`` the columns of row l, and likewise for columns::

        score(i, j) =   sum over rows l of j that share a column with i of  (|N(l) & N(i)| + 1) / (e + 1)
                      + sum over columns c of i that share a row with j of  (|N(c) & N(j)| + 1) / (e + 1)

    where e, the links of l (of c) that lead elsewhere, are ``|N(l)| - |N(l) & N(i)| - 1`` (and likewise), the
    one to j (to i) not counted.

    Notes
    -----
    Draws are without replacement, one after the other, and depend on the seed, the layer, the step and the
    topology only. A score is never computed: its two sums fall into whole numbers of lots, which are dealt by
    compiled code (see `sparselab.kernels.rewiring.two_hop`). Time is ``sum over rows of fan_in^2 + sum over
    columns of fan_out^2``, about ``nnz * (fan_in + fan_out)``, memory O(nnz). Where a round of draws brings
    too few new positions, another is made, up to 16; what is missing then, because hardly more positions than
    that have a path, is drawn uniformly from all that are free.

    References
    ----------
    Zhang et al., "Brain network science modelling of sparse neural networks enables Transformers and LLMs to
    perform as fully connected", NeurIPS 2025, arXiv 2501.19107 (CH2-L3n, and sampling from it). Muscoloni,
    Michieli and Cannistraci, "Adaptive Network Automata Modelling of Complex Networks", 2020 (CH2-L3).
    """

    def choose(self, update: LayerUpdate) -> Array:
        """Distinct free positions, ascending."""
        rng, size, kept, k = update.view.rng(), update.view.size, update.kept, update.n_grow
        drawn = draw_by_paths(rng, RowTopology.from_positions(update.view.grid, kept), k)
        if drawn.size < k:
            taken = np.sort(np.concatenate([kept, drawn]))
            drawn = np.sort(np.concatenate([drawn, random_free(rng, taken, size, k - drawn.size)]))
        return drawn


def draw_by_paths(rng: np.random.Generator, W: RowTopology, k: int) -> Array:
    """Draw distinct free positions of a topology in proportion to their CH2-L3n.

    Parameters
    ----------
    rng : numpy.random.Generator
        Advanced by the call.
    W : RowTopology
        Without spare slots.
    k : int
        How many.

    Returns
    -------
    int64 array, (at most k,)
        Ascending; fewer if so many could not be found.
    """
    transposed, _ = W.transposed()
    by_rows, by_columns = TwoHops(W, transposed), TwoHops(transposed, W)
    n_tickets = by_rows.n_tickets + by_columns.n_tickets
    drawn = np.empty(0, np.int64)
    for _ in range(_ROUNDS if n_tickets else 0):
        missing = k - drawn.size
        n_draws = missing + missing // 4 + 64
        lots, picks = rng.integers(0, n_tickets, n_draws), rng.random(n_draws)
        order = np.argsort(lots, kind="stable")
        cut = int(np.searchsorted(lots[order], by_rows.n_tickets))
        first, second = order[:cut], order[cut:]
        positions = np.empty(n_draws, np.int64)
        rows, columns = by_rows.follow(lots[first], picks[first])
        positions[first] = rows * W.shape[1] + columns
        columns, rows = by_columns.follow(lots[second] - by_rows.n_tickets, picks[second])
        positions[second] = rows * W.shape[1] + columns
        # Who comes first is kept, and a repetition is as if it had not been drawn.
        drawn = np.concatenate([drawn, positions])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])][:k]
        if drawn.size == k:
            break
    return np.sort(drawn)
