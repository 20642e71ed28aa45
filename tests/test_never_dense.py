"""From the model on the meta device to the file: nothing as large as one dense weight is ever allocated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparselab
from tests.allocations import Allocations
from tests.kernels.process import run_python

WIDTH, SPARSITY, TOKENS = 1536, 0.99, 64
#: Of layers whose algorithm prunes, at the start.
START = 0.985
DENSE_BYTES = 4 * WIDTH * WIDTH

schedule = sparselab.PolynomialSchedule(START, SPARSITY, 4)
when: dict[str, Any] = {"update_freq": 2, "stop": 6}

#: An algorithm, and the kind of layer it rewires.
ALGORITHMS: dict[str, tuple[Callable[[], Any], str]] = {
    "static": (sparselab.Static, "sparse"),
    "set": (lambda: sparselab.SET(**when), "sparse"),
    "set, blocks": (lambda: sparselab.SET(**when), "block"),
    "set, fan-in": (lambda: sparselab.SET(scope="row", **when), "fan_in"),
    "rigl": (lambda: sparselab.RigL(**when), "sparse"),
    "rigl, network": (lambda: sparselab.RigL(scope="network", **when), "sparse"),
    "rigl, blocks": (lambda: sparselab.RigL(**when), "block"),
    "rigl, fan-in": (lambda: sparselab.RigL(scope="row", **when), "fan_in"),
    "srigl": (lambda: sparselab.SRigL(**when), "fan_in"),
    "snfs": (lambda: sparselab.SNFS(momentum_bytes=0, **when), "sparse"),
    "dsr": (lambda: sparselab.DSR(**when), "sparse"),
    "deepr": (lambda: sparselab.DeepR(l1=0.1, temperature=1e-6, **when), "sparse"),
    "gse": (lambda: sparselab.GSE(**when), "sparse"),
    "chts": (lambda: sparselab.CHTs(**when), "sparse"),
    "mest": (lambda: sparselab.MEST(delta=0.001, soft_bound=False, **when), "sparse"),
    "gmp": (lambda: sparselab.GMP(schedule, **when), "sparse"),
    "granet": (lambda: sparselab.GraNet(schedule, **when), "sparse"),
    "topkast": (lambda: sparselab.TopKAST(forward_sparsity=0.995, master_bytes=0, **when), "sparse"),
}


def build(kind: str, width: int, sparsity: float) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    rule = {"sparsity": sparsity, **({"block_shape": (4, 4)} if kind == "block" else {})}
    return sparselab.materialize(sparselab.sparsify(model, {"*": rule}, layer=kind))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> None:
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(TOKENS, width)).square().mean().backward()
        optimizer.step()


def live(name: str, width: int, folder: Path, watch: Callable[[], Any] = Allocations) -> dict[str, Any]:
    """Build, train, save and load; what each of them allocated."""
    make, kind = ALGORITHMS[name]
    torch.manual_seed(0)
    seen = {what: watch() for what in ("build", "train", "save and load")}
    with seen["build"]:
        model = build(kind, width, START if name in ("gmp", "granet") else SPARSITY)
    algorithm, optimizer = make(), torch.optim.AdamW(model.parameters(), fused=True)
    algorithm.attach(model, optimizer)
    algorithm.expect_passes(1)
    reports = list[Any]()
    if name != "static":
        algorithm.register_update_hook(lambda algorithm: reports.extend(algorithm.last_update))
    with seen["train"]:
        train(model, optimizer, width)
    assert name == "static" or any(report.grown or report.dropped for report in reports)
    parts = {"model": model, "optimizer": optimizer, "algorithm": algorithm}
    with seen["save and load"]:
        sparselab.save_checkpoint(folder / "last", **parts)
        sparselab.load_checkpoint(folder / "last", **parts)
        sparselab.save_model(model, folder / "model.safetensors")
        sparselab.load_model(model, folder / "model.safetensors")
    return seen


def assert_never_dense(what: str, seen: Allocations) -> None:
    shares = {seen.who: seen.largest / DENSE_BYTES, "NumPy and Python at once": seen.peak / DENSE_BYTES}
    assert max(shares.values()) < 1, f"{what} allocated parts of a dense weight: {shares}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_of_dense_size_from_building_to_loading(name: str, tmp_path: Path) -> None:
    live(name, 256, tmp_path, nullcontext)  # compiles, which takes memory of its own
    for what, seen in live(name, WIDTH, tmp_path).items():
        assert_never_dense(what, seen)


@pytest.mark.parametrize("what", ["to_dense", "mapped", "numpy"])
def test_what_is_dense_is_seen(what: str) -> None:
    layer = sparselab.SparseLinear(WIDTH, WIDTH, sparsity=SPARSITY)
    with Allocations() as seen:
        if what == "to_dense":
            layer.to_dense()
        elif what == "mapped":
            sparselab.kernels.cpu.runtime.memory.mapped_empty(WIDTH * WIDTH, np.dtype(np.float32))
        else:
            np.zeros((WIDTH, WIDTH), np.float32)
    with pytest.raises(AssertionError, match="parts of a dense weight"):
        assert_never_dense(what, seen)


#: The resident set counts all there is, so the layer is so large that nothing else shows.
SCRIPT = """
import torch, sparselab
from torch import nn
from tests.test_never_dense import build
from pathlib import Path

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

def live(width):
    model = build("sparse", width, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    algorithm = sparselab.RigL(update_freq=2)
    algorithm.attach(model, optimizer)
    algorithm.expect_passes(1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(16, width)).square().mean().backward()
        optimizer.step()
    parts = {"model": model, "optimizer": optimizer, "algorithm": algorithm}
    sparselab.save_checkpoint(FOLDER + "/last", **parts)
    sparselab.load_checkpoint(FOLDER + "/last", **parts)

live(256)
before = peak()
live(WIDE)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads it")
def test_the_resident_set_grows_by_less_than_a_quarter_of_a_dense_weight(tmp_path: Path) -> None:
    script = SCRIPT.replace("FOLDER", repr(str(tmp_path))).replace("WIDE", str(wide := 8192))
    assert int(run_python("-c", script, OMP_NUM_THREADS="1")) < wide * wide
