"""What all sparse layers have in common: sizes, counts, patterns, leading dimensions and a watcher."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels import PaddedCSR
from sparselab.nn.ops.linear import GradientWatcher
from sparselab.nn.storage.checks import check_size
from sparselab.nn.storage.contract import SparseTopology, as_matrix
from sparselab.nn.storage.init import fan_in_bound
from sparselab.nn.storage.patterns import read_pattern

if TYPE_CHECKING:
    import scipy.sparse

Layer = TypeVar("Layer", bound="SparseLayer")


class SparseLayer(nn.Module):
    """A layer with the topology of a matrix W (out_features, in_features), which subclasses store."""

    bias: nn.Parameter | None
    forward_mask: Tensor | None
    #: The kind of layer it was made from, which `sparselab.densify` makes of it again.
    dense_class: type[nn.Module] = nn.Linear
    #: Outputs and inputs that one connection joins.
    block_shape: tuple[int, int] = (1, 1)
    #: Parameters and buffers that its class gives it; tools for whole models lose no others in silence.
    tensor_names: tuple[str, ...] = ("values", "indptr", "indices", "forward_mask", "bias")
    #: What `to_dense` makes, and the arguments that both kinds take and keep under the same names.
    _dense: type[nn.Module] = nn.Linear
    _settings: tuple[str, ...] = ("in_features", "out_features")

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("forward_mask", None)
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.gradient_watcher: GradientWatcher | None = None

    def _configure(self, layer: Any) -> None:
        """Take over the settings of a layer that are more than the shape of W."""

    @property
    def stored(self) -> nn.Parameter:
        """The Parameter that holds the weights."""
        raise NotImplementedError

    @property
    def nnz(self) -> int:
        """Live connections."""
        raise NotImplementedError

    def positions(self) -> Tensor:
        """int64 (nnz,): ``row * in_features + column`` of each connection, ascending."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """A dense layer with the same outputs, mode and trainability."""
        raise NotImplementedError

    def per_connection(self, entries: Tensor) -> Tensor:
        """The entries at the connections, in the order of `positions`."""
        raise NotImplementedError

    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        """Replace the topology and the weights, by default with fresh ones; biases stay."""
        raise NotImplementedError

    @property
    def _in_use(self) -> Tensor:
        """`stored`, with 0 for what `forward_mask` leaves out; its gradient reaches all of `stored`."""
        if self.forward_mask is None:
            return self.stored
        return torch.where(self.forward_mask, self.stored, self.stored - self.stored.detach())

    def _fit_forward_mask(self, saved: Tensor | None) -> None:
        """Make room for a saved mask, or forget the mask if none was saved."""
        self.forward_mask = None if saved is None else torch.ones_like(self.stored, dtype=torch.bool)

    def _product(self, x: Tensor) -> Tensor:
        """The output for checked input: of linear layers (tokens, out_features) for (tokens, in_features)."""
        raise NotImplementedError

    def _product_seen_by(self, watcher: GradientWatcher, x: Tensor) -> Tensor:
        """As `_product`, and show `watcher` the operands of its backward passes."""
        raise NotImplementedError

    @classmethod
    def like(
        cls: type[Layer],
        layer: Any,
        sparsity: float | None = None,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> Layer:
        """A new layer with the sizes, dtype, mode and trainability of another one, and random weights.

        Parameters
        ----------
        layer : torch.nn.Module
            Dense or sparse.
        sparsity : float in [0, 1], optional
            Where the settings do not say how sparse the layer is.
        device : torch.device, optional
            That of the other layer by default.
        settings
            Further arguments of the class.
        """
        weight = layer.stored if isinstance(layer, SparseLayer) else layer.weight
        make: Any = cls
        new: Layer = make(
            **{name: getattr(layer, name) for name in cls._settings},
            bias=layer.bias is not None,
            device=weight.device if device is None else device,
            dtype=weight.dtype,
            **({} if sparsity is None else {"sparsity": sparsity}),
            **settings,
        )
        new._train_as(layer, weight)
        return new

    @classmethod
    def from_dense(cls, dense: Any, sparsity: float) -> SparseLayer:
        """The largest weights of a dense layer."""
        raise NotImplementedError

    @classmethod
    def from_pattern(
        cls: type[Layer], pattern: Any, bias: bool = True, dtype: torch.dtype | None = None
    ) -> Layer:
        """A layer with the connections of a matrix (out_features, in_features).

        The topology stays as it is: only an algorithm of `sparselab.dst` that is attached changes it.

        Parameters
        ----------
        pattern : SciPy sparse matrix or array, bool array or tensor, or torch.sparse_csr tensor
            Floating entries are taken as weights. A boolean pattern gets fresh ones, drawn as by
            `fan_in_uniform_`. Every stored entry is a connection, zeros included, as ``pattern.tocsr()`` has
            them; entries stored twice are summed.
        bias : bool
            Drawn as in a new layer.
        dtype : torch.dtype, optional
            float32, float64 or bfloat16; torch's default if None, whatever the dtype of the pattern.

        Raises
        ------
        TypeError
            If the pattern is of another kind, its entries are neither boolean nor floating, or a layer
            cannot have the dtype.
        ValueError
            If the pattern does not have two dimensions, or its compressed rows are not valid.

        Examples
        --------
        >>> from sparselab import SparseLinear
        >>> SparseLinear.from_pattern(np.tri(4, 6, dtype=bool)).indptr
        tensor([ 0,  1,  3,  6, 10])
        """
        (rows, columns), positions, weights = read_pattern(pattern)
        new = cls(columns, rows, bias, sparsity=1.0, dtype=dtype)  # type: ignore[call-arg]
        new._begin_with(positions, weights)
        return new

    def _begin_with(self, positions: Tensor, weights: Tensor | None) -> None:
        """As `_connect`, and draw the biases that go with the connections."""
        self._connect(positions, weights)
        self._draw_bias(torch.from_numpy(self._matrix().indptr.copy()))

    def set_topology(self, pattern: Any) -> None:
        """Replace the connections, in place, by those of a matrix of the layer's shape.

        Weights come from the pattern or are drawn, as by `from_pattern`. Biases stay, and the gradient of the
        weights is dropped. For before training: the state that an optimizer has for the weights does not
        follow.

        Parameters
        ----------
        pattern : SciPy sparse matrix or array, bool array or tensor, or torch.sparse_csr tensor

        Raises
        ------
        TypeError, ValueError
            As `from_pattern`; and if the pattern does not have the layer's shape, or the layer is on the
            device "meta". Nothing has been changed then.

        Examples
        --------
        >>> from sparselab import SparseLinear
        >>> layer = SparseLinear(6, 4)
        >>> layer.set_topology(np.eye(4, 6, dtype=bool))
        >>> layer.positions()
        tensor([ 0,  7, 14, 21])
        """
        if self.stored.is_meta:
            raise ValueError("set_topology needs a layer that holds data, got one on the device meta")
        self._connect(*self._read(pattern))

    def _read(self, pattern: Any) -> tuple[Tensor, Tensor | None]:
        """Positions of a pattern of the layer's shape, and its weights if it has some."""
        shape, positions, weights = read_pattern(pattern)
        if shape != self.shape:
            raise ValueError(f"pattern must have the shape of the layer, {self.shape}, got {shape}")
        return positions, weights

    def _draw_bias(self, indptr: Tensor) -> None:
        if self.bias is not None:
            with torch.no_grad():
                self.bias.uniform_(-1, 1).mul_(fan_in_bound(indptr, self.bias.dtype))

    def to_scipy(self) -> scipy.sparse.csr_array:
        """W as a SciPy array (out_features, in_features) in canonical form, a copy.

        Every connection is stored, also one whose weight is 0. bfloat16, which NumPy lacks, becomes float32.

        Raises
        ------
        ModuleNotFoundError
            If SciPy is not installed.
        """
        return self._matrix().to_scipy()

    def to_sparse_csr(self) -> Tensor:
        """W as a `torch.sparse_csr` tensor (out_features, in_features), a copy without gradient.

        Every connection is stored, also one whose weight is 0.
        """
        W = self._matrix()
        with warnings.catch_warnings():
            # Torch calls the layout a beta each time that a process first makes one.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                torch.from_numpy(W.indptr.copy()), torch.from_numpy(W.indices.astype(np.int64)),
                torch.from_numpy(W.values).to(self.stored.dtype, copy=True), self.shape,
                check_invariants=False,
            )  # fmt: skip

    def _matrix(self) -> PaddedCSR:
        """W as it is in use, not to be written to; bfloat16 as float32."""
        W, weights = as_matrix(cast(SparseTopology, self)), self.per_connection(self._in_use.detach()).cpu()
        values = weights.float() if weights.dtype == torch.bfloat16 else weights
        return PaddedCSR.of(W, values.numpy())

    def _train_as(self, layer: Any, weight: Tensor) -> None:
        """Take over the mode, what is trained, and the kind of another layer with that weight."""
        self.train(layer.training)
        self.dense_class = getattr(layer, "dense_class", self._dense)
        self.stored.requires_grad_(weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``, the shape of W."""
        return self.out_features, self.in_features

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the positions: `shape`, or where connections are blocks, that in blocks."""
        return self.shape

    @property
    def density(self) -> float:
        """Live fraction of W (1 for a layer without positions)."""
        size = self.in_features * self.out_features
        return self.nnz / size if size else 1.0

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    def _forward(self, x: Tensor) -> Tensor:
        """The output for checked input (..., in_features)."""
        tokens = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features)
        y = self._output(tokens)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def _output(self, x: Tensor) -> Tensor:
        """The product, shown to the watcher if there is one and something to be seen."""
        watched = self.gradient_watcher is not None and self.stored.requires_grad
        product = self._watched_product if watched else self._product
        if watched and torch.compiler.is_compiling():
            # Not as a decorator, which imports torch's compiler (300 MB resident) with this module.
            product = torch.compiler.disable(product)  # type: ignore[no-untyped-call]
        return product(x)

    def _watched_product(self, x: Tensor) -> Tensor:
        assert self.gradient_watcher is not None
        y = self._product_seen_by(self.gradient_watcher, x)
        if y.requires_grad:
            self.gradient_watcher.forward_seen()
        return y

    def plan_bytes(self) -> int:
        """Bytes of the kernel plans held now."""
        return 0

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={self.sparsity:.4g}, nnz={self.nnz}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A watcher belongs to the algorithm that set it, not to a copy.
        return {**self.__dict__, "gradient_watcher": None}
