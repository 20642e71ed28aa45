import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gpt
import gpt_arms
import gpt_report
import numpy as np
import psutil
import pytest
import torch
from gpt_arms import ALGORITHMS, Config
from gpt_model import GPT, PRESETS
from ranks import Ranks, join_ranks, of_these
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import sparselab
from tests.kernels.process import ROOT

LINES = "".join(f"{n}: To be, or not to be: that is the question.\n" for n in range(60))
SMALL = {
    "layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 4, "steps": 8, "update_every": 2,
    "evaluate_every": 3, "save_every": 2, "validation_windows": 8, "sample": 20, "warmup": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def options(text, out, **changed):
    settings = {**SMALL, **changed}
    words = [[f"--{name.replace('_', '-')}", str(value)] for name, value in settings.items()]
    return ["--text", str(text), "--out", str(out), *(word for pair in words for word in pair)]


def small(**changed):
    return Config(**{**SMALL, **changed})


def build(cfg):
    model = gpt_arms.make_model(cfg, 256)
    optimizer = gpt_arms.make_optimizer(cfg, model)
    return model, optimizer, gpt_arms.attach_algorithm(cfg, model, optimizer)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "context", "parameters"),
    [
        ("10M", 256, 256, 10_942_464),
        ("40M", 256, 256, 39_880_960),
        ("124M", 50257, 1024, 124_439_808),
        ("350M", 50257, 1024, 354_823_168),
        ("1B", 256, 256, 1_008_742_400),
    ],
)
def test_presets_have_the_parameters_that_they_are_named_by(preset, vocabulary, context, parameters):
    shape = PRESETS[preset]
    with torch.device("meta"):
        model = GPT(vocabulary, context, shape.n_layer, shape.d_model, shape.d_ff, shape.n_head)
    tied = model.head.weight.numel() if vocabulary == 50257 else 0  # as in GPT-2
    assert sum(parameter.numel() for parameter in model.parameters()) - tied == parameters


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_and_ends_at_its_sparsity(algorithm):
    layer = "fan-in" if algorithm == "srigl" else "single"
    cfg = small(algorithm=algorithm, layer=layer, steps=12)
    model, optimizer, group = build(cfg)
    for _ in range(cfg.steps):
        model(torch.randint(256, (2, 16))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [each.steps_done for each in group] == [12, 12]
    found = {name: layer.sparsity for name, layer in sparselab.nn.find_sparse(model)}
    assert len(found) == 4
    for name, sparsity in found.items():
        if algorithm not in ("snfs", "dsr"):  # whose connections move from layer to layer
            wanted = cfg.attention_sparsity if ".attn." in name else cfg.mlp_sparsity
            assert sparsity == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({}, sparselab.SparseLinear),
        ({"layer": "fan-in"}, sparselab.FanInLinear),
        ({"layer": "block", "block": "4x1"}, sparselab.BlockSparseLinear),
        ({"arm": "masked"}, sparselab.MaskedLinear),
    ],
)
def test_the_arms_are_what_they_say(changed, kind):
    model, optimizer, _ = build(small(**changed))
    layers = dict(sparselab.nn.find_sparse(model))
    assert {type(layer) for layer in layers.values()} == {kind}
    stds = {name: layer.weight.to_dense().std().item() for name, layer in layers.items()}
    for name, std in stds.items():  # zeros included, as a dense layer's
        assert std == pytest.approx(gpt_arms.initial_std(f"{name}.", 1), rel=0.2), name
    model(torch.randint(256, (2, 16))).square().mean().backward()
    optimizer.step()


def test_the_dense_arm_has_no_algorithm_and_half_the_rate():
    cfg = small(arm="dense")
    model, _, algorithm = build(cfg)
    assert algorithm is None
    assert not list(sparselab.nn.find_sparse(model))
    assert cfg.peak_lr == small().peak_lr / 2
    assert model.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_weights_decay_and_biases_and_norms_do_not():
    model, optimizer, _ = build(small())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | free == set(names.values())
    assert all(name.endswith("bias") or "norm" in name for name in free)
    assert not any(name.endswith("bias") or "norm" in name for name in decayed)


def test_the_rate_rises_then_falls_to_its_share():
    cfg = small(steps=20)
    rates = [cfg.lr_factor(step) for step in range(cfg.steps + 1)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(cfg.final_lr)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model, _, _ = build(small(checkpoint_activations=recompute))
        assert model.recompute == recompute
        x = torch.arange(32).view(2, 16)
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_writing_place_by_place_is_what_the_whole_text_gives():
    model, _, _ = build(small())
    x = torch.randint(256, (1, 16))
    past = [[] for _ in model.blocks]
    with torch.no_grad():
        parts = [model(part, past) for part in (x[:, :5], *x[:, 5:].split(1, dim=1))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(x))


def lines(out):
    """The log, without what depends on the machine."""
    return [
        {name: line[name] for name in ("step", "tokens", "loss", "validation_loss", "lr", "sparsity")}
        for line in map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    ]


class Killed(BaseException):
    pass


def kill_at(monkeypatch, step):
    take = gpt.Run.take_step

    def stop(run):
        if run.step == step:
            raise Killed
        return take(run)

    monkeypatch.setattr(gpt.Run, "take_step", stop)


def last_state(out):
    return max((out / "checkpoints").iterdir()).read_bytes()


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one(text, tmp_path, monkeypatch, capsys, damaged):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    gpt.main(options(text, whole, accumulate=2))
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            gpt.main(options(text, cut, accumulate=2))
    checkpoints = sorted((cut / "checkpoints").iterdir(), reverse=True)
    assert [path.name for path in checkpoints] == [f"step-0000000{n}.checkpoint" for n in (6, 4)]
    (cut / "checkpoints" / "step-00000006.checkpoint.1.unfinished").write_bytes(b"half")
    for path in checkpoints[:damaged]:
        path.write_bytes(path.read_bytes()[:-1])
    with (cut / "log.jsonl").open("a") as file:
        file.write('{"step": 7, half a line')
    capsys.readouterr()
    gpt.main(["--resume", str(cut)])
    assert ("trying the one before" in capsys.readouterr().out) == bool(damaged)
    assert lines(cut) == lines(whole)
    models = []
    for out in (whole, cut):
        model, *_ = build(small(accumulate=2))
        path = out / "checkpoints" / "step-00000008.checkpoint"
        sparselab.load_checkpoint(path, model=model)
        models.append(model.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not list((cut / "checkpoints").glob("*.unfinished"))
    assert (cut / "loss.png").stat().st_size > 10_000


def test_a_run_that_cannot_be_resumed_says_why(text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="no run there"):
        gpt.main(["--resume", str(out)])
    gpt.main(options(text, out, steps=2))
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="no whole checkpoint in"):
        gpt.main(["--resume", str(out)])
    text.write_text(LINES.replace("be", "do"), encoding="utf-8")
    with pytest.raises(SystemExit, match="is another text than the run began with"):
        gpt.main(["--resume", str(out)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": "block", "algorithm": "dsr"}, "DSR"),
        ({"layer": "block", "block": "4"}, "expected outputs and inputs of a block"),
        ({"context": 5000}, "holds only .* tokens"),
        ({"attention_sparsity": 2}, "sparsity"),
    ],
)
def test_settings_that_do_not_go_together_are_named(text, tmp_path, changed, message):
    with pytest.raises(SystemExit, match=message):
        gpt.main(options(text, tmp_path / "out", **changed))


def test_a_budget_of_seconds_becomes_steps(text, tmp_path):
    cfg = small(seconds=1e-6)
    tokens = gpt.load_tokens(text, False, cfg.context, tmp_path)
    assert gpt.steps_in(cfg, tokens, tmp_path, Ranks()).steps == 10


def test_bfloat16_and_characters_train(text, tmp_path):
    out = tmp_path / "out"
    gpt.main([*options(text, out, steps=3), "--bfloat16", "--characters"])
    (last,) = lines(out)
    assert math.isfinite(last["validation_loss"])
    assert json.loads((out / "config.json").read_text())["characters"]


def test_the_loss_is_in_nats_per_token(text, tmp_path):
    tokens = gpt.load_tokens(text, False, 16, tmp_path)
    run = gpt.Run(small(arm="dense"), tokens, tmp_path, Ranks())
    with torch.no_grad():
        run.model.head.weight.zero_()
    assert run.evaluate() == pytest.approx(math.log(256))
    assert run.take_step() == pytest.approx(math.log(256))


def test_one_process_is_the_first_of_one():
    ranks, model = join_ranks(), torch.nn.Linear(2, 2)
    assert (ranks.first, ranks.world, ranks.share(model)) == (True, 1, model)
    ranks.wait()


def test_processes_get_other_windows(text, tmp_path):
    tokens = gpt.load_tokens(text, False, 16, tmp_path)
    batches = [tokens.batch(16, 4, 1, 0, part=rank, parts=2)[0] for rank in (0, 1, 0)]
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(torch.cat(batches[:2]), tokens.batch(16, 8, 1, 0)[0])


def test_other_processes_share_the_same_passes_out():
    cfg = small(accumulate=3)
    assert gpt.shared_out(cfg, 2, 3).accumulate == 2
    assert gpt.shared_out(cfg, 2, 1).accumulate == 6
    with pytest.raises(ValueError, match="6 passes of each step cannot be shared out to 4 processes"):
        gpt.shared_out(cfg, 2, 4)


def test_processes_that_begin_anew_leave_what_those_before_them_stored():
    store = distributed.HashStore()
    store.set("first", "gone")
    store.set("gone/answer to 1", "gone, too")
    store.set("gone/address", "nowhere")
    with ThreadPoolExecutor() as threads:
        second = threads.submit(of_these, store, 1, 2)
        time.sleep(0.2)  # in which it asks one that is gone
        first = of_these(store, 0, 2)
        first.set("address", "here")
        assert second.result(30).get("address") == b"here"
    assert not of_these(store, 0, 1).check(["address"])


def torchrun(*options, out, processes=2, kill_after=None):
    """Train in several processes, and kill one of them so many seconds after the first checkpoint."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    job = subprocess.Popen(
        [sys.executable, *command, "--max-restarts", "3", "examples/gpt.py", *options], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if kill_after is not None:
        while not list(out.glob("checkpoints/step-*.checkpoint")) and job.poll() is None:
            time.sleep(0.01)
        time.sleep(kill_after)
        workers = [each for each in psutil.Process(job.pid).children() if "examples/gpt.py" in each.cmdline()]
        workers[-1].kill()
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    return said


def curve(out):
    return [(each["step"], each["loss"], each["validation_loss"]) for each in lines(out)]


@pytest.mark.slow
@pytest.mark.parametrize(("gradients", "moment"), [("whole", 0.0), ("whole", 0.3), ("top-k", 0.15)])
def test_a_job_goes_on_after_one_of_its_processes_was_killed(text, tmp_path, gradients, moment):
    said = {}
    for name, after in (("as ever", None), ("killed", moment)):
        out = tmp_path / name
        more = options(text, out, steps=40, save_every=4, evaluate_every=4, accumulate=2, update_every=5)
        said[name] = torchrun(*more, "--gradients", gradients, out=out, kill_after=after)
    assert "exitcode: -9" in said["killed"]
    curves = [curve(tmp_path / name) for name in said]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 10


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(text, tmp_path):
    out = tmp_path / "out"
    begun = options(text, out, steps=12, save_every=6, evaluate_every=3, accumulate=2, algorithm="granet")
    torchrun(*begun, out=out)
    as_ever = lines(out)
    sorted(out.glob("checkpoints/step-*"))[-1].unlink()
    gpt.main(["--resume", str(out)])
    assert lines(out)[:2] == as_ever[:2]
    for ours, theirs in zip(lines(out), as_ever, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("how", ["whole", "bfloat16", "top-k"])
def test_gradients_are_sent_as_they_are_told_to_be(tmp_path, how):
    distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(40, 30, bias=False))
        Ranks().compress(model, how, 0.01)
        model(torch.randn(5, 40)).square().sum().backward()
        gradient = model.module.weight.grad
        rounded = gradient.bfloat16().float()
        assert torch.equal(gradient, rounded) == (how == "bfloat16")
        assert gradient.count_nonzero() == (12 if how == "top-k" else 1200)
    finally:
        distributed.destroy_process_group()


def test_several_runs_are_drawn_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        numbers = "seconds", "tokens", "loss", "validation_loss", "tokens_per_second", "resident_peak"
        line = {**dict.fromkeys(numbers, 1.0), "step": 3, "sparsity": 0.9}
        (tmp_path / name / "log.jsonl").write_text(json.dumps(line) + "\n")
    gpt_report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_what_is_written_comes_after_a_line_break_and_depends_on_the_seed(text, tmp_path):
    tokens = gpt.load_tokens(text, True, 16, tmp_path)
    model = gpt_arms.make_model(small(), tokens.size)
    texts = [gpt.write(model, tokens, 40, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 40
    assert set(texts[0]) <= set(tokens.vocabulary)
    assert np.unique(list(texts[0])).size > 3
