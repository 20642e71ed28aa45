import dataclasses
import io
import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[transformers]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install -e '.[transformers]'")

import transformers_models as example
import transformers_report
from rich.console import Console

from sparselab.nn import find_sparse

TINY = dataclasses.replace(
    example.QUICK, layers=1, context=16, batch=2, steps=4, update_every=1, new_tokens=8, sparsity=0.75
)
TEXT = b"To be, or not to be: that is the question.\n" * 60


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("masked", [False, True])
def test_windows_are_bytes_and_what_is_to_be_told_of_them(masked):
    windows = example.Windows(TEXT, TINY, masked)
    assert len(windows) == len(TEXT) // TINY.context
    hidden = 0
    for k in range(len(windows)):
        window = windows[k]
        true = TEXT[k * TINY.context : (k + 1) * TINY.context]
        told = window["labels"] != -100
        assert example.to_text(window["labels"][told]).encode() == bytes(
            byte for byte, is_told in zip(true, told, strict=True) if is_told
        )
        assert all((window["input_ids"] == example.MASK) == (told & masked))
        assert torch.equal(window["input_ids"], windows[k]["input_ids"])
        hidden += int(told.sum())
    share = hidden / len(windows) / TINY.context
    assert 0.1 < share < 0.3 if masked else share == 1


def test_the_last_tenth_validates_with_windows_from_all_of_it():
    train, validation = example.split(bytes(range(100)))
    assert (train, validation) == (bytes(range(90)), bytes(range(90, 100)))
    cfg = dataclasses.replace(TINY, context=2)
    windows = example.Windows(validation, cfg, False, most=2)
    assert [(windows[k]["input_ids"] - example.FIRST_BYTE).tolist() for k in range(len(windows))] == [
        [90, 91], [94, 95]
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "n_layers"), [("roberta", 3), ("gpt2", 4)])
def test_both_arms_start_alike_and_one_of_them_is_sparse(name, n_layers):
    dense, sparse = (example.make_model(TINY, example.STORIES[name], arm) for arm in example.ARMS)
    layers = dict(find_sparse(sparse))
    assert len(layers) == n_layers
    shared = dict(sparse.named_parameters())
    for parameter, value in dense.named_parameters():
        layer = parameter.rpartition(".")[0]
        assert layer in layers or torch.equal(value, shared[parameter])
    for layer, module in layers.items():
        assert module.sparsity == pytest.approx(TINY.sparsity, abs=1e-3)
        assert not module.bias.any()
        # A sparse weight stands for 1 / density dense ones.
        wanted = dense.get_submodule(layer).weight.std() / math.sqrt(module.density)
        assert module.stored.std().item() == pytest.approx(wanted.item(), rel=0.1)


class Turn:
    """The parent's end of the line: always asks for the next piece of work."""

    def __init__(self):
        self.sent = []

    def recv(self):
        return "go"

    def send(self, answer):
        self.sent.append(answer)


@pytest.mark.parametrize("arm", example.ARMS)
def test_an_arm_takes_its_steps_and_sends_what_came_of_them(arm):
    turn = Turn()
    example.run_arm(TINY, "roberta", arm, TEXT, turn)
    *seconds, result = turn.sent
    assert len(seconds) == TINY.steps == len(result["losses"])
    assert all(second > 0 for second in seconds)
    assert result["losses"][0] == pytest.approx(math.log(example.VOCABULARY), rel=0.1)
    assert result["validation"] < result["losses"][0]
    assert (result["topology_bytes"] > 0) == (result["plan_bytes"] > 0) == (arm == "sparse")
    assert result["gradient_bytes"] == 4 * result["parameters_live"]
    assert result["optimizer_bytes"] >= 2 * result["gradient_bytes"]
    assert result["training_bytes"] == sum(
        result[f"{part}_bytes"] for part in ("weight", "topology", "gradient", "plan", "optimizer")
    )
    assert (result["parameters_live"] < result["parameters_dense"]) == (arm == "sparse")
    assert "sample" not in result


def test_the_algorithm_moves_connections(monkeypatch):
    make_model, made = example.make_model, []
    monkeypatch.setattr(example, "make_model", lambda *which: made.append(make_model(*which)) or made[0])
    example.run_arm(TINY, "roberta", "sparse", TEXT, Turn())
    fresh = dict(find_sparse(make_model(TINY, example.STORIES["roberta"], "sparse")))
    for name, layer in find_sparse(made[0]):
        assert layer.nnz == fresh[name].nnz
        assert not torch.equal(layer.positions(), fresh[name].positions())


def test_both_arms_run_and_leave_a_sample_and_a_table(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "mine.txt"
    file.write_bytes(TEXT)
    sizes = ["--layers", "1", "--context", "16", "--steps", "3", "--threads", "1"]
    example.main(["--quick", "--models", "gpt2", "--text", str(file), *sizes])
    shown = capfd.readouterr()
    assert f"Text: {file}" in shown.out
    assert "gpt2: 1 threads" in shown.out
    for arm in example.ARMS:
        assert f"{arm}, a sample" in shown.out
    for row in ("parameters live", "ms per step, median", "ms per byte written", "peak, MB"):
        assert row in shown.out
    assert "3/3" in shown.err


def test_an_arm_that_fails_is_named():
    class Broken(Turn):
        def recv(self):
            raise EOFError

    with pytest.raises(SystemExit, match="the sparse arm failed; its message is above"):
        example._take("sparse", Broken())


def test_a_short_text_ends_with_a_message(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("short")
    with pytest.raises(SystemExit, match=r"error: .*short\.txt: holds only 5 characters"):
        example.main(["--quick", "--text", str(file)])


def test_the_table_leaves_out_the_first_steps_and_compares():
    dense = {
        "seconds": [9.0, 0.1, 0.3, 0.2], "losses": [5.5, 5.0], "validation": 4.0, "threads": 2,
        **dict.fromkeys(
            (key for _, key, _ in transformers_report.ROWS if key.endswith("_bytes") or "_live" in key), 4
        ),
        "resident_before": 1, "resident_growth": 1, "resident_peak": 1,
    }  # fmt: skip
    sparse = {**dense, "seconds": [9.0, 0.05, 0.05, 0.05], "parameters_live": 1}
    console = Console(file=io.StringIO(), width=120)
    console.print(transformers_report.make_table("model", {"dense": dense, "sparse": sparse}, 1))
    lines = console.file.getvalue().splitlines()
    rows = {cells[1].strip(): cells[2:5] for cells in (line.split("│") for line in lines) if len(cells) > 4}
    cells = {label: [cell.strip() for cell in found] for label, found in rows.items()}
    assert cells["ms per step, median"] == ["200.0", "50.0", "0.25"]
    assert cells["parameters live"] == ["4", "1", "0.25"]
    assert cells["of the last step"] == ["5.000", "5.000", ""]
    assert "ms per byte written" not in cells
