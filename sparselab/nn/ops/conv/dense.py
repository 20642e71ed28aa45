"""torch's own convolutions of images, in the one order of memory in which they keep to theirs.

For images whose strides are those of *channels last*, as many of one channel or one pixel are by chance,
oneDNN has kernels that write beyond their memory or are wrong: the gradient by kernels of one pixel with a
stride and few channels (oneDNN issue 6035), outputs whose windows all lie in the padding (PyTorch issue
195394), and, on AVX-512, one channel under kernels as wide as what they see of an image (seen in PyTorch
2.13). So images are brought into C order first; results are in C order anyhow.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad

from sparselab.nn.ops.conv.geometry import Geometry, Pair
from sparselab.nn.ops.dense_form import DenseProducts


def dense_products(geometry: Geometry, size: Pair) -> DenseProducts:
    """The three products of a convolution of images.

    W has the shape (out_channels, in_channels // groups, *kernel).

    Parameters
    ----------
    geometry : Geometry
    size : (int, int)
        Height and width of the images.
    """
    how: tuple[Any, ...] = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    by_input: Any = grad.conv2d_input
    by_weight: Any = grad.conv2d_weight

    def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
        kernels = dy.shape[1], geometry.in_channels // geometry.groups, *geometry.kernel
        dW: Tensor = by_weight(in_c_order(x), kernels, in_c_order(dy), *how)
        return dW

    return DenseProducts(
        lambda x, W, bias: F.conv2d(in_c_order(x), W, bias, *how),
        lambda dy, W: by_input((len(dy), geometry.in_channels, *size), W, in_c_order(dy), *how),
        weight_grad,
    )


def in_c_order(images: Tensor) -> Tensor:
    """The images with the strides of C order, of dimensions of length one too; copied if need be."""
    return images.reshape(-1).view(images.shape)
