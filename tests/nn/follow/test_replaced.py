"""Connections replaced by loading or drawing anew: gradient and optimizer state go with their positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselab import (
    SET,
    BlockSparseLinear,
    DeepR,
    FanInLinear,
    MaskedLinear,
    RigL,
    SparseConv2d,
    SparseLinear,
    copy_topology,
)
from sparselab.nn.follow.replaced import difference, sources

KINDS: dict[str, Callable[[float], Any]] = {
    "single": lambda s: SparseLinear(16, 12, sparsity=s, dtype=torch.float64),
    "fan-in": lambda s: FanInLinear(16, 12, sparsity=s, dtype=torch.float64),
    "blocks": lambda s: BlockSparseLinear(16, 12, sparsity=s, block_shape=(4, 2), dtype=torch.float64),
    "conv": lambda s: SparseConv2d(4, 6, 3, sparsity=s, dtype=torch.float64),
    "masked": lambda s: MaskedLinear(16, 12, sparsity=s, dtype=torch.float64),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def made(kind: str, sparsity: float, seed: int) -> Any:
    torch.manual_seed(seed)
    return KINDS[kind](sparsity)


def batch(layer: Any) -> Tensor:
    if isinstance(layer, SparseConv2d):
        return torch.randn(3, 4, 5, 5, dtype=torch.float64)
    return torch.randn(5, 16, dtype=torch.float64)


def trained(layer: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layer(batch(layer)).square().sum().backward()
        optimizer.step()


def by_position(layer: Any, entries: Tensor) -> dict[int, list[float]]:
    numbers = layer.per_connection(entries).reshape(layer.nnz, -1).tolist()
    return dict(zip(layer.positions().tolist(), numbers, strict=True))


def moments(layer: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[int, list[float]]]:
    state = optimizer.state[layer.stored]
    return {
        name: by_position(layer, entry)
        for name, entry in state.items()
        if isinstance(entry, Tensor) and entry.shape == layer.stored.shape and entry.is_floating_point()
    }


def expected(before: dict[int, list[float]], layer: Any) -> dict[int, list[float]]:
    width = len(next(iter(before.values())))
    return {at: before.get(at, [0.0] * width) for at in layer.positions().tolist()}


def mask_of(layer: Any) -> np.ndarray[Any, Any]:
    mask = np.zeros(layer.shape, bool)
    dense = layer.to_dense().weight.detach().reshape(layer.shape)
    mask[(dense != 0).numpy()] = True
    return mask


REPLACE: dict[str, Callable[[Any, Any], object]] = {
    "load_state_dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "set_topology": lambda layer, other: layer.set_topology(mask_of(other)),
    "reset_parameters": lambda layer, other: layer.reset_parameters(),
    "copy_topology": lambda layer, other: copy_topology(layer, other),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("sparsity", [0.5, 0.25], ids=["as many", "more"])
@pytest.mark.parametrize("how", REPLACE)
@pytest.mark.parametrize("kind", KINDS)
def test_state_follows_by_position(kind: str, how: str, sparsity: float, optimizer_name: str) -> None:
    layer, other = made(kind, 0.5, 0), made(kind, sparsity, 1)
    optimizer = OPTIMIZERS[optimizer_name](layer.parameters())
    trained(layer, optimizer)
    before, gradient = moments(layer, optimizer), by_position(layer, layer.stored.grad)
    old = layer.positions().tolist()
    assert before
    if kind == "blocks" and how == "set_topology":
        layer.load_state_dict(other.state_dict())  # whole blocks, with their zeros
        layer.stored.grad = None
    else:
        REPLACE[how](layer, other)
    assert layer.positions().tolist() != old
    after = moments(layer, optimizer)
    assert after.keys() == before.keys()
    for name, numbers in after.items():
        assert numbers == expected(before[name], layer)
        assert any(any(entry) for entry in numbers.values()), "nothing survived: the test shows nothing"
    if how == "set_topology":
        assert layer.stored.grad is None
    else:
        assert by_position(layer, layer.stored.grad) == expected(gradient, layer)
    trained(layer, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_loaded_is_of_the_connections_loaded_with_it(kind: str) -> None:
    """Back to the best step: model and optimizer, in either order, and on from there as the first time."""
    layer = made(kind, 0.5, 0)
    optimizer = torch.optim.Adam(layer.parameters())
    trained(layer, optimizer)
    best = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    kept = moments(layer, optimizer)
    for first in ("model", "optimizer"):
        layer.reset_parameters()
        trained(layer, optimizer)
        for what in (first, "optimizer" if first == "model" else "model"):
            if what == "model":
                layer.load_state_dict(best[0])
            else:  # of which torch keeps the tensors
                optimizer.load_state_dict(copy.deepcopy(best[1]))
        assert moments(layer, optimizer) == kept
        trained(layer, optimizer)


def test_the_same_connections_leave_everything_as_it_is() -> None:
    layer = made("single", 0.5, 0)
    optimizer = torch.optim.Adam(layer.parameters())
    trained(layer, optimizer)
    gradient, kept = layer.weight_values.grad, optimizer.state[layer.weight_values]["exp_avg"]
    numbers = kept.clone()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert layer.weight_values.grad is gradient
    assert optimizer.state[layer.weight_values]["exp_avg"] is kept
    assert torch.equal(kept, numbers)


def test_state_that_cannot_follow_begins_anew() -> None:
    """As of an optimizer of the last fold, which somebody still holds."""
    layer = made("masked", 0.5, 0)
    optimizer = torch.optim.Adafactor([layer.stored])
    layer(batch(layer)).sum().backward()
    optimizer.step()
    assert layer.stored in optimizer.state
    layer.reset_parameters()
    assert layer.stored not in optimizer.state
    optimizer.step()


def test_a_best_model_comes_back_in_the_middle_of_a_run() -> None:
    """Of another number of connections, under an algorithm and Adam; the masked twin does the same."""
    runs = []
    for layer_class in (SparseLinear, MaskedLinear):
        torch.manual_seed(0)
        layer = layer_class(16, 12, sparsity=0.5, dtype=torch.float64)
        torch.manual_seed(1)
        other = layer_class(16, 12, sparsity=0.6, dtype=torch.float64).state_dict()
        optimizer = torch.optim.Adam(layer.parameters())
        layer.apply(algorithm := RigL(update_freq=3))
        for step in range(40):
            if step == 17:
                layer.load_state_dict(other)
            trained(layer, optimizer, 1)
            algorithm.step()
        runs.append((layer.positions(), layer.to_dense().weight, moments(layer, optimizer)))
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1])
    assert len(runs[0][0]) == round(0.4 * 16 * 12)


def test_what_an_algorithm_keeps_for_connections_follows() -> None:
    layer, other = made("single", 0.5, 0), made("single", 0.4, 1)
    algorithm = DeepR(update_freq=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    algorithm.attach(layer, optimizer)
    trained(layer, optimizer, 5)
    (part,) = [part for part in algorithm.parts.values() if hasattr(part, "_signs")]
    before = dict(zip(layer.positions().tolist(), part._signs[0].tolist(), strict=True))
    layer.load_state_dict(other.state_dict())
    after = dict(zip(layer.positions().tolist(), part._signs[0].tolist(), strict=True))
    assert all(after[at] == sign for at, sign in before.items() if at in after)
    assert set(after.values()) <= {-1, 1}
    trained(layer, optimizer, 5)
    algorithm.detach()
    assert layer.storage.follower is None


def test_nobody_is_kept_alive_by_a_layer() -> None:
    layer = made("single", 0.5, 0)
    layer.apply(SET())
    layer.load_state_dict(made("single", 0.5, 1).state_dict())  # its algorithm is gone


@pytest.mark.parametrize("seed", range(20))
def test_slots_and_differences_are_those_of_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = (np.sort(rng.choice(20, rng.integers(0, 12), replace=False)) for _ in range(2))
    before, after = torch.from_numpy(old), torch.from_numpy(new)
    found = sources(before, after)
    wanted = [old.tolist().index(at) if at in old else -1 for at in new]
    assert (found is None) == (old.tolist() == new.tolist())
    assert found is None or found.tolist() == wanted
    drop, grow = difference(before, after)
    assert drop.tolist() == [slot for slot, at in enumerate(old) if at not in new]
    assert grow.tolist() == [at for at in new if at not in old]
