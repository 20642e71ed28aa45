"""The options of ``python -m sparselab bench``, checked."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import torch

from sparselab.bench.contenders import linear
from sparselab.bench.output import picture

_DEFAULT_TOKENS = 2048


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options from the command line; `layers` holds the pairs of (in_features, out_features) and tokens.

    Raises
    ------
    SystemExit
        With status 2 and a line that names the option, if one is wrong or cannot be had on this machine.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    most = int(numba.config.NUMBA_NUM_THREADS)
    if options.threads is None:
        options.threads = [min(torch.get_num_threads(), most)]
    options.threads = sorted(set(options.threads))
    if options.threads[-1] > most:
        parser.error(
            f"argument --threads: Numba may use {most} here (NUMBA_NUM_THREADS, by default the number of "
            f"cores), got {options.threads[-1]}"
        )
    if options.picture is not None:
        if options.picture.suffix not in picture.SUFFIXES:
            parser.error(
                f"argument --picture: must end in {', '.join(picture.SUFFIXES)}, got '{options.picture}'"
            )
        if importlib.util.find_spec("matplotlib") is None:
            parser.error(
                "argument --picture: needs matplotlib, which is not installed; install it, or sparselab "
                "with the extra 'benchmarks'"
            )
    for name in ("json", "picture"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            parser.error(f"argument --{name}: there is no directory '{path.parent}'")
    of_blocks = [
        linear.blocks(shape, narrow)
        for shape in options.blocks
        for narrow in ((False, True) if options.bfloat16 else (False,))
    ]
    options.contenders = [*options.contenders, *of_blocks]
    shapes = options.shapes or list(linear.SHAPES)
    options.layers = [
        (shape, tokens)
        for shape in shapes
        for tokens in options.tokens or [linear.SHAPES[shape] if options.shapes is None else _DEFAULT_TOKENS]
    ]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparselab bench",
        description="Time sparse linear layers beside dense torch and torch.sparse_csr on this machine, all "
        "in turns, and compare with what its caches allow. By default four layers of transformers at 90% "
        "sparsity; --shapes, --tokens, --sparsity and --threads are combined each with each.",
    )
    add = parser.add_argument
    add("--shapes", type=_shape, nargs="+", metavar="INxOUT", help="layers, such as 768x3072")
    add(
        "--tokens",
        type=_integer,
        nargs="+",
        metavar="N",
        help=f"rows of the batch (default {_DEFAULT_TOKENS}, and 1024 for the last of the default layers)",
    )
    add("--sparsity", type=_sparsity, nargs="+", default=[0.9], metavar="S", help="default 0.9")
    add("--threads", type=_integer, nargs="+", metavar="N", help="default: as many as torch uses")
    for name, known in (("operations", linear.OPERATIONS), ("contenders", linear.CONTENDERS)):
        quoted = ", ".join(f"'{each}'" for each in known)
        usual = [each for each in known if each not in linear.OPTIONAL]
        others = ", ".join(f"'{each}'" for each in known if each in linear.OPTIONAL)
        left_out = f" (default: all but {others})" if others else ""
        text = f"of {quoted}{left_out}"
        add(f"--{name}", nargs="+", choices=known, default=usual, metavar="NAME", help=text)
    add(
        "--blocks",
        type=block_shape,
        nargs="+",
        default=[],
        metavar="OUTxIN",
        help="also layers of dense blocks, such as 4x4, of the same sizes and sparsities",
    )
    add("--bfloat16", action="store_true", help="time those also under autocast in bfloat16")
    add("--rounds", type=_integer, default=21, metavar="N", help="timed calls of each (default 21)")
    add(
        "--break-even",
        action="store_true",
        help="also find, for each layer, the sparsity where forward + backward takes the time of dense, on "
        "the most threads given",
    )
    add(
        "--scaling",
        action="store_true",
        help="also time the first layer at densities from 1%% to 50%% and in several sizes, on the most "
        "threads given",
    )
    add("--json", type=Path, metavar="FILE", help="also write the results there")
    add("--picture", type=Path, metavar="FILE", help=f"also draw them: {', '.join(picture.SUFFIXES)}")
    return parser


def _pair(text: str, expected: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split("x"))
    except ValueError:
        first = second = 0
    if first < 1 or second < 1:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return first, second


def _shape(text: str) -> tuple[int, int]:
    return _pair(text, "INxOUT such as 768x3072")


def block_shape(text: str) -> tuple[int, int]:
    """Outputs and inputs of a block, from an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is not two positive numbers with an x between.
    """
    return _pair(text, "OUTxIN such as 4x4")


def _checked(
    convert: Callable[[str], float], expected: str, good: Callable[[float], bool]
) -> Callable[[str], float]:
    def check(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = float("nan")
        if not good(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return check


_integer = _checked(int, "an integer of at least 1", lambda value: value >= 1)
_sparsity = _checked(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)
