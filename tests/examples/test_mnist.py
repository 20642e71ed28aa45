import dataclasses
import json
import math
from pathlib import Path

import mnist
import mnist_report
import pytest
import torch
from downloads import find_local
from mnist import ARMS, Arm, Config
from mnist_data import load_digits
from torch import nn

import sparselab
from tests.examples.idx import write_digits

TINY = Config(batch=20, epochs=2, update_every=3, mean=0.0, std=1.0)
OPTIONS = ["--set", "batch=20", "--set", "update_every=3", "--epochs", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def digits(folder):
    return load_digits(folder)


@pytest.fixture(autouse=True)
def one_thread():
    """One, as in the script, which sets it for its whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_dense_output_that_is_already_too_much_is_refused():
    with pytest.raises(SystemExit, match=r"sparsity 0\.999: the dense output alone"):
        mnist.make_model(TINY, 0.999)


@pytest.mark.parametrize("sparsity", [0.9, 0.99])
@pytest.mark.parametrize("output", ["dense", "sparse"])
def test_lenet_has_the_total_asked_for(sparsity, output):
    model = mnist.make_model(dataclasses.replace(TINY, output=output), sparsity)
    assert sparselab.measure_sparsity(model) == pytest.approx(sparsity, abs=1e-5)
    assert isinstance(model[-1], nn.Linear if output == "dense" else sparselab.SparseLinear)


def test_the_wide_network_is_uniform_and_without_biases():
    model = mnist.make_model(dataclasses.replace(TINY, network="wide"), 0.9)
    assert model[0].nnz == round(0.1 * 784 * 512)
    assert [name for name, _ in model.named_parameters()] == ["0.weight_values", "2.weight"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns_repeats_and_ends_at_its_sparsity(digits, arm):
    cfg = dataclasses.replace(TINY, epochs=6)
    first, again, other = (mnist.run(dataclasses.replace(cfg, seed=seed), arm, digits) for seed in (1, 1, 2))
    assert first["accuracy"] > 0.9
    # Rows of equal fan-in leave a remainder unused.
    spare = 1e-3 if arm.startswith("srigl") else 1e-4
    assert first["final_sparsity"] == pytest.approx(0.0 if arm == "dense" else 0.9, abs=spare)
    assert first["steps"] == 60
    assert first["accuracy"] == again["accuracy"]
    assert mnist.key_of(first) == mnist.key_of(again) != mnist.key_of(other)


def weights(digits, seed):
    cfg, algo = mnist.prepare(dataclasses.replace(TINY, seed=seed), "rigl", digits)
    model = mnist.make_model(cfg, cfg.sparsity)
    model.apply(algo)
    mnist.train(cfg, digits, model, algo, "")
    return torch.cat([model[0].positions(), model[0].weight_values.detach().flatten()])


def test_a_seed_gives_the_same_weights_to_the_last_bit(digits):
    first = weights(digits, 1)
    torch.manual_seed(1234)
    assert torch.equal(first, weights(digits, 1))
    assert not torch.equal(first, weights(digits, 2))


def test_accuracy_counts_what_is_right():
    scores = torch.eye(3)[[0, 1, 2, 0]]
    assert mnist.accuracy(nn.Identity(), scores, torch.tensor([0, 1, 1, 2])) == 0.5


def test_the_rate_falls_from_its_peak_to_zero():
    rates = [mnist.lr_factor(progress / 10) for progress in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1
    assert rates[-1] == pytest.approx(0)


def test_an_arm_may_start_denser_and_change_settings(digits, monkeypatch):
    monkeypatch.setitem(
        ARMS,
        "denser",
        Arm(lambda cfg, steps: sparselab.Static(), start=lambda sparsity: 0.5, changes={"lr": 0.05}),
    )
    assert isinstance(mnist.make_model(TINY, 0.5, "masked")[0], sparselab.MaskedLinear)
    record = mnist.run(TINY, "denser", digits)
    assert record["final_sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert (record["sparsity"], record["config"]["lr"]) == (0.9, 0.05)


def digest(digits, **changes):
    return mnist.identity(dataclasses.replace(TINY, **changes), "rigl", digits)["digest"]


def test_any_setting_of_a_run_changes_its_digest(digits, monkeypatch):
    plain = digest(digits)
    assert digest(digits) == plain
    for name, value in {"lr": 0.05, "epochs": 3, "drop_fraction": 0.4, "network": "wide", "std": 2.0}.items():
        assert digest(digits, **{name: value}) != plain
    assert digest(dataclasses.replace(digits, digest="other images")) != plain
    monkeypatch.setitem(ARMS, "rigl", Arm(lambda cfg, steps: sparselab.RigL(update_freq=7)))
    assert digest(digits) != plain


def study(folder, out, *options):
    mnist.main(["--data", str(folder), "--out", str(out), "--network", "lenet", *OPTIONS, *options])
    file = out / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_quick_trains_reports_and_draws(folder, tmp_path, capsys):
    runs = study(folder, tmp_path, "--quick")
    sparse = [(arm, sparsity) for sparsity in (0.9, 0.98) for arm in ("static", "set", "rigl")]
    assert [(run["arm"], run["sparsity"]) for run in runs] == [("dense", 0.0), *sparse]
    said = capsys.readouterr().out
    for run in runs:
        assert f"{100 * run['accuracy']:.2f}" in said
    assert "published SNFS" in said
    assert (tmp_path / "lenet.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_goes_on_where_it_stopped_and_keeps_settings_apart(folder, tmp_path, monkeypatch):
    chosen = ("--arms", "dense", "static", "--sparsity", "0.9", "0.95", "--seeds")
    trained = []
    run = mnist.run
    monkeypatch.setattr(mnist, "run", lambda cfg, arm, digits: trained.append(cfg) or run(cfg, arm, digits))
    assert len(study(folder, tmp_path, *chosen, "1")) == len(trained) == 3
    assert len(study(folder, tmp_path, *chosen, "1", "2")) == len(trained) == 6
    study(folder, tmp_path, *chosen, "1", "2", "--report")
    assert len(trained) == 6
    study(folder, tmp_path, *chosen, "1", "--set", "lr=0.05")
    assert len(trained) == 9
    with pytest.raises(SystemExit, match="no finished run of these settings"):
        study(folder, tmp_path, *chosen, "1", "--set", "lr=0.07", "--report")


def test_a_broken_line_is_named(folder, tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"network": "lenet"}\n')
    with pytest.raises(SystemExit, match=r"runs\.jsonl, line 1: not a finished run"):
        study(folder, tmp_path, "--report")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "seed=3"), "--set seed=3: differs between runs; choose it with --seeds"),
        (("--set", "output=half"), "--set output=half: expected dense or sparse"),
        (("--sparsity", "90"), "--sparsity 90.0: expected a number between 0 and 1"),
        (("--data", "nowhere"), "error: nowhere.*: no such file"),
    ],
)
def test_wrong_options_end_with_a_message(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        mnist.main(["--out", str(tmp_path), *options])


def test_an_impossible_out_folder_ends_with_a_message(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: --out .*file: cannot be made"):
        mnist.main(["--data", str(folder), "--out", str(tmp_path / "file")])


def test_mean_and_std_are_those_of_the_sample():
    assert mnist_report.mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mnist_report.mean_and_std([5.0]) == (5.0, 0.0)


def test_the_table_has_means_and_spread_over_seeds():
    runs = [{"accuracy": a, "seconds": 2.0, "threads": 1, "config": {"epochs": 2}} for a in (0.97, 0.99)]
    table = mnist_report.make_table("wide", {"static": {0.9: runs}}, mnist_report.PUBLISHED["wide"])
    assert [list(column.cells) for column in table.columns] == [
        ["static", "published static"],
        ["98.00 ±1.41", "97.45"],
        ["2", ""],
    ]


def test_two_epochs_of_real_digits():
    if find_local(Path("mnist")) is None:
        pytest.skip("no copy of MNIST on this computer ($SPARSELAB_DATA/mnist or ../shared/data/mnist)")
    cfg = Config(epochs=2)
    digits = load_digits(None, cfg.mean, cfg.std)
    found = {arm: mnist.run(cfg, arm, digits)["accuracy"] for arm in ("static", "rigl")}
    assert found["static"] > 0.955
    assert found["rigl"] > 0.96
