"""Models as programs: exported, saved and loaded, compiled ahead of time, and, made dense, in ONNX."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparselab
from sparselab.nn.ops import topologies


def make() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 20),
        nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip
    return sparselab.sparsify(model, 0.8).eval(), torch.randn(2, 3, 8, 8)


def test_a_saved_program_runs_with_its_plans_kept() -> None:
    model, x = make()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    call = torch.export.load(file).module()
    expected = model(x)
    del model
    assert torch.equal(call(x), expected)
    before = list(topologies._recent.values())
    assert torch.equal(call(x), expected)
    assert [id(each) for each in topologies._recent.values()] == [id(each) for each in before]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_program_compiled_ahead_of_time(tmp_path: Path) -> None:
    model, x = make()
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    call: Any = torch._inductor.aoti_load_package(path)
    for _ in range(2):
        torch.testing.assert_close(call(x), model(x))


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")  # those of the exporter
def test_a_densified_model_is_written_to_onnx(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript", reason="needs onnxscript")
    model, x = make()
    expected = model(x)
    path = tmp_path / "model.onnx"
    program: Any = torch.onnx.export(
        sparselab.densify(model), (x,), None if dynamo else str(path), dynamo=dynamo
    )
    if dynamo:
        program.save(str(path))
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-4, atol=1e-5)
