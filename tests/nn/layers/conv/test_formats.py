"""Orders of memory that torch has names for."""

from __future__ import annotations

import pytest
import torch

from tests.nn.layers.conv.rows import input_of, make


@pytest.mark.parametrize("kind", ["Sparse", "Masked"])
def test_formats_of_torch_give_the_same_numbers_in_the_same_format(kind: str) -> None:
    formats = {"Conv2d": torch.channels_last, "Conv3d": torch.channels_last_3d}
    for name, memory_format in formats.items():
        for each in (name, name.replace("Conv", "ConvTranspose")):
            layer, x = make(f"{kind}{each}"), input_of(each).contiguous(memory_format=memory_format)
            y = layer(x)
            assert torch.equal(y, layer(x.contiguous()))
            assert y.is_contiguous(memory_format=memory_format)
            assert not y.is_contiguous()
            assert layer(x.contiguous()).is_contiguous()
            if "3d" not in each:  # which torch gives back in C order, or not
                assert y.stride() == layer.to_dense()(x).stride()
