"""Which code computes the products of a layout on a device."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from sparselab.kernels.arrays import Array
from sparselab.kernels.layouts.topology import Topology


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


#: A module that has the three functions, or an object with such methods, by (layout, device).
_products: dict[tuple[str, str], Any] = {
    ("csr", "cpu"): "sparselab.kernels.cpu.csr.products",
    ("bsr", "cpu"): "sparselab.kernels.cpu.bsr.products",
    ("csr", "reference"): "sparselab.kernels.reference.csr",
    ("bsr", "reference"): "sparselab.kernels.reference.bsr",
}


def register(layout: str, device: str, products: Products | str) -> None:
    """Say what computes the products of a layout on a device.

    Parameters
    ----------
    layout : str
        `Topology.layout`.
    device : str
        ``"cpu"``, ``"reference"`` (plain loops), or the name of a device to come.
    products : Products, or str
        The object, or the module to import when it is first needed.

    Raises
    ------
    ValueError
        If there are such products.
    """
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
    key = topology.layout, device
    found = _products.get(key)
    if found is None:
        able = sorted(name for layout, name in _products if layout == topology.layout)
        raise NotImplementedError(
            f"device must be one that has products for the layout {topology.layout!r} "
            f"({', '.join(able) or 'none has'}), got {device!r}"
        )
    if isinstance(found, str):
        found = _products[key] = import_module(found)
    products: Products = found
    return products
