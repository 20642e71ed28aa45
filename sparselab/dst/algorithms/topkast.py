"""Top-KAST: compute with the largest weights, train a few more, and let them compete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparselab.dst.engine.describe import setting
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.parts.compete import Competition, Exploration, NestedBudget, Winners
from sparselab.dst.schedules.schedule import Schedule
from sparselab.dst.schedules.when import UpdateSchedule
from sparselab.dst.view import LayerUpdate


class TopKAST(DynamicSparsityAlgorithm):
    """A layer stores B, the largest weights, and its output comes from A, the largest of those.

    Gradients and updates reach all of B. At an update weights outside B compete with those inside: B becomes
    the largest of all, then A the largest of B. Nothing starts anew: what enters B brings its weight along,
    and what leaves it is frozen at its own. The gradient of a layer's input comes from A, as its output does.

    Parameters
    ----------
    sparsity : float or None
        Fraction outside B, ``1 - D - M`` in the paper: the sparsity that every attached layer must have. None
        leaves each layer its own.
    forward_sparsity : float, optional
        Fraction of each layer outside A, ``1 - D`` in the paper; at least one connection is in A. By default
        half of B is in A.
    drop_fraction : float, Schedule or callable
        For a layer whose weights outside B are not kept: candidates drawn at a refresh, as a fraction of B.
    update_freq : int, optional
        Optimizer steps between refreshes of B and A; 100 if `update` says nothing else. (The paper finds
        every step as good as every 100.)
    update : dict, list of int, or UpdateSchedule, optional
        The steps that end with a refresh, where a period does not say it; see `DynamicSparsityAlgorithm`.
    stop : int, optional
        The optimizer step from which on the sets are fixed.
    seed : int
        All random draws depend on ``(seed, layer, step)`` and nothing else.
    exploration : float
        Strength of the exploration loss, see `exploration_loss`, whose gradient is added to that of the
        weights before every optimizer step. 0 adds nothing.
    master_bytes : int
        A layer whose weights outside B take no more than this, as a dense matrix, has them kept, and
        its refresh is exact. 0 keeps none.
    master_dtype : torch.dtype, optional
        Of weights outside B; the layer's by default. bfloat16 takes half of float32 and rounds what leaves B.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or outside its range, or a layer has fewer connections than A.

    Notes
    -----
    Weights outside B start as those of `torch.nn.Linear`, uniform within ``1 / sqrt(in_features)``, and
    change only while they are in B. A layer above `master_bytes` does not keep them: at a refresh a few
    positions are drawn, uniformly among those outside B, each with such a weight, and compete with B. That is
    the same rule over a sample, but what leaves B is forgotten. Equal weights prefer B, then the lower
    position.

    A is the layer's `forward_mask`, which is in the ``state_dict`` of the model. The products run over all of
    B, with 0 for B outside A: the forward pass costs D + M where the paper counts D. `finish` drops B outside
    A in the end, for good.

    Without the exploration loss, and without weight decay, little from outside enters; and B outside A, whose
    gradients do not depend on it, goes wherever they point: adaptive optimizers (Adam) drive it far off, and
    a refresh that takes such weights into A upsets the model. The default strength is the weight decay of the
    paper's networks. Towards the end fixed sets help, too: `stop` at three quarters of the training.

    Memory: ``D + M`` of the layer and its optimizer state, beside the weights outside B where they are kept;
    a refresh takes up to three times the latter for the moment, one layer at a time.

    References
    ----------
    Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, sections 2.1 to 2.3.

    Examples
    --------
    >>> import torch
    >>> from sparselab.dst import TopKAST
    >>> from sparselab.nn import SparseLinear
    >>> model = torch.nn.Sequential(SparseLinear(64, 32, sparsity=0.8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> algorithm = TopKAST(0.8, forward_sparsity=0.9, update_freq=10)
    >>> handle = algorithm.attach(model, optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> model[0].nnz, int(model[0].forward_mask.sum())
    (410, 205)
    >>> algorithm.finish()
    >>> model[0].nnz, model[0].forward_mask
    (205, None)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        forward_sparsity: float | None = None,
        drop_fraction: float | Schedule | Callable[[int], float] = 0.3,
        update_freq: int | None = None,
        update: Mapping[str, Any] | Sequence[int] | UpdateSchedule | None = None,
        stop: int | None = None,
        seed: int = 0,
        exploration: float = 1e-4,
        master_bytes: int = 64 << 20,
        master_dtype: torch.dtype | None = None,
    ) -> None:
        budget = NestedBudget(sparsity, forward_sparsity, drop_fraction)
        competition = Competition(budget, master_bytes, master_dtype)
        super().__init__(
            budget,
            update_freq=update_freq,
            update=update,
            stop=stop,
            seed=seed,
            scope=competition,
            grow=Winners(competition),
            grown_value=competition.weights_entering,
        )
        self.parts["exploration"] = Exploration(budget, exploration)
        self._nested = budget

    forward_sparsity = setting("budget", "forward_sparsity")
    exploration = setting("exploration", "exploration")
    master_bytes = setting("selection", "master_bytes")
    master_dtype = setting("selection", "master_dtype")

    def exploration_loss(self) -> torch.Tensor:
        """``sum over A of w^2 + sum over B outside A of w^2 / D``, over all layers, D being A's density.

        Differentiable. Its gradient, times `exploration`, is added before every optimizer step: with 0, take
        the loss into your own, in place of weight decay on these layers. Since D is below 1, weights that are
        not in use shrink faster than those in use, and must get gradients that hold against it to be used.

        Returns
        -------
        torch.Tensor, ()

        Raises
        ------
        RuntimeError
            If no layer is attached.
        """
        if not self._layers:
            raise RuntimeError("exploration_loss() needs layers; attach the algorithm to a model first")
        terms = []
        for layer in self._layers:
            squares = layer.per_connection(layer.stored).square()
            if layer.forward_mask is not None:
                in_use = layer.per_connection(layer.forward_mask)
                squares = torch.where(in_use, squares, squares / self._nested.density(layer))
            terms.append(squares.sum())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def finish(self) -> None:
        """Drop B outside A from every layer: its output stays the same, and it is never refreshed again.

        For inference, and for training on with what is left. Optimizer state follows.
        """
        moves = [self._tracker.plan_move(layer) for layer in self._layers]
        for view, move in zip(self.views(self._step), moves, strict=True):
            layer = view.layer
            if layer.forward_mask is not None:
                unused = (~layer.per_connection(layer.forward_mask)).nonzero().reshape(-1).cpu().numpy()
                self._rewire(LayerUpdate(view, unused), move)
                layer.forward_mask = None

    def _after_step(self, step: int) -> None:
        super()._after_step(step)
        if self.is_update_step(step) and self.last_update is not None:
            for layer, report in zip(self._layers, self.last_update, strict=True):
                if not report.skipped:
                    self._nested.choose_forward(layer)
