"""Convolutions whose sparsity is only simulated: the dense twins of the sparse ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparselab.nn.layers.conv.sparse import Convolution, Size, SparseConv2d
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.kinds import LayerKind, register_kind
from sparselab.nn.layers.masked import MaskedLayer, recognises_mask
from sparselab.nn.ops.conv_operands import ConvolutionOperands
from sparselab.nn.ops.derivatives import DenseProducts
from sparselab.nn.ops.operands import GradientOperands
from sparselab.nn.storage.checks import check_images


class MaskedConv2d(Convolution, MaskedLayer):
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

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", *, sparsity: float | None = None, density: float | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            SparseConv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                sparsity=sparsity, density=density, device=device, dtype=dtype,
            )
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, sparsity: float | None = None, *, density: float | None = None
    ) -> MaskedConv2d:
        """The largest weights of a dense layer; the same as `SparseConv2d.from_dense`."""
        return cls.from_sparse(SparseConv2d.from_dense(conv, sparsity, density=density))

    def to_sparse(self) -> SparseConv2d:
        """A `SparseConv2d` with the same topology, weights, biases, mode and trainability."""
        refuse_to_lose(self, "to_sparse", self.tensor_names)
        new: SparseConv2d = self._sparse()
        return new

    def to_dense(self) -> nn.Conv2d:
        """A `torch.nn.Conv2d` with the same outputs, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        new: nn.Conv2d = self._sparse().to_dense()
        return new

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x (n, in_channels, height, width), or of one image, as by `torch.nn.Conv2d`."""
        check_images(x, self.in_channels)
        return self._convolved(x)

    def dense_products(self, x: Tensor) -> DenseProducts:
        """The convolution of padded images."""
        geometry = self.geometry
        size, kernel = x.shape[1:], (self.out_channels, self.in_channels // self.groups, *geometry.kernel)
        how = geometry.stride, geometry.padding, geometry.dilation, self.groups
        by_input: Any = nn.grad.conv2d_input
        by_weight: Any = nn.grad.conv2d_weight
        return DenseProducts(
            lambda x, W, bias: nn.functional.conv2d(x, W.reshape(kernel), bias, *how),
            lambda dy, W: by_input((len(dy), *size), W.reshape(kernel), dy, *how),
            lambda dy, x: by_weight(x, kernel, dy, *how).reshape(self.shape),
        )

    def _product(self, x: Tensor) -> Tensor:
        return MaskedLayer._product(self, x)

    def operands(self, x: Tensor, dy: Tensor, of_graph: bool) -> GradientOperands:
        """Images and the gradients of their outputs."""
        return ConvolutionOperands(x, dy, self.geometry, of_graph)


register_kind(LayerKind("masked", MaskedConv2d, (nn.Conv2d,), recognises=recognises_mask))
