"""Products on CPU tensors of a layout that has products on arrays only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.backends import find
from sparselab.kernels.layouts.topology import Topology
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.cpu.variants import Variant

if TYPE_CHECKING:
    from sparselab.nn.ops.topologies import TensorTopology


class NumpyProducts:
    """What `sparselab.kernels.backends` computes for ``"cpu"``, on tensors; bfloat16 is widened."""

    def product(self, topology: TensorTopology, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``."""
        if x.dtype == torch.bfloat16:
            wide = None if bias is None else bias.float()
            return self.product(topology, values.float(), x.float(), wide).to(x.dtype)
        use_torch_threads()
        y = x.new_empty((x.shape[0], topology.shape[0]))
        offsets = None if bias is None else _array(bias.contiguous())
        own = topology.own
        find(own).product(own, _values(values, own), _array(x).T, _array(y).T, offsets)
        return y

    def input_grad(self, topology: TensorTopology, values: Tensor, grad: Tensor) -> Tensor:
        """``dy W``."""
        if grad.dtype == torch.bfloat16:
            return self.input_grad(topology, values.float(), grad.float()).to(grad.dtype)
        use_torch_threads()
        dx = grad.new_empty((grad.shape[0], topology.shape[1]))
        own = topology.own
        find(own).product_t(own, _values(values, own), _array(grad).T, _array(dx).T)
        return dx

    def values_grad(
        self, topology: TensorTopology, grad: Tensor, x: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradient by the values, and by the bias, empty if it is not wanted."""
        if grad.dtype == torch.bfloat16:
            values, sums = self.values_grad(topology, grad.float(), x.float(), with_bias)
            return values.to(grad.dtype), sums.to(grad.dtype)
        use_torch_threads()
        own = topology.own
        dW = np.empty(own.values_shape, _array(grad).dtype)
        find(own).gradient(own, _array(grad).T, _array(x).T, dW)
        dvalues = torch.from_numpy(dW).view(topology.values_shape)
        return dvalues, grad.sum(0) if with_bias else grad.new_empty(0)

    def variant(self, topology: TensorTopology, operation: str, n_tokens: int) -> Variant:
        """There is one way."""
        return Variant(
            operation, "kernels", f"the layout {topology.own.layout!r} has products on arrays only"
        )

    def ways(
        self, topology: TensorTopology, values: Tensor, x: Tensor, bias: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        """There is one way."""
        return {"kernels": partial(self.product, topology, values, x, bias)}

    def keep_forward(self, topology: TensorTopology) -> None:
        """Which plans are for backward passes is not known: all are made anew."""
        topology.own.forget()


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array


def _values(values: Tensor, topology: Topology) -> Array:
    return _array(values.contiguous()).reshape(topology.values_shape)
