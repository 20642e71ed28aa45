"""Choosing layers by their qualified names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

Pattern: TypeAlias = str | re.Pattern[str]
Some = TypeVar("Some", bound=Pattern)


def matches(name: str, pattern: Pattern) -> bool:
    """Whether the name matches a glob, as `fnmatch` has them, or all of it a compiled expression."""
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    return fnmatchcase(name, pattern)


def first_match(name: str, patterns: Iterable[Some]) -> Some | None:
    """The first of the patterns that the name matches."""
    return next((pattern for pattern in patterns if matches(name, pattern)), None)


def listed(names: Collection[str]) -> str:
    """The names for an error message, the first eight of them if there are more."""
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "") or "none"
