"""Forward passes computed as measured; the clock of these tests is theirs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import MaskedLinear, SparseLinear, tune
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS
from sparselab.nn.models import tune as _tune
from sparselab.nn.ops.cpu import csr
from sparselab.nn.ops.cpu.programs import rows as programs
from sparselab.nn.ops.cpu.variants import FORWARD, Measured, possible
from tests.nn.layers.test_linear import check_gradients, dense_weight
from tests.oracle import assert_close, product

FEW, TILES, DENSE = FORWARD


class Clock:
    """Lets every variant take as long as it is told, and every product compute what it does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.microseconds: Mapping[str, float] = {}
        self.runs: list[tuple[int, str]] = []
        patch.setattr(_tune, "perf_counter", lambda: self.now)
        ways = SparseLinear.ways
        patch.setattr(SparseLinear, "ways", lambda layer, x: self.slowed(ways(layer, x), len(x)))

    def slowed(self, runs: dict[str, Callable[[], Tensor]], n_tokens: int) -> dict[str, Callable[[], Tensor]]:
        def slow(name: str) -> Tensor:
            self.now += 1e-6 * self.microseconds[name]
            self.runs.append((n_tokens, name))
            return runs[name]()

        return {name: partial(slow, name) for name in runs}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the variants that compute what is computed from now on."""
    names: list[str] = []

    def noting(run: Callable[..., None], name: str) -> Callable[..., None]:
        def noted(*arguments: Any) -> None:
            names.append(name)
            run(*arguments)

        return noted

    for module, function, name in (
        (csr, "multiply_skinny", FEW),
        (csr, "multiply_cut", TILES),
        (csr, "expand_rows", DENSE),
        (programs, "add_skinny", FEW),  # when a program is made
        (programs, "add_multiply", TILES),
    ):
        monkeypatch.setattr(module, function, noting(getattr(module, function), name))
    return names


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("n_tokens", [1, 2, 16, MOST_TOKENS, MOST_TOKENS + 1, 70])
def test_every_variant_equals_the_oracle(
    n_tokens: int, sparsity: float, bias: bool, taken: list[str]
) -> None:
    layer = SparseLinear(37, 21, bias, sparsity=sparsity)
    x = torch.randn(n_tokens, 37)
    offset = layer.bias.detach() if layer.bias is not None else None
    exact = product(dense_weight(layer).numpy(), x.numpy().T, bias=offset)
    for run in layer.ways(x).values():
        y = run().detach()
        assert_close(y.numpy().T, exact, y.numpy().dtype)
    assert tuple(taken) == possible(n_tokens)
    assert possible(n_tokens) == (FORWARD if n_tokens <= MOST_TOKENS else (TILES, DENSE))


@pytest.mark.parametrize("fastest", FORWARD)
def test_a_layer_computes_as_measured_and_says_so(fastest: str, clock: Clock, taken: list[str]) -> None:
    layer = SparseLinear(37, 21, sparsity=0.5)
    clock.microseconds = {name: 41.0 if name == fastest else 63.0 for name in FORWARD}
    report = tune(layer, n_tokens=[9])
    assert report.products[0].name == fastest
    assert layer.variant(9)[:2] == ("forward", fastest)
    assert layer.variant(9).reason.startswith("measured: 41 us against 63 us (")
    assert layer.variant(9, "values_grad").name == TILES
    assert tune(layer, n_tokens=[9]).products[0].rule == FEW
    taken.clear()
    x, dy = torch.randn(9, 37, requires_grad=True), torch.randn(9, 21)
    with torch.inference_mode():
        layer(x)
    y = layer(x)
    assert taken == [fastest] * 2
    y.backward(dy)
    check_gradients(layer, x, y, dy)


def test_variants_are_timed_in_turns(clock: Clock) -> None:
    clock.microseconds = {FEW: 20_000.0, TILES: 1.0, DENSE: 1.0}
    tune(SparseLinear(8, 8), n_tokens=(4, 40))
    turn = [name for name in FORWARD for _ in range(2)]  # each once untimed
    assert [name for n, name in clock.runs if n == 4] == [*FORWARD, *FORWARD, *turn * 5]
    assert len([name for n, name in clock.runs if n == 40]) == 2 * (2 + 2 * 51)


def test_a_measurement_holds_for_counts_near_it() -> None:
    most = MOST_TOKENS
    measured = Measured(0.5, {
        1: {FEW: 2.0, TILES: 1.0, DENSE: 3.0},
        most: {FEW: 1.0, TILES: 3.0, DENSE: 2.0},
        8 * most: {TILES: 2.0, DENSE: 1.0},
    })  # fmt: skip
    expected = {
        0: None, 1: TILES, 2: TILES, 3: None, most // 2 - 1: None, most // 2: FEW, most: FEW, most + 1: DENSE,
        2 * most: DENSE, 2 * most + 1: None, 4 * most - 1: None, 4 * most: DENSE, 16 * most: DENSE,
        16 * most + 1: None,
    }  # fmt: skip
    assert {n: measured.name(n) for n in expected} == expected
    assert measured.reason(most + 1) == f"measured: 2.0 us against 3.0 us (tiles), at {most} tokens"
    assert measured.reason(8 * most) == "measured: 1.0 us against 2.0 us (tiles)"


def test_what_is_far_from_the_measured_goes_by_the_rule(clock: Clock) -> None:
    clock.microseconds = {FEW: 3.0, TILES: 2.0, DENSE: 1.0}
    layer = SparseLinear(37, 21, sparsity=0.9)
    tune(layer, n_tokens=[4])
    assert layer.variant(8).name == DENSE
    assert layer.variant(9) == SparseLinear(37, 21, sparsity=0.9).variant(9)


def test_another_density_forgets_and_the_same_one_does_not(clock: Clock, taken: list[str]) -> None:
    clock.microseconds = {FEW: 3.0, TILES: 2.0, DENSE: 1.0}
    layer = SparseLinear(37, 21, sparsity=0.5)
    tune(layer, n_tokens=[4])
    taken.clear()
    drop = torch.arange(3)
    free = torch.tensor(sorted(set(range(37 * 21)) - set(layer.positions().tolist()))[:3])
    layer.rewrite(drop, free)
    layer(torch.randn(4, 37))
    layer.rewrite(drop, free[:0])
    layer(torch.randn(4, 37))
    assert taken == [DENSE, FEW]
    assert layer.variant(4).reason == SparseLinear(37, 21).variant(4).reason


def test_a_measurement_is_neither_copied_nor_saved(clock: Clock) -> None:
    clock.microseconds = {FEW: 3.0, TILES: 2.0, DENSE: 1.0}
    layer = SparseLinear(37, 21)
    keys = set(layer.state_dict())
    tune(layer, n_tokens=[4])
    assert set(layer.state_dict()) == keys
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.variant(4).name == FEW
    assert layer.variant(4).name == DENSE


def test_layers_alike_are_measured_once_and_the_table_says_which(clock: Clock) -> None:
    clock.microseconds = {FEW: 9.0, TILES: 1234.5, DENSE: 2000.0}
    model = nn.Sequential(
        SparseLinear(8, 8), nn.ReLU(), SparseLinear(8, 8), SparseLinear(8, 8, sparsity=0.5),
        MaskedLinear(8, 8), SparseLinear(8, 6, dtype=torch.float64),
    )  # fmt: skip
    report = tune(model, n_tokens=(40, 1, 1))
    assert [(each.layers, each.n_tokens) for each in report.products] == [
        (("0", "2"), 1), (("0", "2"), 40), (("3",), 1), (("3",), 40), (("5",), 1), (("5",), 40)
    ]  # fmt: skip
    assert all(model[k].variant(1).reason.startswith("measured") for k in (0, 2, 3, 5))
    lines = [line.split("  ") for line in str(report).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["layer", "shape", "tokens", *FORWARD, "fastest", "by rule"]
    assert cells[1] == ["0 and 1 more", "8 x 8", "1", "9.0", "1,234.5", "2,000.0", FEW, FEW]
    assert cells[2] == ["0 and 1 more", "8 x 8", "40", "-", "1,234.5", "2,000.0", TILES, TILES]


def test_measuring_draws_nothing_and_keeps_no_plan() -> None:
    layer = SparseLinear(40, 30)
    state = torch.get_rng_state()
    report = tune(layer, n_tokens=[1, 40])
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.plan_bytes() == 0
    for each in report.products:
        assert set(each.microseconds) == set(possible(each.n_tokens))
        assert each.microseconds[each.name] == min(each.microseconds.values()) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_measured_too(dtype: torch.dtype) -> None:
    layer = SparseLinear(40, 30).to(dtype)
    x = torch.randn(4, 40, dtype=dtype)
    before = layer(x).detach()
    tune(layer, n_tokens=[4])
    torch.testing.assert_close(layer(x).detach(), before)
    assert layer.variant(4).reason.startswith("measured")


@pytest.mark.parametrize(
    ("model", "n_tokens", "error", "message"),
    [
        (SparseLinear(4, 4), [], ValueError, "n_tokens must have at least one count"),
        (SparseLinear(4, 4), [0], ValueError, "n_tokens must be positive, got 0"),
        (SparseLinear(4, 4), [1.5], TypeError, "n_tokens must be an integer, got 1.5"),
        (nn.Sequential(nn.Linear(4, 4)), [1], ValueError, "a SparseLinear to tune, got a Sequential without"),
        (
            nn.Sequential(SparseLinear(4, 4), SparseLinear(4, 4, device="meta")), [1], ValueError,
            "got '1' on the device meta",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_named(
    model: nn.Module, n_tokens: Any, error: type[Exception], message: str, clock: Clock
) -> None:
    with pytest.raises(error, match=message):
        tune(model, n_tokens)
    assert clock.runs == []
