import functools
import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.dst import (
    ConstantSchedule,
    CosineSchedule,
    CyclingSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PolynomialSchedule,
    Schedule,
    SigmoidSchedule,
    as_schedule,
)

FRACTIONS = st.floats(0, 1)
#: What a schedule between two values is made from.
SHAPES = {
    "LinearSchedule": lambda init, final: LinearSchedule(init, final, 97),
    "PolynomialSchedule": lambda init, final: PolynomialSchedule(init, final, 97, start=3),
    "SigmoidSchedule": lambda init, final: SigmoidSchedule(init, final, 97, start=3),
    "ExponentialSchedule": lambda init, final: ExponentialSchedule(init, 0.9, final),
}


def test_constant_does_not_move():
    assert [ConstantSchedule(0.3)(step) for step in (0, 1, 10**9)] == [0.3] * 3


def test_cosine_passes_through_its_ends_and_middle():
    schedule = CosineSchedule(0.5, 100, minimum=0.1)
    assert schedule(0) == 0.5
    assert schedule(50) == pytest.approx(0.3)
    assert schedule(25) == pytest.approx(0.1 + 0.2 * (1 + math.cos(math.pi / 4)))
    assert schedule(100) == 0.1


def test_cosine_never_rises():
    numbers = [CosineSchedule(0.5, 100, minimum=0.1)(step) for step in range(400)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[100:] == [0.1] * 300


def test_linear_falls_and_rises_and_stays():
    assert [LinearSchedule(1.0, 0.0, 4)(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [LinearSchedule(0.25, 0.75, 2)(step) for step in range(4)] == [0.25, 0.5, 0.75, 0.75]
    assert LinearSchedule(0, 1, 0.5)(1) == 1.0


def test_polynomial_is_the_cubic_of_zhu_and_gupta():
    schedule = PolynomialSchedule(0.0, 0.8, stop=120, start=20)
    assert [schedule(step) for step in (0, 20, 120, 10**9)] == [0.0, 0.0, 0.8, 0.8]
    assert schedule(70) == pytest.approx(0.8 * 7 / 8)
    assert schedule(45) == pytest.approx(0.8 * 37 / 64)


def test_polynomial_power():
    assert PolynomialSchedule(0.0, 1.0, 4, power=2)(2) == 0.75
    assert PolynomialSchedule(0.0, 1.0, 4, power=0.5)(3) == 0.5
    assert [PolynomialSchedule(0.2, 0.6, 7, 1)(step) for step in range(9)] == [
        LinearSchedule(0.2, 0.6, 7)(step) for step in range(9)
    ]


def test_sigmoid_is_a_logistic_curve_stretched_to_its_ends():
    schedule = SigmoidSchedule(0.5, 0.9, 50, start=10)
    assert [schedule(step) for step in (0, 10, 50, 60)] == [0.5, 0.5, 0.9, 0.9]
    assert schedule(30) == pytest.approx(0.7)
    logistic = [1 / (1 + math.exp(-6 * x)) for x in (-1, -0.5, 1)]
    done = (logistic[1] - logistic[0]) / (logistic[2] - logistic[0])
    assert schedule(20) == pytest.approx(0.5 + 0.4 * done)
    assert SigmoidSchedule(0.0, 1.0, 4, steepness=1e-6)(1) == pytest.approx(0.25)


def test_exponential_halves_the_distance():
    assert [ExponentialSchedule(0.5, 0.5)(step) for step in (0, 1, 3)] == [0.5, 0.25, 0.0625]
    assert [ExponentialSchedule(0.0, 0.5, final=1.0)(step) for step in (0, 1, 3)] == [0.0, 0.5, 0.875]
    assert ExponentialSchedule(0.5, 1.0)(10**6) == 0.5
    assert ExponentialSchedule(0.5, 0.5, final=0.1)(10**6) == 0.1


def test_cycling_starts_again():
    assert [CyclingSchedule([0.1, 0.2, 0.3])(step) for step in range(7)] == [
        0.1,
        0.2,
        0.3,
        0.1,
        0.2,
        0.3,
        0.1,
    ]
    assert CyclingSchedule([1])(5) == 1.0


@given(st.sampled_from(sorted(SHAPES)), FRACTIONS, FRACTIONS)
def test_schedules_between_two_values_start_there_and_never_turn_or_leave(shape, init, final):
    schedule = SHAPES[shape](init, final)
    numbers = [schedule(step) for step in range(120)]
    assert numbers[0] == init
    assert numbers == sorted(numbers, reverse=init > final)
    assert all(0 <= number <= 1 for number in numbers)
    assert schedule(10**6) == final


def test_schedules_are_frozen_and_compare_by_settings():
    assert LinearSchedule(0.1, 0.2, 3) == LinearSchedule(0.1, 0.2, 3) != LinearSchedule(0.1, 0.2, 4)
    assert hash(CyclingSchedule([0.1])) == hash(CyclingSchedule((0.1,)))
    with pytest.raises(FrozenInstanceError):
        LinearSchedule(0.1, 0.2, 3).steps = 4


def test_as_schedule_takes_numbers_schedules_and_functions():
    cosine = CosineSchedule(0.3, 10)
    assert as_schedule(cosine) is cosine
    assert as_schedule(0.25) == ConstantSchedule(0.25)
    assert as_schedule(1)(7) == 1.0
    assert as_schedule([0.1, 0.2]) == as_schedule((0.1, 0.2)) == CyclingSchedule([0.1, 0.2])
    function = as_schedule(lambda step: 1 / step)
    assert isinstance(function, Schedule)
    assert function(4) == 0.25


def test_description_tells_settings_apart():
    assert CosineSchedule(0.3, 10).describe() == CosineSchedule(0.3, 10, 0).describe()
    schedules = [
        ConstantSchedule(0.3),
        ConstantSchedule(0.4),
        CosineSchedule(0.3, 10),
        CosineSchedule(0.3, 11),
        LinearSchedule(0.3, 10, 1),
        LinearSchedule(0.3, 11, 1),
        PolynomialSchedule(0.3, 10, 1),
        PolynomialSchedule(0.3, 10, 1, power=2),
        PolynomialSchedule(0.3, 10, 1, start=-2),
        SigmoidSchedule(0.3, 10, 1),
        SigmoidSchedule(0.3, 10, 1, steepness=2),
        ExponentialSchedule(0.3, 0.5),
        ExponentialSchedule(0.3, 0.5, 0.1),
        CyclingSchedule([0.3]),
        CyclingSchedule([0.3, 0.4]),
        as_schedule(math.sqrt),
        as_schedule(math.log),
    ]
    assert len({schedule.describe() for schedule in schedules}) == len(schedules)
    assert PolynomialSchedule(0, 0.8, 100).describe() == "PolynomialSchedule(0.0, 0.8, 100.0, 3.0, 0.0)"
    assert CyclingSchedule([1, 0.5]).describe() == "CyclingSchedule([1.0, 0.5])"


def test_functions_are_described_by_name():
    assert as_schedule(math.sqrt).describe() == "as_schedule(sqrt)"
    assert as_schedule(functools.partial(max, 0.1)).describe() == "as_schedule(partial)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConstantSchedule("0.3"), TypeError, "value must be a number, got '0.3'"),
        (lambda: ConstantSchedule(True), TypeError, "value must be a number, got True"),
        (lambda: ConstantSchedule(math.nan), ValueError, "value must be finite, got nan"),
        (lambda: CosineSchedule(math.inf, 10), ValueError, "init must be finite, got inf"),
        (lambda: CosineSchedule(0.3, 0), ValueError, "stop must be a step after step 0, got 0"),
        (lambda: CosineSchedule(0.3, None), TypeError, "stop must be a number, got None"),
        (lambda: CosineSchedule(0.1, 10, 0.2), ValueError, "got init=0.1, minimum=0.2"),
        (lambda: LinearSchedule("0", 1, 1), TypeError, "init must be a number, got '0'"),
        (lambda: LinearSchedule(0, math.nan, 1), ValueError, "final must be finite, got nan"),
        (lambda: LinearSchedule(0, 1, 0), ValueError, "stop must be a step after step 0, got 0"),
        (
            lambda: PolynomialSchedule(0, 1, -1),
            ValueError,
            "stop must be a step after step 0, got -1",
        ),
        (lambda: PolynomialSchedule(0, 1, 1, power=0), ValueError, "power must be positive, got 0"),
        (lambda: PolynomialSchedule(0, 1, 1, start=math.inf), ValueError, "start must be finite, got inf"),
        (lambda: SigmoidSchedule(0, 1, 1, steepness=0), ValueError, "steepness must be positive, got 0"),
        (lambda: ExponentialSchedule(0, 0), ValueError, r"gamma must lie in \(0, 1\], got 0"),
        (lambda: ExponentialSchedule(0, 1.5), ValueError, r"gamma must lie in \(0, 1\], got 1.5"),
        (lambda: ExponentialSchedule(0, True), TypeError, "gamma must be a number, got True"),
        (lambda: CyclingSchedule([]), ValueError, "values must hold at least one number, got none"),
        (lambda: CyclingSchedule(0.5), TypeError, "values must be a list of numbers, got 0.5"),
        (lambda: CyclingSchedule("12"), TypeError, "values must be a list of numbers, got '12'"),
        (lambda: CyclingSchedule([1, None]), TypeError, r"values\[1\] must be a number, got None"),
        (lambda: as_schedule([0.1, math.inf]), ValueError, r"values\[1\] must be finite, got inf"),
        (
            lambda: as_schedule(None),
            TypeError,
            "a number, a list, a Schedule or a function of the step, got None",
        ),
        (lambda: as_schedule(-math.inf), ValueError, "value must be finite"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
