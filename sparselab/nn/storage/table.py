"""Rows of single connections that are looked up, and drawn as those of an embedding."""

from __future__ import annotations

import math
from typing import Any

import torch

from sparselab.nn.storage.compressed import Compressed


class Table(Compressed):
    """As `Compressed`, with weights that are drawn as `torch.nn.Embedding` draws them."""

    @torch.no_grad()
    def draw_weights(self, layer: Any) -> None:
        """Normal, so that rows have the norm of dense ones on average; 0 in the row of the padding."""
        values = layer.weight_values
        values.normal_(0, math.sqrt(math.prod(self.shape) / max(values.numel(), 1)))
        if layer.padding_idx is not None:
            begin, end = layer.indptr[layer.padding_idx : layer.padding_idx + 2].tolist()
            values[begin:end] = 0
