"""Kinds of layers, by registration: what each replaces, what rules say of it, how a saved state is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from sparselab.nn.layers.base import SparseLayer

#: What a layer has saved, by the names of its tensors.
State: TypeAlias = Mapping[str, Tensor]


def _never(state: State) -> None:
    """Recognise nothing."""


@dataclass(frozen=True)
class LayerKind:
    """One kind of sparse layer, as `register_kind` takes it.

    Attributes
    ----------
    name : str
        What rules call it (``{"layer": name}``). Kinds of one name replace different dense layers.
    cls : type of SparseLayer
        The class itself; its subclasses are not of this kind. It answers for its ``to_dense`` and
        ``from_pattern``, also where it inherits them.
    dense_types : tuple of type
        Dense layers that it replaces.
    settings : tuple of str
        What a rule may say of it besides ``"sparsity"`` and ``"density"``: keywords of its constructor and of
        its ``from_dense``. A kind with the setting ``"fan_in"`` is given that in place of a sparsity.
    recognises : callable
        Whether the tensors that a layer has saved are of this kind: the settings of a layer into which they
        load, or None.
    condenses : bool
        Whether `sparselab.condense` may make a layer of other inputs and outputs of it, with its
        ``from_pattern``: each of its connections must be one weight, and its outputs independent.

    Examples
    --------
    A class of one's own joins `sparsify`, `plan_sparsify`, `rule_of_saved`, `densify` and `condense` so:

    >>> from sparselab import SparseLinear
    >>> class Scaled(SparseLinear):
    ...     pass
    >>> kind = register_kind(LayerKind("scaled", Scaled, (nn.Linear,)))
    >>> find_kind("scaled", nn.Linear(2, 2)).cls.__name__
    'Scaled'
    >>> forget_kind(kind)
    """

    name: str
    cls: type[SparseLayer]
    dense_types: tuple[type[nn.Module], ...]
    settings: tuple[str, ...] = ()
    recognises: Callable[[State], Mapping[str, Any] | None] = _never
    condenses: bool = False


_KINDS: list[LayerKind] = []


def register_kind(kind: LayerKind) -> LayerKind:
    """Make a kind of layer known to all tools for whole models, and return it.

    Raises
    ------
    ValueError
        If a kind of that name that replaces the same dense layers is registered.
    """
    for other in _KINDS:
        if other.name == kind.name and set(other.dense_types) & set(kind.dense_types):
            raise ValueError(
                f"kind must have a name of its own among those that replace the same dense layers, got "
                f"{kind.name!r} for {kind.cls.__name__}, which {other.cls.__name__} has"
            )
    _KINDS.append(kind)
    return kind


def forget_kind(kind: LayerKind) -> None:
    """Undo `register_kind`."""
    _KINDS.remove(kind)


def kind_names() -> tuple[str, ...]:
    """The names of all kinds, in the order of their registration."""
    return tuple(dict.fromkeys(kind.name for kind in _KINDS))


def kinds_named(name: object) -> list[LayerKind]:
    """The kinds of a name; they replace different dense layers.

    Raises
    ------
    ValueError
        If there is none.
    """
    found = [kind for kind in _KINDS if kind.name == name]
    if not found:
        names = ", ".join(f'"{each}"' for each in kind_names())
        raise ValueError(f"layer must be one of {names}, got {name!r}")
    return found


def find_kind(name: object, dense: nn.Module) -> LayerKind | None:
    """The kind of that name that replaces a dense layer; None if none of them does.

    Raises
    ------
    ValueError
        If there is no kind of that name.
    """
    return next((kind for kind in kinds_named(name) if isinstance(dense, kind.dense_types)), None)


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind whose class is exactly that of a layer; None if there is none."""
    return next((kind for kind in _KINDS if kind.cls is type(layer)), None)


def is_registered(cls: type) -> bool:
    """Whether a class is that of a kind."""
    return any(kind.cls is cls for kind in _KINDS)


def recognise(state: State) -> tuple[LayerKind, Mapping[str, Any]] | None:
    """The kind that a layer's saved tensors belong to, and its settings; None if no kind knows them.

    Kinds registered last are asked first, so that a special case can claim its own.
    """
    for kind in reversed(_KINDS):
        settings = kind.recognises(state)
        if settings is not None:
            return kind, settings
    return None
