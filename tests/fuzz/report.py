"""What a run found, as tables."""

from __future__ import annotations

from tests.fuzz.driver import Driver, Finding

KINDS_EXPLAINED = (
    "wrong: a wrong number, or a wrong call that was accepted; refused: a right call that raised",
    "unclean: an error that is no TypeError, ValueError or RuntimeError, or names no argument",
)
KINDS = "crash", "hang", "wrong", "unclean", "refused"


def tables(driver: Driver, triage: bool) -> str:
    """Calls by operation, then every fault, or with `triage` one line for each operation and mutation."""
    lines = [f"{driver.cases} cases, {sum(driver.calls.values())} calls", ""]
    header = ["operation", "calls", "refused cleanly", *KINDS]
    rows = [
        [name, str(driver.calls[name]), str(driver.refusals[name])]
        + [str(sum(f.operation == name and f.kind == kind for f in driver.findings)) for kind in KINDS]
        for name in sorted({*driver.calls, *(finding.operation for finding in driver.findings)})
    ]
    lines += _aligned([header, *rows])
    lines += ["", *KINDS_EXPLAINED, ""]
    lines += _groups(driver) if triage else [_line(driver, finding) for finding in driver.findings]
    left_out = ", ".join("/".join(label) for label in sorted(driver.skip))
    lines += [f"left out after enough faults: {left_out}"] if left_out else []
    lines.append(f"{len(driver.findings)} faults" if driver.findings else "no fault found")
    return "\n".join(lines)


def _groups(driver: Driver) -> list[str]:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in driver.findings:
        groups.setdefault((finding.operation, finding.mutation, finding.kind), []).append(finding)
    lines = []
    order = sorted(groups.items(), key=lambda item: (KINDS.index(item[0][2]), item[0]))
    for (operation, mutation, kind), found in order:
        lines.append(f"{kind:8} {len(found):4} x  {operation} / {mutation}  [{found[0].family}]")
        lines.append(f"           {found[0].detail[:220]}")
        lines.append(f"           {found[0].reproduction(driver.package)[:300]}")
    return lines


def _line(driver: Driver, finding: Finding) -> str:
    where = f"{finding.family} / {finding.operation} / {finding.mutation}, step {finding.step}"
    return f"{finding.kind}: {where}: {finding.detail}\n    {finding.reproduction(driver.package)}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
