"""Learning rates by density: fewer connections want larger steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparselab.nn.layers.base import find_sparse


def parameter_groups(
    model: nn.Module, lr: float, *, power: float = 1.0, density: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights of sparse layers get ``lr * (1 / density) ** power``.

    Everything else, biases of sparse layers included, gets `lr`.

    Parameters
    ----------
    model : nn.Module
        Already sparse: `sparsify` makes other Parameters.
    lr : float
        Of dense weights.
    power : float
        0 gives all weights `lr`; 1 is what sweeps over densities of language models come to.
    density : float, optional
        In ``(0, 1]``: that of all sparse layers, such as the one that gradual pruning will end with. By
        default, what each layer has now.

    Returns
    -------
    list of dict
        One group for each rate, with ``"params"``, ``"lr"`` and, where it is less than 1, ``"density"``.

    Raises
    ------
    ValueError
        If `lr` or `density` is out of range.

    Notes
    -----
    Rates are set here, once: where an algorithm changes the density later (`GMP`, or connections that move
    between layers), they stay. Layers without connections count as dense. Schedulers multiply each rate.

    References
    ----------
    SMET, arXiv 2606.00888 (2026), raises the rate from 1e-3 to 5e-3 as density falls from 0.5 to 0.1.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseLinear(64, 32, sparsity=0.75)
    >>> model = torch.nn.Sequential(layer, torch.nn.Linear(32, 4))
    >>> groups = sparselab.parameter_groups(model, lr=1e-3)
    >>> [(group["lr"], len(group["params"])) for group in groups]
    [(0.001, 3), (0.004, 1)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    if lr < 0:
        raise ValueError(f"lr must not be negative, got {lr!r}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    own = {id(layer.stored): layer.density if density is None else density for _, layer in find_sparse(model)}
    groups: dict[float, dict[str, Any]] = {}
    for parameter in model.parameters():
        share = own.get(id(parameter), 1.0) or 1.0
        group = groups.setdefault(share, {"params": [], "lr": lr * (1 / share) ** power})
        group["params"].append(parameter)
        if share < 1:
            group["density"] = share
    return [groups[share] for share in sorted(groups, reverse=True)]
