"""A linear layer whose sparsity is only simulated: what most papers train; tests compare with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparselab import kernels
from sparselab.nn._checks import check_width
from sparselab.nn._layer import SparseLayer
from sparselab.nn.functional import GradientWatcher
from sparselab.nn.linear import SparseLinear
from sparselab.nn.topology import as_matrix


class MaskedLinear(SparseLayer):
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

    weight: nn.Parameter
    mask: Tensor

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

    @classmethod
    def from_sparse(cls, layer: SparseLinear) -> MaskedLinear:
        """The twin of a sparse layer: the same topology, weights, biases, mode and trainability."""
        if not isinstance(layer, SparseLinear) or layer.grid != layer.shape:
            raise TypeError(f"layer must be a SparseLinear, got {type(layer).__name__}")
        new = cls.__new__(cls)
        SparseLayer.__init__(new, layer.in_features, layer.out_features)
        new._hold(layer)
        new._train_as(layer, layer.values)
        return new

    def to_sparse(self) -> SparseLinear:
        """A `SparseLinear` with the same topology, weights, biases, mode and trainability."""
        new = SparseLinear._from_positions(self, self.positions())
        new.forward_mask = None if self.forward_mask is None else self.per_connection(self.forward_mask)
        return new

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` with the same outputs, mode and trainability."""
        return self.to_sparse().to_dense()

    def _hold(self, layer: SparseLinear) -> None:
        """Make the tensors for the connections of a sparse layer, and copy them."""
        if layer.values.is_meta:
            raise NotImplementedError(
                "MaskedLinear counts its connections in its mask, which must hold data, got the device meta"
            )
        self.weight = nn.Parameter(layer.values.new_empty(self.shape))
        self.register_buffer("mask", torch.empty(self.shape, dtype=torch.bool, device=layer.values.device))
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias))
        self._copy(layer)

    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        # Made without memory, so that nothing is drawn but the weights.
        twin = SparseLinear(
            self.in_features, self.out_features, False, 1.0, device="meta", dtype=self.weight.dtype
        ).to_empty(device=self.weight.device)
        twin._connect(positions, weights)
        self.weight.grad = None
        self._copy(twin)

    @torch.no_grad()
    def _copy(self, layer: SparseLinear) -> None:
        positions = layer.positions()
        self.mask.zero_().view(-1)[positions] = True
        self.weight.zero_().view(-1)[positions] = layer.values
        self.forward_mask = None
        if layer.forward_mask is not None:
            self.forward_mask = torch.zeros_like(self.mask)
            self.forward_mask.view(-1)[positions] = layer.forward_mask
        if self.bias is not None and layer.bias is not None:
            self.bias.copy_(layer.bias)

    def reset_parameters(self) -> None:
        """Draw a new random topology of the same count, and new weights and biases."""
        self._copy(
            SparseLinear(
                self.in_features, self.out_features, self.bias is not None, self.sparsity,
                self.weight.device, self.weight.dtype,
            )
        )  # fmt: skip

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
        matrix, old_slots = kernels.rewrite(
            as_matrix(self), drop.cpu().numpy(), grow.cpu().numpy(), compact=True
        )
        new, source = (torch.from_numpy(part).to(place) for part in (matrix.positions(), old_slots))
        self.mask.zero_().view(-1)[new] = True
        for entries in (self.weight, self.weight.grad, self.forward_mask):
            if entries is not None:
                self.moved(entries, source)
        return source

    def forward(self, x: Tensor) -> Tensor:
        """``x (W * mask)^T + b`` for x (..., in_features): (..., out_features).

        Devices, dtypes, autocast and errors are those of `torch.nn.Linear`. As there, an infinite input
        reaches every output of its token.
        """
        check_width(x, self.in_features)
        return self._forward(x)

    def _product(self, tokens: Tensor) -> Tensor:
        # Chosen, not multiplied: 0 times NaN is NaN, in the output and in the gradient.
        return nn.functional.linear(tokens, torch.where(self.mask, self._in_use, 0), self.bias)

    def _product_seen_by(self, watcher: GradientWatcher, tokens: Tensor) -> Tensor:
        y: Tensor = _Seen.apply(self._product(tokens), tokens, watcher)  # type: ignore[no-untyped-call]
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


class _Seen(torch.autograd.Function):
    """y itself, whose backward passes show its gradient, and the x that it came from, to a watcher."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, watcher: GradientWatcher) -> Tensor:
        ctx.save_for_backward(x)
        ctx.watcher = watcher
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.watcher.backward_seen(x.detach(), grads[0].detach())
        return grads[0], None, None
