"""The arguments of all algorithms: names, horizons, and how they are shown."""

import inspect

import pytest
from torch import nn

import sparselab
from sparselab.dst import GMP, SET, SNFS, CosineSchedule, PolynomialSchedule, RigL, TopKAST
from sparselab.nn import SparseLinear
from tests.dst.contract_rows import ROWS


def test_a_stop_before_the_sparsity_is_reached_is_refused():
    schedule = PolynomialSchedule(0.0, 0.9, stop=1000)
    with pytest.raises(
        ValueError, match=r"an update at step 1000 or later.*got stop=1000, .*step 900, .*0.8991"
    ):
        GMP(schedule, stop=1000)
    GMP(schedule, stop=1001)
    GMP(schedule)
    with pytest.raises(ValueError, match="the last update is at step 0, with sparsity 0"):
        GMP(schedule, update=[2000], stop=1500)
    GMP(lambda step: min(0.9, step / 1000), stop=500)  # nobody knows where it ends


def test_the_headline_lines_work_as_they_stand():
    layer = SparseLinear(64, 32, sparsity=0.9)
    algo = sparselab.RigL(sparsity=0.9, drop_fraction=0.3, update_freq=100)
    layer.apply(algo)
    assert repr(algo).startswith("RigL(sparsity=0.9, drop_fraction=0.3, update_freq=100, stop=None, seed=0, ")
    assert repr(algo).endswith(") of 1 layers after 0 steps, no stop: updates go on")
    annealed = sparselab.RigL(0.9, stop=750)
    assert "drop_fraction=CosineSchedule(init=0.3, stop=750, minimum=0.0), update_freq=100, stop=750" in repr(
        annealed
    )
    assert "no stop" not in repr(annealed)
    assert "update=AtSteps(steps=(5, 9))" in repr(SET(update=[5, 9]))


@pytest.mark.parametrize("make", [RigL, sparselab.SRigL, SNFS, sparselab.GSE], ids=lambda make: make.__name__)
def test_a_stop_anneals_a_number_where_the_paper_does(make):
    default = make().drop_fraction(0)
    for settings in (
        {"update_freq": 9, "stop": 40},
        {"update": {"freq": 2, "stop": 40}},
        {"update": [2, 30], "stop": 40},
    ):
        algorithm = make(drop_fraction=0.25, **settings)
        assert algorithm.stop == 40
        assert algorithm.drop_fraction == CosineSchedule(0.25, 40)
        assert not any(algorithm.is_update_step(step) for step in range(40, 200))
    assert make(
        drop_fraction=CosineSchedule(0.5, 9, 0.1), update_freq=9, stop=40
    ).drop_fraction == CosineSchedule(0.5, 9, 0.1)
    assert make(update_freq=9, stop=40).drop_fraction(0) == default
    assert make().drop_fraction(10**9) == default
    assert make(update=[2, 30], drop_fraction=0.25).drop_fraction(30) == 0.25
    with pytest.raises(ValueError, match=r"drop_fraction must lie in \[0, 1\], got 1.5"):
        make(drop_fraction=1.5, stop=40)
    assert SET(drop_fraction=0.25, update_freq=9, stop=40).drop_fraction(39) == 0.25


@pytest.mark.parametrize("name", ROWS)
def test_sparsity_is_the_only_positional_argument_and_settings_are_explicit(name):
    parameters = list(inspect.signature(type(ROWS[name].make())).parameters.values())
    assert parameters[0].name == "sparsity"
    assert {each.kind for each in parameters[1:]} <= {inspect.Parameter.KEYWORD_ONLY}
    order = ["drop_fraction", "update_freq", "update", "stop", "seed", "scope"]
    named = [each.name for each in parameters if each.name in order]
    assert named == [each for each in order if each in named]


def test_update_freq_and_update_are_not_both_given():
    with pytest.raises(
        ValueError, match=r"update_freq must be left out where update says when, got update_freq=5"
    ):
        RigL(update_freq=5, update={"freq": 5})
    with pytest.raises(TypeError, match=r"got 5 \(the number of steps between updates is update_freq\)"):
        RigL(update=5)


def test_star_imports_shadow_nothing_of_torch():
    assert not set(sparselab.dst.__all__) & set(nn.__all__ if hasattr(nn, "__all__") else dir(nn))
    assert not set(sparselab.__all__) & set(dir(nn))


def test_an_argument_cannot_be_changed_where_nobody_would_see_it():
    algorithm = RigL()
    with pytest.raises(AttributeError):
        algorithm.drop_fraction = 0.5
    algorithm.budget.drop_fraction = CosineSchedule(0.5, 10)
    assert algorithm.drop_fraction(0) == 0.5


def test_topkast_without_a_schedule_for_its_sparsity():
    with pytest.raises(TypeError, match="sparsity must be a number or None, got PolynomialSchedule"):
        TopKAST(PolynomialSchedule(0.0, 0.9, stop=10))
