"""``python -m sparselab bench``, ``info`` and ``warmup``, run whole on tiny layers."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

import sparselab
from sparselab import BlockSparseLinear
from sparselab.__main__ import main
from sparselab.bench import compile as compiling
from sparselab.bench import options, run
from sparselab.bench.contenders import linear
from sparselab.bench.contenders.gate import Gate, WrongResultError
from sparselab.bench.measure import limits
from sparselab.bench.output import info
from sparselab.kernels.cpu.runtime.jit import cache_directory
from tests.bench.test_gate import Altered
from tests.kernels.process import run_python

TINY = ["bench", "--shapes", "16x24", "--tokens", "8", "--rounds", "1"]
OPTIONAL = ("matplotlib", "rich", "tqdm")


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Meter", functools.partial(limits.Meter, connections=512))


def variant(case: dict[str, Any]) -> str:
    layer = sparselab.SparseLinear(case["in_features"], case["out_features"], sparsity=case["sparsity"])
    return layer.variant(case["tokens"]).name


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of wrong arguments; the exit status must be 2."""
    with pytest.raises(SystemExit) as exit_:
        main([*arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("tokens", [["8"], ["1", "70"]])
def test_every_case_is_in_table_and_json(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    arguments = ["--shapes", "16x24", "24x5", "--tokens", *tokens, "--sparsity", "0", "0.9", "--rounds", "1"]
    assert main(["bench", *arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["machine"]["sparselab"] == sparselab.__version__
    assert data["arguments"] == [*arguments, "--json", str(file)]
    assert len(data["limits"]) == 1
    assert [
        (
            *(row["case"][key] for key in ("in_features", "out_features", "tokens", "sparsity")),
            row["operation"],
        )
        for row in data["results"]
    ] == [
        (*shape, int(count), sparsity, operation)
        for shape in [(16, 24), (24, 5)]
        for count in tokens
        for sparsity in (0.0, 0.9)
        for operation in linear.OPERATIONS
    ]
    for row in data["results"]:
        usual = [name for name in linear.CONTENDERS if name not in linear.OPTIONAL]
        assert list(row["timings_ms"]) == usual
        assert row["timings_ms"]["dense"]["median"] > 0
        assert row["threads"] == 1
        assert row["variant"].split(" + ")[0] == variant(row["case"])
        flops = 2 * row["case"]["nnz"] * row["case"]["tokens"] * (3 if "backward" in row["operation"] else 1)
        assert row["gflops"] == pytest.approx(flops / row["timings_ms"]["sparselab"]["median"] / 1e6)
        assert row["share_of_limit"] == pytest.approx(row["gflops"] / data["limits"][0]["first_level_gflops"])
    assert len(re.findall(r"^(16 -> 24|24 -> 5) +forward", printed, re.MULTILINE)) == len(data["results"])


def test_chosen_operations_and_contenders(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert main([*TINY, "--operations", "forward", "--contenders", "dense", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["results"]
    assert row["operation"] == "forward"
    assert list(row["timings_ms"]) == ["dense"]
    assert row["gflops"] is None
    assert row["share_of_limit"] is None


def test_layers_of_blocks_are_timed_where_they_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--contenders", "sparselab", "--blocks", "4x1", "3x5", "--json", str(file)]
    assert main([*TINY, *arguments]) == 0
    for row in json.loads(file.read_text())["results"]:
        assert list(row["timings_ms"]) == ["sparselab", "blocks 4x1", "blocks 3x5"]
        assert row["timings_ms"]["blocks 3x5"]["median"] > 0
    assert main([*TINY, "--contenders", "dense", "--json", str(file)]) == 0
    assert list(json.loads(file.read_text())["results"][0]["timings_ms"]) == ["dense"]


def test_layers_of_blocks_are_timed_in_bfloat16_where_that_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--contenders", "sparselab", "--blocks", "16x16", "--bfloat16", "--json", str(file)]
    assert main([*TINY, *arguments]) == 0
    for row in json.loads(file.read_text())["results"]:
        assert list(row["timings_ms"]) == ["sparselab", "blocks 16x16", "blocks 16x16 bfloat16"]
        assert row["timings_ms"]["blocks 16x16 bfloat16"]["median"] > 0


def test_a_layer_of_blocks_that_computes_something_else_is_refused() -> None:
    layer = BlockSparseLinear(8, 6, block_shape=(3, 5), sparsity=0.5)
    x, dy = torch.randn(4, 8), torch.randn(4, 6)
    judge = Gate(layer, x, dy)
    judge.check(layer, 1e-5, gradients=True)
    other = BlockSparseLinear(8, 6, block_shape=(3, 5), sparsity=0.5)
    with pytest.raises(WrongResultError, match="output of BlockSparseLinear is off"):
        judge.check(other, 1e-5, gradients=False)
    layer.weight_values.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(WrongResultError, match="gradient of the live weights of BlockSparseLinear is off"):
        judge.check(layer, 1e-5, gradients=True)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
def test_gain_from_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    arguments = ["--threads", "2", "1", "--operations", "forward", "--contenders", "sparselab"]
    assert main([*TINY, *arguments, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert [row["threads"] for row in data["results"]] == [1, 2]
    assert [row["threads"] for row in data["limits"]] == [1, 2]
    (gain,) = data["thread_gains"]
    one, two = (row["timings_ms"]["sparselab"]["median"] for row in data["results"])
    assert gain["gain"] == pytest.approx(one / two)
    assert "1 -> 2" in capsys.readouterr().out
    assert torch.get_num_threads() == 1


def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, image = tmp_path / "results.json", tmp_path / "results.png"
    assert main([*TINY, "--break-even", "--scaling", "--json", str(file), "--picture", str(image)]) == 0
    data = json.loads(file.read_text())
    assert [each["in_features"] for each in data["break_even"]] == [16]
    densities = [row["case"]["nnz"] / (16 * 24) for row in data["density"] if row["operation"] == "forward"]
    assert densities == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5], abs=1 / (16 * 24))
    sizes = [row["case"]["out_features"] for row in data["size"] if row["operation"] == "forward"]
    assert sizes == [6, 12, 24, 36, 48]
    assert image.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for title in ("limits of this machine", "layers:", "break-even:", "against density:", "against size:"):
        assert title in printed


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_pictures(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / f"results.{suffix}"
    assert main([*TINY, "--operations", "forward", "--picture", str(image)]) == 0
    assert image.stat().st_size > 1000


def test_a_wrong_contender_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = linear.Contender(lambda layer: Altered(layer, y=lambda y: 2 * y), 1e-5)
    monkeypatch.setitem(linear.CONTENDERS, "dense", wrong)
    assert main(TINY) == 1
    assert "  dense refused: output of Altered is off" in capsys.readouterr().out
    file = tmp_path / "results.json"
    only_ours = ["--contenders", "sparselab"]
    assert main([*TINY, *only_ours, "--break-even", "--json", str(file)]) == 1
    assert "at 0.0% dense refused: output of Altered is off" in capsys.readouterr().out
    (found,) = json.loads(file.read_text())["break_even"]
    assert found["sparsity"] is None
    assert found["reason"].startswith("at 0.0% dense refused: ")


def test_without_the_optional_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(TINY) == 0
    assert "16 -> 24" in capsys.readouterr().out
    message = failure(capsys, *TINY, "--picture", "x.png")
    assert "--picture: needs matplotlib" in message
    assert "extra 'benchmarks'" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "768"], "--shapes: expected INxOUT such as 768x3072, got '768'"),
        (["--shapes", "0x4"], "--shapes: expected INxOUT"),
        (["--shapes", "4x4x4"], "--shapes: expected INxOUT"),
        (["--tokens", "0"], "--tokens: expected an integer of at least 1, got '0'"),
        (["--tokens", "many"], "--tokens: expected an integer of at least 1, got 'many'"),
        (["--rounds", "1.5"], "--rounds: expected an integer"),
        (["--sparsity", "1"], "--sparsity: expected a number of at least 0 and below 1, got '1'"),
        (["--sparsity", "nan"], "--sparsity: expected a number"),
        (["--threads", "100000"], "--threads: Numba may use "),
        (["--operations", "sideways"], "--operations: invalid choice: 'sideways'"),
        (["--contenders", "nobody"], "--contenders: invalid choice: 'nobody'"),
        (["--picture", "x.txt"], "--picture: must end in .pdf, .png, .svg, got 'x.txt'"),
        (["--json", "nowhere/at/all/x.json"], "--json: there is no directory 'nowhere/at/all'"),
        (["--blocks", "4"], "--blocks: expected OUTxIN such as 4x4, got '4'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_options_of_bench(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(capsys, "bench", *arguments)


def test_wrong_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "argument command: invalid choice: 'nothing'" in failure(capsys, "nothing")
    assert "required: command" in failure(capsys)
    assert "unrecognized arguments: extra" in failure(capsys, "info", "--json", "-", "extra")
    assert "argument --json: " in failure(capsys, "info", "--json", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--help"], "bench   time sparse layers"),
        (["bench", "--help"], "--break-even"),
        (["info", "--help"], "--json"),
        (["--version"], sparselab.__version__),
    ],
)
def test_help(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert part in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from sparselab.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', *{'numpy', 'numba', 'torch'} & set(sys.modules))"
    )
    assert run_python("-c", code).splitlines()[-1] == "loaded:"


def test_defaults_are_the_published_layers() -> None:
    parsed = options.parse([])
    assert parsed.layers == list(linear.SHAPES.items())
    assert parsed.sparsity == [0.9]
    assert options.parse(["--tokens", "7"]).layers == [(shape, 7) for shape in linear.SHAPES]
    assert options.parse(["--shapes", "640x2560"]).layers == [((640, 2560), 2048)]
    assert options.parse(["--threads", "1", "1"]).threads == [1]


def test_info_says_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSELAB_EXAMPLE", "set for a test")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found: dict[str, dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert found["environment"]["SPARSELAB_EXAMPLE"] == "set for a test"
    assert found["threads"]["Numba threading layer"] == numba.threading_layer()
    assert found["threads"]["torch"] == 1
    assert found["compiled kernels"]["directory"] == str(cache_directory())
    assert set(found["versions"]) == {"python", "numpy", "numba", "llvmlite", "torch", "sparselab"}
    for section, entries in found.items():
        assert f"{section}:" in printed
        assert all(f"  {name}  " in printed.replace("   ", "  ") for name in entries)
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads((tmp_path / "info.json").read_text()) == found


def test_warmup_says_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = []

    def warmup(dtype: torch.dtype, *, training: bool) -> float:
        asked.append((dtype, training))
        return 2.5

    monkeypatch.setattr(compiling, "warmup", warmup)
    monkeypatch.setattr(compiling, "cache_directory", lambda: tmp_path)
    (tmp_path / "cpu.csr").mkdir()
    (tmp_path / "cpu.csr" / "a.1.nbc").write_bytes(b"")
    assert main(["warmup", "--dtypes", "float64", "bfloat16", "--inference"]) == 0
    assert asked == [(torch.float64, False), (torch.bfloat16, False)]
    assert main(["warmup"]) == 0
    assert asked[2:] == [(torch.float32, True)]
    assert capsys.readouterr().out.splitlines() == [
        "float64: 2.5 s", "bfloat16: 2.5 s", f"1 kernels in {tmp_path}",
        "float32: 2.5 s", f"1 kernels in {tmp_path}",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        main(["warmup", "--dtypes", "int8"])


def test_compiled_kernels_are_counted(tmp_path: Path) -> None:
    assert info.compiled(tmp_path / "absent")["kernels"] == 0
    (tmp_path / "kernels").mkdir()
    for name, size in (("a.1.nbc", 30_000), ("a.2.nbc", 20_000), ("a.nbi", 10_000)):
        (tmp_path / "kernels" / name).write_bytes(bytes(size))
    assert info.compiled(tmp_path) == {"directory": str(tmp_path), "kernels": 2, "MB": 0.06}


def test_a_threading_layer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise ValueError("No threading layer could be loaded.\nHINT: more")

    monkeypatch.setattr(numba, "threading_layer", absent)
    assert info._threading_layer() == "none: No threading layer could be loaded."
