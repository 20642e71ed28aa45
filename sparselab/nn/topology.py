"""What an algorithm may see of a sparse layer, and how a layer prepares its topology for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from sparselab import kernels
from sparselab.kernels import PaddedCSR
from sparselab.nn.functional import GradientWatcher, pack_segments, pack_transpose


@runtime_checkable
class SparseTopology(Protocol):
    """A layer whose connections can be dropped and grown."""

    values: nn.Parameter
    gradient_watcher: GradientWatcher | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""

    @property
    def nnz(self) -> int:
        """Live connections."""

    @property
    def sparsity(self) -> float:
        """Fraction of positions that are structurally zero."""

    def positions(self) -> Tensor:
        """int64 (nnz,): ``row * in_features + column`` of each slot, ascending."""

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop slots and grow positions in place, moving values and gradient.

        Returns each new slot's old slot, or -1.
        """


def find_sparse(module: nn.Module) -> Iterator[tuple[str, SparseTopology]]:
    """The sparse layers of a module (itself included) with their qualified names."""
    for name, child in module.named_modules():
        if isinstance(child, SparseTopology):
            yield name, child


class TopologyPlans:
    """Kernel plans of one topology, each made when it is first needed.

    Holds the two tensors it was made from, so that `matches` can tell by identity and version whether a layer
    still has that topology; nothing is keyed by an address that could be reused.
    """

    def __init__(self, indptr: Tensor, indices: Tensor, in_features: int) -> None:
        self._indptr, self._indices = indptr, indices
        self._versions = _version(indptr), _version(indices)
        self._in_features = in_features
        self.forward = self._make(lambda W: pack_segments(kernels.plan_spmm(W)))
        self._input_grad: list[Tensor] = []
        self._values_grad: list[Tensor] = []

    def matches(self, indptr: Tensor, indices: Tensor) -> bool:
        """Whether these tensors still hold the topology the plans were made for."""
        same = self._indptr is indptr and self._indices is indices
        if torch.compiler.is_compiling():  # versions cannot be read while tracing
            return same
        return same and self._versions == (_version(indptr), _version(indices))

    @property
    def input_grad(self) -> list[Tensor]:
        """Plan of the gradient by the input."""
        if not self._input_grad:
            self._input_grad = self._make(lambda W: pack_transpose(kernels.plan_spmm_t(W)))
        return self._input_grad

    @property
    def values_grad(self) -> list[Tensor]:
        """Plan of the gradient by the values."""
        if not self._values_grad:
            self._values_grad = self._make(lambda W: pack_segments(kernels.plan_sddmm_dw(W)))
        return self._values_grad

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors held now, for counting their bytes."""
        return [*self.forward, *self._input_grad, *self._values_grad]

    def _make(self, plan: Callable[[PaddedCSR], list[Tensor]]) -> list[Tensor]:
        with torch.inference_mode(False):  # an inference tensor could not be saved for backward later
            begin = self._indptr.numpy()
            shape = (len(begin) - 1, self._in_features)
            indices = self._indices.numpy()
            no_values = np.broadcast_to(np.float32(0), indices.shape)
            return plan(PaddedCSR.unchecked(shape, begin, np.diff(begin), indices, no_values))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
