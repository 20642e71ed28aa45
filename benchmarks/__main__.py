"""Command line: ``python -m benchmarks --help``. One layer's speed is ``python -m sparselab bench``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import (
    ages,
    bags,
    blocks,
    calls,
    compiled,
    data_parallel,
    frozen,
    layouts,
    memory,
    models,
    outlook,
    peers,
    revisions,
    scale,
    slow_link,
    startup,
    structure,
    updates,
)
from benchmarks.traffic import WAYS
from benchmarks.turns import TurnError
from sparselab.bench.contenders.linear import SHAPES
from sparselab.bench.measure import machine
from sparselab.bench.options import block_shape


def parse_shape(text: str) -> tuple[int, int, int]:
    try:
        in_features, out_features, tokens = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected INxOUTxTOKENS such as 768x3072x2048, got {text!r}"
        ) from None
    return in_features, out_features, tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    commands = parser.add_subparsers(dest="command", required=True)
    add_memory(commands)
    start = commands.add_parser("startup", help="seconds of imports, first forward pass, compiling")
    start.add_argument("--processes", type=positive, default=3, help="of each (default: %(default)s)")
    aged = commands.add_parser("ages", help="loss around updates, with ages of connections and without")
    aged.add_argument("--algorithms", nargs="+", choices=ages.ALGORITHMS, default=ages.ALGORITHMS)
    for name, default in (("seeds", 3), ("steps", 800), ("every", 50)):
        aged.add_argument(f"--{name}", type=positive, default=default, help="(default: %(default)s)")
    words = commands.add_parser("bags", help="time bags of words in CSR through a first layer")
    words.add_argument("--rounds", type=positive, default=15)
    rewired = commands.add_parser("updates", help="time steps with an update of RigL beside others")
    for name, default in (("width", 1024), ("tokens", 64), ("updates", 20)):
        rewired.add_argument(f"--{name}", type=positive, default=default, help="(default: %(default)s)")
    rewired.add_argument("--sparsity", type=float, default=0.9)
    parallel = commands.add_parser("data_parallel", help="bytes that replicas send, and what they learn")
    parallel.add_argument("--ranks", type=positive, nargs="+", default=[2, 4], help="(default: %(default)s)")
    for name, default in (("steps", 300), ("width", 256), ("tokens", 512), ("every", 30)):
        parallel.add_argument(f"--{name}", type=positive, default=default, help="(default: %(default)s)")
    parallel.add_argument("--sparsity", type=fraction, default=0.9, help="(default: %(default)s)")
    add_slow_link(commands)
    add_outlook(commands)
    add_blocks(commands)
    add_models(commands)
    add_layouts(commands)
    add_frozen(commands)
    add_turns(commands)
    add_source(commands)
    return parser.parse_args()


def add_slow_link(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    slow = commands.add_parser("slow_link", help="time replicas of a GPT over a slow network (Linux, root)")
    slow.add_argument("--model", choices=slow_link.PRESETS, default="10M", help="(default: %(default)s)")
    slow.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    slow.add_argument("--mbit", type=float, default=100.0, help="per second (default: %(default)s)")
    for name, default, of_what in (
        ("ranks", 2, "processes"),
        ("tokens", 1024, "of a process"),
        ("rounds", 3, ""),
    ):
        slow.add_argument(
            f"--{name}", type=positive, default=default, help=f"{of_what} (default: %(default)s)"
        )
    slow.add_argument("--sparsity", type=fraction, default=0.9, help="(default: %(default)s)")


def add_outlook(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    larger = commands.add_parser(
        "outlook", help="what larger models on more machines would take, by formulas"
    )
    larger.add_argument("--ranks", type=positive, nargs="+", default=[10, 100], help="machines")
    larger.add_argument("--mbit", type=float, nargs="+", default=[100.0, 1000.0, 10000.0], help="per second")
    larger.add_argument("--sparsity", type=fraction, default=0.9, help="(default: %(default)s)")
    for name, kind, default, of_what in (
        ("parameters", float, 1e10, "as if dense"),
        ("tokens", positive, 65536, "that a machine sees in a step"),
        ("tokens-per-weight", float, 20.0, "live weight, seen in the whole training"),
        ("picoseconds", float, 110.0, "that a token and live weight took on --measured-cores"),
        ("dense-picoseconds", float, 30.0, "the same of dense weights"),
        ("measured-cores", positive, 2, ""),
        ("cores", positive, 32, "of a machine"),
        ("plan-bytes", float, 3.7, "of kernels, for each live weight"),
        ("price", float, 1.5, "of a machine for an hour, $"),
    ):
        larger.add_argument(f"--{name}", type=kind, default=default, help=f"{of_what} (default: %(default)s)")


def add_blocks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    together = commands.add_parser("blocks", help="time feed-forward blocks: layers together, apart, dense")
    together.add_argument(
        "--shapes", type=parse_shape, nargs="+", metavar="INxHIDDENxTOKENS", default=[(768, 3072, 2048)],
        help="(default: 768x3072x2048)",
    )  # fmt: skip
    together.add_argument("--layers", nargs="+", choices=blocks.LAYERS, default=list(blocks.LAYERS))
    together.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    together.add_argument("--sparsity", type=fraction, default=0.9)
    together.add_argument("--rounds", type=positive, default=15)
    together.add_argument("--no-compile", action="store_true", help="leave torch.compile out")


def add_memory(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bytes_of = commands.add_parser("memory", help="bytes and resident set of training steps, and by cause")
    bytes_of.add_argument("--sparsity", type=float, nargs="+", default=[0.7, 0.9, 0.95])
    bytes_of.add_argument(
        "--models", nargs="*", choices=scale.PRESETS, default=list(scale.PRESETS),
        help="GPTs to look at by cause, at 90%% (default: those that fit)",
    )  # fmt: skip
    bytes_of.add_argument(
        "--tokens", type=positive, default=1024, help="of their steps (default: %(default)s)"
    )
    bytes_of.add_argument("--blocks", type=block_shape, metavar="OUTxIN", help="of their layers, such as 4x4")


def add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    whole = commands.add_parser("models", help="time training steps of transformers, dense and sparse")
    under = commands.add_parser("compiled", help="time them eager and under torch.compile")
    for command, names in ((whole, ["10M", "40M"]), (under, ["10M"])):
        command.add_argument("--models", nargs="+", choices=models.SIZES, default=names)
        command.add_argument("--rounds", type=positive, default=21)
        command.add_argument(
            "--batch", type=positive, help=f"texts per step (default: {models.usual('batch')})"
        )
        command.add_argument(
            "--context", type=positive, help=f"tokens per text (default: {models.usual('context')})"
        )
    whole.add_argument("--fused", action="store_true", help="torch's fused AdamW in both arms")
    whole.add_argument("--bfloat16", action="store_true", help="both arms under autocast in bfloat16")
    whole.add_argument(
        "--blocks", type=block_shape, metavar="OUTxIN", help="dense blocks in the sparse arm, such as 4x4"
    )


def add_layouts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    each = commands.add_parser("layouts", help="speed, accuracy and loss of layouts of connections")
    each.add_argument(
        "--parts", nargs="+", choices=layouts.PARTS, default=layouts.PARTS, help="(default: all)"
    )
    each.add_argument("--sparsity", type=fraction, default=0.9, help="(default: %(default)s)")
    each.add_argument("--seeds", type=positive, default=3, help="runs of each layout (default: %(default)s)")
    each.add_argument("--rounds", type=positive, default=15, help="timed steps (default: %(default)s)")
    each.add_argument("--epochs", type=positive, default=3, help="on MNIST (default: %(default)s)")
    each.add_argument("--steps", type=positive, default=300, help="on the text (default: %(default)s)")


def add_frozen(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    each = commands.add_parser(
        "frozen", help="time few tokens, accuracy and bytes of layers frozen in few bits"
    )
    each.add_argument("--parts", nargs="+", choices=frozen.PARTS, default=frozen.PARTS, help="(default: all)")
    each.add_argument(
        "--layouts", nargs="+", choices=list(layouts.LAYOUTS)[1:], default=frozen.NAMES,
        help="(default: %(default)s)",
    )  # fmt: skip
    each.add_argument("--sparsity", type=fraction, default=0.9, help="(default: %(default)s)")
    each.add_argument("--epochs", type=positive, default=3, help="on MNIST (default: %(default)s)")
    each.add_argument("--seed", type=positive, default=1, help="(default: %(default)s)")


def add_turns(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    others = commands.add_parser("peers", help="time one layer beside two peer packages")
    others.add_argument(
        "--environment", type=Path, default=peers.ENVIRONMENT, metavar="DIR",
        help="virtual environment of the peers, made when absent (default: %(default)s)",
    )  # fmt: skip
    others.add_argument("--no-install", action="store_true", help="neither make it nor install anything")
    two = commands.add_parser("revisions", help="time layers and a model in two revisions of this repository")
    two.add_argument(
        "revisions", nargs=2, metavar="REVISION", help="such as main, HEAD~3, a hash or a folder"
    )
    names = list(revisions.groups([0.9]))
    two.add_argument("--cases", nargs="+", choices=names, default=names, help="(default: all)")
    for command, default in ((others, [(*shape, tokens) for shape, tokens in SHAPES.items()]), (two, None)):
        command.add_argument(
            "--shapes",
            type=parse_shape,
            nargs="+",
            metavar="INxOUTxTOKENS",
            default=default,
            help="layers in place of the usual cases",
        )
        command.add_argument("--sparsity", type=fraction, nargs="+", default=[0.9])
        command.add_argument("--turns", type=positive, default=7, help="turns of each (default: %(default)s)")
        command.add_argument("--calls", type=positive, default=5, help="per turn (default: %(default)s)")


def add_source(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, text in (
        ("calls", "count the Python calls of a pass through a small layer"),
        ("structure", "count lines, files, floors of imports, and find the longest functions"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "checkouts", nargs="*", metavar="CHECKOUT", default=[str(revisions.ROOT)],
            help="folders or revisions (default: this one)",
        )  # fmt: skip


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to, not including, 1, got {text!r}")
    return value


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    description = machine.describe()
    console.print(", ".join(f"{key} {value}" for key, value in description.items()))
    commands = {
        "ages": ages.report,
        "bags": bags.report, "blocks": blocks.report, "calls": calls.report, "compiled": compiled.report,
        "data_parallel": data_parallel.report, "frozen": frozen.report, "layouts": layouts.report,
        "memory": memory.report, "models": models.report, "outlook": outlook.report, "peers": peers.report,
        "revisions": revisions.report, "slow_link": slow_link.report, "startup": startup.report,
        "structure": structure.report, "updates": updates.report,
    }  # fmt: skip
    try:
        rows = commands[options.command](options, console)
    except TurnError as error:
        raise SystemExit(f"error: {error}") from None
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": description, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
