"""Swapping layers by name, and what a whole model measures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparselab import SparseLinear, dst, measure_sparsity, memory_report, plan_sparsify, sparsify


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16, bias=False)})
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 5)


def kinds(model: nn.Module) -> dict[str, float]:
    return {name: m.sparsity for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def test_the_first_matching_pattern_counts() -> None:
    model = Block()
    assert sparsify(model, {"attn.out": 0.5, "attn.*": 0.75, "mlp.?": 0.875}) is model
    assert kinds(model) == {"attn.qkv": 0.75, "attn.out": 0.5, "mlp.0": 0.875, "mlp.2": 0.875}
    assert type(model.head) is nn.Linear
    assert model.attn["out"].bias is None


def test_a_pattern_without_a_layer_is_refused_before_anything_changes() -> None:
    model = Block()
    with pytest.raises(ValueError, match=r"got 'atn\.\*' without one; .*attn\.qkv, attn\.out, mlp\.0"):
        sparsify(model, {"mlp.*": 0.9, "atn.*": 0.9})
    assert kinds(model) == {}


@pytest.mark.parametrize(
    ("rules", "init", "error", "message"),
    [
        ({"head": 1.5}, "random", ValueError, "sparsity must be a finite number"),
        ({"head": "high"}, "random", TypeError, "sparsity must be a number"),
        ({"head": 0.5}, "largest", ValueError, 'init must be "random" or "magnitude", got \'largest\''),
    ],
)
def test_bad_rules_are_named(
    rules: dict[str, float], init: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparsify(Block(), rules, init=init)


def test_tied_weights_are_refused() -> None:
    model = nn.ModuleDict({"twin": nn.Linear(4, 7), "head": nn.Linear(4, 7)})
    model["head"].weight = model["twin"].weight
    with pytest.raises(ValueError, match="'twin' and 'head'"):
        sparsify(model, {"head": 0.5})


def test_tied_biases_are_refused() -> None:
    model = nn.ModuleList([nn.Linear(4, 7), nn.Linear(5, 7)])
    model[0].bias = model[1].bias
    with pytest.raises(
        ValueError,
        match="cannot be swapped, got '1' shares its weight or bias: '0' and '1' hold the same one",
    ):
        sparsify(model, {"1": 0.5})
    assert kinds(model) == {}


COMPUTED = {
    "by a hook": lambda linear: torch.nn.utils.spectral_norm(linear),
    "by a mask": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_are_refused(how: str) -> None:
    model = nn.Sequential(COMPUTED[how](nn.Linear(4, 7)))
    for pattern in ("0", "*"):
        with pytest.raises(ValueError, match="'0' computes its weight"):
            sparsify(model, {pattern: 0.5})
    assert kinds(model) == {}


def test_parametrized_layers_are_left_alone() -> None:
    linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 7))
    with pytest.warns(UserWarning, match="as they are: '0' has a parametrization of weight"):
        model = sparsify(nn.Sequential(linear, nn.Linear(7, 2)), {"*": 0.5})
    assert kinds(model) == {"1": 0.5}


def test_a_linear_layer_itself_cannot_be_swapped() -> None:
    with pytest.raises(ValueError, match=r"model must contain .*SparseLinear.from_dense"):
        sparsify(nn.Linear(4, 7), {"*": 0.5})


def test_a_model_that_is_sparse_already_is_told_so() -> None:
    model = sparsify(nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)), 0.5)
    told = r"are: none; sparse already, until sparselab.densify\(model\): 0, 2$"
    for call in (lambda: sparsify(model, 0.9), lambda: plan_sparsify(model, 0.9)):
        with pytest.raises(ValueError, match=told):
            call()
    with pytest.raises(
        ValueError, match=r"must have dense layers, got sparse ones only: 0, 2\. sparselab.GMP"
    ):
        dst.prune(model, 0.9)


def test_an_unsupported_dtype_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"torch.float16, got torch.complex64"):
        sparsify(model, {"*": 0.5})
    assert kinds(model) == {}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("swapped", ["*.linear1", "*.linear2", "*.linear?"])
def test_a_transformer_evaluates_as_it_trains(swapped: str, padding: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = sparsify(nn.Sequential(nn.TransformerEncoder(layer, 2)), {swapped: 0.5})
    x = torch.randn(3, 5, 16)
    hidden = torch.arange(5) >= torch.tensor([[5], [4], [2]])
    encoder = model[0]
    options = {"src_key_padding_mask": hidden} if padding else {}
    expected = encoder.train()(x, **options)[~hidden]
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, **options)[~hidden], expected)


def test_a_transformer_left_dense_keeps_its_fused_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = sparsify(nn.ModuleList([nn.TransformerEncoder(layer, 1), nn.Linear(4, 4)]), {"1": 0.5})
    assert model[0].use_nested_tensor
    assert model[0].layers[0].activation_relu_or_gelu == 1


def test_upper_and_lower_case_differ_and_stars_cross_dots() -> None:
    with pytest.raises(ValueError, match="got 'MLP"):
        sparsify(Block(), {"MLP.*": 0.5})
    model = sparsify(nn.ModuleDict({"a": Block()}), {"*[02]": 0.5})
    assert kinds(model) == {"a.mlp.0": 0.5, "a.mlp.2": 0.5}


def test_a_pattern_that_never_counts_still_matches() -> None:
    assert kinds(sparsify(Block(), {"*": 0.5, "head": 0.25}))["head"] == 0.5


def test_a_layer_in_two_places_stays_one_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    sparsify(model, {"0": 0.5})
    assert isinstance(model[0], SparseLinear)
    assert model[0] is model[1][0]


def test_subclasses_are_left_alone() -> None:
    class Attention(nn.MultiheadAttention):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(*inputs)[0]

    class Linear(nn.Linear):
        scale = 2.0

    model = nn.ModuleDict({"attention": Attention(8, 2), "own": Linear(8, 8), "plain": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="'attention' is of class Attention, .*; .*'own' is of class Linear"):
        sparsify(model, {"*": 0.5})
    assert kinds(model) == {"plain": 0.5}
    model["attention"](*[torch.randn(3, 1, 8)] * 3)


def test_dtype_mode_and_trainability_are_kept() -> None:
    model = Block().double().eval()
    model.mlp[0].weight.requires_grad_(False)
    sparsify(model, {"mlp.*": 0.5})
    new = model.mlp[0]
    assert (new.weight_values.dtype, new.training) == (torch.float64, False)
    assert (new.weight_values.requires_grad, new.bias.requires_grad) == (False, True)


def test_magnitude_keeps_the_largest_and_the_first_of_equals() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -5.0, 2.0], [2.0, 3.0, -2.0]]))
    layer = SparseLinear.from_dense(linear, 0.5)
    assert layer.to_dense().weight.tolist() == [[0, -5, 2], [0, 3, 0]]
    assert torch.equal(layer.bias, linear.bias)
    model = sparsify(nn.Sequential(linear), {"0": 0.5}, init="magnitude")
    assert torch.equal(model[0].weight_values, layer.weight_values)


def test_what_is_not_a_number_is_the_first_to_go() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[torch.nan, -5.0, 2.0], [2.0, torch.inf, 0.0]]))
    assert SparseLinear.from_dense(linear, 0.5).weight_values.flatten().tolist() == [-5, 2, torch.inf]


def test_dense_and_back_is_the_same_layer() -> None:
    layer = SparseLinear(30, 20, sparsity=0.7)
    again = SparseLinear.from_dense(layer.to_dense(), layer.sparsity)
    assert torch.equal(again.positions(), layer.positions())
    assert torch.equal(again.weight_values, layer.weight_values)


def test_measured_sparsity_counts_dense_weights_as_live() -> None:
    assert measure_sparsity(nn.ReLU()) == 0
    assert measure_sparsity(SparseLinear(10, 10, sparsity=0.75)) == 0.75
    model = nn.Sequential(SparseLinear(10, 10, sparsity=0.8), nn.Linear(10, 30), nn.LayerNorm(30))
    assert measure_sparsity(model) == pytest.approx(80 / 400)


def test_measured_sparsity_counts_a_shared_weight_once() -> None:
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    assert measure_sparsity(nn.Sequential(embedding, head, SparseLinear(4, 5, sparsity=1.0))) == 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_counts_are_exact_and_ties_are_broken_by_position(sparsity: float) -> None:
    linear = nn.Linear(17, 13)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-2, 3, (13, 17)))
    layer = SparseLinear.from_dense(linear, sparsity)
    assert layer.nnz == round((1 - sparsity) * 13 * 17)
    weight = linear.weight.detach().reshape(-1).tolist()
    order = sorted(range(13 * 17), key=lambda at: (-abs(weight[at]), at))
    assert layer.positions().tolist() == sorted(order[: layer.nnz])
    assert layer.weight_values.flatten().tolist() == [weight[at] for at in layer.positions()]


def test_memory_is_counted_by_hand() -> None:
    model = nn.Sequential(SparseLinear(100, 50, sparsity=0.9), nn.Linear(50, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    before = memory_report(model, optimizer)
    weights = 500 * (4 + 2) + 51 * 8 + 50 * 4 + 510 * 4
    assert (before.gradient_bytes, before.plan_bytes, before.optimizer_bytes) == (0, 0, 0)
    assert (before.parameters_live, before.parameters_dense) == (500 + 50 + 510, 5000 + 50 + 510)
    assert (before.weight_bytes, before.dense_weight_bytes) == (weights, 4 * (5050 + 510))
    model(torch.randn(70, 100)).sum().backward()
    optimizer.step()
    after = memory_report(model, optimizer)
    assert after.gradient_bytes == 4 * (500 + 50 + 510)
    assert after.optimizer_bytes == 2 * after.gradient_bytes + 4 * 4  # two moments, and a step per parameter
    assert after.plan_bytes == model[0].plan_bytes() > 0
    assert after.training_bytes == weights + 3 * after.gradient_bytes + 16 + after.plan_bytes
    assert f"{after.training_bytes:,} B" in str(after)


def test_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    assert memory_report(model).weight_bytes == 7 * 4 * 4
