"""Top-k gradients: what is not sent is held back, follows the connections, and is saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparselab import SET, BlockSparseLinear, RigL, SparseLinear, TopKCompression
from tests.dst.ranks import run_ranks
from tests.nn.storage.test_rewrite import free_positions

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

WORLD, STEPS, SAVED = 2, 6, 3


def made(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        SparseLinear(24, 16, sparsity=0.5, dtype=dtype),
        nn.Tanh(),
        SparseLinear(16, 12, sparsity=0.7, dtype=dtype),
        nn.Tanh(),
        BlockSparseLinear(12, 8, sparsity=0.5, block_shape=(4, 2), dtype=dtype),
    )
    return nn.Sequential(*layers)


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)


def backward(model: nn.Module, step: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
    model.zero_grad()
    model(batch(step, rank, dtype)).square().mean().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [each.grad.clone() for each in model.parameters() if each.grad is not None]


def everything_sent(rank: int) -> bool:
    """A density of 1 reduces as torch does, to the bit."""
    plain, ours = DistributedDataParallel(made()), DistributedDataParallel(made())
    TopKCompression(ours, density=1.0)
    backward(plain, 1, rank)
    backward(ours, 1, rank)
    return all(map(torch.equal, gradients(plain), gradients(ours)))


def nothing_lost(rank: int) -> float:
    """What was sent and what is held back add up to the gradients of all; returns by how much they do not."""
    double, alone = torch.float64, made(torch.float64)
    model = DistributedDataParallel(made(double))
    compression = TopKCompression(model, density=0.1, whole_below=16)
    received = [torch.zeros_like(each) for each in alone.parameters()]
    expected = [torch.zeros_like(each) for each in alone.parameters()]
    for step in range(STEPS):
        backward(model, step, rank, double)
        for total, each in zip(received, gradients(model), strict=True):
            total += WORLD * each
        sent = [int(each.count_nonzero()) for each in gradients(model) if each.numel() > 16]
        assert all(
            0 < n <= WORLD * -(-each.numel() // 10) for n, each in zip(sent, _large(model), strict=True)
        )
        for other in range(WORLD):
            backward(alone, step, other, double)
            for total, each in zip(expected, gradients(alone), strict=True):
                total += each
    compression.consolidate()
    held = compression.state_dict()["held"]
    names = [name for name, _ in alone.named_parameters()]
    worst = 0.0
    for name, total, whole in zip(names, received, expected, strict=True):
        rest = held[name].sum(0) if name in held else torch.zeros_like(whole)
        worst = max(worst, float((total + rest - whole).abs().max()))
    assert any(each.any() for each in held.values())
    return worst


def _large(model: nn.Module) -> list[Tensor]:
    return [each for each in model.parameters() if each.numel() > 16]


def followed(rank: int) -> bool:
    """What is held back stays with its position; what is grown begins with nothing."""
    model = DistributedDataParallel(made())
    compression = TopKCompression(model, density=0.1, whole_below=16)
    backward(model, 1, rank)
    layer: Any = model.module[0]
    before = _by_position(compression, layer, rank)
    assert any(before.values())
    layer.rewrite(torch.arange(20), free_positions(layer, 30))  # another number, too
    after = _by_position(compression, layer, rank)
    return len(after) == layer.nnz and after == {each: before.get(each, 0.0) for each in after}


def _by_position(compression: TopKCompression, layer: Any, rank: int) -> dict[int, float]:
    compression.consolidate()
    held = compression.state_dict()["held"][f"0.{layer.storage.parameter}"][rank]
    return dict(zip(layer.positions().tolist(), held.flatten().tolist(), strict=True))


def trained(rank: int, algorithm: str, saved: bytes | None = None) -> tuple[list[list[float]], bytes]:
    """Parameters after some steps and updates; and a checkpoint from the middle, or a run on from it."""
    model = DistributedDataParallel(made())
    rewire: Any = {"SET": SET, "RigL": RigL}[algorithm](update_freq=2, seed=0)
    rewire.attach(model)
    compression, written = TopKCompression(model, density=0.2, whole_below=16), b""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts: list[Any] = [model.module, optimizer, rewire, compression]
    if saved is not None:
        for part, state in zip(parts, torch.load(io.BytesIO(saved), weights_only=True), strict=True):
            part.load_state_dict(state)
    for step in range(0 if saved is None else SAVED, STEPS):
        backward(model, step, rank)
        optimizer.step()
        rewire.step()
        if step == SAVED - 1:
            compression.consolidate()
            file = io.BytesIO()
            torch.save([part.state_dict() for part in parts], file)
            written = file.getvalue()
    return [each.flatten().tolist() for each in model.parameters()], written


def refusals(rank: int) -> list[str]:
    model = DistributedDataParallel(made())
    compression = TopKCompression(model, whole_below=16)
    found = []
    state = {"held": {"9.values": torch.zeros(2, 3)}, "positions": {"9.values": None}}
    wrong = {"held": {"0.bias": torch.zeros(2, 3)}, "positions": {"0.bias": None}}
    calls: list[Any] = [
        compression.state_dict,
        lambda: compression.load_state_dict(state),
        lambda: compression.load_state_dict(wrong),
        lambda: TopKCompression(model),
    ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError)) as error:
            call()
        found.append(str(error.value))
    return found


def all_of_it(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {each.__name__: each(rank) for each in _CHECKS}
    for algorithm in ("SET", "RigL"):
        parameters, saved = trained(rank, algorithm)
        again, _ = trained(rank, algorithm, saved)
        found[algorithm] = parameters, parameters == again
    return found


_CHECKS = (everything_sent, nothing_lost, followed, refusals)


def test_two_processes(tmp_path: Path) -> None:
    results = run_ranks(all_of_it, WORLD, tmp_path)
    for each in results:
        assert each["everything_sent"]
        assert each["nothing_lost"] < 1e-14
        assert each["followed"]
        assert "must call consolidate()" in each["refusals"][0]
        assert "'9.values', which it has not" in each["refusals"][1]
        assert "'0.bias' of shape (3,) instead of (16,)" in each["refusals"][2]
        assert "hook" in each["refusals"][3]
        for algorithm in ("SET", "RigL"):
            parameters, as_resumed = each[algorithm]
            assert as_resumed
            assert parameters == results[0][algorithm][0]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None])
def test_a_model_that_is_not_wrapped_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="model must be a DistributedDataParallel, got"):
        TopKCompression(model)
