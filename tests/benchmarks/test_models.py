"""Training steps of transformers, on one small enough to test."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sparselab
from benchmarks import models
from benchmarks.models import Size
from examples.gpt_model import GPT

TINY = Size(n_layer=1, d_model=32, d_ff=64, n_head=2, context=8, batch=2)


@pytest.mark.parametrize(("name", "parameters"), [("10M", 10_725_888), ("40M", 39_508_480)])
def test_sizes_are_the_published_ones(name: str, parameters: int) -> None:
    size = models.SIZES[name]
    with torch.device("meta"):
        model = GPT(
            models.VOCABULARY, size.context, size.n_layer, size.d_model, size.d_ff, size.n_head, bias=False
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("fused", [False, True])
def test_both_arms_are_measured(fused: bool) -> None:
    arms = models.run(TINY, rounds=2, fused=fused)
    dense, sparse = arms["dense"], arms["sparse"]
    attention, feed_forward = 4 * 32 * 32, 2 * 32 * 64
    assert dense.parameters - sparse.parameters == pytest.approx(0.7 * attention + 0.9 * feed_forward, abs=3)
    assert dense.weight_bytes == 4 * dense.parameters
    # Weights, gradients, two moments, and a step count for each tensor.
    assert dense.training_bytes == 16 * dense.parameters + 4 * 13
    assert sparse.weight_bytes < sparse.training_bytes < dense.training_bytes
    assert dense.update_ms == dense.update_share == 0
    assert dense.mean_ms == dense.step_ms.median > 0
    assert sparse.mean_ms == sparse.step_ms.median + sparse.update_ms / 100
    assert math.isfinite(sparse.update_share)


def test_both_arms_under_autocast_and_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    under, trainer = [], models.Trainer.backward

    def backward(self: models.Trainer) -> None:
        hook = self.model.register_forward_hook(lambda *_: under.append(torch.is_autocast_enabled("cpu")))
        trainer(self)
        hook.remove()

    monkeypatch.setattr(models.Trainer, "backward", backward)
    arms = models.run(TINY, rounds=2, bfloat16=True, block_shape=(4, 4))
    assert all(under)
    assert arms["sparse"].parameters < arms["dense"].parameters
    _, model = models.make_models(TINY, (4, 4))
    assert {layer.block_shape for _, layer in sparselab.nn.find_sparse(model)} == {(4, 4)}


def test_the_steps_timed_apart_update_or_do_not() -> None:
    _, model = models.make_models(TINY)
    algorithm = sparselab.RigL(update_freq=models.UPDATE_FREQ)
    model.apply(algorithm)
    trainer = models.Trainer(model, TINY, False, algorithm)

    def topology() -> list[Tensor]:
        return [layer.positions().clone() for _, layer in sparselab.nn.find_sparse(model)]

    def changed(update: bool) -> list[bool]:
        before = topology()
        assert trainer.seconds_of_two_steps(update) > 0
        return [not torch.equal(a, b) for a, b in zip(before, topology(), strict=True)]

    assert not any(changed(False))
    assert all(changed(True))
    assert not any(changed(False))


def test_both_arms_see_the_same_batches() -> None:
    first, second = (models.Trainer(model, TINY, False) for model in models.make_models(TINY))
    seen = [next(first.batches) for _ in range(models.N_BATCHES + 1)]
    assert all(torch.equal(batch, next(second.batches)) for batch in seen)
    assert torch.equal(seen[0], seen[-1])
    assert not torch.equal(seen[0], seen[1])


def test_a_model_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models.make_models(TINY)
    models.gate(model, TINY)
    forward = sparselab.SparseLinear.forward
    monkeypatch.setattr(sparselab.SparseLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(AssertionError, match="of the largest logit"):
        models.gate(model, TINY)


def test_batch_and_context_can_be_replaced() -> None:
    assert models.sizes(["10M"], None, None) == {"10M": models.SIZES["10M"]}
    size = models.sizes(["40M"], 2, 16)["40M"]
    assert (size.batch, size.context, size.tokens, size.d_model) == (2, 16, 32, 640)


def test_bytes_at_inference_are_those_of_the_tensors() -> None:
    held = models.inference_bytes(TINY)
    dense, sparse = models.make_models(TINY)
    n_dense = sum(p.numel() for p in dense.parameters())
    assert held["dense float32"] == 4 * n_dense + sum(b.nbytes for b in dense.buffers())
    layers = [layer for _, layer in sparselab.nn.find_sparse(sparse)]
    live = sum(layer.nnz for layer in layers)
    rows = sum(8 * (layer.shape[0] + 1) for layer in layers)
    rest = sum(p.numel() for p in sparse.parameters()) - live
    assert held["sparse float32"] == (4 + 2) * live + rows + 4 * rest
    assert held["sparse bfloat16"] == (2 + 2) * live + rows + 2 * rest
