"""Which code computes products on tensors: by family (linear, conv2d, ...), layout and device."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sparselab.nn.ops.numpy_products import NumpyProducts

#: For layouts that only `sparselab.kernels.backends` knows.
_by_arrays = NumpyProducts()

#: A module that has the functions, or an object with such methods, by (family, layout, device type).
_products: dict[tuple[str, str, str], Any] = {
    ("linear", "csr", "cpu"): "sparselab.nn.ops.cpu.csr",
    ("linear", "bsr", "cpu"): "sparselab.nn.ops.cpu.bsr",
    ("conv2d", "csr", "cpu"): "sparselab.nn.ops.cpu.convolution",
    ("lookup", "csr", "cpu"): "sparselab.nn.ops.cpu.lookup",
    ("sparse_input", "csr", "cpu"): "sparselab.nn.ops.cpu.sparse_input",
}


def register_products(family: str, layout: str, device: str, products: Any) -> None:
    """Say what computes the products of a family of layers of one layout on one type of device.

    A layout whose products are known to `sparselab.kernels.backends` for ``"cpu"`` needs no registration for
    linear layers: its arrays are used.

    Parameters
    ----------
    family : {"linear", "conv2d", "lookup", "sparse_input"}
    layout : str
        `sparselab.kernels.layouts.topology.Topology.layout`.
    device : str
        ``torch.device.type``: "cpu", "cuda", ...
    products : LinearProducts, ConvolutionProducts, LookupProducts, SparseInputProducts or str
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


def has_family(family: str, layout: str, device: str) -> bool:
    """Whether something was registered for that family, layout and type of device."""
    return (family, layout, device) in _products


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
