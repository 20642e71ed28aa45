import functools
import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.dst import (
    Constant,
    Cosine,
    Cycling,
    Exponential,
    Linear,
    Polynomial,
    Schedule,
    Sigmoid,
    as_schedule,
)

FRACTIONS = st.floats(0, 1)
#: What a schedule between two values is made from.
SHAPES = {
    "Linear": lambda init, final: Linear(init, final, 97),
    "Polynomial": lambda init, final: Polynomial(init, final, 97, start=3),
    "Sigmoid": lambda init, final: Sigmoid(init, final, 97, start=3),
    "Exponential": lambda init, final: Exponential(init, 0.9, final),
}


def test_constant_does_not_move():
    assert [Constant(0.3)(step) for step in (0, 1, 10**9)] == [0.3] * 3


def test_cosine_passes_through_its_ends_and_middle():
    schedule = Cosine(0.5, 100, minimum=0.1)
    assert schedule(0) == 0.5
    assert schedule(50) == pytest.approx(0.3)
    assert schedule(25) == pytest.approx(0.1 + 0.2 * (1 + math.cos(math.pi / 4)))
    assert schedule(100) == 0.1


def test_cosine_never_rises():
    numbers = [Cosine(0.5, 100, minimum=0.1)(step) for step in range(400)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[100:] == [0.1] * 300


def test_linear_falls_and_rises_and_stays():
    assert [Linear(1.0, 0.0, 4)(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [Linear(0.25, 0.75, 2)(step) for step in range(4)] == [0.25, 0.5, 0.75, 0.75]
    assert Linear(0, 1, 0.5)(1) == 1.0


def test_polynomial_is_the_cubic_of_zhu_and_gupta():
    schedule = Polynomial(0.0, 0.8, steps=100, start=20)
    assert [schedule(step) for step in (0, 20, 120, 10**9)] == [0.0, 0.0, 0.8, 0.8]
    assert schedule(70) == pytest.approx(0.8 * 7 / 8)
    assert schedule(45) == pytest.approx(0.8 * 37 / 64)


def test_polynomial_power():
    assert Polynomial(0.0, 1.0, 4, power=2)(2) == 0.75
    assert Polynomial(0.0, 1.0, 4, power=0.5)(3) == 0.5
    assert [Polynomial(0.2, 0.6, 7, 1)(step) for step in range(9)] == [
        Linear(0.2, 0.6, 7)(step) for step in range(9)
    ]


def test_sigmoid_is_a_logistic_curve_stretched_to_its_ends():
    schedule = Sigmoid(0.5, 0.9, 40, start=10)
    assert [schedule(step) for step in (0, 10, 50, 60)] == [0.5, 0.5, 0.9, 0.9]
    assert schedule(30) == pytest.approx(0.7)
    logistic = [1 / (1 + math.exp(-6 * x)) for x in (-1, -0.5, 1)]
    done = (logistic[1] - logistic[0]) / (logistic[2] - logistic[0])
    assert schedule(20) == pytest.approx(0.5 + 0.4 * done)
    assert Sigmoid(0.0, 1.0, 4, steepness=1e-6)(1) == pytest.approx(0.25)


def test_exponential_halves_the_distance():
    assert [Exponential(0.5, 0.5)(step) for step in (0, 1, 3)] == [0.5, 0.25, 0.0625]
    assert [Exponential(0.0, 0.5, final=1.0)(step) for step in (0, 1, 3)] == [0.0, 0.5, 0.875]
    assert Exponential(0.5, 1.0)(10**6) == 0.5
    assert Exponential(0.5, 0.5, final=0.1)(10**6) == 0.1


def test_cycling_starts_again():
    assert [Cycling([0.1, 0.2, 0.3])(step) for step in range(7)] == [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1]
    assert Cycling([1])(5) == 1.0


@given(st.sampled_from(sorted(SHAPES)), FRACTIONS, FRACTIONS)
def test_schedules_between_two_values_start_there_and_never_turn_or_leave(shape, init, final):
    schedule = SHAPES[shape](init, final)
    numbers = [schedule(step) for step in range(120)]
    assert numbers[0] == init
    assert numbers == sorted(numbers, reverse=init > final)
    assert all(0 <= number <= 1 for number in numbers)
    assert schedule(10**6) == final


def test_schedules_are_frozen_and_compare_by_settings():
    assert Linear(0.1, 0.2, 3) == Linear(0.1, 0.2, 3) != Linear(0.1, 0.2, 4)
    assert hash(Cycling([0.1])) == hash(Cycling((0.1,)))
    with pytest.raises(FrozenInstanceError):
        Linear(0.1, 0.2, 3).steps = 4


def test_as_schedule_takes_numbers_schedules_and_functions():
    cosine = Cosine(0.3, 10)
    assert as_schedule(cosine) is cosine
    assert as_schedule(0.25) == Constant(0.25)
    assert as_schedule(1)(7) == 1.0
    assert as_schedule([0.1, 0.2]) == as_schedule((0.1, 0.2)) == Cycling([0.1, 0.2])
    function = as_schedule(lambda step: 1 / step)
    assert isinstance(function, Schedule)
    assert function(4) == 0.25


def test_description_tells_settings_apart():
    assert Cosine(0.3, 10).describe() == Cosine(0.3, 10, 0).describe()
    schedules = [
        Constant(0.3),
        Constant(0.4),
        Cosine(0.3, 10),
        Cosine(0.3, 11),
        Linear(0.3, 10, 1),
        Linear(0.3, 11, 1),
        Polynomial(0.3, 10, 1),
        Polynomial(0.3, 10, 1, power=2),
        Polynomial(0.3, 10, 1, start=2),
        Sigmoid(0.3, 10, 1),
        Sigmoid(0.3, 10, 1, steepness=2),
        Exponential(0.3, 0.5),
        Exponential(0.3, 0.5, 0.1),
        Cycling([0.3]),
        Cycling([0.3, 0.4]),
        as_schedule(math.sqrt),
        as_schedule(math.log),
    ]
    assert len({schedule.describe() for schedule in schedules}) == len(schedules)
    assert Polynomial(0, 0.8, 100).describe() == "Polynomial(0.0, 0.8, 100.0, 3.0, 0.0)"
    assert Cycling([1, 0.5]).describe() == "Cycling([1.0, 0.5])"


def test_functions_are_described_by_name():
    assert as_schedule(math.sqrt).describe() == "as_schedule(sqrt)"
    assert as_schedule(functools.partial(max, 0.1)).describe() == "as_schedule(partial)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant("0.3"), TypeError, "value must be a number; got '0.3'"),
        (lambda: Constant(True), TypeError, "value must be a number; got True"),
        (lambda: Constant(math.nan), ValueError, "value must be finite; got nan"),
        (lambda: Cosine(math.inf, 10), ValueError, "init must be finite; got inf"),
        (lambda: Cosine(0.3, 0), ValueError, "half_period must be a positive number of steps; got 0"),
        (lambda: Cosine(0.3, None), TypeError, "half_period must be a number; got None"),
        (lambda: Cosine(0.1, 10, 0.2), ValueError, "got init=0.1, minimum=0.2"),
        (lambda: Linear("0", 1, 1), TypeError, "init must be a number; got '0'"),
        (lambda: Linear(0, math.nan, 1), ValueError, "final must be finite; got nan"),
        (lambda: Linear(0, 1, 0), ValueError, "steps must be a positive number of steps; got 0"),
        (lambda: Polynomial(0, 1, -1), ValueError, "steps must be a positive number of steps; got -1"),
        (lambda: Polynomial(0, 1, 1, power=0), ValueError, "power must be positive; got 0"),
        (lambda: Polynomial(0, 1, 1, start=math.inf), ValueError, "start must be finite; got inf"),
        (lambda: Sigmoid(0, 1, 1, steepness=0), ValueError, "steepness must be positive; got 0"),
        (lambda: Exponential(0, 0), ValueError, r"gamma must lie in \(0, 1\]; got 0"),
        (lambda: Exponential(0, 1.5), ValueError, r"gamma must lie in \(0, 1\]; got 1.5"),
        (lambda: Exponential(0, True), TypeError, "gamma must be a number; got True"),
        (lambda: Cycling([]), ValueError, "values must hold at least one number; got none"),
        (lambda: Cycling(0.5), TypeError, "values must be a list of numbers; got 0.5"),
        (lambda: Cycling("12"), TypeError, "values must be a list of numbers; got '12'"),
        (lambda: Cycling([1, None]), TypeError, r"values\[1\] must be a number; got None"),
        (lambda: as_schedule([0.1, math.inf]), ValueError, r"values\[1\] must be finite; got inf"),
        (
            lambda: as_schedule(None),
            TypeError,
            "a number, a list, a Schedule or a function of the step; got None",
        ),
        (lambda: as_schedule(-math.inf), ValueError, "value must be finite"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
