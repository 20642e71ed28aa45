"""The table of architectures, for a terminal and as a page."""

from __future__ import annotations

from importlib.metadata import version

from tests.models.case import CASES, RULES
from tests.models.judge import Row
from tests.models.libraries import LIBRARIES, missing

COLUMNS = ("trained", "saved and read", "generated", "densified")


def line(row: Row) -> str:
    """One row of the table."""
    left = "; ".join(f"{_named(names)} {reason}" for reason, names in row.left) or "none"
    parts = [row.parts.get(part, "-") for part in COLUMNS]
    if row.parts.get("sparse", "ok") != "ok":
        parts[0] = row.parts["sparse"]
    numbers = (str(row.swapped), left, f"{row.before:,}", f"{row.after:,}")
    return f"| {' | '.join((row.name, *numbers, *parts))} |"


def _named(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"`{names[0]}`{more}"


def _other_rules() -> list[str]:
    """Which architectures need more than a number."""
    found = [f"`{case.rules}` for {name}" for name, case in CASES.items() if case.rules != RULES]
    return (
        [f"The rules are others than the number where it would not do: {', '.join(found)}."] if found else []
    )


def document(rows: list[Row]) -> str:
    """docs/models.md."""
    there = [name for name in ("torch", *LIBRARIES) if name not in missing()]
    versions = ", ".join(f"{name} {version(name)}" for name in there)
    passed = sum(not row.failed for row in rows)
    head = ("architecture", "sparse layers", "left dense", "parameters", "after", *COLUMNS)
    return "\n".join(
        (
            "# Other people's models",
            "",
            "`python -m tests.models` (with `pip install -e '.[test,models]'`) makes small models of these",
            "architectures from their configurations, makes them sparse by `sparselab.sparsify(model, 0.8)`,",
            "trains three steps with `RigL(update_freq=1)` under AdamW, saves them (`save_pretrained`, or",
            "`torch.save` of the state), reads them into a fresh model, which must be the same to the bit",
            "and write the same tokens, and makes them dense again, which must leave the outputs as they",
            "are.",
            "`--only NAME` takes some of them.",
            "",
            f"{passed} of {len(rows)} pass, with {versions}.",
            "*Left dense* names the first of what the rules match and what stays dense, with the reason.",
            *_other_rules(),
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *map(line, rows),
            "",
        )
    )
