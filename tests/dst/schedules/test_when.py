import numpy as np
import pytest

from sparselab.dst import AtSteps, EverySteps, UpdateSchedule, as_update_schedule
from sparselab.dst.schedules.when import when_to_update


def updates(schedule, until=12):
    return [step for step in range(until) if schedule(step)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (EverySteps(1), [*range(1, 12)]),
        (EverySteps(3), [3, 6, 9]),
        (EverySteps(3, start=6), [6, 9]),
        (EverySteps(3, start=7), [9]),
        (EverySteps(3, stop=9), [3, 6]),
        (EverySteps(3, stop=10), [3, 6, 9]),
        (EverySteps(3, start=4, stop=4), []),
        (EverySteps(3, stop=0), []),
        (AtSteps([1, 2, 11]), [1, 2, 11]),
        (AtSteps(np.array([4, 8])), [4, 8]),
    ],
)
def test_steps_that_update(schedule, expected):
    assert updates(schedule) == expected
    assert updates(as_update_schedule(schedule.describe())) == expected


def test_beyond_the_last_listed_step_nothing_updates():
    assert not AtSteps([5])(10**9)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"freq": 100}, EverySteps(100)),
        ({"freq": 100, "start": 5, "stop": 900}, EverySteps(100, 5, 900)),
        ({"freq": 100, "stop": None}, EverySteps(100)),
        ({"steps": [1, 10]}, AtSteps([1, 10])),
        ([1, 10], AtSteps([1, 10])),
        ((1, 10), AtSteps([1, 10])),
    ],
)
def test_as_update_schedule_takes_dicts_and_lists(value, expected):
    schedule = as_update_schedule(value)
    assert schedule == expected
    assert as_update_schedule(schedule) is schedule


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None, None), (EverySteps(100), None)),
        ((np.int64(50), None, 750), (EverySteps(50, stop=750), 750)),
        ((None, {"freq": 5, "start": 3, "stop": 9}, None), (EverySteps(5, 3, 9), 9)),
        ((None, {"freq": 5, "stop": 9}, 9), (EverySteps(5, 0, 9), 9)),
        ((None, {"freq": 5}, 9), (EverySteps(5), 9)),
        ((None, [1, 10], 9), (AtSteps([1, 10]), 9)),
    ],
)
def test_three_arguments_say_when(arguments, expected):
    assert when_to_update(*arguments) == expected


def test_description_is_plain_and_tells_settings_apart():
    schedules = [EverySteps(3), EverySteps(4), EverySteps(3, 1), EverySteps(3, 0, 9), AtSteps([3])]
    descriptions = [schedule.describe() for schedule in schedules]
    assert descriptions[3] == {"freq": 3, "start": 0, "stop": 9}
    assert descriptions[4] == {"steps": [3]}
    assert len({str(description) for description in descriptions}) == len(schedules)
    assert {type(number) for number in EverySteps(np.int32(3)).describe().values()} == {int, type(None)}
    assert type(AtSteps(np.array([3])).describe()["steps"][0]) is int


def test_equal_settings_are_equal_and_hash_alike():
    assert hash(AtSteps([1, 2])) == hash(AtSteps((1, 2)))
    assert EverySteps(3) == EverySteps(3, 0, None) != EverySteps(4)


def test_a_schedule_of_ones_own():
    class Squares(UpdateSchedule):
        def __call__(self, step):
            return step in (1, 4, 9)

        def describe(self):
            return {"squares": True}

    assert updates(as_update_schedule(Squares())) == [1, 4, 9]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EverySteps(0), ValueError, "freq must be at least 1, got 0"),
        (lambda: EverySteps(1.0), TypeError, "freq must be an integer, got 1.0"),
        (lambda: EverySteps(1, start=-1), ValueError, "start must be at least 0, got -1"),
        (lambda: EverySteps(1, start=None), TypeError, "start must be an integer, got None"),
        (lambda: EverySteps(1, stop="9"), TypeError, "stop must be an integer, got '9'"),
        (lambda: AtSteps([]), ValueError, "steps must hold at least one number, got none"),
        (lambda: AtSteps(5), TypeError, "steps must be a list of numbers, got 5"),
        (lambda: AtSteps("5"), TypeError, "steps must be a list of numbers, got '5'"),
        (lambda: AtSteps([0, 1]), ValueError, r"steps\[0\] must be at least 1, got 0"),
        (lambda: AtSteps([1, 2.5]), TypeError, r"steps\[1\] must be an integer, got 2.5"),
        (lambda: AtSteps([1, 3, 2]), ValueError, "steps must ascend, got 2 after 3"),
        (lambda: AtSteps([3, 3]), ValueError, "steps must ascend, got 3 after 3"),
        (lambda: as_update_schedule(None), TypeError, "update must be a dict .* got None"),
        (
            lambda: as_update_schedule(0.5),
            TypeError,
            r"a list of steps or an UpdateSchedule, got 0.5 \(.* is update_freq\)",
        ),
        (
            lambda: as_update_schedule(100),
            TypeError,
            "got 100 .the number of steps between updates is update_freq",
        ),
        (lambda: when_to_update(True, None, None), TypeError, "update_freq must be an integer, got True"),
        (lambda: when_to_update(0, None, None), ValueError, "update_freq must be at least 1, got 0"),
        (lambda: when_to_update(None, None, 2.5), TypeError, "stop must be an integer, got 2.5"),
        (
            lambda: when_to_update(5, [5], None),
            ValueError,
            r"update_freq must be left out .* got update_freq=5 and update=\[5\]",
        ),
        (
            lambda: when_to_update(None, {"freq": 5, "stop": 9}, 10),
            ValueError,
            "stop must be given once, got stop=10",
        ),
        (lambda: as_update_schedule({}), ValueError, r"update must have the key .* got \[\]"),
        (lambda: as_update_schedule({"start": 5}), ValueError, r"got \['start'\]"),
        (lambda: as_update_schedule({"freq": 5, "end": 9}), ValueError, r"got \['freq', 'end'\]"),
        (lambda: as_update_schedule({"steps": [5], "stop": 9}), ValueError, r"got \['steps', 'stop'\]"),
        (lambda: as_update_schedule({"freq": 5, "stop": -1}), ValueError, "stop must be at least 0, got -1"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
