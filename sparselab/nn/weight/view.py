"""The weight of a sparse layer, as torch's functions see it: products of live weights, and nothing dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparselab.nn.storage.patterns import to_csr_tensor
from sparselab.nn.weight.described import Described
from sparselab.nn.weight.functions import call, matmul, mm, mv, refuse, refused_operators
from sparselab.nn.weight.products import linear
from sparselab.nn.weight.writing import refuse_to_write


class Weight(Described):
    """What `SparseWeight` is, but for being a tensor; `torch.compile` traces this class.

    Parameters
    ----------
    layer : CompressedLayer
        Whose weight it is.
    transposed, detached : bool
        Whether it is the transpose of the weight, and whether no gradient reaches the layer through it.
    copied : tensor laid out as the layer's Parameter, optional
        Other numbers in place of the layer's, which belong to the connections of now.
    """

    def __init__(
        self, layer: Any, transposed: bool = False, detached: bool = False, copied: Tensor | None = None
    ) -> None:
        self.layer, self.transposed, self._detached, self._copied = layer, transposed, detached, copied
        known = copied is not None and not torch.compiler.is_compiling()
        self._stamp = layer.storage.stamp(layer) if known else None

    def _with(self, **changes: Any) -> Any:
        # What was copied of connections that are gone must not become a copy of those of now.
        copied = None if self._copied is None else self.values()
        state = {"transposed": self.transposed, "detached": self._detached, "copied": copied}
        return weight_view(self.layer, **{**state, **changes})

    def detach(self) -> Any:
        """The same, without gradient."""
        return self._with(detached=True, copied=None if self._copied is None else self._copied.detach())

    @property
    def data(self) -> Any:
        """As `detach`."""
        return self.detach()

    @data.setter
    def data(self, data: Any) -> None:
        # Itself is what a write in place leaves to be assigned, as ``weight.data *= 2`` does.
        if not (isinstance(data, Weight) and data._is_live_of(self.layer) and self._copied is None):
            refuse_to_write(self, "data")

    def _is_live_of(self, layer: Any) -> bool:
        return self.layer is layer and self._copied is None and not self.transposed

    @property
    def T(self) -> Any:
        """The transpose, of a weight with two dimensions."""
        if self.ndim != 2:
            raise TypeError(f"a weight must have two dimensions to be transposed, got {tuple(self.shape)}")
        return self._with(transposed=not self.transposed)

    @property
    def mT(self) -> Any:
        """As `T`."""
        return self.T

    def t(self) -> Any:
        """As `T`."""
        return self.T

    def transpose(self, dim0: int, dim1: int) -> Any:
        """The transpose, where the two dimensions differ."""
        return self if dim0 % self.ndim == dim1 % self.ndim else self.T

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same in another dtype, with gradients: a copy of the live weights of now.

        Raises
        ------
        TypeError
            If it is another device that is asked for.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != self.device.type:
            raise TypeError(f"a weight must go with its layer, layer.to({str(device)!r}), got .to alone")
        if dtype in (None, self.dtype):
            return self
        return self._with(copied=self.values().to(dtype))

    def type_as(self, other: Tensor) -> Any:
        """As `to` the dtype of another tensor."""
        return self.to(other.dtype)

    def type(self, dtype: Any = None, **kwargs: Any) -> Any:
        """As `to` another dtype."""
        if not isinstance(dtype, torch.dtype):
            refuse(Tensor.type)
        return self.to(dtype)

    def float(self) -> Any:
        """As `to`."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """As `to`."""
        return self.to(torch.float64)

    def bfloat16(self) -> Any:
        """As `to`."""
        return self.to(torch.bfloat16)

    def cpu(self) -> Any:
        """As `to`."""
        return self.to("cpu")

    def contiguous(self) -> Any:
        """Itself: there is only one order of the live weights."""
        return self

    def new_tensor(self, data: Any, **settings: Any) -> Tensor:
        """A dense tensor of other numbers, as of `torch.Tensor`."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **settings})

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, a new tensor, with gradients to the live weights."""
        dense: Tensor = self.layer.storage.spread(self.layer, self.values())
        dense = dense.t() if self.transposed else dense.view(self.shape)
        return dense if dtype is None else dense.to(dtype)

    def to_sparse_csr(self) -> Tensor:
        """The weight as a `torch.sparse_csr` tensor, with gradients to the live weights."""
        if self.ndim != 2 or self.transposed:
            raise TypeError(f"a weight must have two dimensions, not transposed, to be CSR, got {self!r}")
        topology, slots = self.layer.storage.entries(self.layer)
        return to_csr_tensor(topology, self.values().reshape(-1)[slots])

    def matmul(self, other: Any) -> Tensor:
        """``weight @ other``."""
        return matmul(self, other)

    def mm(self, other: Any) -> Tensor:
        """``weight @ other`` for two dimensions."""
        return mm(self, other)

    def mv(self, other: Any) -> Tensor:
        """``weight @ other`` for one dimension."""
        return mv(self, other)

    def __matmul__(self, other: Any) -> Tensor:
        return self.matmul(other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return linear(other, self.T)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        words = [str(tuple(self.shape)), str(self.dtype), f"{self.layer.n_weights} live weights"]
        words += ["transposed"] * self.transposed + ["detached"] * self._detached
        return f"<weight of a {type(self.layer).__name__}: {', '.join(words)}>"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return call(func, args, kwargs or {})


for _name, _method in refused_operators().items():
    setattr(Weight, _name, _method)


class SparseWeight(Weight, Tensor):  # type: ignore[misc, override]
    """The weight of a sparse layer: its dtype, device and shape, and products with it; nothing dense.

    ``layer.weight`` makes one. `torch.nn.functional.linear`, ``@``, `torch.matmul`, ``mm``, ``mv`` and
    ``addmm``, with the weight or its transpose, and for convolutions all ``conv`` and ``conv_transpose`` of
    `torch.nn.functional`, are computed by the sparse kernels, and their gradients reach the layer's Parameter
    ``weight_values``.
    `to_dense` and `to_sparse_csr` make tensors, with gradients. ``data`` and `detach` are the same without
    gradient; ``to`` another dtype copies the live weights.

    In place a weight can be multiplied by a number, zeroed, filled and drawn (``mul_``, ``div_``, ``zero_``,
    ``fill_``, ``normal_``, ``uniform_``): live weights only. So `torch.nn.init` works, with the fans of the
    dense weight in ``xavier_`` and ``kaiming_``. Everything else raises TypeError.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> layer, x = SparseLinear(64, 32, sparsity=0.9), torch.randn(8, 64)
    >>> layer.weight
    <weight of a SparseLinear: (32, 64), torch.float32, 205 live weights>
    >>> torch.equal(torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    True
    >>> (x @ layer.weight.T).shape, layer.weight.to_dense().shape
    (torch.Size([8, 32]), torch.Size([32, 64]))
    """

    @staticmethod
    def __new__(cls, *args: Any, **kwargs: Any) -> SparseWeight:
        it = TracedWeight(*args, **kwargs)
        new: SparseWeight = Tensor._make_wrapper_subclass(
            cls, it.shape, dtype=it.dtype, device=it.device, requires_grad=it.requires_grad
        )
        return new

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                Tensor.register_hook(self, _refuse_gradient)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        refuse(func)


class TracedWeight(Weight):
    """`SparseWeight` where `torch.compile` traces, which cannot make tensors of a class of its own."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{name} must be asked of a dense tensor, got the weight of a sparse layer: write "
            "layer.weight.to_dense(), or layer.weight_values for the live weights alone"
        )


def weight_view(layer: Any, **changes: Any) -> Any:
    """The weight of a layer; further arguments as of `Weight`."""
    kind = TracedWeight if torch.compiler.is_compiling() else SparseWeight
    return kind(layer, **changes)


def is_weight_of(layer: Any, value: object) -> bool:
    """Whether this is the weight of that layer, which ``layer.weight *= 2`` writes and then assigns."""
    return isinstance(value, Weight) and value._is_live_of(layer) and not value._detached


def _refuse_gradient(grad: Tensor) -> NoReturn:
    raise RuntimeError(
        "the gradient of a sparse weight must come from a product that is listed in "
        "sparselab.nn.SparseWeight, got one from elsewhere, such as a torch.autograd.Function that was given "
        "layer.weight; give it layer.weight.to_dense()"
    )
