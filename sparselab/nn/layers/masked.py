"""Layers whose sparsity is only simulated: what most papers train; tests compare with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparselab.nn.follow.replaced import connections_replaced
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.compressed import CompressedLayer
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.layers.linear import SparseLinear, connected
from sparselab.nn.ops.dense_form import DenseForm, DenseProducts
from sparselab.nn.ops.derivatives import product
from sparselab.nn.ops.inputs.places import dense_of
from sparselab.nn.ops.inputs.tokens import by_matrix
from sparselab.nn.ops.operands import GradientOperands, LinearOperands, is_of_graph
from sparselab.nn.ops.tools.nodes import is_node, node_of
from sparselab.nn.storage.checks import check_width
from sparselab.nn.storage.masked import Masked

Layer = TypeVar("Layer", bound="MaskedLayer")
#: Called with x and dy, of which the gradient by W is made.
Show = Callable[[Tensor, Tensor], None]

#: ``x W^T + b`` for tokens, and ``x W + b``.
_LINEAR = DenseProducts(nn.functional.linear, lambda dy, W: dy @ W, lambda dy, x: dy.T @ x)
_TRANSPOSED = DenseProducts(
    lambda x, W, b: nn.functional.linear(x, W.T, b), lambda dy, W: dy @ W.T, lambda dy, x: x.T @ dy
)


class MaskedLayer(SparseLayer):
    """A layer whose weight is dense, with the topology in a mask; the twin of a sparse layer.

    W has two dimensions, those of the sparse layer's `shape`, whatever the dense layer's weight has.

    Parameters
    ----------
    layer : CompressedLayer
        The sparse layer, whose settings, connections, weights and biases it takes over.
    """

    weight: nn.Parameter
    mask: Tensor
    tensor_names = "weight", "mask", "forward_mask", "bias"
    #: The sparse layer that it is the twin of.
    twin: type[CompressedLayer]

    def __init__(self, layer: CompressedLayer) -> None:
        super().__init__(Masked(layer.shape))
        self._configure(layer)
        values = layer.weight_values
        if values.is_meta:
            raise NotImplementedError(
                f"{type(self).__name__} counts its connections in its mask, which must hold data, "
                "got the device meta"
            )
        self.weight = nn.Parameter(values.new_empty(self.shape))
        self.register_buffer("mask", torch.empty(self.shape, dtype=torch.bool, device=values.device))
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias))
        self._copy(layer)
        self._train_as(layer, values)

    @classmethod
    def from_sparse(cls: type[Layer], layer: Any) -> Layer:
        """The twin of a sparse layer: the same topology, weights, biases, mode and trainability."""
        fits = isinstance(layer, CompressedLayer) and layer.dense_type is cls.twin.dense_type
        if not fits or layer.block_shape != (1, 1):
            raise TypeError(f"layer must be a {cls.twin.__name__}, got {type(layer).__name__}")
        with torch.random.fork_rng(devices=()):  # what a new layer draws is overwritten
            new = cls.like(layer, 1.0)
        new._copy(layer)
        return new

    def _sparse(self) -> Any:
        """The sparse layer with the same topology, weights, biases, mode and trainability."""
        return self.twin._from_layer(self)

    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        # Made without memory, so that nothing is drawn but the weights.
        twin = self.twin.like(self, 1.0, device="meta").to_empty(device=self.weight.device)
        twin.bias = None
        twin._connect(positions, weights)
        self.weight.grad = None
        self._copy(twin)

    @torch.no_grad()
    def _copy(self, layer: CompressedLayer) -> None:
        positions = layer.positions()
        self.mask.zero_().view(-1)[positions] = True
        self.weight.zero_().view(-1)[positions] = layer.per_connection(layer.weight_values)
        self.forward_mask = None
        if layer.forward_mask is not None:
            self.forward_mask = torch.zeros_like(self.mask)
            self.forward_mask.view(-1)[positions] = layer.per_connection(layer.forward_mask)
        if self.bias is not None and layer.bias is not None:
            self.bias.copy_(layer.bias)

    def reset_parameters(self) -> None:
        """Draw a new random topology of the same count, and new weights and biases."""
        with connections_replaced(self):
            self._copy(self.twin.like(self, self.sparsity))

    @property
    def weight_in_use(self) -> Tensor:
        """W in use, dense."""
        # Chosen, not multiplied: 0 times NaN is NaN, in the output and in the gradient.
        return torch.where(self.mask, self.in_use, 0)

    def operands(self, x: Tensor, dy: Tensor, of_graph: bool) -> GradientOperands:
        """What the dense gradient is made of."""
        raise NotImplementedError

    def _compute(
        self, products: DenseProducts, x: Tensor, bias: Tensor | None, show: Show | None = None
    ) -> Tensor:
        """The output, whose gradient is shown to the hook if there is one and something to be seen."""
        weight = self.weight_in_use
        if self.gradient_hook is None or not self.stored.requires_grad or not torch.is_grad_enabled():
            return products.product(x, weight, bias)
        form = DenseForm(products, show or self._show, lambda: self.stored)
        x, weight, bias = _under_autocast(x, weight, bias)
        return product(x, weight, bias, (None, None), form)

    def _show(self, x: Tensor, dy: Tensor) -> None:
        if self.gradient_hook is not None:
            self.gradient_hook(self.operands(x.detach(), dy.detach(), is_of_graph(x)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, and clear what another topology leaves behind: weights and gradients without a connection."""
        if prefix + "mask" in state_dict:
            self._fit_forward_mask(state_dict.get(prefix + "forward_mask"))
        with connections_replaced(self):
            super()._load_from_state_dict(state_dict, prefix, *args)
            with torch.no_grad():
                self.weight.masked_fill_(~self.mask, 0)


class MaskedLinear(MaskedLayer):
    """Dense twin of `SparseLinear`: ``y = x (W * mask)^T + b``, where the mask is the topology.

    Every algorithm of `sparselab.dst` drives it as it drives a `SparseLinear`. It is there to compare with:
    it takes the memory and the time of a dense layer, and more.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    sparsity : float in [0, 1], optional
        Fraction of W without a connection; 0.9 if density is not given either.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    device : torch.device, optional
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16.

    Attributes
    ----------
    weight : Parameter, (out_features, in_features)
        Exactly 0 where there is no connection, and so is its gradient, whatever NaN or infinity comes along.
        The gradient of what is computed with it otherwise than by the layer, `TiedLinear` and
        `TransposedLinear` is dense, and no growth sees it.
    mask : bool buffer, (out_features, in_features)
        Where connections are. It is part of the state: what is loaded replaces the topology.
    forward_mask : bool buffer, (out_features, in_features), or None
        Connections that the output comes from; as of `SparseLinear`.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        As `SparseLinear`.
    NotImplementedError
        If the device is "meta", where a mask has nothing to count.

    Notes
    -----
    With the same state of torch's generator it draws the topology, weights and biases that `SparseLinear`
    draws. A position without a connection has value, gradient and optimizer state 0, so optimizers that treat
    each entry by itself (SGD, Adam and their kin, with weight decay) leave it alone and train as they would
    train the twin. Those that look at a matrix as a whole, such as Adafactor, do not.

    Examples
    --------
    >>> import torch
    >>> masked = MaskedLinear(64, 32, sparsity=0.9)
    >>> sparse = masked.to_sparse()
    >>> x = torch.randn(8, 64)
    >>> torch.allclose(masked(x), sparse(x), atol=1e-6)
    True
    """

    twin = SparseLinear
    is_shareable = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            SparseLinear(
                in_features, out_features, bias, sparsity=sparsity, density=density, device=device,
                dtype=dtype,
            )
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, sparsity: float | None = None, *, density: float | None = None
    ) -> MaskedLinear:
        """The largest weights of a dense layer; the same as `SparseLinear.from_dense`."""
        return cls.from_sparse(SparseLinear.from_dense(linear, sparsity, density=density))

    @classmethod
    def from_pattern(
        cls, pattern: object, bias: bool = True, *, dtype: torch.dtype | None = None
    ) -> MaskedLinear:
        """A layer with the connections of a matrix; as `SparseLinear.from_pattern`."""
        return connected(cls, pattern, bias, dtype)

    def to_sparse(self) -> SparseLinear:
        """A `SparseLinear` with the same topology, weights, biases, mode and trainability."""
        refuse_to_lose(self, "to_sparse", self.tensor_names)
        new: SparseLinear = self._sparse()
        return new

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` with the same outputs, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        new: nn.Linear = self._sparse().to_dense()
        return new

    def forward(self, input: Tensor) -> Tensor:
        """``x (W * mask)^T + b`` for the input x (..., in_features): (..., out_features).

        Devices, dtypes, autocast and errors are those of `torch.nn.Linear`. As there, an infinite input
        reaches every output of its token. A sparse tensor is made dense.
        """
        if is_node(input):
            return node_of(self, input)  # type: ignore[no-any-return]
        return self.tied_product(input, self.bias)

    def tied_product(self, input: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
        check_width(input, self.shape[0] if transposed else self.shape[1])
        if input.layout is not torch.strided and not input.is_nested:
            input = dense_of(input)  # growth by gradient reads the memory of its operands
        products = _TRANSPOSED if transposed else _LINEAR
        show = (lambda x, dy: self._show(dy, x)) if transposed else None
        return by_matrix(input, lambda tokens: self._compute(products, tokens, bias, show))

    def operands(self, x: Tensor, dy: Tensor, of_graph: bool) -> GradientOperands:
        """Tokens and the gradients of their outputs."""
        return LinearOperands(x, dy, of_graph)


def _under_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors as torch's own products take them: in autocast's dtype, but for float64 and None."""
    kind = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
    )


def recognises_mask(state: State) -> dict[str, object] | None:
    """Whether a saved state is that of a masked layer, as `LayerKind` asks."""
    return {} if "mask" in state else None


register_kind(LayerKind("masked", MaskedLinear, (nn.Linear,), recognises=recognises_mask))
