"""Where a model has weights, and which of them cannot be made sparse, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.dense import DenseLayer, dense_base, dense_parts, dense_type
from sparselab.nn.layers.extras import extras


@dataclass(frozen=True)
class Weights:
    """Weights that rules may choose: a layer that can be swapped, or why there is none.

    Attributes
    ----------
    name : str
        Of the module, of the part of an attention, or of the Parameter.
    owner : torch.nn.Module
        The module that holds them.
    tensors : dict
        Numbers of entries and bytes by what tells the tensors apart: shared ones count once.
    layer : DenseLayer or None
    reason : str or None
        Why the layer cannot be swapped.
    aside : bool
        Whether nobody expects them to be sparse where all of a model is: they are looked up, or added.
    tied_to : str
        Name of the embedding whose weight a layer has, if the two can be made sparse together.
    apart : str
        Why the layer is only swapped where a key matches it and no layer without such a reason; empty if it
        is like any other.
    """

    name: str
    owner: nn.Module
    tensors: dict[tuple[int, str], tuple[int, int]]
    layer: DenseLayer | None = None
    reason: str | None = None
    aside: bool = False
    tied_to: str = ""
    apart: str = ""


def find_weights(model: nn.Module) -> dict[str, Weights]:
    """The weights that are not sparse yet, by qualified name, in the order of the model.

    Weights are what registered classes of dense modules and their subclasses hold, and all other Parameters
    of two or more dimensions.
    """
    users = parameter_users(model)
    heads = find_heads(model)
    inside: set[nn.Module] = set()
    found: dict[str, Weights] = {}
    for name, module in model.named_modules():
        inside |= _insides(module)
        if module not in inside and not isinstance(module, SparseLayer):
            found.update((each.name, each) for each in _weights_of(name, module, users, heads))
    return found


def find_heads(model: nn.Module) -> dict[str, str]:
    """Linear layers that have the weight of one embedding, and nobody else has: its name, by theirs."""
    users, modules = parameter_users(model), dict(model.named_modules())
    heads: dict[str, str] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None or not isinstance(module, nn.Embedding) or not _is_plain(module, nn.Embedding):
            continue
        others: list[str] = [each for each in users[id(weight)] if each != name]
        if all(
            _is_plain(modules[each], nn.Linear) and modules[each]._parameters.get("weight") is weight
            for each in others
        ):
            heads.update((each, name) for each in others)
    return heads


def _is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module can be swapped and differs from a class in nothing but how its objects are made."""
    known = dense_type(type(module))
    if known is None or known.cls is not cls or not dense_parts(module):
        return False
    return not extras(module, known.known)


def find_dense(model: nn.Module) -> dict[str, DenseLayer]:
    """The layers by qualified name, in the order of the model; those of an attention are its projections."""
    return {name: each.layer for name, each in find_weights(model).items() if each.layer is not None}


def parameter_users(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its id."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def _insides(module: nn.Module) -> set[nn.Module]:
    """Modules whose weights are those of a module above them."""
    parts: list[nn.Module] = []
    if isinstance(module, SparseLayer):
        parts = list(module.children())
    elif base := dense_base(type(module)):
        parts = [each for name, each in module.named_children() if name in base.known]
    if parametrize.is_parametrized(module):
        parts.append(module.parametrizations)  # type: ignore[arg-type]
    return {each for part in parts for each in part.modules()}


def _weights_of(
    name: str, module: nn.Module, users: Mapping[int, list[str]], heads: Mapping[str, str]
) -> Iterator[Weights]:
    table = _is_table(module)
    if dense_base(type(module)) is None:
        yield from _unknown(name, module)
    elif layers := dense_parts(module):
        for layer in layers:
            at = f"{name}.{layer.part}".strip(".")
            tensors = _share(layer) if layer.part else _counted(dict(_own(module)).values())
            tied = name in heads or name in heads.values()
            reason = None if tied else _reason_to_leave(layer, users)
            apart = _reason_to_stay_apart(layer, users, tied)
            yield Weights(at, module, tensors, layer, reason, table, heads.get(name, ""), apart)
    else:
        whole = (each for part in (module, *_insides(module)) for each in part.parameters(recurse=False))
        yield Weights(name, module, _counted(whole), None, _reason_of_class(module), table)


def _unknown(name: str, module: nn.Module) -> Iterator[Weights]:
    """Weights of a class of which nothing is known: as those of one layer, if torch's names say that."""
    kind = type(module).__name__
    own = {at: each for at, each in _own(module) if not is_lazy(each)}
    wide = {at for at, each in own.items() if each.ndim > 1 and each.numel()}
    if any(at.startswith("weight") for at in wide):
        layer = {at: each for at, each in own.items() if at.startswith("weight") or at not in wide}
        reason = f"is of class {kind}, which has no sparse kind"
        yield Weights(name, module, _counted(layer.values()), None, reason, _is_table(module))
    for at, each in own.items():
        if at in wide and not at.startswith("weight"):
            reason = f"is a Parameter of class {kind}, which has no sparse kind"
            # What has one row for a batch is added to all of its samples.
            added = len(each) == 1
            yield Weights(f"{name}.{at}".strip("."), module, _counted([each]), None, reason, added)


def _is_table(module: nn.Module) -> bool:
    """Whether its weight is looked up."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that a module holds itself, also below a parametrization, by name."""
    yield from ((name, each) for name, each in module._parameters.items() if each is not None)
    if parametrize.is_parametrized(module):
        yield from module.parametrizations.named_parameters()  # type: ignore[union-attr]


def _counted(tensors: Iterable[Tensor]) -> dict[tuple[int, str], tuple[int, int]]:
    return {(id(each), ""): (each.numel(), each.nbytes) for each in tensors if not is_lazy(each)}


def _share(part: DenseLayer) -> dict[tuple[int, str], tuple[int, int]]:
    """Its own share of tensors that it is packed in with other parts."""
    seen = (each for each in (part.linear.weight, part.linear.bias) if each is not None)
    return {
        (id(source), part.part): (each.numel(), each.nbytes)
        for source, each in zip(part.sources, seen, strict=False)
    }


#: Settings of dense modules that no sparse layer has.
_UNSUPPORTED = {
    "sparse": "sparse=True, whose gradients are sparse tensors",
    "proj_size": "projections (proj_size)",
}


def _reason_of_class(module: nn.Module) -> str:
    if dense_type(type(module)) is not None:
        for name, what in _UNSUPPORTED.items():
            if getattr(module, name, False):
                return f"has {what}, which no sparse layer has"
    if found := extras(module, [*module._parameters, *module._buffers, *module._modules]):
        return f"has {' and '.join(found)}"
    return f"is of class {type(module).__name__}, which may compute or be read in a way of its own"


def _reason_to_stay_apart(layer: DenseLayer, users: Mapping[int, list[str]], tied: bool) -> str:
    if tied:
        names = " and ".join(map(repr, users[id(layer.linear.weight)]))
        return (
            f"shares its weight or bias: {names} hold the same one; a key for these alone makes them sparse"
        )
    if _is_table(layer.owner):
        return "is looked up, not multiplied; a key for such layers alone makes it sparse"
    return ""


def _reason_to_leave(layer: DenseLayer, users: Mapping[int, list[str]]) -> str | None:
    for source in layer.sources:
        if not isinstance(source, nn.Parameter):
            return "computes its weight (as under torch.nn.utils.weight_norm, spectral_norm or prune)"
        if len(names := users[id(source)]) > 1:
            return f"shares its weight or bias: {' and '.join(map(repr, names))} hold the same one"
    known = dense_type(type(layer.owner))
    found = extras(layer.owner, known.known if known else ())
    return f"has {' and '.join(found)}" if found else None
