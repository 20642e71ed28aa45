"""Weights of a frozen layer in bfloat16 or int8: buffers in the place of its Parameter.

Nothing else says that a layer is frozen so, and nothing is left in float32. The buffer with the values has
the name of the Parameter; the scales of int8 are another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.nn.ops.contract import Narrow
from sparselab.nn.ops.narrow.weights import NARROW, narrowed, widen, widened, word
from sparselab.nn.ops.tracing import has_memory, is_plain
from sparselab.nn.storage.checks import check_width

#: Name of the buffer with the scales, which weights in int8 have.
SCALES = "weight_scales"

#: What weights can be frozen in.
_KNOWN = (torch.float32, *NARROW)
#: What tokens may be of, and outputs are returned in.
_TOKENS = (torch.float32, torch.bfloat16, torch.float16)
#: Integers as wide, which no change of a module's dtype casts.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def find_narrow(layer: Any) -> Narrow | None:
    """The narrow weights of a layer; None if its weights are a Parameter, or computed."""
    values = layer._buffers.get(layer.storage.parameter)
    return None if values is None else Narrow(values, layer._buffers.get(SCALES))


def narrow_word(layer: Any) -> str | None:
    """The dtype that the weights of a layer are frozen in, as one says it; None if they are not."""
    narrow = find_narrow(layer)
    return None if narrow is None else word(narrow.values.dtype)


def weights_of(layer: Any, narrow: Narrow) -> Tensor:
    """The float32 weights that those of a layer stand for, a new tensor."""
    if is_plain(*narrow):
        return widen(narrow, layer.storage.topology(layer))
    return widened(narrow, layer.indptr, layer.storage.arguments(layer)[2])


def made_weights(layer: Any, dtype: torch.dtype) -> Narrow | nn.Parameter | None:
    """The weights of a layer in another dtype, for `hold`: narrow, or a Parameter for float32.

    None if it has them so already, or if they are a Parameter that need only be cast.

    Raises
    ------
    TypeError, ValueError
        If that is another dtype, the weights are float64 or computed, or they are not finite.
    """
    if dtype not in _KNOWN:
        known = ", ".join(map(str, _KNOWN))
        raise TypeError(f"weights must be one of {known} to be frozen in, or None to stay, got {dtype!r}")
    storage, narrow = layer.storage, find_narrow(layer)
    if narrow is None and storage.held(layer).dtype is torch.float64 and dtype is not torch.float32:
        raise TypeError(
            f"layers to freeze in {word(dtype)} must be float32 or narrower, got float64; as sums would then "
            "be float32, call layer.float() first"
        )
    if dtype is torch.float32:
        return None if narrow is None else nn.Parameter(weights_of(layer, narrow), requires_grad=False)
    if narrow is not None and narrow.values.dtype is dtype:
        return None
    weights, n_rows = layer.in_use.detach(), storage.shape[0]
    return narrowed(weights, dtype, layer.indptr, storage.block_shape, n_rows)


def hold(layer: Any, dtype: torch.dtype, made: Narrow | nn.Parameter | None) -> None:
    """Put what `made_weights` has made for a dtype into the place of the weights of a layer."""
    name = layer.storage.parameter
    if made is not None:
        layer._parameters.pop(name, None)
        for each in (name, SCALES):
            layer._buffers.pop(each, None)
            layer._non_persistent_buffers_set.discard(each)
        layer.forward_mask = None
    if isinstance(made, Narrow):
        layer.register_buffer(name, made.values)
        if made.scales is not None:
            layer.register_buffer(SCALES, made.scales)
    else:
        if made is not None:
            layer.register_parameter(name, made)
        if dtype is torch.float32:
            layer.float()


def make_room(layer: Any, nnz: int) -> None:
    """Give a layer as many narrow weights as another topology has connections; what they were is lost."""
    name = layer.storage.parameter
    values = layer._buffers[name]
    layer._buffers[name] = values.new_empty((nnz, *values.shape[1:]))


def check_state(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Raise TypeError or ValueError if a layer cannot load weights that are as narrow as those of a state."""
    narrow, name = find_narrow(layer), layer.storage.parameter
    own = torch.float32 if narrow is None else narrow.values.dtype
    values, scales = state.get(prefix + name), state.get(prefix + SCALES)
    if not isinstance(values, Tensor):
        return
    if (values.dtype is torch.int8) != (own is torch.int8):
        what = "a Parameter" if narrow is None else f"frozen in {word(own)}"
        advice = (
            "freeze it first: layer.freeze(weights=torch.int8)"
            if values.dtype is torch.int8
            else "load it into a layer that is not frozen so, and freeze that"
        )
        raise TypeError(f"{name} of the layer is {what}, got a state with {values.dtype}; {advice}")
    if narrow is not None and state.get(prefix + "forward_mask") is not None:
        raise ValueError(
            "a frozen layer has no forward_mask, got a state with one; load it into a layer that is not "
            "frozen, and freeze that"
        )
    if own is torch.int8 and not (
        isinstance(scales, Tensor)
        and scales.dtype is torch.float32
        and scales.shape == (layer.storage.shape[0],)
        and scales.layout is torch.strided
        and (scales.is_meta or has_memory(scales))
    ):
        got = f"{scales.dtype} of shape {tuple(scales.shape)}" if isinstance(scales, Tensor) else scales
        raise ValueError(
            f"{SCALES} must be loaded with weights in int8, float32 of shape ({layer.storage.shape[0]},), "
            f"got {got}"
        )


def check_tokens(x: Tensor, narrow: Narrow, in_features: int) -> Tensor:
    """x (..., in_features), whose dtype and device a layer with narrow weights takes.

    Raises
    ------
    TypeError, RuntimeError
        If it is none; float64, too, in which no sums are made.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is torch.strided and x.is_cpu and narrow.values.is_cpu and x.dtype in _TOKENS:
        shape = x.shape
        if shape and shape[-1] == in_features:
            return x
    check_width(x, in_features)
    if x.device != narrow.values.device:
        raise RuntimeError(f"input must be on the layer's device, {narrow.values.device}, got {x.device}")
    if x.dtype not in _TOKENS:
        raise RuntimeError(
            f"input must be float32, bfloat16 or float16 for a layer whose weights are frozen in "
            f"{word(narrow.values.dtype)}, whose sums are float32, got {x.dtype}"
        )
    return x


@contextmanager
def as_integers(layer: Any) -> Iterator[None]:
    """Show narrow weights and scales as integers meanwhile: a module's casts leave these as they are."""
    names = (layer.storage.parameter, SCALES)
    held = {name: each for name in names if (each := layer._buffers.get(name)) is not None}
    shown = {name: each.view(_INTEGERS[each.itemsize]) for name, each in held.items()}
    layer._buffers.update(shown)
    try:
        yield
    finally:
        for name, before in held.items():
            now = layer._buffers[name]
            layer._buffers[name] = before if now is shown[name] else now.view(before.dtype)
