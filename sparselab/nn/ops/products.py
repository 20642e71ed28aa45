"""Which code computes products on tensors: by family (linear, conv2d), layout and device."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sparselab.nn.ops.cpu.variants import Variant
from sparselab.nn.ops.numpy_products import NumpyProducts

if TYPE_CHECKING:
    from sparselab.nn.ops.topologies import TensorTopology


class LinearProducts(Protocol):
    """The products of linear layers of one layout on one device.

    Operands have been checked against the topology; they are plain, of one dtype, with any strides. Tokens
    are rows. Results are new tensors.
    """

    def product(self, topology: TensorTopology, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, (tokens, rows)."""

    def input_grad(self, topology: TensorTopology, values: Tensor, grad: Tensor) -> Tensor:
        """``dy W``, (tokens, columns)."""

    def values_grad(
        self, topology: TensorTopology, grad: Tensor, x: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """``sum_t dy[t, i] x[t, j]`` at the connections, shaped as the values; ``sum_t dy[t]``, or empty."""

    def variant(self, topology: TensorTopology, operation: str, n_tokens: int) -> Variant:
        """Which way a product of so many tokens takes, and why."""

    def ways(
        self, topology: TensorTopology, values: Tensor, x: Tensor, bias: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        """Every way to compute `product`, by the name of its variant."""

    def keep_forward(self, topology: TensorTopology) -> None:
        """Let go of what only backward passes need; it is made anew if it is needed."""


class ConvolutionProducts(Protocol):
    """The products of convolutions of one layout on one device; operands have been checked."""

    def product(
        self, topology: TensorTopology, values: Tensor, x: Tensor, bias: Tensor | None, geometry: Any
    ) -> Tensor:
        """The convolution of images, contiguous."""

    def input_grad(
        self, topology: TensorTopology, values: Tensor, grad: Tensor, geometry: Any, size: tuple[int, int]
    ) -> Tensor:
        """The gradient by images of that size."""

    def values_grad(self, topology: TensorTopology, grad: Tensor, x: Tensor, geometry: Any) -> Tensor:
        """The gradient by the values, shaped as they are."""


#: For layouts that only `sparselab.kernels.backends` knows.
_by_arrays = NumpyProducts()

#: A module that has the functions, or an object with such methods, by (family, layout, device type).
_products: dict[tuple[str, str, str], Any] = {
    ("linear", "csr", "cpu"): "sparselab.nn.ops.cpu.csr",
    ("linear", "bsr", "cpu"): "sparselab.nn.ops.cpu.bsr",
    ("conv2d", "csr", "cpu"): "sparselab.nn.ops.cpu.convolution",
}


def register_products(family: str, layout: str, device: str, products: Any) -> None:
    """Say what computes the products of a family of layers of one layout on one type of device.

    A layout whose products are known to `sparselab.kernels.backends` for ``"cpu"`` needs no registration for
    linear layers: its arrays are used.

    Parameters
    ----------
    family : {"linear", "conv2d"}
    layout : str
        `sparselab.kernels.layouts.topology.Topology.layout`.
    device : str
        ``torch.device.type``: "cpu", "cuda", ...
    products : LinearProducts, ConvolutionProducts or str
        The object, or the module to import when it is first needed.

    Raises
    ------
    ValueError
        If there are such products.
    """
    key = family, layout, device
    if key in _products:
        raise ValueError(f"family, layout and device must be new together, got {key}, which have products")
    _products[key] = products


def unregister_products(family: str, layout: str, device: str) -> None:
    """Take back what `register_products` was told."""
    del _products[family, layout, device]


def has_products(device: str) -> bool:
    """Whether anything is computed on that type of device; on "meta", shapes are."""
    return device in ("cpu", "meta") or any(key[2] == device for key in _products)


def find_products(family: str, layout: str, device: str) -> Any:
    """The products of a family of layers of one layout on one type of device.

    Raises
    ------
    NotImplementedError
        If there are none.
    """
    key = family, layout, device
    found = _products.get(key)
    if found is None and (family, device) == ("linear", "cpu"):
        return _by_arrays
    if found is None:
        able = sorted(each[2] for each in _products if each[:2] == key[:2])
        raise NotImplementedError(
            f"tensors must be on a device that has products of the family {family!r} for the layout "
            f"{layout!r} ({', '.join(able) or 'none has'}), got {device}"
        )
    if isinstance(found, str):
        found = _products[key] = import_module(found)
    return found
