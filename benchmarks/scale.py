"""Where the memory of a large sparse GPT goes, by cause, beside the resident set of its process.

Each model is built, trained, rewired, saved and loaded in a process of its own. Causes are those of the
moment in a step at which most tensors are alive; together they must be what the process then has resident.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparselab
from examples.gpt_model import GPT, PRESETS, Shape
from examples.resident import peak_resident_bytes, resident_bytes
from sparselab.bench.output import tables
from sparselab.kernels.cpu.runtime.memory import scratch_bytes

CONTEXT, SPARSITY = 256, 0.9
#: The step that rewires; the one before it is the one that is looked at.
UPDATE = 5
#: Bytes per live weight, of sparse models and of dense ones, and beside them, that a process may need at
#: most; to tell what fits.
MOST_PER_WEIGHT, MOST_PER_DENSE_WEIGHT, MOST_BESIDE = 40, 17, 1 << 30


class LiveTensors(TorchDispatchMode):
    """While it is entered, the most that new tensors took at once, and how much of that were gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.most = self.gradients = 0
        self._model = model
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(each) for each in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        new = [each for each in _tensors(out) if _storage(each) not in given | self._alive.keys()]
        for each in new:
            storage = each.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if new and self._total() > self.most:
            self._alive = {place: kept for place, kept in self._alive.items() if not kept[0].expired()}
            if (total := self._total()) > self.most:
                self.most = total
                self.gradients = sum(p.grad.nbytes for p in self._model.parameters() if p.grad is not None)
        return out

    def _total(self) -> int:
        return sum(n_bytes for _, n_bytes in self._alive.values())


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


class Trainer:
    """A GPT, its AdamW and RigL, as ``examples/gpt.py`` trains them; dense without a sparsity."""

    def __init__(
        self, shape: Shape, sparsity: float | None, tokens: int, block: tuple[int, int] | None = None
    ) -> None:
        with torch.device("meta" if sparsity else "cpu"):
            model = GPT(256, CONTEXT, shape.n_layer, shape.d_model, shape.d_ff, shape.n_head)
        self.dense = sum(parameter.numel() for parameter in model.parameters())
        kind = {"layer": "block", "block_shape": block} if block else {}
        rules = {"*": {"sparsity": sparsity, **kind}}
        self.model = sparselab.materialize(sparselab.sparsify(model, rules)) if sparsity else model
        self.model.recompute = True
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if sparsity:
            self.algorithm = sparselab.RigL(update_freq=UPDATE, stop=UPDATE + 1)
            self.algorithm.attach(self.model, self.optimizer)
            self.algorithm.expect_passes(1)
        self._shape = max(1, tokens // CONTEXT), CONTEXT

    def step(self) -> None:
        """One step; gradients go at its end."""
        x, y = torch.randint(256, (2, *self._shape))
        F.cross_entropy(self.model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Phases:
    """What a process takes, phase by phase: seconds, and the resident set at its highest and at its end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")  # the mark starts anew
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        peak = peak_resident_bytes() if clear.exists() else resident_bytes()
        self.rows.append({"phase": name, "seconds": seconds, "peak": peak, "resident": resident_bytes()})

    def seconds(self, name: str) -> float:
        """Median of those of one name."""
        return statistics.median(row["seconds"] for row in self.rows if row["phase"] == name)

    def __getitem__(self, name: str) -> dict[str, Any]:
        return next(row for row in reversed(self.rows) if row["phase"] == name)


class _Heap(ctypes.Structure):
    """What ``mallinfo2`` of glibc (2.33) returns; see its manual page."""

    _fields_ = (
        *((f"other{n}", ctypes.c_size_t) for n in range(8)),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def free_heap_bytes() -> int:
    """What the C library holds of freed memory, where it tells."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform.startswith("linux") else None
    if ask is None:
        return 0
    ask.restype = _Heap
    return int(ask().fordblks)


def measure(
    name: str, sparsity: float, tokens: int, threads: int, block: tuple[int, int] | None
) -> dict[str, Any]:
    """In a fresh process: the life of one model."""
    torch.set_num_threads(threads)
    small = Trainer(Shape(1, 64, 1), sparsity, tokens, block)
    for _ in range(UPDATE + 1):
        small.step()  # loads the code, which is not the model's
    del small
    gc.collect()
    phases, code = Phases(), resident_bytes()
    with phases("build"):
        trainer = Trainer(PRESETS[name], sparsity, tokens, block)
    for step in range(1, UPDATE + 3):
        with phases(
            {1: "first step", UPDATE: "step with an update", UPDATE + 1: "step after it"}.get(step, "step")
        ):
            trainer.step()
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: getattr(trainer, name) for name in ("model", "optimizer", "algorithm")}
        with phases("save"):
            sparselab.save_checkpoint(f"{folder}/last", **parts)
        file_bytes = Path(folder, "last").stat().st_size
        with phases("load"):
            sparselab.load_checkpoint(f"{folder}/last", **parts)
    with phases("first step again"):
        trainer.step()  # plans were made anew
    return {
        "model": name, "sparsity": sparsity, "tokens": tokens, "threads": threads,
        "live": sum(parameter.numel() for parameter in trainer.model.parameters()), "dense": trainer.dense,
        "file_bytes": file_bytes, "phases": phases.rows, "peak": max(row["peak"] for row in phases.rows),
        "step_peak": phases["step"]["peak"], "step_s": phases.seconds("step"),
        "tensors": training_bytes(trainer), "causes": causes(trainer, code),
    }  # fmt: skip


def measure_dense(name: str, tokens: int, threads: int) -> dict[str, Any]:
    """In a fresh process: what the same model takes dense, at the highest moment of its third step."""
    torch.set_num_threads(threads)
    phases, trainer = Phases(), Trainer(PRESETS[name], None, tokens)
    for _ in range(3):
        with phases("step"):
            trainer.step()
    return {
        "tensors": training_bytes(trainer),
        "step_peak": phases["step"]["peak"],
        "step_s": phases.seconds("step"),
    }


def training_bytes(trainer: Trainer) -> int:
    """Of weights, their gradients, what kernels need to know of them, and the optimizer's state."""
    gradients = sum(parameter.nbytes for parameter in trainer.model.parameters())  # which a step lets go
    return sparselab.memory_report(trainer.model, trainer.optimizer).training_bytes + gradients


def causes(trainer: Trainer, code: int) -> dict[str, int]:
    """Bytes by cause at the highest moment of a step."""
    freed = free_heap_bytes()
    with LiveTensors(trainer.model) as seen:
        trainer.step()
    report = sparselab.memory_report(trainer.model, trainer.optimizer)
    connections = sum(buffer.nbytes for buffer in trainer.model.buffers())
    return {
        "weights": report.weight_bytes - connections,
        "connections": connections,
        "moments of AdamW, ages": report.optimizer_bytes,
        "plans of kernels": report.plan_bytes,
        "gradients": seen.gradients,
        "activations and temporaries": seen.most - seen.gradients,
        "scratch of kernels": scratch_bytes(),
        "freed, not given back": freed,
        "code, before the model": code,
    }


def fits(name: str, density: float, most_per_weight: int) -> bool:
    """Whether a model surely has room now."""
    shape = PRESETS[name]
    live = 12 * shape.n_layer * shape.d_model**2 * density
    return bool(live * most_per_weight + MOST_BESIDE < psutil.virtual_memory().available)


def run(
    names: list[str], sparsity: float, tokens: int, threads: int, block: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """One fresh process for each model that fits; its row has `dense_arm` where that fits, too."""
    rows = []
    for name in names:
        if not fits(name, 1 - sparsity, MOST_PER_WEIGHT):
            print(f"{name}: does not fit here", file=sys.stderr)
            continue
        row = alone(f"measure({name!r}, {sparsity}, {tokens}, {threads}, {block})")
        if fits(name, 1.0, MOST_PER_DENSE_WEIGHT):
            row["dense_arm"] = alone(f"measure_dense({name!r}, {tokens}, {threads})")
        else:
            print(f"{name}: does not fit here dense", file=sys.stderr)
        rows.append(row)
    return rows


def alone(call: str) -> dict[str, Any]:
    """What a call of a function of this module returns in a process of its own."""
    code = f"import examples.small_heap, json; from benchmarks import scale; print(json.dumps(scale.{call}))"
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def report(
    names: list[str], tokens: int, threads: int, block: tuple[int, int] | None, console: Console
) -> list[dict[str, Any]]:
    """Run and print: bytes per live weight by cause, the phases of each model, and all beside dense ones."""
    found = run(names, SPARSITY, tokens, threads, block)
    for row in found:
        console.print(by_cause(row))
        console.print(by_phase(row))
    if found:
        console.print(beside_dense(found))
    return found


def beside_dense(rows: list[dict[str, Any]]) -> str:
    """Tensors, resident set and seconds of a step, and the share of the dense ones."""
    cells = []
    for row in rows:
        dense = row.get("dense_arm")
        cells.append([row["model"], f"{row['dense']:,}", f"{row['live']:,}"])
        for key in ("tensors", "step_peak"):
            share = f"{row[key] / dense[key]:.0%}" if dense else ""
            cells[-1] += [mebibytes(dense[key]) if dense else "does not fit", mebibytes(row[key]), share]
        share = f"{row['step_s'] / dense['step_s']:.0%}" if dense else ""
        cells[-1] += [f"{dense['step_s']:.2f}" if dense else "", f"{row['step_s']:.2f}", share]
    columns = ["model", "parameters", "live"]
    columns += ["tensors, dense, MiB", "sparse", "share", "resident, dense, MiB", "sparse", "share"]
    columns += ["step, dense, s", "sparse", "share"]
    return tables.plain("Trained dense and sparse, activations recomputed in both", columns, cells)


def by_cause(row: dict[str, Any]) -> str:
    """What a step has resident at its highest, by cause."""
    sizes = f"{row['live']:,} live of {row['dense']:,} parameters, {row['tokens']} tokens a step"
    lines = {**row["causes"], "all of these": sum(row["causes"].values()), "resident set": row["step_peak"]}
    cells = [[cause, mebibytes(size), f"{size / row['live']:.2f}"] for cause, size in lines.items()]
    title = f"{row['model']}: {sizes}, at the highest moment of a step"
    return tables.plain(title, ["cause", "MiB", "bytes per live weight"], cells)


def by_phase(row: dict[str, Any]) -> str:
    """Seconds and resident set from building to loading."""
    cells = [
        [each["phase"], f"{each['seconds']:.2f}", mebibytes(each["peak"]), mebibytes(each["resident"])]
        for each in row["phases"]
    ]
    whole = f"peak {row['peak'] / 2**30:.2f} GiB, checkpoint {row['file_bytes'] / 1e6:,.0f} MB"
    columns = ["phase", "seconds", "resident at most, MiB", "at its end"]
    return tables.plain(f"{row['model']}: {whole}", columns, cells)


def mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f}"
