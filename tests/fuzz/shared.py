"""A layer and what is tied to it, as one module: what a test of a single layer asks of, and the twin sees."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Shared(nn.Module):
    """``head(x)``, with the weight of the owner; or ``head(owner(x))``, through which both are trained.

    Parameters
    ----------
    owner : torch.nn.Module
        A sparse layer.
    head : torch.nn.Module
        Tied to it.
    chained : bool
        Whether the owner comes first.
    """

    def __init__(self, owner: Any, head: Any, chained: bool) -> None:
        super().__init__()
        self.owner, self.head, self.chained = owner, head, chained

    def forward(self, input: Tensor) -> Tensor:
        """The output of the head."""
        return self.head(self.owner(input) if self.chained else input)  # type: ignore[no-any-return]

    @property
    def in_features(self) -> int:
        """The last dimension of inputs."""
        return int((self.owner if self.chained else self.head).in_features)

    @property
    def bias(self) -> Any:
        """That of the head: the owner has none where it comes first, and is not asked for its own else."""
        return self.head.bias

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.owner.shape  # type: ignore[no-any-return]

    @property
    def forward_mask(self) -> Tensor | None:
        """That of the owner."""
        return self.owner.forward_mask  # type: ignore[no-any-return]

    @forward_mask.setter
    def forward_mask(self, mask: Tensor | None) -> None:
        self.owner.forward_mask = mask

    def positions(self) -> Tensor:
        """Of the weight's connections."""
        return self.owner.positions()  # type: ignore[no-any-return]

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop and grow connections of the owner."""
        return self.owner.rewrite(drop, grow)  # type: ignore[no-any-return]

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        self.owner.reset_parameters()
