"""``python -m sparselab bench``: sparse layers beside dense ones, and beside what this machine allows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import torch

from sparselab.bench import options as command_line
from sparselab.bench.contenders import linear
from sparselab.bench.contenders.linear import OURS, Case, Result
from sparselab.bench.measure import break_even, machine
from sparselab.bench.measure.limits import Limits, Meter
from sparselab.bench.output import report

#: Densities and sizes of ``--scaling``; sizes are factors of both sides of the layer.
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
SIZES = (0.25, 0.5, 1.0, 1.5, 2.0)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status, which is 1 if a contender computed something wrong.

    Raises
    ------
    SystemExit
        With status 2 if an option is wrong.
    """
    options = command_line.parse(arguments)
    threads = torch.get_num_threads()
    try:
        return _run(options, arguments)
    finally:
        torch.set_num_threads(threads)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    found = {**machine.describe(), "threads": " ".join(map(str, options.threads))}
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    meter = Meter(options.threads)
    meter.run(20)

    results = _table(options, meter)
    peak = meter.limits()
    report.show_limits(peak)
    report.show_results("layers", results, peak)
    gains = report.thread_gains(results, peak)
    if gains:
        report.show_thread_gains(gains)

    crossings = []
    if options.break_even:
        most = options.threads[-1]
        crossings = [break_even.find(shape, tokens, options.rounds, most) for shape, tokens in options.layers]
        report.show_break_even(crossings)

    density, size = _scaling(options, peak) if options.scaling else ([], [])
    if options.json:
        data = {
            "machine": found,
            "arguments": list(arguments),
            "limits": report.plain_limits(peak),
            "results": list(report.plain_results(results, peak)),
            "thread_gains": gains,
            "break_even": [asdict(each) for each in crossings],
            "density": list(report.plain_results(density, peak)),
            "size": list(report.plain_results(size, peak)),
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.picture:
        from sparselab.bench.output import picture

        title = f"{found['cpu']}, threads: {found['threads']}"
        picture.draw(options.picture, title, results, density, size)
    reasons = [f"{name} {reason}" for name, reason in report.reasons([*results, *density, *size])]
    reasons += [each.reason for each in crossings if each.reason is not None]
    return 1 if any(" refused: " in reason for reason in reasons) else 0


def _table(options: argparse.Namespace, meter: Meter) -> list[Result]:
    results = []
    for ((in_features, out_features), tokens), sparsity in product(options.layers, options.sparsity):
        case = Case(in_features, out_features, tokens, sparsity)
        results += linear.run_case(
            case, options.operations, options.contenders, options.rounds, options.threads
        )
        meter.run()
    return results


def _scaling(options: argparse.Namespace, peak: Sequence[Limits]) -> tuple[list[Result], list[Result]]:
    """The first layer of the table at several densities and in several sizes."""
    (in_features, out_features), tokens = options.layers[0]
    sparsity, threads = options.sparsity[0], options.threads[-1:]
    by_density = [Case(in_features, out_features, tokens, 1 - density) for density in DENSITIES]
    by_size = [
        Case(max(round(in_features * factor), 1), max(round(out_features * factor), 1), tokens, sparsity)
        for factor in SIZES
    ]
    found = []
    for title, cases in (("time against density", by_density), ("time against size", by_size)):
        results = [
            result
            for case in cases
            for result in linear.run_case(case, options.operations, [OURS, "dense"], options.rounds, threads)
        ]
        results.sort(key=lambda result: options.operations.index(result.operation))
        report.show_results(title, results, peak)
        found.append(results)
    return found[0], found[1]
