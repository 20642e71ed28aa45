"""Models in files: what was saved comes back, and what is damaged is refused and changes nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparselab import MaskedLinear, SparseLinear, load_model, save_model
from sparselab.nn.models.saved import files
from tests.nn.storage.test_state_dict import HOSTILE


class Model(nn.Module):
    """Layers of every kind, a tied weight, views of one memory, an empty layer, one partly in use."""

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 30)
        self.inner = SparseLinear(30, 20, sparsity=sparsity)
        self.narrow = SparseLinear(20, 30, bias=False, sparsity=sparsity, dtype=torch.bfloat16)
        self.wide = SparseLinear(70_000, 2, sparsity=0.999)
        self.nothing = SparseLinear(30, 20, sparsity=1.0)
        self.masked = MaskedLinear(30, 20, sparsity=sparsity)
        self.norm = nn.BatchNorm1d(20)
        self.head = nn.Linear(30, 50, bias=False)
        self.head.weight = self.embed.weight
        both = torch.randn(2, 7)
        self.register_buffer("first", both[0])
        self.register_buffer("flat", both.view(-1))
        self.register_buffer("across", both[:, 1])
        self.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))


def make_pair() -> tuple[Model, Model]:
    source, target = Model(0.8), Model(0.5)
    source.inner.forward_mask = torch.rand(source.inner.nnz, 1, 1) < 0.5
    return source, target


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_wrong_states_are_seen() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(AssertionError):
        assert_state(model, {**snapshot(model), "bias": torch.full((2,), 9.0)})
    with pytest.raises(AssertionError):
        assert_state(model, {"weight": model.weight.detach()})


def test_a_model_comes_back(tmp_path: Path) -> None:
    source, target = make_pair()
    parameters = dict(target.named_parameters())
    save_model(source, tmp_path / "model.safetensors")
    load_model(target, tmp_path / "model.safetensors")
    assert_state(target, source.state_dict())
    assert target.head.weight is target.embed.weight
    assert all(parameter is parameters[name] for name, parameter in target.named_parameters())
    x = torch.randn(5, 30)
    for name in ("inner", "nothing", "masked"):
        assert torch.equal(getattr(target, name)(x), getattr(source, name)(x))
    with torch.no_grad():
        source.inner.weight_values.zero_()
    assert not torch.equal(target.inner.weight_values, source.inner.weight_values)


def test_a_model_comes_back_through_torch_with_weights_only(tmp_path: Path) -> None:
    source, target = make_pair()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_state(target, source.state_dict())


def test_what_is_tied_is_stored_once_and_the_format_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(Model(0.8), path)
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert "embed.weight" in names
    assert "head.weight" not in names
    assert metadata == {
        "format": "pt",
        "sparselab_format": files.FORMAT,
        "tied": json.dumps({"head.weight": "embed.weight"}),
    }


def test_a_tied_weight_comes_back_into_an_untied_model(tmp_path: Path) -> None:
    source, target = make_pair()
    target.head.weight = nn.Parameter(torch.zeros(50, 30))
    save_model(source, tmp_path / "model.safetensors")
    load_model(target, tmp_path / "model.safetensors")
    assert_state(target, source.state_dict())


def test_other_float_dtypes_and_gradients(tmp_path: Path) -> None:
    source, target = SparseLinear(30, 20, sparsity=0.8), SparseLinear(30, 20, dtype=torch.float64)
    save_model(source, str(tmp_path / "layer.safetensors"))
    target(torch.randn(3, 30, dtype=torch.float64)).sum().backward()
    load_model(target, str(tmp_path / "layer.safetensors"))
    assert target.weight_values.dtype == torch.float64
    assert torch.equal(target.weight_values, source.weight_values.double())
    assert target.weight_values.grad is None


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer.safetensors"
    first, second = SparseLinear(30, 20), SparseLinear(30, 20)
    save_model(first, path)
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="the disk is full"):
            save_model(second, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_model(second, path)
    load_model(first, path)
    assert_state(first, second.state_dict())
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_flushed_before_it_is_moved_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spied(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, spied(name, getattr(os, name)))
    save_model(SparseLinear(30, 20), tmp_path / "layer.safetensors")
    assert calls == (["fsync", "replace", "fsync"] if os.name == "posix" else ["fsync", "replace"])


def refused(target: nn.Module, path: Path, error: type[Exception], message: str) -> None:
    """Loading raises, and the model, gradients included, is as it was."""
    for parameter in target.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    before = snapshot(target)
    with pytest.raises(error, match=message):
        load_model(target, path)
    assert_state(target, before)
    for parameter in target.parameters():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 7))


@pytest.mark.parametrize("what", [name for name in HOSTILE if name not in ("no data", "not a tensor")])
def test_a_damaged_topology_is_named_and_changes_nothing(what: str, tmp_path: Path) -> None:
    change, message = HOSTILE[what]
    source, target = (
        nn.ModuleDict(
            {"a": nn.Linear(3, 4), "inner": SparseLinear(30, 20, sparsity=s), "z": SparseLinear(9, 9)}
        )
        for s in (0.8, 0.5)
    )
    save_model(source, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    layer = {name: state.pop(f"inner.{name}") for name in ("weight_values", "indptr", "indices", "bias")}
    state |= {f"inner.{name}": tensor.contiguous() for name, tensor in change(layer).items()}
    rewrite(tmp_path / "model.safetensors", state)
    refused(target, tmp_path / "model.safetensors", RuntimeError, f"inner: .*{message}")


def rewrite(path: Path, state: dict[str, Tensor], **metadata: str) -> None:
    save_file(state, path, {"sparselab_format": files.FORMAT, "tied": "{}", **metadata})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


def changed(**metadata: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, load_file(path), **metadata)


def without(name: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, {key: t for key, t in load_file(path).items() if key != name})


def with_tensor(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda path: rewrite(path, {**load_file(path), name: tensor})


DAMAGED = {
    "cut": (cut, ValueError, "path must be a file of save_model, format 1, got '.*layer.safetensors': "),
    "garbled header": (garble, ValueError, "path must be a file of save_model"),
    "empty": (lambda path: path.write_bytes(b""), ValueError, "path must be a file of save_model"),
    "of something else": (
        lambda path: save_file(load_file(path), path),
        ValueError,
        "path must be .* got .* of format None",
    ),
    "of the future": (changed(sparselab_format="2"), ValueError, "got .* of format 2"),
    "tied to nothing": (changed(tied='{"bias": "none"}'), ValueError, "tied tensors that it lacks: .*none"),
    "no list of ties": (changed(tied="[]"), ValueError, "tied tensors that it lacks"),
    "no JSON": (changed(tied="{"), ValueError, "tied tensors that it lacks"),
    "no bias": (without("bias"), RuntimeError, 'Missing key.*"bias"'),
    "more": (with_tensor("more", torch.zeros(2)), RuntimeError, 'Unexpected key.*"more"'),
    "short bias": (with_tensor("bias", torch.zeros(2)), RuntimeError, "size mismatch for bias"),
    "long mask": (
        with_tensor("forward_mask", torch.ones(2, dtype=torch.bool)),
        RuntimeError,
        "size mismatch for forward_mask",
    ),
    "not there": (Path.unlink, FileNotFoundError, "layer.safetensors"),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_and_changes_nothing(what: str, masked: bool, tmp_path: Path) -> None:
    damage, error, message = DAMAGED[what]
    path = tmp_path / "layer.safetensors"
    save_model(SparseLinear(30, 20, sparsity=0.8), path)
    damage(path)
    target = SparseLinear(30, 20, sparsity=0.5)
    if masked:
        target.forward_mask = torch.rand(target.nnz, 1, 1) < 0.5
    refused(target, path, error, message)


def test_a_masked_layer_is_left_as_it_was(tmp_path: Path) -> None:
    source, target = (nn.Sequential(MaskedLinear(30, 20), nn.Linear(20, 5)) for _ in range(2))
    save_model(source, tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    rewrite(tmp_path / "layer.safetensors", {**state, "1.bias": torch.zeros(2)})
    refused(target, tmp_path / "layer.safetensors", RuntimeError, r"size mismatch for 1\.bias")


class WithExtra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (WithExtra({"a": 1}), TypeError, "dense tensors only, got dict under '_extra_state'"),
        (WithExtra(torch.eye(2).to_sparse()), TypeError, "got torch.sparse_coo under '_extra_state'"),
        (
            SparseLinear(3, 3, device="meta"),
            ValueError,
            "must hold data, got 'weight_values' on the device meta",
        ),
    ],
)
def test_models_that_do_not_fit_a_file_are_named(
    model: nn.Module, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save_model(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_extra_state_of_a_tensor_comes_back(tmp_path: Path) -> None:
    source, target = WithExtra(torch.arange(3)), WithExtra(None)
    save_model(source, tmp_path / "model.safetensors")
    load_model(target, tmp_path / "model.safetensors")
    assert torch.equal(target.extra, source.extra)


def test_a_model_without_memory_is_not_loaded(tmp_path: Path) -> None:
    save_model(SparseLinear(30, 20), tmp_path / "layer.safetensors")
    with pytest.raises(ValueError, match="must hold data, got 'weight_values' on the device meta"):
        load_model(SparseLinear(30, 20, device="meta"), tmp_path / "layer.safetensors")


def test_a_missing_safetensors_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for function in (save_model, load_model):
        with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[safetensors\]'"):
            function(SparseLinear(3, 3), tmp_path / "layer.safetensors")
