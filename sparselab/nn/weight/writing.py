"""What can be written to the weight of a sparse layer in place: what has a meaning for live weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor


def _in_place(name: str) -> Callable[..., Any]:
    """The method of that name of the live weights."""

    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()):
            if isinstance(each, Tensor) and each.ndim:
                raise TypeError(
                    f"{name} of a sparse weight must be given numbers, got a tensor of shape "
                    f"{tuple(each.shape)}; write to layer.weight_values"
                )
        self._write(name, *args, **kwargs)
        return self

    write.__name__ = name
    write.__doc__ = f"As `torch.Tensor.{name}`, of the live weights alone."
    return write


class Writable:
    """Writes to live weights, and refuses others."""

    layer: Any
    _copied: Tensor | None
    _detached: bool

    mul_ = _in_place("mul_")
    div_ = _in_place("div_")
    __imul__ = mul_
    __itruediv__ = div_
    zero_ = _in_place("zero_")
    fill_ = _in_place("fill_")
    uniform_ = _in_place("uniform_")
    # What trunc_normal_ of older versions of torch is made of, after uniform_.
    add_ = _in_place("add_")
    clamp_ = _in_place("clamp_")
    erfinv_ = _in_place("erfinv_")

    def normal_(self, mean: float = 0, std: float = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw the live weights, and return them, laid out as the layer's Parameter and without gradient.

        Not itself: `torch.nn.init.trunc_normal_` goes on to draw anew what is out of its bounds, by
        comparisons that only plain tensors have.
        """
        return self._write("normal_", mean, std, generator=generator).detach()

    def copy_(self, source: Any, non_blocking: bool = False) -> Any:
        """Overwrite the live weights by a tensor that is laid out as the layer's Parameter.

        Raises
        ------
        TypeError
            If it is laid out otherwise, as a dense weight is.
        """
        expected = self.layer.stored.shape
        if type(source) not in (Tensor, torch.nn.Parameter) or source.shape != expected:
            refuse_to_write(self, "copy_")
        self._write("copy_", source, non_blocking)
        return self

    def _write(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Call a method of what holds the numbers, and return that."""
        layer = self.layer
        held: Tensor = layer.stored if self._copied is None else self._copied
        held = held.detach() if self._detached else held
        getattr(held, name)(*args, **kwargs)
        if not held.is_meta:
            with torch.no_grad():
                layer.storage.clear_outside(layer, held.detach())
        return held


def refuse_to_write(weight: Any, how: str) -> NoReturn:
    """Raise TypeError for what would write more than live weights.

    Parameters
    ----------
    weight : Weight or None
        For the message.
    how : str
        What was to be written by.
    """
    what = "the weight of a sparse layer" if weight is None else repr(weight)
    raise TypeError(
        f"{how} must not write to a sparse weight, which has room for live weights alone, got {what}: "
        "write to layer.weight_values, give the layer other connections (layer.set_topology), or make a new "
        "layer (from_dense)"
    )
