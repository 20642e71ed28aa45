"""Models that are made sparse before they have memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselab import MaskedLinear, SparseLinear, materialize, plan_sparsify, sparsify

#: A dense weight of this size takes 640 GB.
HUGE, SPARSITY, NNZ = 400_000, 1 - 1e-6, 160_000


def huge() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(HUGE, HUGE), nn.LayerNorm(HUGE), nn.Linear(HUGE, 4))


def test_a_model_too_big_to_exist_dense() -> None:
    model = huge()
    assert plan_sparsify(model, {"0": SPARSITY}).layers[0].bytes_before > 4 * HUGE**2
    assert sparsify(model, {"0": SPARSITY})[0].weight_values.is_meta
    assert model[0].nnz == NNZ
    assert materialize(model) is model
    positions = model[0].positions()
    assert len(positions) == len(positions.unique()) == NNZ
    assert 0 < positions.min() < HUGE**2 // 100 < HUGE**2 - HUGE**2 // 100 < positions.max() < HUGE**2
    assert 0 < model[0].weight_values.detach().abs().max() <= 1
    assert torch.equal(model[1].weight, torch.ones(HUGE))
    model(torch.randn(1, HUGE)).sum().backward()
    assert model[0].weight_values.grad.shape == (NNZ, 1, 1)


def test_emptied_and_reset_is_materialised_too() -> None:
    model = sparsify(huge(), {"0": SPARSITY, "2": 0.9}).to_empty(device="cpu")
    for module in model:
        module.reset_parameters()
    assert model(torch.zeros(1, HUGE)).isfinite().all()


def test_draws_are_those_of_the_layers() -> None:
    torch.manual_seed(0)
    expected = SparseLinear(30, 20, sparsity=0.8)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(30, 20))
    sparsify(model, {"0": 0.8})
    torch.manual_seed(0)
    materialize(model)
    assert torch.equal(model[0].positions(), expected.positions())
    assert torch.equal(model[0].weight_values, expected.weight_values)
    assert torch.equal(model[0].bias, expected.bias)


def test_dense_weights_on_the_meta_device_have_no_largest() -> None:
    with pytest.raises(
        ValueError, match=r"init must be \"random\" on the meta device, where '0' has no weights"
    ):
        sparsify(huge(), {"0": SPARSITY}, init="magnitude")


def test_a_mask_would_have_the_size_of_the_dense_weight() -> None:
    model = huge()
    with pytest.raises(NotImplementedError, match="got the device meta"):
        sparsify(model, {"0": SPARSITY}, layer="masked")
    assert not any(isinstance(each, (SparseLinear, MaskedLinear)) for each in model)


def test_ties_trainability_and_what_has_data_are_kept() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        model["norm"] = nn.BatchNorm1d(4)
    model["head"].weight = model["embed"].weight
    model["norm"].weight.requires_grad_(False)
    model["real"] = nn.Linear(2, 2)
    real = model["real"].weight.clone()
    materialize(model)
    assert model["head"].weight is model["embed"].weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert (model["norm"].weight.requires_grad, model["norm"].bias.requires_grad) == (False, True)
    assert torch.equal(model["norm"].running_var, torch.ones(4))
    assert torch.equal(model["real"].weight, real)


@pytest.mark.parametrize("rules", [{}, {"attn.q_proj": 0.5}])
def test_attention_is_materialised(rules: dict[str, float]) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, add_bias_kv=True)})
    materialize(sparsify(model, rules))
    x = torch.randn(3, 1, 8)
    assert model["attn"](x, x, x)[0].isfinite().all()
    assert (model["attn"].bias_k != 0).all()


def test_a_module_that_cannot_fill_itself_is_named_before_anything_changes() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Scale(), nn.ModuleDict({"last": Scale()}))
    with pytest.raises(ValueError, match=r"no reset_parameters\(\) of '1' \(Scale\), '2.last' \(Scale\);"):
        materialize(model)
    assert model[0].weight.is_meta
    for module in (model[1], model[2].last):
        module.to_empty(device="cpu", recurse=False)
    assert not materialize(model)[0].weight.is_meta
