"""Whether anything but autograd would see a call of an operator.

A call through torch's dispatcher takes 20 us, 100 with gradients, which is more than many products. Where
nobody would see it, an operator's function is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.compiler.config
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """The function, into which torch's compiler does not look.

    Not by `torch.compiler.disable`, which imports the compiler (300 MB resident) with this module.
    """
    return cast("F", _disable_dynamo(function))


_ORDINARY = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether tensors (or None) are ordinary ones that hold data, and nothing traces or transforms.

    A tensor whose sign is still to be turned (`Tensor.is_neg`), or of zeros without memory, is not ordinary:
    the dispatcher makes it so. Nor is one whose memory was taken away, which the operator refuses.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or getattr(forward_ad, "_current_level", 0) >= 0
    ):
        return False
    try:
        for tensor in tensors:
            if tensor is not None and (
                type(tensor) not in _ORDINARY
                or tensor.layout is not torch.strided
                or tensor.is_neg()
                # On the device meta, of zeros without memory, or freed.
                or (not tensor.data_ptr() and tensor.numel())
                # What `has_memory` asks first, without the call.
                or (
                    (
                        tensor.untyped_storage().nbytes() < tensor.nbytes
                        or tensor.storage_offset()
                        or not tensor.is_contiguous()
                    )
                    and not has_memory(tensor)
                )
            ):
                return False
    except RuntimeError:  # of batched gradients, whose storage torch hides
        return False
    return True


def is_transformed() -> bool:
    """Whether `torch.func` or forward mode is at work, which see through no operator of Python's."""
    return torch._C._are_functorch_transforms_active() or getattr(forward_ad, "_current_level", 0) >= 0


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a tensor, which may have been freed or shrunk, holds all of its entries.

    A tensor of batched gradients (``is_grads_batched``), whose storage torch hides, is said to have none.
    """
    try:
        held = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return False
    if held >= tensor.nbytes and not tensor.storage_offset() and tensor.is_contiguous():
        return True
    last = int(tensor.storage_offset())
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        if n == 0:
            return True
        last += (n - 1) * step
    return held >= (last + 1) * tensor.itemsize


def let_sizes_change(names: Iterable[str]) -> None:
    """Tell `torch.compile` that parameters and buffers of these names change their first size.

    It would take all of them for fixed, and compile a model anew whenever an update changes a number of
    connections. Other modules' tensors of such a name are compiled for any first size, too.
    """
    # Absent from older versions of torch, which compile anew.
    known = getattr(torch.compiler.config, "dynamic_sources", None)
    if known is not None:
        ours = [rf".*\['{name}'\]:0" for name in names]
        added = [each for each in ours if each not in known.split(",")]
        torch.compiler.config.dynamic_sources = ",".join(filter(None, [known, *added]))
