"""Checksums of connections and weights, by which one state of a layer is told from another."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

#: Weights that are looked at: an average changes nearly all.
_SAMPLE = 4096


def of_connections(layer: Any) -> int | None:
    """Of where the connections of a layer are; None on the device meta."""
    found = 0
    held = [layer._buffers[name] for name in layer.storage.pattern]
    for tensor in held or [layer.positions()]:
        if tensor.is_meta:
            return None
        found = of_tensor(tensor, found)
    return found


def of_weights(layer: Any) -> tuple[Any, int] | None:
    """Dtype and a checksum of some weights; None if they are computed, or on the device meta."""
    held = layer._parameters.get(layer.storage.parameter)
    if held is None or held.is_meta:
        return None
    flat = held.detach().reshape(-1)
    return held.dtype, of_tensor(flat[:: max(1, len(flat) // _SAMPLE)])


def of_text(text: str) -> int:
    """Of a text, the same in every process."""
    return zlib.crc32(text.encode())


def of_tensor(tensor: Tensor, start: int = 0) -> int:
    """Of the bytes of a tensor, after those that `start` is the checksum of."""
    tensor = tensor.detach().cpu().contiguous()
    return zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, start) if tensor.numel() else start
