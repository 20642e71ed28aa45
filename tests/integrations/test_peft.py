"""LoRA of peft on sparse layers: trained beside the dense twin, saved, read, taken off, and merged."""

import copy

import pytest
import torch

from sparselab import MaskedLinear, SparseLinear, densify, sparsify
from sparselab.nn import find_sparse

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from sparselab.integrations.peft import SparseLora, support_sparse  # noqa: E402

# Peft asks transformers for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

KINDS = {
    "sparse": {"sparsity": 0.7},
    "masked": {"sparsity": 0.7},
    "fan_in": {"fan_in": 5},
    "block": {"sparsity": 0.7, "block_shape": (4, 4)},
}
ADAPTED = ["q_proj", "up_proj"]


def language_model(kind="sparse"):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        )
    )  # fmt: skip
    return sparsify(model, {"*_proj": {"layer": kind, **KINDS[kind]}}).double()


def config(**settings):
    return support_sparse(
        peft.LoraConfig(r=2, target_modules=ADAPTED, **{"init_lora_weights": False, **settings})
    )


def tokens():
    return torch.arange(12)[None]


def logits(model):
    return model(tokens()).logits


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_as_those_of_the_dense_twin(kind):
    sparse = language_model(kind)
    dense = densify(copy.deepcopy(sparse))
    sparse = peft.get_peft_model(sparse, config())
    dense = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=ADAPTED))
    assert sum(isinstance(each, SparseLora) for each in sparse.modules()) == 2
    names = [name for name, each in sparse.named_parameters() if each.requires_grad]
    assert names == [name for name, each in dense.named_parameters() if each.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    dense.load_state_dict({name: sparse.get_parameter(name) for name in names}, strict=False)
    for model in (sparse, dense):
        optimizer = torch.optim.AdamW([model.get_parameter(name) for name in names], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            logits(model).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(logits(sparse), logits(dense))
    for name in names:
        torch.testing.assert_close(sparse.get_parameter(name), dense.get_parameter(name))
        torch.testing.assert_close(sparse.get_parameter(name).grad, dense.get_parameter(name).grad)


def test_adapters_are_saved_and_read(tmp_path):
    model = language_model()
    base = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, config()).eval()
    adapted.save_pretrained(tmp_path)
    read = support_sparse(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=read)
    torch.testing.assert_close(logits(again.eval()), logits(adapted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_taken_off_the_layers_are_sparse_and_merged_they_are_dense(bias):
    model = sparsify(torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh()).double(), 0.7)
    x = torch.randn(5, 16, dtype=torch.float64)
    before = model(x)
    settings = support_sparse(
        peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=bias)
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    if bias:
        torch.nn.init.normal_(adapted.base_model.model[0].lora_B["default"].bias)
    expected = adapted(x)
    assert (expected - before).abs().max() > 1e-3
    merged = copy.deepcopy(adapted).merge_and_unload(safe_merge=True)
    assert type(merged[0]) is torch.nn.Linear
    torch.testing.assert_close(merged(x), expected)
    unloaded = adapted.unload()
    assert type(unloaded[0]) is SparseLinear
    assert torch.equal(unloaded(x), before)


def test_what_cannot_be_is_refused():
    adapted = peft.get_peft_model(language_model(), config())
    with pytest.raises(
        TypeError, match=r"must not be merged into it, .* got a SparseLinear; merge_and_unload"
    ):
        adapted.merge_adapter()
    with pytest.raises(ValueError, match="variant"):
        peft.get_peft_model(language_model(), config(use_dora=True))
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, got dict"):
        support_sparse({"r": 2})


def test_an_adapter_that_is_not_finite_is_not_merged_safely():
    adapted = peft.get_peft_model(language_model("masked"), config())
    layer = next(each for each in adapted.modules() if isinstance(each, SparseLora))
    assert isinstance(layer.get_base_layer(), MaskedLinear)
    torch.nn.init.constant_(layer.lora_B["default"].weight, float("nan"))
    with pytest.raises(ValueError, match="adapters must be finite to be merged, got those of a MaskedLinear"):
        adapted.merge_and_unload(safe_merge=True)


def test_the_other_layers_stay_sparse():
    model = peft.get_peft_model(language_model(), config())
    assert len(list(find_sparse(model))) == 7


def test_a_merged_model_without_sparse_layers_is_saved_as_dense(tmp_path):
    settings = support_sparse(peft.LoraConfig(r=2, target_modules=r".*_proj"))
    model = densify(peft.get_peft_model(language_model().float(), settings).merge_and_unload()).eval()
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
