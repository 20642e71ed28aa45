"""One-shot magnitude pruning, and the baseline it belongs to: train dense, prune, fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from sparselab._names import Keys, literal
from sparselab.kernels.arrays import n_connections
from sparselab.kernels.rewiring.select import select
from sparselab.nn.models.convert import find_linear, keep_positions
from sparselab.nn.storage.entries import as_scores, largest_positions

Model = TypeVar("Model", bound=torch.nn.Module)
Scope = Literal["layer", "network"]


def prune(
    model: torch.nn.Module,
    sparsity: float,
    scope: Scope = "layer",
    *,
    include: Keys = "*",
    exempt: Keys = (),
) -> dict[str, float]:
    """Swap layers of a trained dense model for sparse ones with their largest weights, in place.

    Parameters
    ----------
    model : torch.nn.Module
    sparsity : float in [0, 1]
    scope : {"layer", "network"}
        "layer": each layer gets that sparsity. "network": all together get it, at one threshold; a layer then
        keeps at least one weight.
    include, exempt : str, re.Pattern, type or callable, or iterable of them
        Keys as in `sparselab.sparsify`: layers that match one of `include` and none of `exempt` are pruned.

    Returns
    -------
    dict of str to float
        Sparsity of each pruned layer by name, in which ``*``, ``?`` and ``[`` are escaped: rules for
        `sparselab.sparsify`, to train a new model with as many connections in each layer.

    Raises
    ------
    TypeError, ValueError
        If the sparsity or the scope is none, the keys or layers are such as `sparselab.sparsify` refuses,
        or the network is to keep fewer weights than it has layers. Nothing has been changed then.

    Notes
    -----
    Counts are exact. Of equal magnitudes the one in the earlier layer stays, and in a layer the first in
    row-major order; NaN counts as the smallest. A network-wide selection holds two numbers per dense weight
    for the moment.

    References
    ----------
    Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015,
    section 3. There a threshold is chosen per layer, by hand.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    >>> prune(model, 0.875, exempt="2")
    {'0': 0.875}
    >>> model[0].nnz
    256
    """
    layers = _find(model, sparsity, scope, include, exempt)
    weights = [layer.weight.detach() for layer in layers.values()]
    if scope == "layer":
        kept = [largest_positions(w, n_connections((1, w.numel()), sparsity)) for w in weights]
    else:
        kept = _largest_of_all(weights, sparsity)
    keep_positions(model, dict(zip(layers, kept, strict=True)))
    return {
        literal(name): 1 - len(positions) / max(w.numel(), 1)
        for name, positions, w in zip(layers, kept, weights, strict=True)
    }


def train_prune_finetune(
    model: Model,
    train: Callable[[Model], object],
    sparsity: float,
    scope: Scope = "layer",
    *,
    include: Keys = "*",
    exempt: Keys = (),
    finetune: Callable[[Model], object] | None = None,
) -> Model:
    """Train a dense model, `prune` it, and train what is left: the baseline of sparse training.

    Parameters
    ----------
    model : torch.nn.Module
        Dense; pruned in place.
    train : callable
        The training loop; called with the dense model.
    sparsity, scope, include, exempt
        See `prune`.
    finetune : callable, optional
        Called with the pruned model, which has new Parameters: it must make a new optimizer. `train` by
        default.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError, ValueError
        As `prune`, before the training.
    """
    _find(model, sparsity, scope, include, exempt)
    train(model)
    prune(model, sparsity, scope, include=include, exempt=exempt)
    (finetune or train)(model)
    return model


def _find(model: torch.nn.Module, sparsity: float, scope: str, include: Keys, exempt: Keys) -> dict[str, Any]:
    """The layers to prune, once all arguments are known to be good."""
    if scope not in ("layer", "network"):
        raise ValueError(f'scope must be "layer" or "network", got {scope!r}')
    n_connections((1, 1), sparsity)
    layers = find_linear(model, include, exempt)
    if scope == "network":
        sizes = [layer.weight.numel() for layer in layers.values()]
        total = n_connections((1, sum(sizes)), sparsity)
        if total < (least := sum(size > 0 for size in sizes)):
            raise ValueError(
                f"sparsity must leave a weight for each of the {least} layers, got {sparsity}, which leaves "
                f"{total} of {sum(sizes)}"
            )
    return layers


def _largest_of_all(weights: list[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """Positions of the largest magnitudes over all layers, layer by layer, with at least one in each."""
    scores = np.concatenate([as_scores(weight) for weight in weights])
    np.nan_to_num(scores, copy=False, nan=-1, posinf=np.inf)
    starts = np.cumsum([0, *(weight.numel() for weight in weights)])
    # Each layer's own best are taken first and then ranked last, where only NaN is.
    best = np.array([start + scores[start:end].argmax() for start, end in pairwise(starts) if start < end])
    scores[best] = np.nan
    others = select(scores, n_connections((1, len(scores)), sparsity) - len(best))
    chosen = np.sort(np.concatenate((best, others)).astype(np.int64))
    edges = np.searchsorted(chosen, starts)
    return [
        torch.from_numpy(chosen[begin:end] - start).to(weight.device)
        for weight, start, (begin, end) in zip(weights, starts[:-1], pairwise(edges), strict=True)
    ]
