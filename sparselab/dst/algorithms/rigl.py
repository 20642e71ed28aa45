"""RigL: drop the weakest connections, grow where the dense gradient is largest."""

from __future__ import annotations

from typing import Any

from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.grow import GradientGrowth


class RigL(DynamicSparsityAlgorithm):
    """Grow the positions of largest ``|G|``, ``G = dY^T X``, among all that are not kept.

    Parameters
    ----------
    sparsity : float, Schedule or None
        See `DynamicSparsityAlgorithm`.
    grad_accumulation : int
        Backward passes per optimizer step; G is the sum over them.
    **settings
        See `DynamicSparsityAlgorithm`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range.

    Notes
    -----
    The selection is exact and layer-wide; see `GradientGrowth` for how G is formed. The update follows the
    optimizer step, where the paper puts it in place of the step, and weights are ranked after it. A layer
    that no backward pass reached, or whose gradient is not finite, keeps its topology; ``last_update`` says
    so. The gradient is that of this process alone.

    The paper's settings are ``drop_fraction=Cosine(0.3, stop)`` and ``update={"freq": 100, "stop": stop}``
    with `stop` at three quarters of the training. Those of Liu et al., "Do we actually need dense
    over-parameterization?" (ICML 2021), explore longer: ``drop_fraction=Cosine(0.5, steps, minimum=0.005)``
    and updates further apart, to the end.

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
    >>> algorithm = RigL(sparsity=0.9, drop_fraction=Cosine(0.3, half_period=40), update=10)
    >>> _ = model.apply(algorithm)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     algorithm.step()
    >>> algorithm.last_update[0].grown, model[0].nnz
    (30, 205)
    """

    def __init__(self, sparsity: Any = None, *, grad_accumulation: int = 1, **settings: Any) -> None:
        super().__init__(sparsity, grow=GradientGrowth(grad_accumulation), **settings)
