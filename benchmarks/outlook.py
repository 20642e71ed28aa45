"""What training larger models on more machines would take, by the formulas of ``docs/scaling.md``.

Nothing is timed here: what other commands have measured is put in, and the formulas carry it on.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from benchmarks.traffic import WAYS, step_bytes, update_bytes
from sparselab.bench.output import tables

#: Bytes for each live weight: itself, its column of 16 bits, its gradient, two moments, and what kernels look
#: up (``python -m benchmarks memory``).
WEIGHT, CONNECTION, GRADIENT, MOMENTS = 4.0, 2.0, 4.0, 8.0
DAY_S, HOUR_S = 86400, 3600
#: Of RigL, and of `sparselab.Replicas`.
DROP, CANDIDATES = 0.3, 2


@dataclass(frozen=True)
class Job:
    """A model, and where it is trained.

    Parameters
    ----------
    parameters : float
        As if dense.
    density : float
        Of them, those that live.
    tokens : int
        That each machine sees in a step.
    seconds, dense_seconds : float
        For a token and a live weight on one machine, forward, backward and AdamW; and for a dense one.
    plan_bytes : float
        For each live weight, what kernels look up.
    """

    parameters: float
    density: float
    tokens: int
    seconds: float
    dense_seconds: float
    plan_bytes: float

    @property
    def live(self) -> float:
        return self.parameters * self.density

    def memory(self, shards: int = 1) -> float:
        """Bytes of tensors on each machine, without activations, with moments in so many shards."""
        each = WEIGHT + CONNECTION + GRADIENT + self.plan_bytes + MOMENTS / shards
        return self.live * each

    def dense_memory(self, shards: int = 1) -> float:
        """The same, of the dense model."""
        return self.parameters * (WEIGHT + GRADIENT + MOMENTS / shards)

    def step_s(self) -> float:
        """Seconds of a step, without the others."""
        return self.live * self.tokens * self.seconds

    def dense_step_s(self) -> float:
        """The same, of the dense model."""
        return self.parameters * self.tokens * self.dense_seconds


def network_s(n_bytes: float, mbit: float) -> float:
    """Seconds that so many bytes take over a cable of so many Mbit/s."""
    return 8 * n_bytes / (mbit * 1e6)


def predict(job: Job, ranks: int, mbit: float, way: str, total: float, price: float) -> dict[str, Any]:
    """A step, and a whole training of `total` tokens, by one way; nothing is sent while others compute."""
    sent = step_bytes(way, [round(job.live)], ranks)
    seconds = job.step_s() + network_s(sent, mbit)
    dense_sent = step_bytes(way, [round(job.parameters)], ranks)
    dense_seconds = job.dense_step_s() + network_s(dense_sent, mbit)
    training_s = total / (job.tokens * ranks) * seconds
    return {
        "ranks": ranks,
        "mbit": mbit,
        "way": way,
        "sent": sent,
        "alone_s": job.step_s(),
        "network_s": network_s(sent, mbit),
        "tokens_per_second": job.tokens * ranks / seconds,
        "dense_tokens_per_second": job.tokens * ranks / dense_seconds,
        "share": job.step_s() / seconds,
        "training_s": training_s,
        "cost": training_s / HOUR_S * ranks * price,
    }


def report(options: Namespace, console: Console) -> list[dict[str, Any]]:
    """The subcommand: print memory and a table of networks; returns its rows for ``--json``."""
    sparse, dense = (
        each * 1e-12 * options.measured_cores / options.cores
        for each in (options.picoseconds, options.dense_picoseconds)
    )
    job = Job(options.parameters, 1 - options.sparsity, options.tokens, sparse, dense, options.plan_bytes)
    total = options.tokens_per_weight * job.live
    console.print(
        f"{job.parameters:,.0f} parameters, {job.live:,.0f} live, {total:,.0f} tokens; machines of "
        f"{options.cores} cores, {job.tokens:,} tokens a step on each"
    )
    cells = [
        [f"{shards:,}", gigabytes(job.dense_memory(shards)), gigabytes(job.memory(shards))]
        for shards in (1, *options.ranks)
    ]
    title = "Tensors of each machine without activations, GB"
    console.print(tables.plain(title, ["moments in shards", "dense", "sparse"], cells))
    rows = [
        predict(job, ranks, mbit, way, total, options.price)
        for ranks in options.ranks
        for mbit in options.mbit
        for way in WAYS
    ]
    columns = ["machines", "Mbit/s", "sent", "MB a step", "s alone", "s network", "tokens/s"]
    columns += ["dense, tokens/s", "of time computing", "days", "cost, $"]
    title = "Training, nothing sent while others compute, connections as they are"
    console.print(tables.plain(title, columns, [_cells(row) for row in rows], 3))
    console.print(
        tables.plain("An update of RigL", ["machines", "growth", "MB"], _update_cells(job, options.ranks))
    )
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        f"{row['ranks']}",
        f"{row['mbit']:g}",
        row["way"],
        f"{row['sent'] / 1e6:,.0f}",
        f"{row['alone_s']:,.0f}",
        f"{row['network_s']:,.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['dense_tokens_per_second']:,.0f}",
        f"{row['share']:.0%}",
        f"{row['training_s'] / DAY_S:,.1f}",
        f"{row['cost']:,.0f}",
    ]


def _update_cells(job: Job, all_ranks: list[int]) -> list[list[str]]:
    """Lines of what updates send."""
    return [
        [f"{ranks}", way, f"{n_bytes / 1e6:,.0f}"]
        for ranks in all_ranks
        for way, n_bytes in update_bytes(job.live, job.parameters, ranks, DROP, CANDIDATES).items()
    ]


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f}"
