"""``python -m tests.fuzz``: random calls until the time is over; exit status 1 if a fault was found."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz import planted

KERNELS = "PaddedCSR", "BlockCSR"
TORCH = (
    "operators", "SparseLinear", "FanInLinear", "BlockSparseLinear", "SparseConv1d", "SparseConv2d",
    "SparseConv3d", "SparseConvTranspose1d", "SparseConvTranspose2d", "SparseConvTranspose3d",
    "SparseEmbedding", "TiedLinear", "TransposedLinear", "masked",
)  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--package", help="directory that holds another sparselab to test")
    modes = parser.add_subparsers(dest="mode")
    concurrency = modes.add_parser("concurrency", help="threads, forks and DataLoader workers, bit for bit")
    concurrency.add_argument("--calls", type=int, default=10_000)
    concurrency.add_argument("--package", default=argparse.SUPPRESS, help="as above")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=[*KERNELS, *TORCH, *planted.FAMILIES],
        metavar="LAYOUT",
        help=f"what to test, of {', '.join([*KERNELS, *TORCH])} (default: everything)",
    )
    parser.add_argument(
        "--operators", action=argparse.BooleanOptionalAction, default=True,
        help="also the torch operators and layers, in turns with the kernels",
    )  # fmt: skip
    parser.add_argument("--triage", action="store_true", help="group faults by operation and mutation")
    parser.add_argument("--case", type=int, help="run this one case here, to see it fail")
    parser.add_argument("--skip", action="append", default=[], help="OPERATION/MUTATION to leave out")
    return parser.parse_args(arguments)


def run_one(options: argparse.Namespace, names: list[str]) -> int:
    """Run one case in this process, where a debugger can see it."""
    from tests.fuzz.case import Case, Label, run_case
    from tests.fuzz.worker import families

    skip = frozenset(Label(*label.split("/", 1)) for label in options.skip)
    wrong = 0
    for name, sequence in families(names).items():
        case = Case(name, options.case, skip=skip)
        found = run_case(case, sequence)
        print(f"{name}, step {case.step}, {' / '.join(case.label)}: {found or 'no fault'}")
        wrong += found is not None
        if found is not None and found.__cause__ is not None:
            raise found
    return int(wrong > 0)


def main(arguments: list[str]) -> int:
    """Run, print, and return the exit status."""
    options = parse(arguments)
    if options.package:
        sys.path.insert(0, options.package)
    if options.mode == "concurrency":
        from tests.fuzz.concurrency import main as check_concurrency

        return check_concurrency(options.calls)
    names = options.layouts or [*KERNELS, *(TORCH if options.operators else ())]
    if options.case is not None:
        return run_one(options, names)
    from tests.fuzz.case import Label
    from tests.fuzz.driver import Driver
    from tests.fuzz.report import tables

    driver = Driver(names, 60 * options.minutes, options.seed, options.package)
    driver.skip = {Label(*label.split("/", 1)) for label in options.skip}
    found = driver.run()
    print(tables(driver, options.triage))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
