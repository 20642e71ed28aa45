"""The products of a dense W by torch itself, in the form in which derivatives are made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from sparselab.nn.ops.derivatives import Bilinear, Maybe, sum_of_outputs
from sparselab.nn.ops.tracing import has_memory


class DenseProducts(NamedTuple):
    """The three products of a dense W, by torch itself."""

    product: Callable[[Tensor, Tensor, Maybe], Tensor]
    input_grad: Callable[[Tensor, Tensor], Tensor]
    weight_grad: Callable[[Tensor, Tensor], Tensor]


class DenseForm:
    """A `Bilinear` of a dense W, which has no topology.

    Parameters
    ----------
    products : DenseProducts
    show : callable, optional
        Called with x and dy, whenever the gradient by W is made of them.
    parameter : callable, optional
        Returns the layer's Parameter.
    """

    def __init__(
        self,
        products: DenseProducts,
        show: Callable[[Tensor, Tensor], None] | None = None,
        parameter: Callable[[], Tensor] | None = None,
    ) -> None:
        self.products, self.show, self.parameter = products, show, parameter

    def product(self, x: Tensor, values: Tensor, bias: Maybe, *_: Any) -> Tensor:
        """``x W^T + b``."""
        return self.products.product(x, values, bias)

    def input_grad(self, grad: Tensor, values: Tensor, *_: Any) -> Tensor:
        """``dy W``."""
        return self.products.input_grad(grad, values)

    def values_grad(
        self, grad: Tensor, x: Tensor, indptr: Any, indices: Any, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """``dy^T x``, and the sum of dy for each output, or an empty tensor."""
        if self.show is not None and has_memory(grad) and has_memory(x):  # not of a batch of gradients
            self.show(x, grad)
        sums = sum_of_outputs(grad) if with_bias else grad.new_empty(0)
        return self.products.weight_grad(grad, x), sums

    def is_trained(self, leaf: Tensor, *_: Any) -> bool:
        """Whether that is the layer's Parameter."""
        return self.parameter is None or self.parameter() is leaf

    def hidden(self) -> Bilinear:
        """The same for something in place of W."""
        return DenseForm(self.products)
