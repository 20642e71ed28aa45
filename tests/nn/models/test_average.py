"""Averages by position against dense ones."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

import sparselab
from sparselab import (
    GMP,
    SET,
    AveragedModel,
    BlockSparseLinear,
    FanInLinear,
    LinearSchedule,
    MaskedLinear,
    RigL,
    SparseConv2d,
    SparseLinear,
    TopKAST,
    average,
    copy_topology,
    soft_update,
)
from tests.shared import usual

KINDS: dict[str, Any] = {
    "single": lambda: SparseLinear(16, 12, sparsity=0.5, dtype=torch.float64),
    "fan-in": lambda: FanInLinear(16, 12, sparsity=0.5, dtype=torch.float64),
    "blocks": lambda: BlockSparseLinear(16, 12, sparsity=0.5, block_shape=(4, 2), dtype=torch.float64),
    "conv": lambda: SparseConv2d(4, 12, 2, sparsity=0.5, dtype=torch.float64),
    "masked": lambda: MaskedLinear(16, 12, sparsity=0.5, dtype=torch.float64),
}


def made(kind: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = (nn.BatchNorm2d if kind == "conv" else nn.BatchNorm1d)(12, dtype=torch.float64)
    return nn.Sequential(KINDS[kind](), norm)


def dense(model: Any) -> torch.Tensor:
    return model[0].to_dense().weight.detach().reshape(12, -1)


def mask(model: Any) -> torch.Tensor:
    live = copy.deepcopy(model[0])
    with torch.no_grad():
        live.stored.fill_(1)
    return dense([live]) != 0


def batch(model: Any) -> torch.Tensor:
    shape = (6, 4, 3, 3) if isinstance(model[0], SparseConv2d) else (6, 16)
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_gets_the_connections_and_keeps_its_weights_there(kind: str) -> None:
    target, model = made(kind, 0), made(kind, 1)
    before, wanted = dense(target), mask(model)
    copy_topology(target, model)
    assert torch.equal(target[0].positions(), model[0].positions())
    assert torch.equal(dense(target), torch.where(wanted, before, 0))


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_update_is_that_of_the_dense_weights(kind: str, tau: float) -> None:
    target, model = made(kind, 0), made(kind, 1)
    model(batch(model))  # moves the statistics of the norm
    before, wanted = dense(target), mask(model)
    bias, mean = target[0].bias.detach().clone(), target[1].running_mean.clone()
    soft_update(target, model, tau)
    torch.testing.assert_close(dense(target), torch.where(wanted, before, 0).lerp(dense(model), tau))
    torch.testing.assert_close(target[0].bias, bias.lerp(model[0].bias, tau))
    torch.testing.assert_close(target[1].running_mean, mean.lerp(model[1].running_mean, tau))
    assert target[1].num_batches_tracked == 1
    if tau == 1:
        target.eval(), model.eval()
        x = batch(model)
        assert torch.equal(target(x), model(x))


@pytest.mark.parametrize("topology", ["union", "newest"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fan-in"])
def test_a_mean_is_that_of_the_dense_weights(kind: str, topology: Any) -> None:
    models = [made(kind, seed) for seed in range(3)]
    before = copy.deepcopy([model.state_dict() for model in models])
    mean = average(models, [1, 2, 5], topology=topology)
    expected = (dense(models[0]) + 2 * dense(models[1]) + 5 * dense(models[2])) / 8
    live = mask(models[2])
    if topology == "union":
        live = live | mask(models[0]) | mask(models[1])
    torch.testing.assert_close(dense(mean), torch.where(live, expected, 0))
    assert mean[0].nnz == (live.sum() if kind != "blocks" else live.sum() // 8)
    torch.testing.assert_close(
        mean[0].bias, (models[0][0].bias + 2 * models[1][0].bias + 5 * models[2][0].bias) / 8
    )
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_constant_fan_in_is_averaged_on_the_newest_connections() -> None:
    models = [made("fan-in", seed) for seed in range(2)]
    torch.testing.assert_close(
        dense(average(models, topology="newest")),
        torch.where(mask(models[1]), (dense(models[0]) + dense(models[1])) / 2, 0),
    )
    with pytest.raises(ValueError, match="must have equally many connections"):
        average(models)


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.8)},
    "buffers": {"use_buffers": True},
    "ema of buffers": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.8)},
}
ALGORITHMS: dict[str, Any] = {
    "RigL": lambda: RigL(update_freq=3),
    "SET": lambda: SET(update_freq=3),
    "GMP": lambda: GMP(LinearSchedule(0.5, 0.8, 20), update_freq=4),
    "TopKAST": lambda: TopKAST(0.5, forward_sparsity=0.7, update_freq=3),
}


@torch.no_grad()
def update_masked(averaged: TorchAveragedModel, model: Any) -> None:
    """Torch's average of all but the masks, which are those of the newest model."""
    ours, theirs = averaged.module[0], model[0]
    masks = [
        (layer, name, layer._buffers[name]) for layer in (ours, theirs) for name in ("mask", "forward_mask")
    ]
    for layer, name, _ in masks:
        layer._buffers[name] = None
    averaged.update_parameters(model)
    for layer, name, buffer in masks:
        layer._buffers[name] = buffer
    ours.mask.copy_(theirs.mask)
    ours.forward_mask = copy.deepcopy(theirs.forward_mask)
    ours.weight.masked_fill_(~ours.mask, 0)


@pytest.mark.parametrize("algorithm", [usual(name in ("RigL", "GMP"), name) for name in ALGORITHMS])
@pytest.mark.parametrize("how", AVERAGES)
def test_the_drop_in_averages_as_torchs_does_of_the_masked_twin(how: str, algorithm: str) -> None:
    """The twin's average is dense, and 0 is put where the newest model has no connection."""
    results = []
    for kind, averager in (("single", AveragedModel), ("masked", TorchAveragedModel)):
        model = made("single", 0)
        if kind == "masked":
            model[0] = MaskedLinear.from_sparse(model[0])
        averaged = averager(model, **AVERAGES[how])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ALGORITHMS[algorithm]().attach(model, optimizer)
        torch.manual_seed(3)
        for _ in range(25):
            optimizer.zero_grad()
            model(batch(model)).square().mean().backward()
            optimizer.step()
            if kind == "single":
                averaged.update_parameters(model)
            else:
                update_masked(averaged, model)
        averaged.eval()
        results.append((averaged.module[0].positions(), averaged.module.state_dict(), averaged(batch(model))))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1]["1.running_mean"], results[1][1]["1.running_mean"])
    torch.testing.assert_close(results[0][2], results[1][2])


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    target, other = made("single", 0), made("single", 1)
    before = copy.deepcopy(target.state_dict())
    for tau in (-0.1, 1.5, float("nan"), True, "0.1"):
        with pytest.raises(ValueError, match=re.escape(f"tau must be a number in [0, 1], got {tau!r}")):
            soft_update(target, other, tau)  # type: ignore[arg-type]
    longer = nn.Sequential(*other, SparseLinear(12, 4))
    wider = nn.Sequential(SparseLinear(17, 12), nn.BatchNorm1d(12))
    for wrong in (longer, wider, other[:1]):
        with pytest.raises(ValueError, match="both models must have the same"):
            soft_update(target, wrong, 0.5)
    for wrong in (longer, wider):
        with pytest.raises(ValueError, match="both models must have the same sparse layers, got "):
            average([target, wrong])
    for weights in ([1.0], [1, -1], [1, float("nan")]):
        with pytest.raises(ValueError, match="weights must be 2 numbers whose sum is not 0, got "):
            average([target, other], weights)
    with pytest.raises(ValueError, match="models must be at least one, got none"):
        average([])
    with pytest.raises(ValueError, match=r"topology must be one of \('union', 'newest'\), got 'old'"):
        average([target, other], topology="old")  # type: ignore[arg-type]
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in before.items())
    assert sparselab.soft_update is soft_update
