"""What a module has beyond its class, and a class beyond its base: what no conversion may lose silently."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn
from torch.nn.utils import parametrize

from sparselab.nn.layers.kinds import is_registered

#: What a subclass may redefine without another output, beside class methods and special methods.
_HARMLESS = {"extra_repr", "reset_parameters"}
#: Special methods that can change what a call returns.
_TELLING = {"__call__", "__getattr__", "__getattribute__"}
#: Where `torch.nn.Module` keeps the hooks that see or change inputs, outputs and gradients.
_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
}


def overridden(cls: type, method: str) -> list[str]:
    """What the subclasses below the class that defines a method redefine: that method knows nothing of it.

    A class that is registered as a kind of layer answers for the methods that it inherits.

    Examples
    --------
    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> overridden(Scaled, "reset_parameters")
    ['forward']
    """
    found: list[str] = []
    for at, each in enumerate(cls.__mro__):
        if method in vars(each) or is_registered(each):
            break
        bases = cls.__mro__[at + 1 :]
        found += [
            name
            for name, member in vars(each).items()
            if _tells(name, member) and any(name in vars(base) for base in bases if base is not object)
        ]
    return found


def _tells(name: str, member: object) -> bool:
    """Whether a member of a class can change what a call of an object returns."""
    if name in _HARMLESS or isinstance(member, (classmethod, staticmethod)):
        return False
    if name.startswith("__"):
        return name in _TELLING
    return inspect.isroutine(member) or hasattr(member, "__get__")


def only_remade(cls: type) -> bool:
    """Whether a class differs from its base in nothing but how its objects are made, reset and printed.

    Examples
    --------
    >>> class Zeroed(nn.Linear):
    ...     def __init__(self, size):
    ...         super().__init__(size, size)
    ...         nn.init.zeros_(self.weight)
    >>> only_remade(Zeroed), only_remade(nn.Linear)
    (True, False)
    """
    return all(
        name in {"__init__", *_HARMLESS} or (name.startswith("__") and _is_written_by_python(name, member))
        for name, member in vars(cls).items()
    )


def _is_written_by_python(name: str, member: object) -> bool:
    """Such as the name of the class, its annotations, its docstring: no method and no property."""
    return name.startswith("__annotate") or not hasattr(member, "__get__")


def extras(module: nn.Module, known: Collection[str]) -> list[str]:
    """What a module has beside the tensors that its class gives it, in words.

    Parameters
    ----------
    module : torch.nn.Module
    known : collection of str
        Names of the parameters, buffers and modules that belong to its class.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> linear.register_parameter("scale", nn.Parameter(linear.weight[0]))
    >>> extras(linear, ("weight", "bias"))
    ['the parameter scale']
    """
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return [f"a parametrization of {names}"]
    found = [words for name, words in _HOOKS.items() if getattr(module, name)]
    if "forward" in vars(module):
        found.append("a forward of its own, set on the object")
    for what, held in (
        ("parameter", module._parameters), ("buffer", module._buffers), ("module", module._modules)
    ):  # fmt: skip
        found += [
            f"the {what} {name}" for name, each in held.items() if each is not None and name not in known
        ]
    return found


def refuse_to_lose(module: nn.Module, method: str, known: Collection[str]) -> None:
    """Raise TypeError if a module has more than what the method that makes another of it knows.

    Parameters
    ----------
    module : torch.nn.Module
    method : str
        Its method that makes the other module. A subclass that redefines more than that must redefine it too.
    known : collection of str
        As of `extras`.
    """
    name = type(module).__name__
    if redefined := overridden(type(module), method):
        raise TypeError(
            f"{name}.{method} must be defined, because {name} redefines {', '.join(redefined)}, of which the "
            f"inherited {method} knows nothing; define it in {name}"
        )
    if found := extras(module, known):
        raise TypeError(
            f"{name}.{method} must not lose what the layer has beside its class, got {' and '.join(found)}; "
            f"remove that first"
        )
