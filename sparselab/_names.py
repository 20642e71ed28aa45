"""Choosing layers, in one way for the whole package: by name, by expression, by class, by function."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import translate
from typing import Any, TypeAlias

#: What a str begins with that is a regular expression, and no glob.
_EXPRESSION = "re:"

#: A glob, as `fnmatch` has them, or ``"re:"`` and a regular expression; a compiled one; a class of modules;
#: or a function of a module and its qualified name, which says whether it is meant.
Key: TypeAlias = str | re.Pattern[str] | type[Any] | Callable[[Any, str], bool]
Keys: TypeAlias = Key | Iterable[Key]


_SORTS = "a str, a regular expression, a class, or a function of a module and its name"


def as_keys(argument: str, keys: Keys) -> list[Key]:
    """One key, or several, as a list."""
    if isinstance(keys, (str, re.Pattern)) or callable(keys):
        return [keys]
    if not isinstance(keys, Iterable):
        raise TypeError(f"{argument} must be {_SORTS}, or several of them, got {keys!r}")
    return list(keys)


def match(
    argument: str, keys: Iterable[Key], layers: Mapping[str, Any], what: str = "layers", also: str = ""
) -> dict[Key, list[str]]:
    """The names of the layers that each key matches; a function is called once with each layer.

    Parameters
    ----------
    argument : str
        What errors call the keys.
    keys : iterable of keys
    layers : mapping
        Qualified name to the module that owns the layer.
    what : str
        What errors call the layers.
    also : str
        What errors say at their end.

    Raises
    ------
    TypeError, ValueError
        If a key is none, is no valid expression, matches no layer, or is a function that returns no bool.

    Examples
    --------
    >>> list(match("keys", ["fc*", int, lambda module, name: module > 1], {"fc1": 1, "fc2": 2.0}).values())
    [['fc1', 'fc2'], ['fc1'], ['fc2']]
    """
    found: dict[Key, list[str]] = {}
    for key in keys:
        matches = matcher(argument, key)
        found[key] = [name for name, module in layers.items() if matches(module, name)]
        if not found[key]:
            raise ValueError(
                f"{argument} must match at least one layer each, got {told(key)} without one; "
                f"{_remedy(key, layers)}the {what} are: {listed(layers)}{also}"
            )
    return found


def matcher(argument: str, key: Key) -> Callable[[Any, str], bool]:
    """The key as a function of a module and its name; TypeError or ValueError if it is none."""
    if isinstance(key, str):
        key = _compiled(argument, key) if key.startswith(_EXPRESSION) else re.compile(translate(key))
    if isinstance(key, re.Pattern):
        fullmatch = key.fullmatch
        return lambda module, name: fullmatch(name) is not None
    if isinstance(key, type):
        cls = key
        return lambda module, name: isinstance(module, cls)
    if not callable(key) or hasattr(key, "named_modules"):
        raise TypeError(f"{argument} must choose layers by {_SORTS}, got {key!r}")
    function = key
    return lambda module, name: _answer(argument, function, module, name)


def first_keys(found: Mapping[Key, Iterable[str]]) -> dict[str, Key]:
    """The first of the keys that matches each name, from what `match` returns."""
    first: dict[str, Key] = {}
    for key, names in found.items():
        for name in names:
            first.setdefault(name, key)
    return first


def told(key: Key) -> str:
    """A key for a message: classes and functions by their names."""
    if isinstance(key, (str, re.Pattern)):
        return repr(key)
    return getattr(key, "__qualname__", type(key).__qualname__)


def literal(name: str) -> str:
    """The glob that matches this name only."""
    escaped = re.sub(r"([*?[])", r"[\1]", name)
    return f"[r]{escaped[1:]}" if escaped.startswith(_EXPRESSION) else escaped


def listed(names: Collection[str]) -> str:
    """The names for an error message, the first eight of them if there are more."""
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "") or "none"


def _answer(argument: str, function: Callable[[Any, str], bool], module: Any, name: str) -> bool:
    answer = function(module, name)
    if not isinstance(answer, bool):
        raise TypeError(f"{argument} must hold functions that return a bool, got {answer!r} for {name!r}")
    return answer


def _compiled(argument: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(key.removeprefix(_EXPRESSION))
    except re.error as error:
        raise ValueError(
            f"{argument} must hold a regular expression after {_EXPRESSION!r}, got {key!r}: {error}"
        ) from error


def _remedy(key: Key, names: Collection[str]) -> str:
    """What else a str may have meant, if that has layers."""
    if not isinstance(key, str):
        return ""
    if any(name.startswith(f"{key}.") for name in names):
        return f"what lies below it is {f'{key}.*'!r}; "
    if any(name.endswith(f".{key}") for name in names):
        return f"what ends so is {f'*.{key}'!r}; "
    try:
        expression = re.compile(key)
    except re.error:
        return ""
    if found := [name for name in names if expression.fullmatch(name)]:
        return (
            f"it is read as a glob, and only as a regular expression would match {listed(found)}: write "
            f"re.compile({key!r}) or {_EXPRESSION + key!r}; "
        )
    return ""
