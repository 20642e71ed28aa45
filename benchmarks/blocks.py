"""Feed-forward blocks: the layers together, one after the other, and dense ones, eager and compiled."""

from __future__ import annotations

import gc
import statistics
import time
from argparse import Namespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import sparselab
from sparselab.bench.output import tables

#: The layers of a block, by what the table calls them.
LAYERS: dict[str, dict[str, Any]] = {
    "single": {}, "fan-in": {"layer": "fan-in"}, "4x4": {"layer": "block", "block_shape": (4, 4)},
    "32x32": {"layer": "block", "block_shape": (32, 32)},
}  # fmt: skip


def arms(
    shape: tuple[int, int, int], sparsity: float, kinds: list[str], compiled: bool
) -> dict[str, nn.Module]:
    """What is timed: each kind of layer together and apart, and dense blocks."""
    width, hidden, _ = shape
    dense = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    found: dict[str, Any] = {"dense": dense}
    if compiled:
        found["dense, compiled"] = torch.compile(dense)
    for kind in kinds:
        block = sparselab.SparseMLP(width, hidden, sparsity=sparsity, **LAYERS[kind])
        found[f"{kind}, together"] = block
        found[f"{kind}, apart"] = nn.Sequential(block.up, nn.GELU(), block.down)
    return found


def step(model: nn.Module, x: Tensor, dy: Tensor, is_narrow: bool) -> None:
    """A forward and a backward pass, with a gradient by the input."""
    x.grad = None
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
        y = model(x)
    y.backward(dy.to(y.dtype))


def saved_bytes(model: nn.Module, x: Tensor, is_narrow: bool) -> int:
    """Bytes that autograd keeps from the forward pass, beside parameters and the input."""
    known = {each.data_ptr() for each in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_narrow),
    ):
        y = model(x)
    total = sum(kept.values())
    del y
    return total


def run(options: Namespace, shape: tuple[int, int, int], is_narrow: bool) -> list[dict[str, Any]]:
    """Median milliseconds of a step of each arm, in turns, and what autograd keeps."""
    torch.manual_seed(0)
    width, _, n_tokens = shape
    x, dy = torch.randn(n_tokens, width, requires_grad=True), torch.randn(n_tokens, width)
    models = arms(shape, options.sparsity, options.layers, not options.no_compile)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 3):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x, dy, is_narrow)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    gc.collect()
    return [
        {
            "shape": "x".join(map(str, shape)), "dtype": "bfloat16" if is_narrow else "float32", "arm": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "saved_bytes": 0 if "compiled" in name else saved_bytes(model, x, is_narrow),
        }
        for name, model in models.items()
    ]  # fmt: skip


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: run, print tables; returns the rows for ``--json``."""
    found = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            rows = run(options, shape, dtype == "bfloat16")
            dense = rows[0]["ms"]
            console.print(
                tables.plain(
                    f"{rows[0]['shape']} tokens, {options.sparsity:.0%} sparse, {dtype}: a training step",
                    ["arm", "ms", "times dense", "kept (MiB)"],
                    [
                        [row["arm"], f"{row['ms']:.1f}", f"{dense / row['ms']:.2f}",
                         f"{row['saved_bytes'] / 2**20:.1f}"]
                        for row in rows
                    ],
                )
            )  # fmt: skip
            found += rows
    return found
