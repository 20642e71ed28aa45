"""RigL as its paper has it, of a dense weight with a mask: what the sparse layers must do, too."""

from __future__ import annotations

import torch


@torch.no_grad()
def rigl_update(weight: torch.Tensor, mask: torch.Tensor, gradient: torch.Tensor, fraction: float) -> None:
    """Drop the smallest weights and grow where the gradient is largest, ties to the lower position; in place.

    Parameters
    ----------
    weight, gradient : tensor, (out_features, in_features)
    mask : bool tensor, (out_features, in_features)
        The connections.
    fraction : float
        Of the connections, those dropped.

    References
    ----------
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, Algorithm 1.
    """
    flat, connected = weight.view(-1), mask.view(-1)
    live = connected.nonzero()[:, 0]
    k = int(fraction * len(live))
    order = torch.argsort(flat[live].abs(), descending=True, stable=True)
    dropped = live[order[len(live) - k :]]
    connected[dropped] = False
    candidates = (~connected).nonzero()[:, 0]
    steepest = torch.argsort(gradient.view(-1)[candidates].abs(), descending=True, stable=True)[:k]
    grown = candidates[steepest]
    connected[grown] = True
    flat[~connected] = 0
    flat[grown[~torch.isin(grown, dropped)]] = 0
    assert int(mask.sum()) == len(live)
