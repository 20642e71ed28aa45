"""What is typed in the first hour: lines that must work as they stand, and those that must not mislead."""

from __future__ import annotations

import inspect

import torch

import sparselab
from tests.hazards.cases import demand, hazard

DYNAMIC = (
    "CHTs", "CHTss", "DSR", "DeepR", "GMP", "GSE", "GraNet", "MEST", "RigL", "SET", "SNFS", "SRigL",
    "TopKAST",
)  # fmt: skip


@hazard("first hour", "RigL(sparsity=0.9, drop_fraction=0.3, update_freq=100)", refusable=False)
def headline() -> None:
    layer = sparselab.SparseLinear(1536, 384, sparsity=0.9)
    algo = sparselab.RigL(sparsity=0.9, drop_fraction=0.3, update_freq=100)
    layer.apply(algo)


@hazard("first hour", "BlockSparseLinear(1024, 256, density=0.1)", refusable=False)
def block_line() -> str:
    layer = sparselab.BlockSparseLinear(1024, 256, density=0.1)
    demand(abs(layer.density - 0.1) < 0.01, f"density {layer.density}")
    return repr(layer)


@hazard("first hour", "SparseLinear(100, 256, 0.8)")
def third_is_sparsity() -> None:
    layer = sparselab.SparseLinear(100, 256, 0.8)
    demand(abs(layer.sparsity - 0.8) < 0.01, f"accepted, {layer.sparsity:.3g} sparse")


@hazard("first hour", "BlockSparseLinear(64, 64, True, 0.9)")
def fourth_is_sparsity() -> None:
    layer = sparselab.BlockSparseLinear(64, 64, True, 0.9)
    demand(abs(layer.sparsity - 0.9) < 0.1, f"accepted, {layer.sparsity:.3g} sparse")


@hazard("first hour", "SparseMultiheadAttention(32, 4)", refusable=False)
def attention_line() -> None:
    sparselab.SparseMultiheadAttention(32, 4)


@hazard("first hour", "SparseConv2d(..., sparsity=.5, fan_in=4)")
def both() -> None:
    layer = sparselab.SparseConv2d(4, 8, 3, sparsity=0.5, fan_in=4)
    demand(False, f"accepted, {layer.sparsity:.3g} sparse")


@hazard("first hour", "fan_in of a convolution after SET made its rows differ", refusable=False)
def stale_fan_in() -> None:
    torch.manual_seed(0)
    layer = sparselab.SparseConv2d(4, 8, 3, fan_in=4)
    algorithm = sparselab.SET(update={"freq": 1}, drop_fraction=0.5)
    layer.apply(algorithm)
    algorithm.step()
    differ = len(set(torch.diff(layer.indptr).tolist())) > 1
    try:
        fan_in = layer.fan_in
    except Exception:
        return
    demand(differ and fan_in is None, f"rows {torch.diff(layer.indptr).tolist()}, fan_in {fan_in}")


@hazard("first hour", "from sparselab.dst import * leaves nn's Linear alone", refusable=False)
def star() -> None:
    from sparselab import dst

    demand("Linear" not in dst.__all__, "Linear is a schedule")


@hazard("first hour", "repr of an algorithm tells its settings", refusable=False)
def representation() -> str:
    text = repr(sparselab.RigL(drop_fraction=0.3))
    demand("0.3" in text, text)
    return text


@hazard("first hour", "detach() gives the layers back", refusable=False)
def detached() -> None:
    layer, algorithm = sparselab.SparseLinear(64, 32), sparselab.SET()
    layer.apply(algorithm)
    algorithm.detach()
    layer.apply(sparselab.SET())


@hazard("first hour", "signatures name every setting", refusable=False)
def signatures() -> None:
    names = [
        "CHTs",
        "CHTss",
        "DSR",
        "DeepR",
        "GMP",
        "GSE",
        "GraNet",
        "MEST",
        "RigL",
        "SET",
        "SNFS",
        "SRigL",
        "Static",
        "TopKAST",
    ]
    hidden = [
        name
        for name in names
        for parameter in inspect.signature(getattr(sparselab, name)).parameters.values()
        if parameter.kind is parameter.VAR_KEYWORD
    ]
    demand(not hidden, f"settings are hidden in {', '.join(hidden)}")


@hazard("first hour", "every algorithm takes update_freq, update and stop", refusable=False)
def same_words() -> None:
    names = [
        "CHTs",
        "CHTss",
        "DSR",
        "DeepR",
        "GMP",
        "GSE",
        "GraNet",
        "MEST",
        "RigL",
        "SET",
        "SNFS",
        "SRigL",
        "TopKAST",
    ]
    lacking = [
        f"{name}: {word}"
        for name in names
        for word in ("update_freq", "update", "stop")
        if word not in inspect.signature(getattr(sparselab, name)).parameters
    ]
    demand(not lacking, f"missing: {', '.join(lacking)}")


@hazard("first hour", "the schedule that GMP needs is at the top", refusable=False)
def schedules() -> None:
    lacking = [name for name in ("allocate", "EverySteps", "AtSteps") if not hasattr(sparselab, name)]
    lacking += [
        name
        for name in ("Constant", "Cosine", "Linear", "Polynomial")
        if not any(hasattr(sparselab, name + suffix) for suffix in ("", "Schedule"))
    ]
    demand(not lacking, f"missing: {', '.join(lacking)}")
