import dataclasses
import json
import math
import subprocess

import numpy as np
import pytest
import resident
import shakespeare
import shakespeare_report
import torch
from shakespeare import Config
from torch import nn

TINY = {
    "n_layer": 1,
    "d_model": 32,
    "d_ff": 64,
    "n_head": 2,
    "context": 16,
    "batch": 4,
    "update_every": 2,
    "warmup": 0.25,
    "evaluations": 2,
    "validation_windows": 8,
    "sample_chars": 20,
}
LINE = "To be, or not to be: that is the question.\n"


@pytest.fixture
def tiny():
    return Config(**TINY, steps=8)


def numbers(characters: str) -> torch.Tensor:
    return torch.tensor(["ab".index(character) for character in characters])


def test_bigram_loss_is_that_of_counts_plus_one():
    # "ab" twice and "ba" once: p(b|a) = (2 + 1) / (2 + 2), p(a|b) = (1 + 1) / (1 + 2), p(a|a) = 1 / 4.
    loss = shakespeare.bigram_loss(numbers("abab"), numbers("aba")[None], numbers("baa")[None], 2)
    assert loss == pytest.approx(-(math.log(3 / 4) + math.log(2 / 3) + math.log(1 / 4)) / 3)


def test_validation_windows_lie_in_the_last_tenth_and_training_before_it(tiny):
    characters = "a" * 900 + "b" * 100
    data = shakespeare.make_data(tiny, characters)
    assert data.vocabulary == "ab"
    assert data.train.tolist() == [0] * 900
    assert data.val_x.shape == data.val_y.shape == (6, tiny.context)
    assert data.val_x.min() == 1


def test_targets_are_the_characters_one_place_further_on(tiny):
    data = shakespeare.make_data(tiny, LINE * 20)
    assert torch.equal(data.val_x[:, 1:], data.val_y[:, :-1])
    joined = "".join(data.vocabulary[token] for token in data.val_x[0].tolist())
    assert joined in LINE * 2


def test_the_shortest_text_allowed_is_enough(tiny):
    data = shakespeare.make_data(tiny, "ab" * (shakespeare.min_chars(tiny) // 2))
    assert len(data.val_x) == 1
    assert len(data.train) > tiny.context


def test_characters_beyond_the_basic_plane_stay_whole(tiny):
    assert shakespeare.make_data(tiny, "a😀é" * 100).vocabulary == "aé😀"


def test_learning_rate_rises_then_falls_to_its_share(tiny):
    rates = [shakespeare.lr_factor(tiny, step) for step in range(tiny.steps + 1)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(tiny.final_lr)


class Indifferent(nn.Module):
    """Gives every character the same chance, and keeps what it was shown."""

    def __init__(self, vocabulary):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(vocabulary))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.logit.expand(*x.shape, -1)


def test_evaluate_is_in_nats_per_character(tiny):
    data = shakespeare.make_data(tiny, LINE * 20)
    n = len(data.vocabulary)
    assert shakespeare.evaluate(Indifferent(n), data, batch=3) == pytest.approx(math.log(n))


def test_batches_depend_on_the_seed_alone(tiny):
    data = shakespeare.make_data(tiny, LINE * 20)
    seen = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        model = Indifferent(len(data.vocabulary))
        shakespeare.train(tiny, data, model, torch.optim.SGD(model.parameters()), None, "dense")
        seen.append(torch.stack([x for x in model.seen if len(x) == tiny.batch]))
    assert torch.equal(*seen)


def test_a_later_character_does_not_change_an_earlier_prediction(tiny):
    model, _ = shakespeare.make_model(tiny, 7, "dense")
    x = torch.randint(7, (1, tiny.context), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 9] = (x[0, 9] + 1) % 7
    with torch.no_grad():
        difference = (model(x) - model(changed)).abs().amax(-1)[0]
    assert difference[:9].max() == 0
    assert difference[9:].min() > 0


def test_both_arms_start_from_the_same_dense_parts(tiny):
    dense, _ = shakespeare.make_model(tiny, 7, "dense")
    sparse, _ = shakespeare.make_model(tiny, 7, "sparse")
    for name in ("tokens", "places", "norm", "head"):
        for a, b in zip(getattr(dense, name).parameters(), getattr(sparse, name).parameters(), strict=True):
            assert torch.equal(a, b)


def test_sparse_layers_are_as_sparse_as_the_config_says(tiny):
    model, _ = shakespeare.make_model(tiny, 7, "sparse")
    found = {name: layer.sparsity for name, layer in shakespeare.sparselab.nn.find_sparse(model)}
    assert set(found) == {f"blocks.0.{name}" for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")}
    for name, sparsity in found.items():
        wanted = tiny.attention_sparsity if ".attn." in name else tiny.mlp_sparsity
        assert sparsity == pytest.approx(wanted, abs=1e-2)


@pytest.mark.parametrize("block", ["1x1", "4x4"])
def test_connections_are_single_or_blocks(tiny, block):
    model, _ = shakespeare.make_model(dataclasses.replace(tiny, block=block), 7, "sparse")
    kinds = {type(layer).__name__ for _, layer in shakespeare.sparselab.nn.find_sparse(model)}
    assert kinds == {"SparseLinear" if block == "1x1" else "BlockSparseLinear"}


def test_a_narrow_model_is_the_widest_that_fits():
    cfg = Config()
    for width in (32, 160, 384):
        fitting = 16 * shakespeare.n_parameters(shakespeare.with_width(cfg, width), 65)
        found = shakespeare.narrowed(cfg, 65, fitting)
        assert (found.d_model, found.d_ff, found.n_head) == (width, 4 * width, width // 32)
        assert shakespeare.narrowed(cfg, 65, fitting - 1).d_model == max(32, width - 32)
    assert shakespeare.narrowed(cfg, 65, 1 << 40).d_model == cfg.d_model


def test_so_many_steps_as_fit_into_the_seconds(tiny, monkeypatch):
    seconds = [9.0] * tiny.untimed_steps + [0.5, 0.25, 0.125]
    monkeypatch.setattr(shakespeare, "train", lambda *args: {"seconds": seconds})
    data = shakespeare.make_data(tiny, LINE * 20)
    assert shakespeare.steps_in(dataclasses.replace(tiny, seconds=10.0), data, "dense") == 40
    assert shakespeare.steps_in(dataclasses.replace(tiny, seconds=0.01), data, "dense") == 1


@pytest.mark.parametrize("text", ["0", "-1"])
def test_seconds_must_be_positive(text, capsys):
    with pytest.raises(SystemExit):
        shakespeare.main(["--seconds", text])
    assert f"expected a positive number, got {text}" in capsys.readouterr().err


@pytest.mark.parametrize("arm", shakespeare.ARMS)
def test_weights_decay_and_biases_and_norms_do_not(tiny, arm):
    model, _ = shakespeare.make_model(tiny, 7, arm)
    optimizer = shakespeare.make_optimizer(tiny, model, arm)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | free == set(names.values())
    assert all(name.endswith("bias") or "norm" in name for name in free)
    assert not any(name.endswith("bias") or "norm" in name for name in decayed)


def test_set_changes_a_line_of_the_config_in_its_own_type():
    cfg = shakespeare.changed(Config(), ["n_layer=2", "sparse_lr=1e-2"])
    assert (cfg.n_layer, cfg.sparse_lr) == (2, 0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("layers=2", "no setting 'layers'; expected one of n_layer, "),
        ("n_layer=two", "expected n_layer=<int>"),
    ],
)
def test_set_explains_what_it_cannot_use(setting, message):
    with pytest.raises(SystemExit, match=message):
        shakespeare.changed(Config(), [setting])


def test_a_missing_text_ends_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere\.txt: no such file"):
        shakespeare.main(["--text", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path)])


def test_an_impossible_out_folder_ends_with_a_message(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(LINE * 100)
    with pytest.raises(SystemExit, match=r"error: --out .*text\.txt: cannot be made"):
        shakespeare.main(["--text", str(file), "--out", str(file)])


def test_steps_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        shakespeare.main(["--steps", "0"])
    assert "at least 1, got 0" in capsys.readouterr().err


def test_a_failing_arm_is_named(tmp_path, monkeypatch, tiny):
    file = tmp_path / "text.txt"
    file.write_text(LINE * 100)
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 3))
    with pytest.raises(SystemExit, match=r"the dense arm failed \(exit status 3\)"):
        shakespeare.main(["--text", str(file), "--out", str(tmp_path / "out")])


def test_peak_memory_is_at_least_what_is_resident_now():
    assert resident.peak_resident_bytes() >= 0.9 * resident.resident_bytes() > 0


def test_block_density_counts_every_connection_once():
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(rng.random((130, 70)) < 0.1)
    image = shakespeare_report.block_density(positions, (130, 70), n_blocks=10)
    assert image.shape == (10, 10)
    assert image.mean() == pytest.approx(len(positions) / (130 * 70))


def test_changes_tells_kept_dropped_and_grown_apart():
    picture = shakespeare_report.changes(np.array([0, 1, 5]), np.array([1, 2]), (2, 3))
    assert picture.tolist() == [[2, 1, 3], [0, 0, 2]]


def test_the_sentence_says_who_is_better_by_how_much():
    def arm(width, val_loss, training_bytes):
        return {"width": width, "val_loss": val_loss, "training_bytes": training_bytes, "train_s": 110.2}

    results = {"dense": arm(384, 2.3, 100), "sparse": arm(384, 2.0, 20), "narrow": arm(160, 1.9, 20)}
    assert shakespeare_report.sentence(results) == (
        "In 110 seconds of training the sparse model, of width 384, ends 0.300 nats below the dense model of "
        "its width with 20% of the training memory and ends 0.100 nats above a dense one of width 160, which "
        "takes as much memory."
    )
    results["narrow"]["val_loss"] = 2.003
    assert "and reaches the loss of a dense one of width 160" in shakespeare_report.sentence(results)


def test_all_arms_run_and_leave_a_table_and_pictures(tmp_path, capfd):
    file, out = tmp_path / "mine.txt", tmp_path / "out"
    file.write_text(LINE * 200)
    settings = [option for name, value in TINY.items() for option in ("--set", f"{name}={value}")]
    shakespeare.main(["--text", str(file), "--steps", "8", "--out", str(out), "--threads", "1", *settings])

    results = json.loads((out / "results.json").read_text())
    dense, sparse, narrow = (results[arm] for arm in ("dense", "sparse", "narrow"))
    assert (dense["width"], sparse["width"], narrow["width"]) == (TINY["d_model"],) * 3
    for arm in (dense, sparse, narrow):
        assert len(arm["curves"]["loss"]) == 8
        assert arm["curves"]["val_step"] == [4, 8]
        assert 0 < arm["val_loss"] < 1.1 * math.log(len(set(LINE)))
        assert 0 < arm["resident_before"] <= arm["resident_peak"]
        assert len(arm["sample"]) == TINY["sample_chars"]
        assert arm["threads"] == 1
    assert sparse["parameters_live"] < dense["parameters_live"]
    assert sparse["weight_bytes"] < dense["weight_bytes"]
    assert sparse["training_bytes"] < dense["training_bytes"]
    assert results["bigram"]["val_loss"] < math.log(len(set(LINE)))

    with np.load(out / "topology.npz") as saved:
        assert str(saved["name"]) == "blocks.0.mlp.up"
        assert saved["shape"].tolist() == [64, 32]
        assert len(saved["before"]) == len(saved["after"])
        assert not np.array_equal(saved["before"], saved["after"])
    shown = capfd.readouterr()
    assert "8/8" in shown.err
    assert shakespeare_report.sentence({arm: results[arm] for arm in shakespeare.ARMS}) in shown.out
    assert f"Text: {file}" in shown.out
    for picture in ("loss.png", "topology.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
        assert f"Picture: {out / picture}" in shown.out
