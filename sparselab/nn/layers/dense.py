"""Dense modules whose weights can be made sparse, by registration: how each is seen as plain layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparselab.nn.layers.extras import only_remade

#: Of `torch.nn.MultiheadAttention`, in the order of its packed weight.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LinearView(nn.Linear):
    """Weights of a dense layer of another kind, in the layout of `torch.nn.Linear` and in their own memory.

    `dense_class` is what a layer made from it becomes again when it is made dense.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, training: bool, dense_class: type[nn.Module] = nn.Linear
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), weight.requires_grad)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)
        )
        self.dense_class = dense_class
        self.train(training)


@dataclass(frozen=True)
class DenseLayer:
    """One layer: the module it belongs to, its name there if it is a part, a view, what holds its data.

    The view is a `torch.nn.Linear`, or a convolution as it is.
    """

    owner: nn.Module
    part: str
    linear: Any
    sources: tuple[Tensor, ...]


@dataclass(frozen=True)
class DenseType:
    """A class of dense modules that can be made sparse, as `register_dense` takes it.

    Attributes
    ----------
    cls : type of torch.nn.Module, or str
        This class, or its qualified name, where its package need not be installed; and subclasses of it that
        redefine nothing but ``__init__``, ``reset_parameters`` and ``extra_repr``. Made sparse and dense
        again, they become this class.
    parts : callable
        ``parts(module)``: the layers that its weights are, as `DenseLayer`.
    known : tuple of str
        The parameters, buffers and modules that the class gives a module; any other would be lost.
    restore : callable, optional
        ``restore(layer, cls)``: a module of this class from the `torch.nn.Linear` or convolution that a
        sparse layer becomes, where `LinearView.dense_class` asks for one.
    join : callable, optional
        ``join(module, layers)``: what takes the place of a module whose parts named in ``layers`` were
        replaced. Needed where parts have names.
    """

    cls: type[nn.Module] | str
    parts: Callable[[Any], Sequence[DenseLayer]]
    known: tuple[str, ...] = ("weight", "bias")
    restore: Callable[[Any, type[Any]], nn.Module] | None = None
    join: Callable[[Any, Mapping[str, nn.Module]], nn.Module] | None = None


_TYPES: dict[type[nn.Module] | str, DenseType] = {}


def register_dense(dense: DenseType) -> DenseType:
    """Make a class of dense modules known to `sparselab.sparsify` and `sparselab.densify`, and return it.

    Examples
    --------
    >>> class Named(nn.Linear):
    ...     '''Reads as a linear layer, and says that it was called.'''
    ...
    ...     def forward(self, x):
    ...         self.called = True
    ...         return super().forward(x)
    >>> dense = register_dense(DenseType(Named, whole))
    >>> [layer.part for layer in dense_parts(Named(2, 2))]
    ['']
    >>> forget_dense(dense)
    """
    _TYPES[dense.cls] = dense
    return dense


def forget_dense(dense: DenseType) -> None:
    """Undo `register_dense`."""
    del _TYPES[dense.cls]


def dense_type(cls: type) -> DenseType | None:
    """What was registered for a class, or for a base from which it differs by how its objects are made."""
    for each in cls.__mro__:
        if (found := _registered(each)) or not only_remade(each):
            return found
    return None


def dense_base(cls: type) -> DenseType | None:
    """What was registered for the nearest base of a class: for the class itself, if it is."""
    return next((found for base in cls.__mro__ if (found := _registered(base))), None)


def _registered(cls: type) -> DenseType | None:
    """What was registered for exactly this class."""
    return _TYPES.get(cls) or _TYPES.get(f"{cls.__module__}.{cls.__qualname__}")


def dense_parts(module: nn.Module) -> Sequence[DenseLayer]:
    """What can be made sparse of a module's own weights; nothing if its class is not registered."""
    found = dense_type(type(module))
    return () if found is None else found.parts(module)


def whole(module: Any) -> Sequence[DenseLayer]:
    """A module that is itself a linear layer or a convolution."""
    return (DenseLayer(module, "", module, _present(module.weight, module.bias)),)


def projections(attention: nn.MultiheadAttention) -> dict[str, DenseLayer]:
    """The four projections of a dense attention, by name."""
    packed, bias, out = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
    sources: list[Tensor]
    weights: list[Tensor]
    if attention._qkv_same_embed_dim:
        sources, weights = [packed] * 3, list(packed.chunk(3))
    else:
        sources = weights = [getattr(attention, f"{name}_weight") for name in PROJECTIONS[:3]]
    biases = [None] * 3 if bias is None else bias.chunk(3)
    found = {
        name: DenseLayer(attention, name, LinearView(w, b, attention.training), _present(source, bias))
        for name, source, w, b in zip(PROJECTIONS, sources, weights, biases, strict=False)
    }
    found["out_proj"] = DenseLayer(attention, "out_proj", out, _present(out.weight, out.bias))
    return found


def attention_parts(attention: nn.MultiheadAttention) -> Sequence[DenseLayer]:
    """Its projections, unless torch has quantised them."""
    plain = type(attention.out_proj) is NonDynamicallyQuantizableLinear
    return tuple(projections(attention).values()) if plain else ()


def _transposed(module: Any) -> Sequence[DenseLayer]:
    cls = next(each for each in type(module).__mro__ if _registered(each))
    view = LinearView(module.weight.t(), module.bias, module.training, cls)
    return (DenseLayer(module, "", view, (module.weight, module.bias)),)


def _transpose_back(linear: nn.Linear, cls: type[Any]) -> nn.Module:
    with torch.device("meta"):
        new: nn.Module = cls(linear.out_features, linear.in_features)
    weight = linear.weight
    new.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    new.bias = linear.bias
    return new.train(linear.training)


def _named_otherwise(module: Any) -> Sequence[DenseLayer]:
    cls = next(each for each in type(module).__mro__ if _registered(each))
    view = LinearView(module.weight, module.bias, module.training, cls)
    return (DenseLayer(module, "", view, _present(module.weight, module.bias)),)


def _as_class(linear: nn.Linear, cls: type[Any]) -> nn.Module:
    """A linear layer of a class that takes the arguments of `torch.nn.Linear`."""
    sizes = linear.in_features, linear.out_features
    new: nn.Module = cls(*sizes, bias=linear.bias is not None, device="meta")
    new.weight, new.bias = linear.weight, linear.bias
    return new.train(linear.training)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


register_dense(DenseType(nn.Linear, whole))
for _convolution in (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
):  # fmt: skip
    register_dense(DenseType(_convolution, whole))
register_dense(DenseType("transformers.pytorch_utils.Conv1D", _transposed, restore=_transpose_back))
# As torch.nn.Linear, but that it adds the bias apart.
_FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"
register_dense(DenseType(_FALCON, _named_otherwise, restore=_as_class))
