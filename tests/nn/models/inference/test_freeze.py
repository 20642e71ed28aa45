"""Whole models frozen in few bits, and what other tools for models make of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparselab
from sparselab import (
    BlockSparseLinear,
    FanInLinear,
    MaskedLinear,
    SparseConv2d,
    SparseEmbedding,
    SparseGRU,
    SparseLinear,
    SparseMLP,
    SparseMultiheadAttention,
    TiedLinear,
    freeze,
    load_model,
    memory_report,
    save_model,
)
from tests.nn.narrow import every_dtype, weights_of

INT8, BF16, F32 = torch.int8, torch.bfloat16, torch.float32


class Model(nn.Module):
    """A layer of every kind, and dense ones."""

    def __init__(self, sparsity: float = 0.7) -> None:
        super().__init__()
        self.embed = SparseEmbedding(20, 32, sparsity=sparsity)
        self.attend = SparseMultiheadAttention(32, 2, batch_first=True, sparsity=sparsity)
        self.gru = SparseGRU(32, 24, batch_first=True, sparsity=sparsity)
        self.mix = nn.Sequential(
            SparseLinear(24, 40, sparsity=sparsity), nn.ReLU(), FanInLinear(40, 30, sparsity=sparsity),
            nn.ReLU(), BlockSparseLinear(30, 36, sparsity=sparsity, block_shape=(4, 4)),
        )  # fmt: skip
        self.conv = SparseConv2d(1, 3, 3, padding=1, sparsity=sparsity)
        self.masked = MaskedLinear(36, 32, sparsity=sparsity)
        self.head = TiedLinear(self.embed, bias=False)
        self.out = nn.Linear(20, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attend(x, x, x)[0]
        x = self.mix(self.gru(x)[0])
        x = self.masked(self.conv(x.unsqueeze(1)).sum(1))
        return self.out(self.head(x))


LINEAR = (
    *(f"attend.{part}_proj" for part in ("q", "k", "v", "out")), "gru.weight_ih_l0", "gru.weight_hh_l0",
    "mix.0", "mix.2", "mix.4",
)  # fmt: skip


def narrow_layers(model: nn.Module) -> dict[str, torch.dtype]:
    return {
        name.removesuffix(".weight_values"): buffer.dtype
        for name, buffer in model.named_buffers()
        if name.endswith("weight_values")
    }


@every_dtype
def test_all_that_can_be_is_narrow_and_all_sparse_is_frozen(dtype: torch.dtype) -> None:
    model, tokens = Model(), torch.randint(20, (3, 7))
    expected = model(tokens)
    assert freeze(model, dtype) is model
    assert narrow_layers(model) == dict.fromkeys(LINEAR, dtype)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {"masked.weight", "masked.bias", "out.weight", "out.bias"}
    torch.testing.assert_close(model(tokens), expected, rtol=0.05, atol=0.02)


def test_without_a_dtype_weights_stay() -> None:
    model, tokens = Model(), torch.randint(20, (3, 7))
    expected = model(tokens)
    freeze(model)
    assert narrow_layers(model) == {}
    assert not model.mix[0].weight_values.requires_grad
    assert torch.equal(model(tokens), expected)


def test_a_layer_itself() -> None:
    layer = SparseLinear(24, 40)
    assert freeze(layer, INT8) is layer
    assert layer.weight_values.dtype is INT8


@every_dtype
def test_one_layer_that_cannot_be_leaves_all_as_they_were(dtype: torch.dtype) -> None:
    model = Model()
    with torch.no_grad():
        model.mix[4].weight_values[0, 0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^mix\.4: weights must be finite numbers of"):
        freeze(model, dtype)
    assert narrow_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(TypeError, match=r"^attend\.q_proj: weights must be one of"):
        freeze(model, torch.float64)


def test_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match="must contain a sparse layer to freeze, got a Sequential without"):
        freeze(nn.Sequential(nn.Linear(3, 4)))
    for model in (nn.Sequential(SparseConv2d(3, 4, 3)), nn.Sequential(MaskedLinear(3, 4, sparsity=0.5))):
        with pytest.raises(ValueError, match="must contain a sparse linear layer to freeze"):
            freeze(model, INT8)


@every_dtype
def test_files(dtype: torch.dtype, tmp_path: Path) -> None:
    model, other, tokens = freeze(Model(), dtype), freeze(Model(0.5), dtype), torch.randint(20, (3, 7))
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(tokens), model(tokens))
    assert narrow_layers(other) == dict.fromkeys(LINEAR, dtype)
    size = (tmp_path / "model.safetensors").stat().st_size
    save_model(Model(), tmp_path / "wide.safetensors")
    assert size < (tmp_path / "wide.safetensors").stat().st_size
    if dtype is INT8:
        plain = Model()
        before = copy.deepcopy(plain.state_dict())
        with pytest.raises(RuntimeError, match=r"attend\.q_proj: .* freeze it first"):
            load_model(plain, tmp_path / "model.safetensors")
        assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in before.items())


def test_memory_is_counted_as_it_is() -> None:
    for make in (
        lambda: SparseLinear(3072, 768, sparsity=0.9),
        lambda: FanInLinear(3072, 768, sparsity=0.9),
        lambda: BlockSparseLinear(3072, 768, sparsity=0.9, block_shape=(4, 4)),
    ):
        layer: Any = make()
        n, before = layer.n_weights, memory_report(layer)
        reports = {dtype: memory_report(freeze(copy.deepcopy(layer), dtype)) for dtype in (BF16, INT8)}
        for dtype, report in reports.items():
            scales = 768 * 4 * (dtype is INT8)
            assert report.weight_bytes == before.weight_bytes - n * (4 - dtype.itemsize) + scales
            assert report.parameters_live == before.parameters_live
            assert report.parameters_dense == before.parameters_dense
            assert report.dense_weight_bytes == before.dense_weight_bytes
            assert report.gradient_bytes == report.plan_bytes == 0
        # Bytes for each live weight, with a column for each connection, row pointers, scales and biases.
        per_weight = [report.weight_bytes / n for report in (before, reports[BF16], reports[INT8])]
        column = 2 / (layer.block_shape[0] * layer.block_shape[1])
        for bytes_, value in zip(per_weight, (4, 2, 1), strict=True):
            assert 0 <= bytes_ - value - column < 0.07


@every_dtype
def test_a_report_of_a_model_on_the_device_meta(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = nn.Sequential(SparseLinear(4000, 3000))
    held = memory_report(freeze(model, dtype)).weight_bytes
    assert held == memory_report(freeze(nn.Sequential(SparseLinear(4000, 3000)), dtype)).weight_bytes


@every_dtype
def test_dense_again(dtype: torch.dtype) -> None:
    model, tokens = freeze(Model(), dtype), torch.randint(20, (3, 7))
    expected, W = model(tokens), weights_of(model.mix[0]).float()
    sparselab.densify(model)
    assert narrow_layers(model) == {}
    assert type(model.mix[0]) is nn.Linear
    assert torch.equal(model.mix[0].weight, W)
    assert not model.mix[0].weight.requires_grad
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


@every_dtype
def test_dense_again_after_a_cast(dtype: torch.dtype) -> None:
    layer = freeze(SparseLinear(24, 40), dtype).half()
    dense = layer.to_dense()
    assert (dense.weight.dtype, dense.bias.dtype) == (F32, F32)
    x = torch.randn(3, 24)
    torch.testing.assert_close(dense.half()(x.half()), layer(x.half()), rtol=0.01, atol=0.005)


@every_dtype
def test_tuned(dtype: torch.dtype) -> None:
    model = freeze(nn.Sequential(SparseLinear(60, 40), nn.ReLU(), SparseLinear(40, 60)), dtype)
    x = torch.randn(9, 60)
    expected = model(x)
    report = sparselab.tune(model, [9, 40])
    assert {name for each in report.products for name in each.microseconds} == {
        "skinny",
        "tiles",
        "dense blocks",
    }
    assert model[0].variant(9).reason.startswith("measured: ")
    torch.testing.assert_close(model(x), expected)
    plain = SparseLinear(60, 40)
    assert len(sparselab.tune(nn.ModuleList([plain, freeze(copy.deepcopy(plain), dtype)]), [1]).products) == 2


@every_dtype
def test_tools_that_write_weights_say_that_they_are_frozen(dtype: torch.dtype) -> None:
    frozen, model = freeze(nn.Sequential(SparseLinear(24, 24)), dtype), nn.Sequential(SparseLinear(24, 24))
    before = copy.deepcopy(frozen.state_dict())
    for tool in (
        lambda: sparselab.soft_update(frozen, model, 0.5),
        lambda: sparselab.soft_update(model, frozen, 0.5),
        lambda: sparselab.average([frozen, model]),
        lambda: sparselab.copy_topology(frozen, model),
        lambda: sparselab.condense(nn.Sequential(*frozen, nn.ReLU(), nn.Linear(24, 3))),
        lambda: MaskedLinear.from_sparse(frozen[0]),
        lambda: sparselab.SET().attach(frozen),
    ):
        with pytest.raises(TypeError, match=r"frozen in (int8|bfloat16), which are neither trained nor"):
            tool()
    assert all(torch.equal(frozen.state_dict()[name], tensor) for name, tensor in before.items())


@every_dtype
@pytest.mark.parametrize("layer", ["single", "fan-in", "block"])
def test_feed_forward_blocks(layer: str, dtype: torch.dtype) -> None:
    settings = {"block_shape": (4, 4)} if layer == "block" else {}
    block = SparseMLP(64, 128, layer=layer, sparsity=0.7, **settings)
    for tokens in (3, 300):  # few, and so many that the layers would be computed together
        x = torch.randn(tokens, 64)
        expected = block(x)
        frozen = freeze(copy.deepcopy(block), dtype)
        torch.testing.assert_close(frozen(x), expected, rtol=0.05, atol=0.02)
        torch.testing.assert_close(frozen(x), frozen.down.to_dense()(F.gelu(frozen.up.to_dense()(x))))


@every_dtype
def test_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    model, other, tokens = freeze(Model(), dtype), freeze(Model(0.5), dtype), torch.randint(20, (3, 7))
    sparselab.save_checkpoint(tmp_path / "run", model=model)
    sparselab.load_checkpoint(tmp_path / "run", model=other)
    assert torch.equal(other(tokens), model(tokens))


@every_dtype
def test_dense_layers_around_it_are_trained(dtype: torch.dtype) -> None:
    model = freeze(nn.Sequential(nn.Linear(6, 24), SparseLinear(24, 40), nn.Linear(40, 3)), dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(50, 6), torch.randn(50, 3)
    held = copy.deepcopy(model[1].state_dict())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model[1].state_dict()[name], tensor) for name, tensor in held.items())
    assert model[1].weight_values.grad is None


def test_warmup_of_int8() -> None:
    assert sparselab.warmup(INT8) > 0
