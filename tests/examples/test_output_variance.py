"""The variance of output norms: measured as the theory says, drawn, and judged."""

from itertools import pairwise

import output_variance
import pytest
import torch
from output_variance import KINDS, Measured, judge, main, measure


@pytest.fixture(autouse=True)
def one_thread():
    """One, as in the script, which sets it for its whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def theory(variance=lambda kind, k: kind.variance(16, k)):
    return [
        Measured(name, k, variance(kind, k), 1e-6, kind.variance(16, k))
        for name, kind in KINDS.items()
        for k in (1, 4, 16)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_is_what_its_name_says(name):
    layer = KINDS[name].draw(16, 4)
    row_nnz = layer.indptr.diff()
    assert layer.bias is None
    assert (row_nnz.unique().tolist() == [4]) == (name == "constant fan-in")
    counts = {KINDS[name].draw(16, 4).nnz for _ in range(5)}
    assert (counts == {64}) == (name != "Bernoulli")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("k", [1, 4])
def test_layers_vary_as_the_theory_says(name, k):
    torch.manual_seed(0)
    found = measure(name, 16, k, layers=300, tokens=32)
    assert 0 < found.error < 0.15 * found.theory
    assert abs(found.variance - found.theory) < 4 * found.error


def test_dense_layers_are_all_the_same_kind():
    assert {round(kind.variance(16, 16), 12) for kind in KINDS.values()} == {round(5 / 16, 12)}


def test_the_judge_accepts_the_theory_and_no_other_order_or_size():
    assert judge(theory()) == []
    assert len(judge(theory(lambda kind, k: 1.1 * kind.variance(16, k)))) == 9
    names = list(KINDS)
    turned = dict(zip(names, reversed(KINDS.values()), strict=True))
    wrong = [each._replace(variance=turned[each.kind].variance(16, each.k), error=1.0) for each in theory()]
    assert judge(wrong) == [f"fan-in 1: {low} varies no less than {high}" for low, high in pairwise(names)]
    assert judge([each._replace(variance=float("nan")) for each in theory()])


def test_the_script_prints_and_draws(tmp_path, capsys, monkeypatch):
    options = ["--n", "8", "--layers", "20", "--tokens", "8", "--out", str(tmp_path)]
    monkeypatch.setattr(output_variance, "judge", lambda results: [])
    main(options)
    assert "constant fan-in" in capsys.readouterr().out
    assert (tmp_path / "output_variance.png").stat().st_size > 10_000
    monkeypatch.setattr(output_variance, "judge", lambda results: ["nothing fits"])
    with pytest.raises(SystemExit, match="nothing fits"):
        main(options)
