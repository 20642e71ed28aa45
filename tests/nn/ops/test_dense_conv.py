"""Convolutions by torch's own products, where its kernels for channels last fail.

They run in a process of their own: what they wrote beyond it would come to light in another test.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparselab.nn.ops.conv.dense import in_c_order
from tests.kernels.process import run_python
from tests.shared import n_steps

#: Images, kernels, stride, padding and dilation, by what goes wrong in PyTorch 2.13.
FAULTS: dict[str, Any] = {
    "gradient by kernels of one pixel": [((5, 1, 32, 32), (4, 1, 1, 1), (2, 2), (0, 0), (1, 1))] * 10,
    "windows in the padding": [((64, 15, 2, 1), (12, 15, 1, 1), (2, 2), (1, 1), (2, 2))] * 40,
    "one channel": [((16, 1, 13, 4), (9, 1, 3, 3), (1, 2), (1, 0), (1, 1))],
}
LAYERS = "sparse", "masked", "masked with a hook"

PROGRAM = """
import json, sys
import torch
from torch.nn import functional as F
from sparselab import MaskedConv2d, SparseConv2d

kinds, calls = json.loads(sys.argv[1])
for kind in kinds:
    torch.manual_seed(0)
    worst = 0.0
    for shape, kernels, stride, padding, dilation in calls:
        n_outputs, n_inputs, *kernel = kernels
        how = tuple(stride), tuple(padding), tuple(dilation)
        layer = SparseConv2d(n_inputs, n_outputs, tuple(kernel), *how, density=1.0)
        twin = layer.to_dense().double()
        if kind != "sparse":
            layer = MaskedConv2d.from_sparse(layer)
        seen = []
        layer.gradient_hook = seen.append if kind == "masked with a hook" else None
        x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        exact = x.detach().double().contiguous().requires_grad_()
        y, wanted = layer(x), twin(exact)
        dy = torch.randn(y.shape).to(memory_format=torch.channels_last)
        y.backward(dy)
        wanted.backward(dy.double().contiguous())
        dense = twin.weight.grad.reshape(layer.shape)
        pairs = [(y, wanted), (x.grad, exact.grad), (layer.stored.grad.reshape(layer.shape), dense)]
        for operands in seen:
            pairs.append((torch.empty(layer.shape), dense))
            operands.add_rows(0, pairs[-1][0], 0.0)
        for got, right in pairs:
            worst = max(worst, float((got.double() - right).abs().max() / (1 + right.abs().max())))
    print(worst)
"""


def test_products_by_torch_are_right_where_its_kernels_for_channels_last_are_not() -> None:
    calls = [call for calls in FAULTS.values() for call in calls]
    worst = [float(each) for each in run_python("-c", PROGRAM, json.dumps([LAYERS, calls])).split()]
    assert len(worst) == len(LAYERS)
    assert all(each < 1e-5 for each in worst), dict(zip(LAYERS, worst, strict=True))


RANDOM = """
import sys
import numpy as np
import torch
from sparselab.nn.ops.conv.dense import dense_products
from sparselab.nn.ops.conv.geometry import Geometry

rng, worst = np.random.default_rng(0), 0.0
torch.manual_seed(0)
pair = lambda *choices: tuple(int(each) for each in rng.choice(choices, 2))
for _ in range(int(sys.argv[1])):
    groups, inputs, outputs, n = (
        int(rng.choice(each)) for each in ((1, 1, 3), (1, 2, 3, 5, 8, 20), (1, 2, 4, 9, 16), (1, 2, 5, 8))
    )
    kernel, stride, padding, dilation = pair(1, 1, 2, 3, 5), pair(1, 2, 3), pair(0, 1, 2), pair(1, 1, 2)
    size = tuple(d * (k - 1) + 1 + int(rng.integers(12)) for d, k in zip(dilation, kernel))
    geometry = Geometry(groups * inputs, groups, kernel, stride, padding, dilation)
    x = torch.randn(n, groups * inputs, *size).to(memory_format=torch.channels_last)
    W, bias = torch.randn(groups * outputs, inputs, *kernel), torch.randn(groups * outputs)
    dy = torch.randn(n, groups * outputs, *geometry.outputs(size)).to(memory_format=torch.channels_last)
    products = dense_products(geometry, size)
    wide = [each.double() for each in (x, W, bias, dy)]
    for make in (
        lambda x, W, bias, dy: products.product(x, W, bias),
        lambda x, W, bias, dy: products.input_grad(dy, W),
        lambda x, W, bias, dy: products.weight_grad(dy, x),
    ):
        got, right = make(x, W, bias, dy).double(), make(*wide)
        worst = max(worst, float((got - right).abs().max() / (1 + right.abs().max())))
print(worst)
"""


def test_products_by_torch_are_right_for_any_geometry_in_channels_last() -> None:
    assert float(run_python("-c", RANDOM, str(n_steps(300, 1500)))) < 1e-5


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 3, 1, 1), (2, 3, 4, 1), (1, 1, 1, 1), (0, 3, 2, 2)])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_images_come_to_the_strides_of_c_order(shape: Any, format: torch.memory_format) -> None:
    x = torch.randn(shape).to(memory_format=format).requires_grad_()
    y = in_c_order(x)
    torch.testing.assert_close(y, x)
    _, channels, height, width = shape
    assert y.stride() == (channels * height * width, height * width, width, 1)
    F.gelu(y).sum().backward()
    assert x.grad is not None
