"""Reading assembly: the innermost loops of a listing, and what they do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_LABEL = re.compile(r"^([.\w$@]+):")
_BRANCH = re.compile(r"^\s+(?:j\w+|b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([.\w$@]+)\s*(?:[#;/].*)?$")
_STACK = re.compile(r"\(%rsp|\[sp\b|\b(?:Spill|Reload)\b")
_VECTOR = re.compile(r"%[xyz]mm\d|\b[vqd]\d+\b")


class Loop(NamedTuple):
    """The lines of one innermost loop."""

    lines: list[str]

    def count(self, pattern: str) -> int:
        """Lines whose instruction matches, comments left out."""
        return sum(bool(re.search(pattern, re.split(r"\s[#;]|//", line)[0])) for line in self.lines)

    @property
    def spills(self) -> list[str]:
        """Lines that move a vector to or from the stack: there are too few registers for the loop."""
        return [line.strip() for line in self.lines if _STACK.search(line) and _VECTOR.search(line)]


def innermost_loops(assembly: str) -> Iterator[Loop]:
    """Loops without a loop inside: from a label to the last branch back to it, in the listing's order."""
    lines = assembly.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    spans = set()
    for i, line in enumerate(lines):
        if (branch := _BRANCH.match(line)) and (target := labels.get(branch[1])) is not None and target <= i:
            spans.add((target, i))
    ends: dict[int, int] = {}
    for start, end in spans:
        ends[start] = max(end, ends.get(start, end))
    for start, end in sorted(ends.items()):
        if not any(start < other <= end for other in ends):
            yield Loop(lines[start : end + 1])
