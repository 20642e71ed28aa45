"""Linear layers that have the weight of another layer, and only a bias of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselab.nn.layers.base import SparseLayer, weight_of
from sparselab.nn.ops.tools.nodes import is_node, node_of
from sparselab.nn.storage.checks import check_bias
from sparselab.nn.weight.view import is_weight_of

_DENSE = nn.Linear, nn.Embedding


class TiedLinear(nn.Module):
    """``y = x W^T + b`` with the W of another layer, which both train: an output head, say, of an embedding.

    Parameters
    ----------
    layer : torch.nn.Module
        A sparse layer whose weight has two dimensions (`sparselab.SparseLinear`, `FanInLinear`,
        `BlockSparseLinear`, `SparseEmbedding`, `MaskedLinear`), a `torch.nn.Linear` or a
        `torch.nn.Embedding`. It must be part of the model itself: what is tied to it holds it, but is not
        where its weights are listed, moved and saved.
    bias : bool

    Attributes
    ----------
    layer : torch.nn.Module
    in_features, out_features : int
    weight : SparseWeight, or tensor, (out_features, in_features)
        That of the layer.
    bias : Parameter, (out_features,), or None
        Drawn within ``1 / sqrt(fan_in)``, with the inputs that an output has on average.

    Raises
    ------
    TypeError
        If the layer is none of those above, or bias no bool.

    Notes
    -----
    There is one Parameter and one topology. Rewrites are followed, the gradients of both uses add up, and
    growth by gradient sees both. It is no sparse layer to an algorithm, which attaches the shared one, and
    the weight is counted once. Copies of a model share as it does; a copy of this module alone has a layer
    of its own. `sparselab.sparsify` and `densify` of the layer are followed.

    Examples
    --------
    >>> import torch
    >>> embedding = torch.nn.Embedding(1000, 64)
    >>> head = TiedLinear(embedding, bias=False)
    >>> head(embedding(torch.tensor([3, 5]))).shape
    torch.Size([2, 1000])
    """

    bias: nn.Parameter | None
    #: Whether W is the transpose of the layer's weight.
    transposed = False

    def __init__(self, layer: nn.Module, bias: bool = True) -> None:
        super().__init__()
        has_bias = check_bias(bias, f"{type(self).__name__}(layer")
        require_shareable(layer)
        #: In a tuple: torch lists, saves and moves the modules that are members.
        self._shared = (layer,)
        held = weight_of(layer)
        shape = self.weight.shape
        self.out_features, self.in_features = int(shape[0]), int(shape[1])
        new = torch.empty(self.out_features, device=held.device, dtype=held.dtype) if has_bias else None
        self.register_parameter("bias", None if new is None else nn.Parameter(new))
        self.reset_parameters()

    @property
    def layer(self) -> Any:
        """The layer whose weight this is."""
        return self._shared[0]

    @property
    def weight(self) -> Any:
        """The weight that is multiplied with: that of the layer, or its transpose."""
        weight = self.layer.weight
        return weight.T if self.transposed else weight

    @weight.setter
    def weight(self, value: object) -> None:
        # What ties weights assigns the one that is shared already.
        if self.transposed or not (value is self.layer.weight or is_weight_of(self.layer, value)):
            raise TypeError(
                f"weight of a {type(self).__name__} must be that of its layer, got another one; to share "
                "that of another layer, call tie(layer)"
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `torch.nn.Module`, which calls it to assign a Parameter; as `weight`, only the shared one."""
        if name == "weight":
            type(self).weight.fset(self, param)  # type: ignore[attr-defined]
        else:
            super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Draw the bias anew; the layer has its own ``reset_parameters``."""
        if self.bias is not None:
            fan_in = weight_of(self.layer).numel() / max(self.out_features, 1)
            bound = 1 / math.sqrt(max(fan_in, 1.0))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b``.

        Parameters
        ----------
        input : (..., in_features)

        Returns
        -------
        (..., out_features)
        """
        if is_node(input):
            return node_of(self, input)  # type: ignore[no-any-return]
        if isinstance(self.layer, SparseLayer):
            return self.layer.tied_product(input, self.bias, self.transposed)
        return F.linear(input, self.weight, self.bias)

    def tie(self, layer: nn.Module) -> None:
        """Share the weight of another layer from now on.

        Parameters
        ----------
        layer : torch.nn.Module
            With a weight of the same shape.

        Raises
        ------
        TypeError, ValueError
            If it cannot be shared, or the shape differs.
        """
        require_shareable(layer)
        other: Any = layer
        shape, own = tuple(other.weight.shape), tuple(self.layer.weight.shape)
        if shape != own:
            raise ValueError(f"layer must have a weight of shape {own}, got {shape}")
        self._shared = (layer,)

    def untied(self) -> nn.Linear:
        """What a dense model has in this place: a `torch.nn.Linear` with the Parameter of the dense layer.

        There is none with the transpose of one.
        """
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        new.weight = self.layer.weight
        new.register_parameter("bias", self.bias)
        return new.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, with the weight of a {type(self.layer).__name__}"
        )


class TransposedLinear(TiedLinear):
    """``y = x W + b`` with the W of another layer, which both train: the decoder of a tied autoencoder.

    As `TiedLinear`, with the transpose of its weight: from the outputs of the layer to its inputs.

    Examples
    --------
    >>> import torch
    >>> from sparselab import SparseLinear
    >>> encoder = SparseLinear(784, 64)
    >>> decoder = TransposedLinear(encoder)
    >>> decoder(torch.relu(encoder(torch.randn(8, 784)))).shape
    torch.Size([8, 784])
    """

    transposed = True


def require_shareable(layer: object) -> None:
    """Raise TypeError unless this is a layer whose weight `TiedLinear` can share."""
    known = layer.is_shareable if isinstance(layer, SparseLayer) else isinstance(layer, _DENSE)
    if not known or layer.weight.ndim != 2:  # type: ignore[attr-defined]
        raise TypeError(
            "layer must be a SparseLinear or another sparse layer whose weight has two dimensions, a "
            f"torch.nn.Linear or a torch.nn.Embedding, got {type(layer).__name__}"
        )


def find_tied(model: nn.Module) -> Iterator[tuple[str, TiedLinear]]:
    """The tied layers of a model with their qualified names."""
    for name, module in model.named_modules():
        if isinstance(module, TiedLinear):
            yield name, module


def retie(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Tie what shares the weight of layers to what takes their place; nothing is changed by an error.

    Raises
    ------
    TypeError, ValueError
        If what takes the place of one cannot be shared, or a layer that is shared is part of what goes.
    """
    moves = []
    gone = _modules_of(new)
    for name, tied in find_tied(model):
        if tied.layer in new:
            try:
                require_shareable(new[tied.layer])
            except TypeError as error:
                raise TypeError(f"{name} shares the weight of a layer to replace: {error}") from None
            moves.append((tied, new[tied.layer]))
        elif tied.layer in gone:
            raise ValueError(
                f"model must not share the weight of a part of what is replaced, got {name!r}, which has "
                f"that of a {type(tied.layer).__name__} inside"
            )
    for tied, layer in moves:
        tied.tie(layer)


def _modules_of(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {each for module in modules for each in module.modules()}
