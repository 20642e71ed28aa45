"""A linear layer that stores, computes and trains only its live connections."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.ops import linear as functional
from sparselab.nn.ops.cpu.plans import TopologyPlans
from sparselab.nn.ops.cpu.products import product
from sparselab.nn.ops.cpu.variants import Variant, possible
from sparselab.nn.ops.linear import GradientWatcher
from sparselab.nn.storage.checks import check_input, check_width
from sparselab.nn.storage.compressed import CompressedRows


class SparseLinear(CompressedRows):
    """Drop-in for `torch.nn.Linear`: ``y = x W^T + b`` with a sparse W.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    sparsity : float in [0, 1]
        Fraction of W that does not exist. Exactly ``round((1 - sparsity) * out_features * in_features)``
        connections are drawn uniformly at random, from torch's random generator.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64 or bfloat16. In bfloat16 the sums are still made in float32.

    Attributes
    ----------
    values : Parameter, (nnz,)
        Weights of the live connections, row by row, columns ascending. There are no spare slots, so weight
        decay, noise and clipping touch live weights only.
    indptr : int64 buffer, (out_features + 1,)
        ``values[indptr[i] : indptr[i + 1]]`` are the weights of output i.
    indices : uint16, int32 or int64 buffer, (nnz,)
        Input of each connection; uint16 up to 65,536 inputs.
    forward_mask : bool buffer, (nnz,), or None
        Connections that the output comes from; None means all. The others get gradients as if they were in
        use, and are 0 in the forward pass and in the gradient of x. Set by `sparselab.TopKAST`.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        If a size is not a non-negative integer or the sparsity not a number in [0, 1].

    Notes
    -----
    6 bytes per connection at inference in float32, 4 in bfloat16 (``layer.to(torch.bfloat16)``); about 8 more
    with the plans that training keeps. The plans are
    derived from the topology when they are needed and are neither saved nor copied.

    The Parameter is one-dimensional: code that finds weights by ``p.ndim >= 2`` (often to choose what decays)
    should look for ``p.ndim >= 2 or name.endswith("values")``.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.SparseLinear(1536, 384, sparsity=0.9)
    >>> layer(torch.randn(8, 16, 1536)).shape
    torch.Size([8, 16, 384])
    >>> layer.nnz
    58982
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        sparsity: float = 0.9,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._allocate((n_connections(self.shape, sparsity),), bias, device, dtype)

    @classmethod
    def from_dense(cls, linear: nn.Linear, sparsity: float) -> SparseLinear:
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        return cls._from_largest(linear, sparsity)

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` with the same outputs, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        new: nn.Linear = self._dense_twin()
        return new

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``.

        Parameters
        ----------
        x : (..., in_features), the dtype of `values`
            Under CPU autocast any floating dtype; the product is then computed and returned in the dtype of
            `values`.

        Returns
        -------
        (..., out_features)

        Raises
        ------
        RuntimeError
            As `torch.nn.Linear`: if the last dimension, the dtype or the device does not fit.
        NotImplementedError
            If the layer or x is not on the CPU, or forward-mode derivatives are asked for.
        """
        y = self._shortcut(x)
        if y is not None:
            return y
        check_width(x, self.in_features)
        return self._forward(check_input(x, self.values))

    def _shortcut(self, x: Tensor) -> Tensor | None:
        return functional.infer(x, self._parameters, self._buffers, self._plans)

    def _product(self, tokens: Tensor) -> Tensor:
        return functional.sparse_linear(
            tokens, self._in_use, self.bias, self.indptr, self.indices, self._plans
        )

    def _product_seen_by(self, watcher: GradientWatcher, tokens: Tensor) -> Tensor:
        with functional.watching(watcher):
            return self._product(tokens)

    def _ways(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Every way to compute the output for x (tokens, in_features), by the name of its variant."""
        # Plans of their own: what only one of them needs is not kept.
        plans = TopologyPlans(self.indptr, self.indices, self.in_features)
        weights = self._in_use.detach()
        return {name: partial(product, x, weights, self.bias, plans, name) for name in possible(len(x))}

    def variant(self, n_tokens: int, operation: str = "forward") -> Variant:
        """How a batch of so many tokens is computed, and why: by a rule, or as `sparselab.tune` measured.

        Parameters
        ----------
        n_tokens : int
            Product of all leading dimensions of the input.
        operation : {"forward", "input_grad", "values_grad"}

        Examples
        --------
        >>> SparseLinear(3072, 768, sparsity=0.9).variant(1)
        Variant(operation='forward', name='few tokens', reason='1 tokens (at most 16) do not fill a tile')
        """
        return self._plans.variant(operation, n_tokens, self.density)


def _recognises(state: State) -> dict[str, object] | None:
    return {} if "indptr" in state and state["values"].ndim == 1 else None


register_kind(LayerKind("sparse", SparseLinear, (nn.Linear,), recognises=_recognises, condenses=True))
