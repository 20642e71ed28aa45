"""A layout and a device from outside the package go through the same operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselab.kernels import backends
from sparselab.kernels.layouts.topology import Topology
from sparselab.nn.ops import products
from sparselab.nn.ops.linear import linear_operator
from sparselab.nn.ops.topologies import register_layout, unregister_layout


class Pairs(Topology):
    """Positions as two lists: the simplest layout that there is."""

    layout: ClassVar[str] = "coordinates"

    def __init__(self, rows: Any, columns: Any, shape: tuple[int, int]) -> None:
        super().__init__()
        if len(rows) != len(columns) or (len(rows) and (rows.max() >= shape[0] or columns.max() >= shape[1])):
            raise ValueError("rows and columns must be positions of the shape")
        self.rows, self.columns, self._shape = rows, columns, shape

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nnz(self) -> int:
        return len(self.rows)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.nnz,)

    def positions(self) -> Any:
        return self.rows * self.shape[1] + self.columns

    def rewrite(self, drop: Any, grow: Any, *, compact: bool = False) -> Any:
        raise NotImplementedError


class PairProducts:
    def product(self, topology: Any, values: Any, X: Any, Y: Any, bias: Any) -> None:
        Y[...] = 0 if bias is None else bias[:, None]
        np.add.at(Y, topology.rows, values[:, None] * X[topology.columns])

    def product_t(self, topology: Any, values: Any, DY: Any, DX: Any) -> None:
        DX[...] = 0
        np.add.at(DX, topology.columns, values[:, None] * DY[topology.rows])

    def gradient(self, topology: Any, DY: Any, X: Any, dW: Any) -> None:
        dW[...] = (DY[topology.rows] * X[topology.columns]).sum(1)


def read(rows: Any, columns: Any, sizes: Any) -> Pairs:
    return Pairs(rows, columns, tuple(sizes[:2]))


@pytest.fixture
def pairs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    register_layout("coordinates", read)
    backends.register("coordinates", "cpu", PairProducts())  # type: ignore[arg-type]
    W = torch.randn(5, 7, dtype=torch.float64) * (torch.rand(5, 7) < 0.5)
    rows, columns = W.nonzero().unbind(1)
    try:
        yield W, rows.contiguous(), columns.contiguous()
    finally:
        backends.unregister("coordinates", "cpu")
        unregister_layout("coordinates")


@pytest.mark.parametrize("bias", [True, False])
def test_a_layout_that_only_the_kernels_know(pairs: tuple[Tensor, Tensor, Tensor], bias: bool) -> None:
    W, rows, columns = pairs
    values = W[rows, columns].view(-1, 1, 1).requires_grad_()
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    x, dy = torch.randn(9, 7, dtype=torch.float64, requires_grad=True), torch.randn(9, 5, dtype=torch.float64)
    arguments = x, values, b, rows, columns, [5, 7, 1, 1], "coordinates"
    y = linear_operator(*arguments)
    y.backward(dy)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W, b))
    torch.testing.assert_close(x.grad, dy @ W)
    torch.testing.assert_close(values.grad.flatten(), (dy.T @ x)[rows, columns])
    if b is not None:
        torch.testing.assert_close(b.grad, dy.sum(0))
    torch.library.opcheck(linear_operator, arguments)
    low = [each if each is None else each.detach().bfloat16() for each in (x, values, b)]
    torch.testing.assert_close(
        linear_operator(*low, *arguments[3:]).double(), y.detach(), rtol=0.05, atol=0.1
    )


def test_a_layout_is_known_once_and_products_too() -> None:
    with pytest.raises(ValueError, match="layout must be new, got 'csr'"):
        register_layout("csr", read)
    with pytest.raises(ValueError, match="must be new together"):
        products.register_products("linear", "csr", "cpu", object())
    products.register_products("linear", "csr", "somewhere", "sparselab.nn.ops.cpu.csr")
    try:
        assert products.has_products("somewhere")
        assert products.find_products("linear", "csr", "somewhere") is products.find_products(
            "linear", "csr", "cpu"
        )
    finally:
        products.unregister_products("linear", "csr", "somewhere")
    assert not products.has_products("somewhere")


def test_a_device_without_products_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"a device that has products .*'csr' \(cpu\), got cuda"):
        products.find_products("linear", "csr", "cuda")
    with pytest.raises(NotImplementedError, match=r"'conv2d' for the layout 'bsr' \(none has\), got cpu"):
        products.find_products("conv2d", "bsr", "cpu")
