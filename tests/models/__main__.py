"""``python -m tests.models``: take every architecture all the way, print the table, write docs/models.md.

``--only NAME`` takes those whose name contains the text, in any case, and writes nothing. The exit status is
1 if one failed that can be tried here; a library that is missing is told.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch

from tests.models.case import CASES
from tests.models.judge import Row, judge
from tests.models.libraries import missing
from tests.models.table import document, line

PLACE = Path(__file__).parents[2] / "docs" / "models.md"


def main(arguments: list[str]) -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lacking = missing()
    for library, reason in lacking.items():
        print(f"{library} is left out: {reason}")
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    rows: list[Row] = []
    for name, case in CASES.items():
        if options.only.lower() in name.lower() and case.library not in lacking:
            begin = time.perf_counter()
            rows.append(judge(case))
            print(f"{line(rows[-1])} {time.perf_counter() - begin:.1f} s", flush=True)
    failed = [row.name for row in rows if row.failed]
    print(f"{len(rows)} architectures, {len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}")
    if not options.only and not lacking:
        PLACE.write_text(document(rows))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
