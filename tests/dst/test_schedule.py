import math

import pytest

from sparselab.dst import Constant, Cosine, Schedule, as_schedule


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


def test_as_schedule_takes_numbers_schedules_and_functions():
    cosine = Cosine(0.3, 10)
    assert as_schedule(cosine) is cosine
    assert as_schedule(0.25) == Constant(0.25)
    assert as_schedule(1)(7) == 1.0
    function = as_schedule(lambda step: 1 / step)
    assert isinstance(function, Schedule)
    assert function(4) == 0.25


def test_description_tells_settings_apart():
    assert Cosine(0.3, 10).describe() == Cosine(0.3, 10, 0).describe()
    assert len({s.describe() for s in (Cosine(0.3, 10), Cosine(0.3, 11), Constant(0.3), Constant(0.4))}) == 4


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
        (lambda: as_schedule(None), TypeError, "a number, a Schedule or a function of the step; got None"),
        (lambda: as_schedule(-math.inf), ValueError, "value must be finite"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
