"""Which code computes the products of a layout on a device.

There are compiled kernels for the CPU, and plain loops as a device of their own (``"reference"``). For CUDA
there are none yet: three functions for each layout, and a call of `register`, are all that is missing.
"""

from __future__ import annotations

from typing import Any, Protocol

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.bsr import products as bsr_products
from sparselab.kernels.cpu.csr import products as csr_products
from sparselab.kernels.layouts.block_csr import BlockTopology
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.kernels.layouts.topology import Topology
from sparselab.kernels.reference import bsr as reference_bsr
from sparselab.kernels.reference import csr as reference_csr


class Products(Protocol):
    """The products of one layout on one device.

    Arguments have been checked, outputs are overwritten and overlap no input. Each output entry has one
    writer and one order of summation, so that results do not depend on the number of threads. Matrices are
    feature-major, with one token per column, and have any strides.
    """

    def product(self, topology: Any, values: Array, X: Array, Y: Array, bias: Array | None) -> None:
        """``Y = W X + b``."""

    def product_t(self, topology: Any, values: Array, DY: Array, DX: Array) -> None:
        """``DX = W^T DY``."""

    def gradient(self, topology: Any, DY: Array, X: Array, dW: Array) -> None:
        """``dW[i, j] = sum_t DY[i, t] X[j, t]`` at the connections, 0 in every other place of dW."""


#: By (layout, device).
_products: dict[tuple[str, str], Products] = {
    (RowTopology.layout, "cpu"): csr_products,
    (BlockTopology.layout, "cpu"): bsr_products,
    (RowTopology.layout, "reference"): reference_csr,
    (BlockTopology.layout, "reference"): reference_bsr,
}


def register(layout: str, device: str, products: Products) -> None:
    """Say what computes the products of a layout on a device.

    Parameters
    ----------
    layout : str
        `Topology.layout`.
    device : str
        ``"cpu"``, ``"reference"`` (plain loops), or the name of a device to come.
    products : Products
        A module that has the three functions, or an object that has the three methods.

    Raises
    ------
    TypeError
        If it does not have them.
    ValueError
        If there are such products.
    """
    for name in ("product", "product_t", "gradient"):
        if not callable(getattr(products, name, None)):
            raise TypeError(f"products must have product, product_t and gradient, got {products!r}")
    if (layout, device) in _products:
        raise ValueError(f"layout and device must be new, got {layout!r} on {device!r}, which has products")
    _products[layout, device] = products


def unregister(layout: str, device: str) -> None:
    """Take back what `register` was told."""
    del _products[layout, device]


def find(topology: Topology, device: str = "cpu") -> Products:
    """The products of a topology's layout on a device.

    Raises
    ------
    NotImplementedError
        If there are none.
    """
    found = _products.get((topology.layout, device))
    if found is None:
        able = sorted(name for layout, name in _products if layout == topology.layout)
        reason = ": there are no CUDA kernels yet" if device == "cuda" else ""
        raise NotImplementedError(
            f"device must be one that has products for the layout {topology.layout!r} "
            f"({', '.join(able) or 'none has'}), got {device!r}{reason}"
        )
    return found
