"""memory_report against numbers counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparselab import SparseLinear, memory_report
from sparselab.nn import MemoryReport

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: int) -> None:
    model(torch.randn(3, inputs)).square().sum().backward()
    optimizer.step()


def test_a_dense_model_is_its_own_dense_model() -> None:
    report = memory_report(nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20)))
    weights = 4 * (620 + 20 + 20 + 20 + 20) + 8  # running mean and variance, and how many batches they saw
    assert (report.weight_bytes, report.dense_weight_bytes) == (weights, weights)
    assert (report.parameters_live, report.parameters_dense) == (660, 660)
    assert report.training_bytes == weights


@pytest.mark.parametrize(
    ("inputs", "column_bytes", "dtype", "value_bytes"),
    [(100, 2, torch.float32, 4), (65_536, 2, torch.float32, 4), (65_537, 4, torch.float64, 8)],
)
def test_a_sparse_layer(inputs: int, column_bytes: int, dtype: torch.dtype, value_bytes: int) -> None:
    layer = SparseLinear(inputs, 10, sparsity=0.9, dtype=dtype)
    report = memory_report(layer)
    assert report.parameters_live == layer.nnz + 10
    assert report.parameters_dense == inputs * 10 + 10
    assert report.weight_bytes == layer.nnz * (value_bytes + column_bytes) + 11 * 8 + 10 * value_bytes
    assert report.dense_weight_bytes == (inputs * 10 + 10) * value_bytes


#: Bytes of state beside the step counters, per float32 parameter.
OPTIMIZERS: dict[str, tuple[Make, int, int]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), 0, 0),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, 0),
    "AdamW": (lambda p: torch.optim.AdamW(p), 8, 4),
    "AMSGrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), 12, 4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step(name: str) -> None:
    make, per_number, per_parameter = OPTIMIZERS[name]
    model = nn.Sequential(SparseLinear(30, 20, sparsity=0.9), nn.Linear(20, 5, bias=False))
    optimizer = make(list(model.parameters()))
    numbers = 60 + 20 + 100
    before = memory_report(model, optimizer)
    assert (before.gradient_bytes, before.plan_bytes, before.optimizer_bytes) == (0, 0, 0)
    assert before.training_bytes == before.weight_bytes
    train(model, optimizer, 30)
    after = memory_report(model, optimizer)
    assert after.weight_bytes == before.weight_bytes
    assert after.gradient_bytes == 4 * numbers
    assert after.optimizer_bytes == per_number * numbers + per_parameter * 3
    parts = after.weight_bytes + after.gradient_bytes + after.plan_bytes + after.optimizer_bytes
    assert after.training_bytes == parts
    optimizer.zero_grad()
    assert memory_report(model, optimizer).gradient_bytes == 0


def test_state_in_lists_is_found() -> None:
    layer = SparseLinear(30, 20, sparsity=0.9, bias=False)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = layer(torch.ones(1, 30)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    entries = list(optimizer.state[layer.weight_values].values())
    lists = [entry for entry in entries if isinstance(entry, list)]
    assert any(tensor is not None and torch.is_tensor(tensor) for entry in lists for tensor in entry)
    report = memory_report(layer, optimizer)
    assert report.optimizer_bytes > sum(entry.nbytes for entry in entries if torch.is_tensor(entry))


def test_several_optimizers_add_up() -> None:
    model = nn.ModuleList([SparseLinear(30, 20, sparsity=0.9), nn.Linear(4, 5)])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in model]
    for part, optimizer, inputs in zip(model, optimizers, (30, 4), strict=True):
        train(part, optimizer, inputs)
    assert memory_report(model, optimizers).optimizer_bytes == 4 * (60 + 20) + 4 * 25


def test_plans_come_with_the_passes_that_need_them() -> None:
    layer = SparseLinear(300, 200, sparsity=0.9)
    held = [memory_report(layer).plan_bytes]
    with torch.no_grad():
        layer(torch.randn(40, 300))
    held.append(memory_report(layer).plan_bytes)
    layer(torch.randn(40, 300)).sum().backward()
    held.append(memory_report(layer).plan_bytes)
    layer(torch.randn(40, 300, requires_grad=True)).sum().backward()
    held.append(memory_report(layer).plan_bytes)
    assert held[0] == 0
    assert held == sorted(set(held))
    # The transpose plan alone is a 2-byte row per connection, and where its columns begin.
    assert held[3] - held[2] >= 2 * layer.nnz + 4 * 300
    layer.rewrite(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    layer(torch.randn(40, 300)).sum().backward()
    assert memory_report(layer).plan_bytes == held[2]


def test_shared_layers_and_weights_count_once() -> None:
    shared = SparseLinear(30, 30, sparsity=0.9)
    assert memory_report(nn.Sequential(shared, nn.ReLU(), shared)) == memory_report(shared)
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    report = memory_report(nn.ModuleList([embedding, head]))
    assert (report.parameters_live, report.weight_bytes, report.dense_weight_bytes) == (28, 112, 112)


def test_a_model_without_memory_reports_what_it_would_take() -> None:
    with torch.device("meta"):
        planned = memory_report(nn.Sequential(SparseLinear(30, 20), nn.Linear(20, 5)))
    assert planned == memory_report(nn.Sequential(SparseLinear(30, 20), nn.Linear(20, 5)))
    assert planned.weight_bytes > 0


def test_a_model_without_parameters() -> None:
    report = memory_report(nn.ReLU())
    assert report == MemoryReport(0, 0, 0, 0, 0, 0, 0)
    assert "100.0% of dense" in str(report)


def test_the_table_says_what_was_counted() -> None:
    text = str(MemoryReport(1_000, 20_000, 6_000, 80_000, 4_000, 7_000, 8_000))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["parameters", "1,000", "of", "20,000", "dense"]
    assert lines[1] == ["weights", "6,000", "B,", "7.5%", "of", "dense"]
    assert [line[-2] for line in lines[2:]] == ["4,000", "7,000", "8,000", "25,000"]
