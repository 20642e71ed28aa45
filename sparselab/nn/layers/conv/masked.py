"""Convolutions whose sparsity is only simulated: the dense twins of the sparse ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparselab.nn.layers.conv.base import Convolution, TransposedConvolution
from sparselab.nn.layers.conv.sparse import SparseConv1d, SparseConv2d, SparseConv3d
from sparselab.nn.layers.conv.transposed import (
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
)
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.kinds import LayerKind, register_kind
from sparselab.nn.layers.masked import MaskedLayer, recognises_mask
from sparselab.nn.ops.conv.dense import dense_products, in_c_order
from sparselab.nn.ops.conv.geometry import Geometry, Pair, Size
from sparselab.nn.ops.conv.operands import ConvolutionOperands
from sparselab.nn.ops.dense_form import DenseProducts
from sparselab.nn.ops.operands import GradientOperands

Layer = TypeVar("Layer", bound="MaskedConvolution")


class MaskedConvolution(Convolution, MaskedLayer):
    """A convolution, transposed or not, with a mask: torch's own, of the images that the sparse twin has."""

    @classmethod
    def from_dense(
        cls: type[Layer], conv: Any, sparsity: float | None = None, *, density: float | None = None
    ) -> Layer:
        """The largest weights of a dense layer; the same as by the sparse twin."""
        twin: Any = cls.twin
        return cls.from_sparse(twin.from_dense(conv, sparsity, density=density))

    def to_sparse(self) -> Any:
        """The sparse twin with the same topology, weights, biases, mode and trainability."""
        refuse_to_lose(self, "to_sparse", self.tensor_names)
        return self._sparse()

    def to_dense(self) -> Any:
        """The layer of torch with the same outputs, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        return self._sparse().to_dense()

    def operands(self, x: Tensor, dy: Tensor, of_graph: bool) -> GradientOperands:
        """Images and the gradients of their outputs."""
        return ConvolutionOperands(x, dy, self.geometry, of_graph)

    @property
    def _kernels(self) -> tuple[int, ...]:
        """The shape of W as kernels of images."""
        geometry = self.geometry
        return self.shape[0], geometry.in_channels // geometry.groups, *geometry.kernel

    def _products(self, size: Sequence[int]) -> DenseProducts:
        """The convolution of images of a height and width, and its gradients."""
        shape, kernels = self.shape, self._kernels
        height, width = size
        product, input_grad, weight_grad = dense_products(self.geometry, (height, width))
        return DenseProducts(
            lambda x, W, bias: product(x, W.reshape(kernels), bias),
            lambda dy, W: input_grad(dy, W.reshape(kernels)),
            lambda dy, x: weight_grad(dy, x).reshape(shape),
        )


class MaskedConvNd(MaskedConvolution):
    """What `MaskedConv1d`, `MaskedConv2d` and `MaskedConv3d` are but for their dimensions."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", *, sparsity: float | None = None, density: float | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            cast("Any", self.twin)(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                sparsity=sparsity, density=density, device=device, dtype=dtype,
            )
        )  # fmt: skip

    def _product(self, images: Tensor) -> Tensor:
        return self._compute(self._products(images.shape[2:]), images, self.bias)


class MaskedConvTransposeNd(TransposedConvolution, MaskedConvolution):
    """What the transposed convolutions are but for their dimensions."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
        output_padding: Size = 0, groups: int = 1, bias: bool = True, dilation: Size = 1,
        padding_mode: str = "zeros", *, sparsity: float | None = None, density: float | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            cast("Any", self.twin)(
                in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
                dilation, padding_mode, sparsity=sparsity, density=density, device=device, dtype=dtype,
            )
        )  # fmt: skip

    def operands(self, x: Tensor, dy: Tensor, of_graph: bool) -> GradientOperands:
        """Outputs' gradients are the images here, and inputs what comes back from them."""
        return super().operands(dy, x, of_graph)

    def _transposed(self, images: Tensor, size: Pair) -> Tensor:
        convolution, kernels = self._products(size), self._kernels
        products = DenseProducts(
            lambda x, W, bias: _transpose(x, W.reshape(kernels), self.geometry, size),
            lambda dy, W: convolution.product(dy, W, None),
            lambda dy, x: convolution.weight_grad(x, dy),
        )
        return self._compute(products, images, None)


def _transpose(x: Tensor, kernels: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """The transposed convolution of images, of this size."""
    stride, padding, dilation = geometry[3:]
    least = (
        (n - 1) * s + d * (k - 1) + 1 - 2 * p
        for n, k, s, p, d in zip(x.shape[2:], *geometry[2:], strict=True)
    )
    more = [n - m for n, m in zip(size, least, strict=True)]
    images = in_c_order(x)
    return nn.functional.conv_transpose2d(
        images, kernels, None, stride, padding, more, geometry.groups, dilation
    )


class MaskedConv2d(MaskedConvNd):
    """Dense twin of `SparseConv2d`: a convolution with ``W * mask``; see `MaskedLinear`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of `torch.nn.Conv2d`.
    sparsity : float in [0, 1], optional
        Fraction of W without a connection; 0.9 if density is not given either.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    device, dtype
        As of `MaskedLinear`.

    Attributes
    ----------
    weight : Parameter, (out_channels, in_channels // groups * height * width)
        Exactly 0 where there is no connection, as of `MaskedLinear`.
    mask, forward_mask, bias
        As of `MaskedLinear`, in the shape of `weight`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `SparseConv2d`.
    NotImplementedError
        If the device is "meta".

    Examples
    --------
    >>> import torch
    >>> from sparselab import MaskedConv2d
    >>> masked = MaskedConv2d(8, 16, 3, padding="same")
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.allclose(masked(x), masked.to_sparse()(x), atol=1e-6)
    True
    """

    twin = SparseConv2d
    dense_class = nn.Conv2d
    dense_type = nn.Conv2d
    n_dims = 2


class MaskedConv1d(MaskedConvNd):
    """Dense twin of `SparseConv1d`: a convolution with ``W * mask``; see `MaskedConv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of `torch.nn.Conv1d`.
    sparsity, density, device, dtype
        As of `MaskedConv2d`.

    Examples
    --------
    >>> import torch
    >>> from sparselab import MaskedConv1d
    >>> masked = MaskedConv1d(8, 16, 3, stride=2)
    >>> x = torch.randn(2, 8, 9)
    >>> torch.allclose(masked(x), masked.to_sparse()(x), atol=1e-5)
    True
    """

    twin = SparseConv1d
    dense_class = nn.Conv1d
    dense_type = nn.Conv1d
    n_dims = 1


class MaskedConv3d(MaskedConvNd):
    """Dense twin of `SparseConv3d`: a convolution with ``W * mask``; see `MaskedConv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of `torch.nn.Conv3d`.
    sparsity, density, device, dtype
        As of `MaskedConv2d`.

    Examples
    --------
    >>> import torch
    >>> from sparselab import MaskedConv3d
    >>> masked = MaskedConv3d(4, 6, 3, padding=1)
    >>> x = torch.randn(2, 4, 5, 5, 5)
    >>> torch.allclose(masked(x), masked.to_sparse()(x), atol=1e-5)
    True
    """

    twin = SparseConv3d
    dense_class = nn.Conv3d
    dense_type = nn.Conv3d
    n_dims = 3


class MaskedConvTranspose1d(MaskedConvTransposeNd):
    """Dense twin of `SparseConvTranspose1d`: a transposed convolution with ``W * mask``; see `MaskedConv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias
    dilation, padding_mode
        As of `torch.nn.ConvTranspose1d`.
    sparsity, density, device, dtype
        As of `MaskedConv2d`.

    Examples
    --------
    >>> import torch
    >>> from sparselab import MaskedConvTranspose1d
    >>> masked = MaskedConvTranspose1d(8, 16, 3, stride=2)
    >>> x = torch.randn(2, 8, 9)
    >>> torch.allclose(masked(x), masked.to_sparse()(x), atol=1e-5)
    True
    """

    twin = SparseConvTranspose1d
    dense_class = nn.ConvTranspose1d
    dense_type = nn.ConvTranspose1d
    n_dims = 1


class MaskedConvTranspose2d(MaskedConvTransposeNd):
    """Dense twin of `SparseConvTranspose2d`: a transposed convolution with ``W * mask``; see `MaskedConv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias
    dilation, padding_mode
        As of `torch.nn.ConvTranspose2d`.
    sparsity, density, device, dtype
        As of `MaskedConv2d`.

    Examples
    --------
    >>> import torch
    >>> from sparselab import MaskedConvTranspose2d
    >>> masked = MaskedConvTranspose2d(8, 16, 3, stride=2)
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.allclose(masked(x), masked.to_sparse()(x), atol=1e-5)
    True
    """

    twin = SparseConvTranspose2d
    dense_class = nn.ConvTranspose2d
    dense_type = nn.ConvTranspose2d
    n_dims = 2


class MaskedConvTranspose3d(MaskedConvTransposeNd):
    """Dense twin of `SparseConvTranspose3d`: a transposed convolution with ``W * mask``; see `MaskedConv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias
    dilation, padding_mode
        As of `torch.nn.ConvTranspose3d`.
    sparsity, density, device, dtype
        As of `MaskedConv2d`.

    Examples
    --------
    >>> import torch
    >>> from sparselab import MaskedConvTranspose3d
    >>> masked = MaskedConvTranspose3d(4, 6, 2, stride=2)
    >>> x = torch.randn(2, 4, 3, 4, 5)
    >>> torch.allclose(masked(x), masked.to_sparse()(x), atol=1e-5)
    True
    """

    twin = SparseConvTranspose3d
    dense_class = nn.ConvTranspose3d
    dense_type = nn.ConvTranspose3d
    n_dims = 3


for _cls in (
    MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedConvTranspose1d, MaskedConvTranspose2d,
    MaskedConvTranspose3d,
):  # fmt: skip
    register_kind(LayerKind("masked", _cls, (_cls.dense_type,), recognises=recognises_mask))
