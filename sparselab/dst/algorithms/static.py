"""Static sparse training: the topology a layer is born with is the one it keeps."""

from __future__ import annotations

from sparselab.dst.engine.base import SparsityAlgorithm


class Static(SparsityAlgorithm):
    """Never rewires; `step` only counts.

    The baseline that dynamic algorithms are measured against, with the same interface.

    Parameters
    ----------
    sparsity : float or None
        The sparsity that every attached layer must have; None leaves each layer its own.

    Raises
    ------
    TypeError
        If `sparsity` is neither a number nor None.
    ValueError
        If `sparsity` is outside ``[0, 1]``.
    """
