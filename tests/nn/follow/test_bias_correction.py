"""Adam's bias correction by the age of each connection, beside one Adam for each weight."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparselab
from sparselab import BlockSparseLinear, MaskedLinear, SparseLinear
from sparselab.nn.follow import bias_correction
from sparselab.nn.follow.bias_correction import AGE

ADAMS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {}),
    "Adam, decayed": (torch.optim.Adam, {"weight_decay": 0.1}),
    "Adam, amsgrad": (torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.95)}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True, "betas": (0.9, 0.95)}),
    "AdamW, foreach, up": (torch.optim.AdamW, {"foreach": True, "maximize": True}),
    "AdamW, rate in a tensor": (torch.optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    "NAdam": (torch.optim.NAdam, {}),
    "NAdam, decayed": (torch.optim.NAdam, {"weight_decay": 0.1, "maximize": True}),
    "NAdam, decoupled": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"betas": (0.9, 0.99)}),
    "RAdam, decayed": (torch.optim.RAdam, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.1}),
}
BETAS = [(0.9, 0.999), (0.9, 0.99), (0.9, 0.95)]
SHAPE = (6, 8)
N = SHAPE[0] * SHAPE[1]


def gradient_of(step: int) -> torch.Tensor:
    return torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


class OneEach:
    """An optimizer for each position of a dense matrix, made anew when a connection grows there."""

    def __init__(self, weights: torch.Tensor, live: set[int], kind: Any, settings: dict[str, Any]) -> None:
        self.weights, self.live = weights.clone(), live
        self._kind, self._settings = kind, settings
        self._own: dict[int, tuple[torch.nn.Parameter, torch.optim.Optimizer]] = {}
        for position in live:
            self._begin(position, self.weights[position])

    def _begin(self, position: int, weight: Any) -> None:
        parameter = torch.nn.Parameter(torch.as_tensor(weight, dtype=torch.float64).reshape(1).clone())
        self._own[position] = parameter, self._kind([parameter], **self._settings)

    def step(self, gradient: torch.Tensor) -> None:
        for position in self.live:
            parameter, optimizer = self._own[position]
            parameter.grad = gradient[position].reshape(1).clone()
            optimizer.step()
            self.weights[position] = parameter.item()

    def follow(self, live: set[int]) -> None:
        for position in live - self.live:
            self.weights[position] = 0.0
            self._begin(position, 0.0)
        self.live = live


def make(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    layers: dict[str, Any] = {
        "single": lambda: SparseLinear(SHAPE[1], SHAPE[0], sparsity=0.5, bias=False, dtype=dtype),
        "fan-in": lambda: sparselab.FanInLinear(SHAPE[1], SHAPE[0], sparsity=0.5, bias=False, dtype=dtype),
        "blocks": lambda: BlockSparseLinear(
            SHAPE[1], SHAPE[0], sparsity=0.5, block_shape=(2, 4), bias=False, dtype=dtype
        ),
        "masked": lambda: MaskedLinear(SHAPE[1], SHAPE[0], sparsity=0.5, bias=False, dtype=dtype),
    }
    torch.manual_seed(0)
    return layers[kind]()


def dense(layer: Any) -> torch.Tensor:
    """All weights of the matrix, in a row."""
    return layer.to_dense().weight.detach().reshape(-1)


def live_positions(layer: Any) -> set[int]:
    return {int(position) for position in positions(layer)}


def positions(layer: Any) -> np.ndarray:
    """Of all weights, slot by slot."""
    height, width = layer.block_shape
    row, column = np.divmod(layer.positions().numpy(), layer.grid[1])
    rows = row[:, None, None] * height + np.arange(height)[:, None]
    return (rows * SHAPE[1] + column[:, None, None] * width + np.arange(width)).reshape(-1)


def give_gradient(layer: Any, gradient: torch.Tensor) -> None:
    if isinstance(layer, MaskedLinear):
        layer.stored.grad = (gradient.view(SHAPE) * layer.mask).to(layer.stored.dtype)
    else:
        layer.stored.grad = gradient[positions(layer)].view_as(layer.stored).to(layer.stored.dtype)


def train(layer: Any, kind: Any, settings: dict[str, Any], steps: int, every: int) -> None:
    """A layer by one optimizer beside one for each of its weights."""
    optimizer = kind(layer.parameters(), **settings)
    scope: Any = "row" if isinstance(layer, sparselab.FanInLinear) else "layer"
    algorithm = sparselab.SET(drop_fraction=0.5, update_freq=every, scope=scope)
    layer.apply(algorithm)
    twin = OneEach(dense(layer).double(), live_positions(layer), kind, settings)
    for step in range(1, steps + 1):
        give_gradient(layer, gradient_of(step))
        optimizer.step()
        twin.step(gradient_of(step))
        algorithm.step()
        twin.follow(live_positions(layer))
        weights = dense(layer).double()
        live = sorted(twin.live)
        # Of NAdam, torch holds a product of the momentums in float32.
        exact = 1e-8 if kind is torch.optim.NAdam else 1e-12
        tolerance = exact if layer.stored.dtype == torch.float64 else 3e-5
        torch.testing.assert_close(weights[live], twin.weights[live], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ADAMS)
def test_every_connection_moves_as_if_it_were_alone(name: str) -> None:
    kind, settings = ADAMS[name]
    train(make("single"), kind, {"lr": 0.01, **settings}, steps=30, every=4)


@pytest.mark.parametrize("layer", ["fan-in", "blocks", "masked"])
def test_so_do_those_of_other_layers(layer: str) -> None:
    train(make(layer), torch.optim.AdamW, {"lr": 0.01}, steps=16, every=3)


@pytest.mark.parametrize("betas", BETAS)
def test_in_float32(betas: tuple[float, float]) -> None:
    train(make("single", torch.float32), torch.optim.AdamW, {"lr": 0.01, "betas": betas}, steps=40, every=7)


@settings(max_examples=20)
@given(every=st.integers(1, 9), first=st.integers(0, 12), fraction=st.floats(0.1, 0.9))
def test_whenever_they_grow(every: int, first: int, fraction: float) -> None:
    layer = make("single")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    twin = OneEach(dense(layer), live_positions(layer), torch.optim.Adam, {"lr": 0.01})
    algorithm = sparselab.SET(drop_fraction=fraction, update={"start": first + 1, "freq": every})
    layer.apply(algorithm)
    for step in range(1, 25):
        give_gradient(layer, gradient_of(step))
        optimizer.step()
        twin.step(gradient_of(step))
        algorithm.step()
        twin.follow(live_positions(layer))
    live = sorted(twin.live)
    torch.testing.assert_close(dense(layer)[live], twin.weights[live])


@pytest.mark.parametrize("betas", BETAS)
def test_a_grown_connection_never_moves_further_than_the_rate(betas: tuple[float, float]) -> None:
    """By the optimizer's step it does, up to 6.6 times; shown, so that this can fail."""

    def furthest(grown_state: str) -> float:
        layer = make("single", torch.float32)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, betas=betas)
        algorithm = sparselab.SET(drop_fraction=0.5, update={"steps": [1000]}, grown_state=grown_state)
        layer.apply(algorithm)
        longest = 0.0
        for step in range(1, 1040):
            layer.stored.grad = torch.ones_like(layer.stored)
            before = layer.stored.detach().clone()
            optimizer.step()
            if step > 1000:
                longest = max(longest, (layer.stored.detach() - before).abs().max().item())
            algorithm.step()
        return longest / 0.01

    assert furthest("young") == pytest.approx(1, rel=1e-3)
    assert furthest("zero") > {0.999: 5, 0.99: 2, 0.95: 1.05}[betas[1]]


@pytest.mark.parametrize("name", ADAMS)
def test_survivors_move_as_before_to_the_bit(name: str) -> None:
    kind, settings = ADAMS[name]
    found = []
    for grown_state in ("young", "zero"):
        layer = make("single", torch.float32)
        apart = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([*layer.parameters(), apart], **{**settings, "lr": 0.01})
        algorithm = sparselab.SET(drop_fraction=0.4, update={"steps": [3, 7]}, grown_state=grown_state)
        layer.apply(algorithm)
        grown: set[int] = set()
        for step in range(1, 20):
            give_gradient(layer, gradient_of(step))
            apart.grad = gradient_of(step)[:3].float()
            optimizer.step()
            before = set(layer.positions().tolist())
            algorithm.step()
            grown |= set(layer.positions().tolist()) - before
        old = [position not in grown for position in layer.positions().tolist()]
        assert 0 < sum(old) < len(old)
        found.append((layer.positions()[old], layer.stored.detach().reshape(-1)[old], apart.detach().clone()))
    # The draws are the same, and what drops at step 7 is, too, unless a young one is the difference.
    both = np.intersect1d(found[0][0], found[1][0])
    for a, b in zip(*(values[np.isin(where, both)] for where, values, _ in found), strict=True):
        assert a.item() == b.item()
    assert torch.equal(found[0][2], found[1][2])


def test_moves_of_the_young_may_grow_over_some_steps() -> None:
    layer = make("single", torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, eps=0)
    algorithm = sparselab.SET(drop_fraction=0.5, update={"steps": [5]}, grown_state=sparselab.Young(warmup=4))
    layer.apply(algorithm)
    for step in range(1, 13):
        layer.stored.grad = torch.ones_like(layer.stored)
        young = optimizer.state[layer.stored].get(AGE, torch.zeros(1)).reshape(-1) > 0
        before = layer.stored.detach().reshape(-1).clone()
        optimizer.step()
        moves = (before - layer.stored.detach().reshape(-1)) / 0.01
        if step > 5:
            assert young.any()
            assert moves[young].numpy() == pytest.approx(min((step - 5) / 4, 1))
            assert moves[~young].numpy() == pytest.approx(1)
        algorithm.step()


def run_on(state: dict[str, Any] | None, steps: range) -> tuple[Any, dict[str, Any], torch.Tensor]:
    layer = make("single", torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    algorithm = sparselab.SET(drop_fraction=0.5, update_freq=4)
    algorithm.attach(layer, optimizer)
    if state is not None:
        layer.load_state_dict(state["layer"])
        optimizer.load_state_dict(state["optimizer"])
        algorithm.load_state_dict(state["algorithm"])
    for step in steps:
        give_gradient(layer, gradient_of(step))
        optimizer.step()
    saved = {
        "layer": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "algorithm": algorithm.state_dict(),
    }
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return optimizer, torch.load(file, weights_only=False), layer.stored.detach().clone()


@pytest.mark.parametrize("at", [4, 6])
def test_a_run_goes_on_as_if_it_had_not_been_saved(at: int) -> None:
    _, _, whole = run_on(None, range(1, 20))
    _, saved, _ = run_on(None, range(1, at + 1))
    _, _, resumed = run_on(saved, range(at + 1, 20))
    assert torch.equal(resumed, whole)


def test_ages_take_two_bytes_for_each_connection_and_end() -> None:
    layer = make("single", torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, betas=(0.5, 0.5))
    layer.apply(algorithm := sparselab.SET(drop_fraction=0.5, update={"steps": [2]}))
    for step in range(1, 5):
        give_gradient(layer, gradient_of(step))
        optimizer.step()
        algorithm.step()
    ages = optimizer.state[layer.stored][AGE]
    assert ages.nbytes == 2 * layer.nnz
    assert sorted(set(ages.reshape(-1).tolist())) == [0, 3]
    for step in range(5, 80):  # 0.5 to the power of what is left is nothing
        give_gradient(layer, gradient_of(step))
        optimizer.step()
    assert set(optimizer.state[layer.stored]) == {"step", "exp_avg", "exp_avg_sq"}


def test_what_never_grew_has_no_ages() -> None:
    layer = make("single", torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer.apply(sparselab.Static())
    give_gradient(layer, gradient_of(1))
    optimizer.step()
    assert AGE not in optimizer.state[layer.stored]


def test_no_step_is_no_age() -> None:
    layer = make("single", torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer.apply(algorithm := sparselab.SET(drop_fraction=0.5, update={"steps": [1]}))
    give_gradient(layer, gradient_of(1))
    optimizer.step()
    algorithm.step()
    before = optimizer.state[layer.stored][AGE].clone()
    layer.stored.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[layer.stored][AGE], before)
    give_gradient(layer, gradient_of(2))
    optimizer.step()
    assert torch.equal(optimizer.state[layer.stored][AGE], torch.where(before > 0, before + 1, 0))


class Mine(torch.optim.Adam):
    """Steps in a way of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Named(torch.optim.AdamW):
    """Steps as its class does."""


@pytest.mark.parametrize(
    ("optimizer", "knows"),
    [(Named, True), (Mine, False), (torch.optim.SGD, False), (torch.optim.RMSprop, False)],
)
def test_optimizers_that_are_not_known_are_left_alone(optimizer: Any, knows: bool) -> None:
    layer = make("single", torch.float32)
    made = optimizer(layer.parameters(), lr=0.01)
    layer.apply(algorithm := sparselab.SET(drop_fraction=0.5, update={"steps": [2]}))
    for step in range(1, 4):
        give_gradient(layer, gradient_of(step))
        made.step()
        algorithm.step()
    assert (bias_correction.rule_of(made) is not None) == knows
    assert (AGE in made.state[layer.stored]) == knows


def test_means_are_as_old_as_those_they_are_of() -> None:
    layer = make("single", torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer.apply(algorithm := sparselab.SET(drop_fraction=0.5, update={"steps": [2]}, grown_state="mean"))
    for step in range(1, 4):
        give_gradient(layer, gradient_of(step))
        optimizer.step()
        algorithm.step()
    assert AGE not in optimizer.state[layer.stored]


def test_copies_of_a_run_go_on_alike() -> None:
    layer = make("single", torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer.apply(algorithm := sparselab.SET(drop_fraction=0.5, update={"steps": [2]}))
    for step in range(1, 4):
        give_gradient(layer, gradient_of(step))
        optimizer.step()
        algorithm.step()
    other_layer, other = copy.deepcopy((layer, optimizer))
    for own, its in ((layer, optimizer), (other_layer, other)):
        for step in range(4, 9):
            give_gradient(own, gradient_of(step))
            its.step()
    assert torch.equal(layer.stored, other_layer.stored)


def test_a_beta_that_remembers_longer_than_ages_count() -> None:
    factors = bias_correction._factors(
        bias_correction._RULES[torch.optim.Adam],
        (("betas", (0.9, 0.9999)), ("eps", 1e-8)),
        np.dtype(np.float64),
    )
    assert len(factors.B) == np.iinfo(np.int16).max
    assert 1 / factors.B[-1] == pytest.approx(math.sqrt(1 - 0.9999**32766))
    assert 0.98 < 1 / factors.B[-1] < 0.982


def test_warmup_must_be_a_count() -> None:
    with pytest.raises(ValueError, match="warmup must be at least 0, got -1"):
        sparselab.Young(warmup=-1)
    with pytest.raises(TypeError, match=r"warmup must be an integer, got 1\.5"):
        sparselab.Young(warmup=1.5)  # type: ignore[arg-type]
