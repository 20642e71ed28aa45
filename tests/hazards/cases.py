"""What a hazard is: a small program, and what may come of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: What a call may raise to refuse what it was given. Others (a KeyError, an AssertionError) are accidents.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError)


class Wrong(AssertionError):
    """A number, or an effect, that is not what a dense twin would give."""


@dataclass(frozen=True)
class Hazard:
    """A program that is right if it returns, and that may be refused or warned of if `refusable`."""

    topic: str
    name: str
    program: Callable[[], str | None]
    refusable: bool


@dataclass(frozen=True)
class Outcome:
    """What came of a hazard: `kind` is ``right``, ``refused``, ``warned``, or a fault."""

    kind: str
    text: str

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("right", "refused", "warned")


HAZARDS: list[Hazard] = []


def hazard(
    topic: str, name: str, *, refusable: bool = True
) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    """Register a program under a topic and a name."""

    def register(program: Callable[[], str | None]) -> Callable[[], str | None]:
        HAZARDS.append(Hazard(topic, name, program, refusable))
        return program

    return register


def outcome_of(hazard: Hazard) -> Outcome:
    """Run a hazard in this process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            text = hazard.program() or ""
        except Wrong as fault:
            ours = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
            if ours and hazard.refusable:
                return Outcome("warned", _short(ours[-1]))
            return Outcome("WRONG", _short(fault))
        except REFUSALS as error:
            kind = "refused" if hazard.refusable else "REFUSED"
            return Outcome(kind, _short(f"{type(error).__name__}: {error}"))
        except Exception as error:
            return Outcome("ERROR", _short(f"{type(error).__name__}: {error}"))
    return Outcome("right", text)


def _short(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 160 else line[:157] + "..."


def demand(condition: Any, text: str) -> None:
    """Raise Wrong, with the text, unless the condition holds."""
    if not condition:
        raise Wrong(text)
