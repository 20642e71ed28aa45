"""What `SparseLinear` and `MaskedLinear` have in common: sizes, counts, leading dimensions and a watcher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sparselab.nn._checks import check_size
from sparselab.nn.functional import GradientWatcher

if TYPE_CHECKING:
    from sparselab.nn.masked import MaskedLinear

Layer = TypeVar("Layer", bound="SparseLayer")


class SparseLayer(nn.Module):
    """A linear layer with a topology; subclasses say how it is stored and computed."""

    bias: nn.Parameter | None
    forward_mask: Tensor | None
    #: The kind of layer it was made from, which `sparselab.densify` makes of it again.
    dense_class: type[nn.Module] = nn.Linear

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("forward_mask", None)
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.gradient_watcher: GradientWatcher | None = None

    @property
    def stored(self) -> nn.Parameter:
        """The Parameter that holds the weights."""
        raise NotImplementedError

    @property
    def nnz(self) -> int:
        """Live connections."""
        raise NotImplementedError

    @property
    def _in_use(self) -> Tensor:
        """`stored`, with 0 for what `forward_mask` leaves out; its gradient reaches all of `stored`."""
        if self.forward_mask is None:
            return self.stored
        return torch.where(self.forward_mask, self.stored, self.stored - self.stored.detach())

    def _fit_forward_mask(self, saved: Tensor | None) -> None:
        """Make room for a saved mask, or forget the mask if none was saved."""
        self.forward_mask = None if saved is None else torch.ones_like(self.stored, dtype=torch.bool)

    def _product(self, tokens: Tensor) -> Tensor:
        """(tokens, out_features) for (tokens, in_features)."""
        raise NotImplementedError

    def _product_seen_by(self, watcher: GradientWatcher, tokens: Tensor) -> Tensor:
        """As `_product`, and show `watcher` the operands of its backward passes."""
        raise NotImplementedError

    @classmethod
    def _like(
        cls: type[Layer],
        linear: nn.Linear | MaskedLinear,
        sparsity: float,
        device: torch.device | str | None = None,
    ) -> Layer:
        """A new layer with the sizes, dtype, mode and trainability of a dense one, and random weights."""
        weight = linear.weight
        place = weight.device if device is None else device
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, sparsity, place, weight.dtype
        )  # type: ignore[call-arg]
        new._train_as(linear, weight)
        return new

    def _train_as(self, linear: nn.Linear | SparseLayer, weight: Tensor) -> None:
        """Take over the mode, what is trained, and the kind of another layer with that weight."""
        self.train(linear.training)
        self.dense_class = getattr(linear, "dense_class", nn.Linear)
        self.stored.requires_grad_(weight.requires_grad)
        if self.bias is not None:
            assert linear.bias is not None
            self.bias.requires_grad_(linear.bias.requires_grad)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``, the shape of W."""
        return self.out_features, self.in_features

    @property
    def density(self) -> float:
        """Live fraction of W (1 for a layer without positions)."""
        size = self.in_features * self.out_features
        return self.nnz / size if size else 1.0

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    def _forward(self, x: Tensor) -> Tensor:
        """The output for checked input (..., in_features)."""
        tokens = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features)
        watched = self.gradient_watcher is not None and self.stored.requires_grad
        product = self._watched_product if watched else self._product
        if watched and torch.compiler.is_compiling():
            # Not as a decorator, which imports torch's compiler (300 MB resident) with this module.
            product = torch.compiler.disable(product)  # type: ignore[no-untyped-call]
        y = product(tokens)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def _watched_product(self, tokens: Tensor) -> Tensor:
        assert self.gradient_watcher is not None
        y = self._product_seen_by(self.gradient_watcher, tokens)
        if y.requires_grad:
            self.gradient_watcher.forward_seen()
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={self.sparsity:.4g}, nnz={self.nnz}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A watcher belongs to the algorithm that set it, not to a copy.
        return {**self.__dict__, "gradient_watcher": None}
