"""``python -m sparselab bench`` times this machine, ``info`` describes it, ``warmup`` compiles for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import sparselab


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        As on the command line, which is the default.

    Raises
    ------
    SystemExit
        With status 2 if an argument is wrong, 0 after ``--help`` and ``--version``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sparselab",
        usage="%(prog)s [-h] [--version] {bench,info,warmup} ...",
        description="Truly sparse neural network training in PyTorch, on any CPU.",
        epilog="commands:\n"
        "  bench   time sparse layers on this machine beside dense torch and torch.sparse_csr\n"
        "  info    CPU, vector width in use, threads, cache of compiled kernels, versions\n"
        "  warmup  compile the kernels into the cache, as for an image or a shared directory\n\n"
        "'python -m sparselab bench --help' lists the options of bench, and so on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparselab {sparselab.__version__}")
    parser.add_argument("command", choices=("bench", "info", "warmup"), help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # Not at the top: all import torch, and --help should answer at once.
    if options.command == "bench":
        from sparselab.bench.run import main as run
    elif options.command == "info":
        from sparselab.bench.output.info import main as run
    else:
        from sparselab.bench.compile import main as run
    return run(options.options)


if __name__ == "__main__":
    sys.exit(main())
