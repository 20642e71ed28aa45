"""Layers whose sparsity is only simulated: what most papers train; tests compare with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparselab.kernels.checks import ascending
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.conv import Convolution, Size, SparseConv2d
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.layers.linear import SparseLinear
from sparselab.nn.ops.conv_operands import ConvolutionFactors
from sparselab.nn.ops.linear import GradientWatcher
from sparselab.nn.ops.operands import GradientFactors, LinearFactors
from sparselab.nn.storage.checks import check_images, check_width
from sparselab.nn.storage.compressed import CompressedRows
from sparselab.nn.storage.contract import as_matrix

Layer = TypeVar("Layer", bound="MaskedLayer")


class MaskedLayer(SparseLayer):
    """A layer whose weight is dense, with the topology in a mask; the twin of a sparse layer.

    W has two dimensions, those of the sparse layer's `shape`, whatever the dense layer's weight has.
    """

    weight: nn.Parameter
    mask: Tensor
    tensor_names = "weight", "mask", "forward_mask", "bias"
    #: The sparse layer that it is the twin of.
    _twin: type[CompressedRows]

    @classmethod
    def from_sparse(cls: type[Layer], layer: Any) -> Layer:
        """The twin of a sparse layer: the same topology, weights, biases, mode and trainability."""
        if not isinstance(layer, cls._twin) or layer.grid != layer.shape:
            raise TypeError(f"layer must be a {cls._twin.__name__}, got {type(layer).__name__}")
        new = cls.__new__(cls)
        SparseLayer.__init__(new, layer.in_features, layer.out_features)
        new._hold(layer)
        new._train_as(layer, layer.values)
        return new

    def _sparse(self) -> Any:
        """The sparse layer with the same topology, weights, biases, mode and trainability."""
        return self._twin._from_layer(self)

    def _hold(self, layer: CompressedRows) -> None:
        """Take over the settings of a sparse layer, make tensors for its connections, and copy them."""
        self._configure(layer)
        if layer.values.is_meta:
            raise NotImplementedError(
                f"{type(self).__name__} counts its connections in its mask, which must hold data, "
                "got the device meta"
            )
        self.weight = nn.Parameter(layer.values.new_empty(self.shape))
        self.register_buffer("mask", torch.empty(self.shape, dtype=torch.bool, device=layer.values.device))
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias))
        self._copy(layer)

    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        # Made without memory, so that nothing is drawn but the weights.
        twin = self._twin.like(self, 1.0, device="meta").to_empty(device=self.weight.device)
        twin.bias = None
        twin._connect(positions, weights)
        self.weight.grad = None
        self._copy(twin)

    @torch.no_grad()
    def _copy(self, layer: CompressedRows) -> None:
        positions = layer.positions()
        self.mask.zero_().view(-1)[positions] = True
        self.weight.zero_().view(-1)[positions] = layer.per_connection(layer.values)
        self.forward_mask = None
        if layer.forward_mask is not None:
            self.forward_mask = torch.zeros_like(self.mask)
            self.forward_mask.view(-1)[positions] = layer.per_connection(layer.forward_mask)
        if self.bias is not None and layer.bias is not None:
            self.bias.copy_(layer.bias)

    def reset_parameters(self) -> None:
        """Draw a new random topology of the same count, and new weights and biases."""
        self._copy(self._twin.like(self, self.sparsity))

    @property
    def stored(self) -> nn.Parameter:
        """`weight`."""
        return self.weight

    @property
    def nnz(self) -> int:
        """Live connections, counted in the mask."""
        return int(self.mask.count_nonzero())

    def positions(self) -> Tensor:
        """int64 (nnz,): ``row * in_features + column`` of each connection, ascending."""
        return self.mask.reshape(-1).nonzero().reshape(-1)

    def per_connection(self, entries: Tensor) -> Tensor:
        """(nnz,): the entries (out_features, in_features) at the connections, in the order of `positions`."""
        return entries[self.mask]

    @torch.no_grad()
    def put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries (out_features, in_features) of some connections."""
        positions = self.positions()[slots]
        entries[positions // self.in_features, positions % self.in_features] = numbers

    @torch.no_grad()
    def moved(self, entries: Tensor, source: Tensor) -> Tensor:
        """`entries`, zeroed in place wherever a `rewrite` that returned `source` left nothing."""
        survived = self.mask.clone()
        survived.view(-1)[self.positions()[source < 0]] = False
        return entries.masked_fill_(~survived, 0)

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop and grow connections in place.

        Parameters
        ----------
        drop : int64 (n,)
            Slots to remove: indices into `positions`.
        grow : int64 (m,)
            Positions ``row * in_features + column`` to add with weight 0. A dropped position may be grown
            again; it then keeps its weight.

        Returns
        -------
        int64 (new nnz,)
            The old slot of each new slot, or -1 where it was grown; `weight` and its gradient have followed.

        Raises
        ------
        ValueError
            As `sparselab.kernels.rewrite`.
        """
        place = self.mask.device
        topology, old_slots = as_matrix(self).rewrite(
            ascending(drop.cpu().numpy()), ascending(grow.cpu().numpy()), compact=True
        )
        new, source = (torch.from_numpy(part).to(place) for part in (topology.positions(), old_slots))
        self.mask.zero_().view(-1)[new] = True
        for entries in (self.weight, self.weight.grad, self.forward_mask):
            if entries is not None:
                self.moved(entries, source)
        return source

    @property
    def _weights(self) -> Tensor:
        """W in use, dense."""
        # Chosen, not multiplied: 0 times NaN is NaN, in the output and in the gradient.
        return torch.where(self.mask, self._in_use, 0)

    def _factors(self, x: Tensor, dy: Tensor) -> GradientFactors:
        """The factors of the dense gradient."""
        raise NotImplementedError

    def _product_seen_by(self, watcher: GradientWatcher, x: Tensor) -> Tensor:
        y: Tensor = _Seen.apply(self._product(x), x, watcher, self._factors)  # type: ignore[no-untyped-call]
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, and clear what another topology leaves behind: weights and gradients without a connection."""
        if prefix + "mask" in state_dict:
            self._fit_forward_mask(state_dict.get(prefix + "forward_mask"))
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            for entries in (self.weight, self.weight.grad):
                if entries is not None:
                    entries.masked_fill_(~self.mask, 0)


class MaskedLinear(MaskedLayer):
    """Dense twin of `SparseLinear`: ``y = x (W * mask)^T + b``, where the mask is the topology.

    Every algorithm of `sparselab.dst` drives it as it drives a `SparseLinear`. It is there to compare with:
    it takes the memory and the time of a dense layer, and more.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    sparsity : float in [0, 1]
        Fraction of W without a connection.
    device : torch.device, optional
    dtype : torch.dtype, optional
        float32, float64 or bfloat16.

    Attributes
    ----------
    weight : Parameter, (out_features, in_features)
        Exactly 0 where there is no connection, and so is its gradient, whatever NaN or infinity comes along.
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

    _twin = SparseLinear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        sparsity: float = 0.9,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._hold(SparseLinear(in_features, out_features, bias, sparsity, device, dtype))

    @classmethod
    def from_dense(cls, linear: nn.Linear, sparsity: float) -> MaskedLinear:
        """The largest weights of a dense layer; the same as `SparseLinear.from_dense`."""
        return cls.from_sparse(SparseLinear.from_dense(linear, sparsity))

    def to_sparse(self) -> SparseLinear:
        """A `SparseLinear` with the same topology, weights, biases, mode and trainability."""
        new: SparseLinear = self._sparse()
        return new

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` with the same outputs, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        return self.to_sparse().to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """``x (W * mask)^T + b`` for x (..., in_features): (..., out_features).

        Devices, dtypes, autocast and errors are those of `torch.nn.Linear`. As there, an infinite input
        reaches every output of its token.
        """
        check_width(x, self.in_features)
        return self._forward(x)

    def _product(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(tokens, self._weights, self.bias)

    def _factors(self, x: Tensor, dy: Tensor) -> GradientFactors:
        return LinearFactors(x, dy)


class MaskedConv2d(Convolution, MaskedLayer):
    """Dense twin of `SparseConv2d`: a convolution with ``W * mask``; see `MaskedLinear`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of `torch.nn.Conv2d`.
    sparsity : float in [0, 1]
        Fraction of W without a connection.
    device, dtype
        As of `MaskedLinear`.

    Attributes
    ----------
    weight : Parameter, (out_channels, in_channels // groups * height * width)
        Exactly 0 where there is no connection, as of `MaskedLinear`.
    mask, forward_mask, bias
        As of `MaskedLinear`, in the shape of `weight`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `SparseConv2d`.
    NotImplementedError
        If the device is "meta".

    Examples
    --------
    >>> import torch
    >>> masked = MaskedConv2d(8, 16, 3, padding="same")
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.allclose(masked(x), masked.to_sparse()(x), atol=1e-6)
    True
    """

    _twin = SparseConv2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", sparsity: float = 0.9,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        layer = SparseConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            sparsity, None, device, dtype,
        )  # fmt: skip
        super().__init__(layer.in_features, layer.out_features)
        self._hold(layer)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, sparsity: float = 0.9) -> MaskedConv2d:
        """The largest weights of a dense layer; the same as `SparseConv2d.from_dense`."""
        return cls.from_sparse(SparseConv2d.from_dense(conv, sparsity))

    def to_sparse(self) -> SparseConv2d:
        """A `SparseConv2d` with the same topology, weights, biases, mode and trainability."""
        new: SparseConv2d = self._sparse()
        return new

    def to_dense(self) -> nn.Conv2d:
        """A `torch.nn.Conv2d` with the same outputs, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        return self.to_sparse().to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x (n, in_channels, height, width), or of one image, as by `torch.nn.Conv2d`."""
        check_images(x, self.in_channels)
        return self._convolved(x)

    def _product(self, x: Tensor) -> Tensor:
        geometry = self._geometry
        kernel = self.in_channels // self.groups, *geometry.kernel
        return nn.functional.conv2d(
            x, self._weights.reshape(-1, *kernel), self.bias, geometry.stride, geometry.padding,
            geometry.dilation, self.groups,
        )  # fmt: skip

    def _factors(self, x: Tensor, dy: Tensor) -> GradientFactors:
        return ConvolutionFactors(x, dy, self._geometry)


class _Seen(torch.autograd.Function):
    """y itself, whose backward passes show its gradient, and what it is a factor of with x, to a watcher."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, watcher: GradientWatcher, factors: Callable[..., GradientFactors]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.watcher, ctx.factors = watcher, factors
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.watcher.backward_seen(ctx.factors(x.detach(), grads[0].detach()))
        return grads[0], None, None, None


def _recognises(state: State) -> dict[str, object] | None:
    return {} if "mask" in state else None


register_kind(LayerKind("masked", MaskedLinear, (nn.Linear,), recognises=_recognises))
register_kind(LayerKind("masked", MaskedConv2d, (nn.Conv2d,), recognises=_recognises))
