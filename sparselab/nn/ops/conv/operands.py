"""The operands of the dense gradient of a convolution, whose unfolded batch is never made."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparselab.kernels.arrays import Array, index_dtype
from sparselab.nn.ops.conv.dense import dense_products
from sparselab.nn.ops.conv.geometry import Geometry
from sparselab.nn.ops.operands import GradientOperands, Totals, token_totals
from sparselab.nn.ops.products import find_products
from sparselab.nn.ops.topologies import TensorTopology


class ConvolutionOperands(GradientOperands):
    """Of a convolution, where the X of G is the unfolded batch.

    Parameters
    ----------
    x : (n, in_channels, height, width)
    dy : (n, out_channels, rows, columns)
    geometry : Geometry
    of_graph : bool
        See `sparselab.nn.ops.operands.GradientOperands`.
    """

    def __init__(self, x: Tensor, dy: Tensor, geometry: Geometry, of_graph: bool = False) -> None:
        super().__init__(x, dy, of_graph)
        self.geometry = geometry

    @property
    def n_tokens(self) -> int:
        """Outputs of all images, of one channel."""
        return self.dy.shape[0] * self.dy.shape[2] * self.dy.shape[3]

    def add_rows(self, start: int, out: Tensor, beta: float = 1.0) -> None:
        """Group by group, by torch's own gradient of a slice of the output channels."""
        geometry, stop = self.geometry, start + len(out)
        channels = geometry.in_channels // geometry.groups
        rows = self.dy.shape[1] // geometry.groups
        height, width = self.x.shape[2:]
        of_group = dense_products(geometry._replace(in_channels=channels, groups=1), (height, width))
        for group in range(start // rows, -(-stop // rows)):
            first, last = max(start, group * rows), min(stop, (group + 1) * rows)
            images = self.x[:, group * channels : (group + 1) * channels]
            gradient = of_group.weight_grad(self.dy[:, first:last], images).reshape(last - first, -1)
            part = out[first - start : last - start]
            # Not what is there times 0, which may be NaN.
            part.copy_(gradient if beta == 0 else part * beta + gradient)

    def sampled(self, positions: Array) -> Array:
        """G at some positions, ascending, by the sparse kernels."""
        rows, columns = self.dy.shape[1], self.geometry.columns
        row, column = np.divmod(positions, columns)
        indptr = torch.from_numpy(np.searchsorted(row, np.arange(rows + 1)).astype(np.int64))
        indices = torch.from_numpy(column.astype(index_dtype(columns)))
        topology = TensorTopology(indptr, indices, (rows, columns, 1, 1), "csr")
        products = find_products("conv2d", "csr", self.device.type)
        gradient: Array = products.values_grad(topology, self.dy, self.x, self.geometry).numpy().reshape(-1)
        return gradient

    def totals(self, signs: Totals | None) -> tuple[Totals, Totals]:
        """Those of the columns are added up over the groups."""
        geometry, n_outputs = self.geometry, self.dy.shape[2] * self.dy.shape[3]
        rows, columns = np.zeros(self.dy.shape[1]), np.zeros(geometry.in_channels * geometry.elements)
        for n in range(len(self.dy)):
            of_image = None if signs is None else signs[n * n_outputs : (n + 1) * n_outputs]
            unfolded = torch.nn.functional.unfold(
                self.x[n : n + 1], geometry.kernel, geometry.dilation, geometry.padding, geometry.stride
            )
            rows += token_totals(self.dy[n].flatten(1).T, of_image)
            columns += token_totals(unfolded[0].T, of_image)
        return rows, columns.reshape(geometry.groups, -1).sum(0)
