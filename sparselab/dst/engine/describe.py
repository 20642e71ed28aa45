"""What an algorithm was told: for ``repr``, and for comparing a saved run with the one that resumes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sparselab.dst.schedules.schedule import ConstantSchedule
from sparselab.dst.schedules.when import EverySteps

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def setting(part: str, name: str) -> Any:
    """A property of an algorithm: an argument that the part of that name keeps. Read only.

    Parameters
    ----------
    part : str
        Key in the algorithm's ``parts``.
    name : str
        Attribute of the part.
    """

    def get(algorithm: Any) -> Any:
        return getattr(algorithm.parts[part], name)

    get.__doc__ = f"`{name}`, as the algorithm was told; {part!r} of its parts keeps it."
    return property(get)


def arguments(algorithm: object) -> dict[str, Any]:
    """The arguments of ``__init__``, each with the attribute of its name; what has none is left out.

    Of `update_freq` and `update` only the one that says it all.
    """
    parameters = inspect.signature(type(algorithm)).parameters.values()
    names = [each.name for each in parameters if each.kind in _NAMED and hasattr(algorithm, each.name)]
    found = {name: getattr(algorithm, name) for name in names}
    when = found.get("update")
    if when is not None:
        found.pop("update" if isinstance(when, EverySteps) and when.start == 0 else "update_freq", None)
    return found


def plain(value: Any) -> Any:
    """A value that can be saved, printed and compared: itself, or what describes it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, "describe"):
        return value.describe()
    return getattr(value, "__qualname__", repr(value))


def as_text(value: Any) -> str:
    """``repr``, of a constant schedule that of its number."""
    return repr(value.value if isinstance(value, ConstantSchedule) else value)


def differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Which settings were others, in words; empty if none."""
    return ", ".join(
        f"{key} was {saved.get(key)!r} and is {ours.get(key)!r}"
        for key in sorted(saved.keys() | ours.keys())
        if saved.get(key) != ours.get(key)
    )
