"""Feed-forward blocks: two sparse layers with a nonlinearity between them, computed together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _module

from sparselab.kernels.cpu.simd.activations import ACTIVATIONS
from sparselab.nn.layers.block import BlockSparseLinear
from sparselab.nn.layers.fan_in import FanInLinear
from sparselab.nn.layers.linear import LinearLayer, SparseLinear
from sparselab.nn.ops.cpu.mlp import Weights, pays
from sparselab.nn.ops.mlp.function import apply_activation, two_layers
from sparselab.nn.ops.tracing import is_plain
from sparselab.nn.storage.checks import check_bias, check_size

_has_any_global_hook: Any = _module._has_any_global_hook

_LAYERS: dict[str, type[LinearLayer]] = {
    "single": SparseLinear, "fan-in": FanInLinear, "block": BlockSparseLinear,
}  # fmt: skip


def feed_forward(
    x: Tensor, up: nn.Module, down: nn.Module, activation: str = "gelu", gate: nn.Module | None = None
) -> Tensor:
    """``down(f(up(x)))``, or ``down(f(gate(x)) * up(x))``.

    Parameters
    ----------
    x : (..., in_features)
    up, down : torch.nn.Module
        Any modules; two sparse linear layers of one kind are computed together where that is faster.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}
        f, as in `torch.nn.functional`.
    gate : torch.nn.Module, optional

    Returns
    -------
    (..., out_features)

    Raises
    ------
    ValueError
        If the activation is unknown.

    Notes
    -----
    Together, the hidden numbers stay in a cache between the two products, and one copy of them in place of
    two is kept for the backward pass. This is done for at least two tiles of tokens a thread on the CPU, in
    float32 and under autocast in bfloat16 (whose hidden numbers then stay in float32), outside of
    `torch.compile`, `torch.func` and forward mode, for `SparseLinear`, `FanInLinear` and `BlockSparseLinear`
    with small blocks, without hooks, parametrizations and forward masks, while no algorithm watches their
    gradients. Else the modules are called one after the other. Outputs differ by rounding.

    Examples
    --------
    >>> import sparselab
    >>> up, down = sparselab.SparseLinear(64, 256), sparselab.SparseLinear(256, 64)
    >>> feed_forward(torch.randn(8, 128, 64), up, down).shape
    torch.Size([8, 128, 64])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate is not None:
        return down(apply_activation(activation, gate(x)) * up(x))  # type: ignore[no-any-return]
    if (together := _together(x, up, down, activation)) is not None:
        return together
    return down(apply_activation(activation, up(x)))  # type: ignore[no-any-return]


def _together(x: Any, up: Any, down: Any, activation: str) -> Tensor | None:
    """The output by one operation, or None if the modules are to be called."""
    if torch.compiler.is_compiling() or not (_is_ordinary(up) and _is_ordinary(down)):
        return None
    tensors = [up.weight_values, down.weight_values, up.bias, down.bias]
    out = _dtype_of_output(x, tensors)
    if out is None or x.shape[-1] != up.in_features or up.out_features != down.in_features:
        return None
    first, second = (Weights(each.topology(), each.weight_values, each.bias) for each in (up, down))
    if any(each.topology.is_watched or _misfits(each) for each in (first, second)):
        return None
    if not pays(first.topology, second.topology, math.prod(x.shape[:-1])):
        return None
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    with torch.autocast("cpu", enabled=False):
        y = two_layers(rows, first, second, activation, out)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _is_ordinary(layer: nn.Module) -> bool:
    """Whether a module is a sparse linear layer that nobody sees being called, and that computes as usual."""
    kind: Any = type(layer)
    return (
        isinstance(layer, LinearLayer)
        and kind.forward is LinearLayer.forward
        and kind._multiply is LinearLayer._multiply
        and "forward" not in vars(layer)
        and not (
            layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
            or layer._backward_pre_hooks or _has_any_global_hook()
        )
        and layer._parameters.get("weight_values") is not None
        and ("bias" in layer._parameters or layer.bias is None)
        and layer._buffers["forward_mask"] is None
    )  # fmt: skip


def _dtype_of_output(x: Any, tensors: list[Tensor | None]) -> torch.dtype | None:
    """In which dtype the output is, or None if the operands are none for the kernels."""
    if not (isinstance(x, Tensor) and is_plain(x, *tensors) and x.is_cpu and x.ndim > 0 and x.numel()):
        return None
    if any(each is not None and not (each.is_cpu and each.dtype is torch.float32) for each in tensors):
        return None
    up, _, bias, _ = tensors
    if bias is not None and bias.requires_grad and up is not None and not up.requires_grad:
        return None  # sums of the hidden layer's gradient come with a gradient by the weights
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if x.dtype is torch.float32 else None
    narrow = torch.get_autocast_dtype("cpu")
    return narrow if narrow is torch.bfloat16 and x.dtype in (torch.float32, narrow) else None


def _misfits(layer: Weights) -> bool:
    """Whether weights or biases have other shapes than their layer needs: the layer itself says so."""
    topology = layer.topology
    return layer.values.shape != topology.values_shape or (
        layer.bias is not None and layer.bias.shape != (topology.shape[0],)
    )


class SparseMLP(nn.Module):
    """A feed-forward block ``y = down(f(up(x)))`` of sparse layers, computed together.

    A training step takes about a tenth less time than the same layers one after the other, and keeps half of
    the hidden numbers for the backward pass; see `feed_forward` for when.

    Parameters
    ----------
    in_features, hidden_features : int
    out_features : int, optional
        `in_features` by default.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}
    bias : bool
    dropout : float in [0, 1)
        Of the hidden numbers, in training. The layers are called one after the other then.
    gated : bool
        Whether there is a third layer: ``y = down(f(gate(x)) * up(x))``, SwiGLU for "silu".
    layer : {"single", "fan-in", "block"}
        `SparseLinear`, `FanInLinear` or `BlockSparseLinear`.
    **settings
        Of the layers: sparsity or density, ``block_shape``, ``device``, ``dtype``.

    Attributes
    ----------
    up, down : SparseLayer
        Ordinary layers, which algorithms and tools see as any others.
    gate : SparseLayer or None

    Raises
    ------
    TypeError, ValueError
        If the activation, the kind of layer or the dropout is none of these; and as of the layers.

    References
    ----------
    Shazeer: GLU Variants Improve Transformer, 2020 (gated blocks).

    Examples
    --------
    >>> block = SparseMLP(64, 256, layer="block", block_shape=(4, 4), sparsity=0.9)
    >>> block(torch.randn(8, 128, 64)).shape
    torch.Size([8, 128, 64])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        *,
        dropout: float = 0.0,
        gated: bool = False,
        layer: str = "single",
        **settings: Any,
    ) -> None:
        super().__init__()
        inputs, hidden = (
            check_size("in_features", in_features),
            check_size("hidden_features", hidden_features),
        )
        outputs = inputs if out_features is None else check_size("out_features", out_features)
        bias = check_bias(bias, f"SparseMLP({in_features}, {hidden_features}, {out_features}, {activation!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if layer not in _LAYERS:
            raise ValueError(f"layer must be one of {', '.join(_LAYERS)}, got {layer!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        make: Callable[..., LinearLayer] = _LAYERS[layer]
        self.activation, self.dropout = activation, float(dropout)
        self.gate = make(inputs, hidden, bias, **settings) if gated else None
        self.up, self.down = make(inputs, hidden, bias, **settings), make(hidden, outputs, bias, **settings)

    def forward(self, input: Tensor) -> Tensor:
        """``down(f(up(x)))``, or with a gate; (..., in_features) to (..., out_features)."""
        if not (self.dropout and self.training):
            return feed_forward(input, self.up, self.down, self.activation, self.gate)
        first = self.up if self.gate is None else self.gate
        hidden = apply_activation(self.activation, first(input))
        if self.gate is not None:
            hidden = hidden * self.up(input)
        return self.down(F.dropout(hidden, self.dropout))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, gated={self.gate is not None}"
