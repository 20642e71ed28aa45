"""The one contract that sparse layers answer to: algorithms and tools see layers only through it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from sparselab.kernels import PaddedCSR
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.follow.replaced import connections_replaced
from sparselab.nn.follow.replicas import refuse_shards
from sparselab.nn.ops.cpu.threads import use_torch_threads
from sparselab.nn.ops.cpu.variants import Measured
from sparselab.nn.ops.inputs.places import dense_of
from sparselab.nn.ops.inputs.tokens import by_matrix
from sparselab.nn.ops.topologies import GradientHook
from sparselab.nn.storage.base import Storage
from sparselab.nn.storage.in_use import without_unused
from sparselab.nn.storage.init import fan_in_bound
from sparselab.nn.storage.patterns import read_pattern, to_csr_tensor

if TYPE_CHECKING:
    import scipy.sparse

Layer = TypeVar("Layer", bound="SparseLayer")


class SparseLayer(nn.Module):
    """A layer with a weight matrix W (out_features, in_features) of which some connections exist.

    Parameters
    ----------
    storage : Storage
        What holds W.

    Attributes
    ----------
    storage : Storage
    forward_mask : bool buffer laid out as `stored`, or None
        The connections in use in the forward pass; None if all are. It follows a rewrite, with nothing grown
        in it. The others are 0 in the output and in the gradient of the input, whatever is stored; the
        gradient of `stored` is the same with a mask as without.
    """

    storage: Storage
    bias: nn.Parameter | None
    forward_mask: Tensor | None
    #: The kind of layer it was made from, which `sparselab.densify` makes of it again.
    dense_class: type[nn.Module] = nn.Linear
    #: Parameters and buffers that its class gives it; tools for whole models lose no others in silence.
    tensor_names: tuple[str, ...] = ("weight_values", "indptr", "indices", "forward_mask", "bias")
    #: What `to_dense` makes, and the arguments that both kinds take and keep under the same names.
    dense_type: type[nn.Module] = nn.Linear
    settings: tuple[str, ...] = ("in_features", "out_features")
    #: Whether other layers may multiply with its weight, if that has two dimensions; see `tied_product`.
    is_shareable = False

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        use_torch_threads()  # kernels draw connections, and their first use would change torch's count
        self.storage = storage
        self.out_features, self.in_features = storage.shape
        self.register_buffer("forward_mask", None)

    @property
    def gradient_hook(self) -> GradientHook | None:
        """Called in backward passes with what the gradient of the weights is made of; None for nothing.

        It gets `GradientOperands`, which are lent. Copies of a layer have none.
        """
        return self.storage.hook_place.hook

    @gradient_hook.setter
    def gradient_hook(self, hook: GradientHook | None) -> None:
        self.storage.hook_place.hook = hook
        self.storage.refresh(self)

    @property
    def stored(self) -> nn.Parameter:
        """The Parameter that holds the weights, as optimizers see it.

        Raises
        ------
        TypeError
            If the weights are computed, as under a parametrization.
        """
        return self.storage.held(self)

    @property
    def _is_fsdp_managed_module(self) -> bool:
        """What torch sets where it shards a module's parameters over processes, which is refused."""
        return False

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, managed: bool) -> None:
        if managed:
            refuse_shards(self)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``, the shape of W."""
        return self.storage.shape

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the positions that a connection may take: `shape`, or that in blocks."""
        return self.storage.grid

    @property
    def block_shape(self) -> tuple[int, int]:
        """Outputs and inputs that one connection joins: (1, 1), unless it is a block of weights."""
        return self.storage.block_shape

    @property
    def nnz(self) -> int:
        """Live connections; a block of weights is one."""
        return self.storage.nnz(self)

    @property
    def n_weights(self) -> int:
        """Live weights."""
        return self.storage.n_weights(self)

    @property
    def density(self) -> float:
        """Live fraction of W, in weights (1 for a layer without positions)."""
        size = math.prod(self.shape)
        return self.n_weights / size if size else 1.0

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    def positions(self) -> Tensor:
        """int64 (nnz,): ``row * columns + column`` of each slot on the `grid`, ascending."""
        return self.storage.positions(self)

    def per_connection(self, entries: Tensor) -> Tensor:
        """Entries in slot order of a tensor laid out as `stored`: weights, a gradient, a moment.

        One for each connection, (nnz,), or (nnz, *block_shape) where a connection is a block.
        """
        return self.storage.take(self, entries)

    def put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set the entries of some slots, int64 (n,), in a tensor laid out as `stored`.

        `numbers` is laid out as what `per_connection` returns.
        """
        self.storage.put(self, entries, slots, numbers)

    def moved(self, entries: Tensor, source: Tensor) -> Tensor:
        """A tensor laid out as `stored`, after a `rewrite` that returned `source`.

        What survived keeps its entry; whatever was grown or has no connection gets 0. In place where the
        shape stays, so that other references see it; else a new tensor.
        """
        return self.storage.move(self, entries, source)

    def rewrite(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop and grow connections in place.

        Parameters
        ----------
        drop : int64 (n,)
            Slots to remove.
        grow : int64 (m,)
            Positions ``row * columns + column`` of the `grid` to add with weight 0. A dropped position may
            be grown again; it then keeps its weight.

        Returns
        -------
        int64 (new nnz,)
            The old slot of each new slot, or -1 where it was grown. Whatever lives per slot, such as the
            state of an optimizer, follows by it; `stored` and its gradient have been moved.

        Raises
        ------
        TypeError
            If the weights are bfloat16 or float16, which are for inference, or computed.
        ValueError
            As `sparselab.kernels.rewrite`.
        """
        return self.storage.rewrite(self, drop, grow)

    def to_dense(self) -> nn.Module:
        """A dense layer with the same outputs, mode and trainability."""
        raise NotImplementedError

    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        """Replace the topology and the weights, by default with fresh ones; biases stay."""
        raise NotImplementedError

    def _configure(self, layer: Any) -> None:
        """Take over the settings of a layer that are more than the shape of W."""

    def tied_product(self, input: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
        """``x W^T + b`` or ``x W + b``, with any b: what a `TiedLinear` computes with the layer's weight."""
        weight: Any = self.weight.T if transposed else self.weight
        if transposed and input.layout is not torch.strided and not input.is_nested:
            input = dense_of(input)
        if input.layout is torch.strided and not input.is_nested:
            return nn.functional.linear(input, weight, bias)
        return by_matrix(input, lambda tokens: nn.functional.linear(tokens, weight, bias))

    @property
    def in_use(self) -> Tensor:
        """The weights, with 0 for what `forward_mask` leaves out; their gradient reaches all of them."""
        return used_weights(self)

    def _fit_forward_mask(self, saved: Tensor | None) -> None:
        """Make room for a saved mask, or forget the mask if none was saved."""
        self.forward_mask = None if saved is None else torch.ones_like(self.stored, dtype=torch.bool)

    def use_measured(self, measured: Measured | None) -> None:
        """Let forward passes go by what was measured, as long as the density stays; None: by the rule."""

    def plan_bytes(self) -> int:
        """Bytes of the kernel plans held now."""
        return 0

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
        weight = weight_of(layer)
        make: Any = cls
        new: Layer = make(
            **{name: getattr(layer, name) for name in cls.settings},
            bias=layer.bias is not None,
            device=weight.device if device is None else device,
            dtype=weight.dtype,
            **({} if sparsity is None else {"sparsity": sparsity}),
            **settings,
        )
        new._train_as(layer, weight)
        return new

    def _train_as(self, layer: Any, weight: Tensor) -> None:
        """Take over the mode, what is trained, and the kind of another layer with that weight."""
        self.train(layer.training)
        self.dense_class = getattr(layer, "dense_class", self.dense_type)
        self.stored.requires_grad_(weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)

    def set_topology(self, pattern: Any) -> None:
        """Replace the connections, in place, by those of a matrix of the layer's shape.

        Weights come from the pattern or are drawn, as by `from_pattern`. Biases stay, and the gradient of the
        weights is dropped. The state that an optimizer has for the weights follows by position.

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
        >>> import numpy as np
        >>> from sparselab import SparseLinear
        >>> layer = SparseLinear(6, 4)
        >>> layer.set_topology(np.eye(4, 6, dtype=bool))
        >>> layer.positions()
        tensor([ 0,  7, 14, 21])
        """
        if self.stored.is_meta:
            raise ValueError("set_topology needs a layer that holds data, got one on the device meta")
        positions, weights = self._read(pattern)
        with connections_replaced(self):
            self._connect(positions, weights)
        self.stored.grad = None

    def _read(self, pattern: Any) -> tuple[Tensor, Tensor | None]:
        """Positions of a pattern of the layer's shape, and its weights if it has some."""
        shape, positions, weights = read_pattern(pattern)
        if shape != self.shape:
            raise ValueError(f"pattern must have the shape of the layer, {self.shape}, got {shape}")
        return positions, weights

    def _begin_with(self, positions: Tensor, weights: Tensor | None) -> None:
        """As `_connect`, and draw the biases that go with the connections."""
        self._connect(positions, weights)
        self._draw_bias(torch.from_numpy(self._matrix().indptr.copy()))

    def _draw_bias(self, indptr: Tensor) -> None:
        if self.bias is not None:
            with torch.no_grad():
                self.bias.uniform_(-1, 1).mul_(self._bias_bound(indptr, self.bias.dtype))

    def _bias_bound(self, indptr: Tensor, dtype: torch.dtype) -> Tensor:
        """Within what biases are drawn, from the row pointers of W."""
        return fan_in_bound(indptr, dtype)

    def to_scipy(self) -> scipy.sparse.csr_array | scipy.sparse.bsr_array:
        """W as a SciPy array (out_features, in_features) in canonical form, a copy.

        Every connection is stored, also one whose weight is 0. bfloat16 and float16 become float32.

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
        return to_csr_tensor(W.topology, torch.from_numpy(W.values).to(self.in_use.dtype, copy=True))

    def _matrix(self) -> PaddedCSR:
        """W as it is in use, not to be written to; bfloat16 and float16 as float32."""
        self.storage.check_kin(self)
        weights = self.per_connection(self.in_use.detach()).cpu()
        values = weights.float() if weights.itemsize < 4 else weights
        return PaddedCSR.of(as_matrix(self), values.numpy())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={self.sparsity:.4g}, nnz={self.nnz}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A hook belongs to the algorithm that set it, and plans to the tensors: a copy has neither.
        return {**self.__dict__, "storage": copy.copy(self.storage)}


def used_weights(layer: SparseLayer) -> Tensor:
    """`SparseLayer.in_use`, of weights that are a Parameter or computed."""
    values: Tensor = getattr(layer, layer.storage.parameter)
    mask = layer._buffers["forward_mask"]
    return values if mask is None else without_unused(values, mask)


def weight_of(layer: Any) -> Tensor:
    """The weight of a dense layer, or what holds those of a sparse one."""
    weight: Tensor = layer.stored if is_sparse(layer) else layer.weight
    return weight


def is_sparse(module: object) -> TypeGuard[SparseLayer]:
    """Whether a module is a `SparseLayer`."""
    return isinstance(module, SparseLayer)


def find_sparse(module: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """The sparse layers of a module (itself included) with their qualified names."""
    for name, child in module.named_modules():
        if isinstance(child, SparseLayer):
            yield name, child


def as_matrix(layer: SparseLayer) -> RowTopology:
    """The connections of a layer on its grid, for the compiled functions of `sparselab.kernels`.

    Nothing is copied where the layer keeps compressed rows as `sparselab.SparseLinear` does; else they are
    made from its positions. Kernels launched by this Python thread use as many threads as torch from now on.

    Returns
    -------
    RowTopology
        Without spare slots.
    """
    use_torch_threads()
    return layer.storage.matrix(layer)
