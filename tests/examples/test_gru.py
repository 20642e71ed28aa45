"""The models run, the masked one as the sparse one, and windows follow each other through the text."""

import random

import pytest
import torch
from arms import ARMS
from gru import QUICK, judge, main, make_data, make_model, train, windows
from options import changed

from tests.examples.twins import assert_compared, assert_twins, float64

CFG = changed(QUICK, ["width=32", "steps=12", "batch=4", "window=16", "update_freq=3"])


def words(n):
    draw = random.Random(0)
    return " ".join(draw.choice(("the", "pole", "that", "falls", "is", "sparse")) for _ in range(n))


def test_the_quick_run_compares_all_models(capsys, tmp_path):
    (tmp_path / "words.txt").write_text(words(4_000))
    results = main(["--quick", "--set", f"text={tmp_path / 'words.txt'}"])
    assert_compared(results, capsys.readouterr().out)
    assert all(each.scores[0] < torch.tensor(13.0).log() for each in results)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text("short")
    with pytest.raises(SystemExit, match="holds only 5 characters"):
        main(["--quick", "--set", f"text={tmp_path / 'words.txt'}"])


def test_the_masked_model_learns_as_the_sparse_one():
    data = make_data(words(400), CFG)
    with float64():
        masked, sparse = (train(name, data, CFG) for name in ("masked, RigL", "sparse, RigL"))
        assert_twins(masked, sparse, make_model(ARMS["sparse, RigL"], data.n_distinct, CFG))
    assert masked.scores == pytest.approx(sparse.scores, rel=1e-9)


def test_windows_go_on_where_the_last_ones_ended():
    pairs = list(windows(torch.arange(22), 3, 4))
    assert [x.tolist() for x, _ in pairs] == [
        [[0, 1, 2, 3], [7, 8, 9, 10], [14, 15, 16, 17]],
        [[4, 5, 6], [11, 12, 13], [18, 19, 20]],
    ]
    assert all(torch.equal(y, x + 1) for x, y in pairs)


def test_the_loss_is_that_of_one_long_pass():
    data = make_data(words(400), CFG)
    cfg = changed(CFG, ["batch=1"])
    model, tokens = make_model(ARMS["sparse, RigL"], data.n_distinct, cfg), data.validation
    with torch.no_grad():
        scores, _ = model(tokens[None, :-1], None)
    expected = torch.nn.functional.cross_entropy(scores[0], tokens[1:]).item()
    assert judge(model, tokens, cfg) == pytest.approx(expected, rel=1e-5)
