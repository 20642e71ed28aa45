"""Reading assembly: the innermost loops of a listing, and what they do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_LABEL = re.compile(r"^([.\w$@]+):")
_BRANCH = re.compile(r"^\s+(?:j\w+|b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([.\w$@]+)\s*(?:[#;/].*)?$")
_JUMP = re.compile(r"^\s+(?:jmp|b)\s")
_STACK = re.compile(r"\(%rsp|\[sp\b|\b(?:Spill|Reload)\b")
_VECTOR = re.compile(r"%[xyz]mm\d|\b[vqd]\d+\b")


class Loop(NamedTuple):
    """The lines of one innermost loop."""

    lines: list[str]

    def count(self, pattern: str) -> int:
        """Lines whose instruction matches, comments left out."""
        return sum(bool(re.search(pattern, re.split(r"\s+[#;]|//", line)[0])) for line in self.lines)

    @property
    def spills(self) -> list[str]:
        """Lines that move a vector to or from the stack: there are too few registers for the loop."""
        return [line.strip() for line in self.lines if _STACK.search(line) and _VECTOR.search(line)]


def _leaves(lines: list[str], labels: dict[str, int], start: int, end: int) -> bool:
    """Whether a block only jumps out of start : end, so that a branch back to it makes no loop."""
    first = next((line for line in lines if _BRANCH.match(line)), "")
    branch = _BRANCH.match(first)
    if branch is None or not _JUMP.match(first):
        return False
    return not start <= labels.get(branch[1], -1) <= end


def innermost_loops(assembly: str) -> Iterator[Loop]:
    """Loops without a loop inside: from a label to the last branch back to it, in the listing's order."""
    lines = assembly.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    spans = set()
    for i, line in enumerate(lines):
        branch = _BRANCH.match(line)
        target = labels.get(branch[1], i + 1) if branch else i + 1
        if target <= i and not _leaves(lines[target:i], labels, target, i):
            spans.add((target, i))
    ends: dict[int, int] = {}
    for start, end in spans:
        ends[start] = max(end, ends.get(start, end))
    for start, end in sorted(ends.items()):
        if not any(start < other <= end for other in ends):
            yield Loop(lines[start : end + 1])
