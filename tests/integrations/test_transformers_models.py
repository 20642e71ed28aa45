"""Models of transformers, made from a configuration: sparse by name, trained, used, and dense again."""

import re
import warnings

import pytest
import torch

from sparselab import MaskedLinear, RigL, SparseLinear, densify, plan_sparsify, sparsify
from sparselab.nn.layers.base import find_sparse

transformers = pytest.importorskip("transformers", reason="needs transformers")

from transformers.pytorch_utils import Conv1D  # noqa: E402

from sparselab.integrations.transformers import from_pretrained  # noqa: E402

VOCABULARY, LENGTH = 48, 12


def roberta():
    return transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=LENGTH + 2,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=2 * LENGTH,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


#: The patterns that the README of pytorch_block_sparse gives for RoBERTa, and the Conv1D layers of GPT-2.
ROBERTA = {
    re.compile(rf"roberta\.encoder\.layer\.[0-9]+\.{name}"): sparsity
    for name, sparsity in {
        r"intermediate\.dense": 0.8, r"output\.dense": 0.8, r"attention\.output\.dense": 0.5
    }.items()
}  # fmt: skip
GPT2 = {"*.c_attn": 0.5, "*.c_proj": 0.6, "*.c_fc": 0.8}
MODELS = {"RoBERTa": (roberta, ROBERTA, 6), "GPT-2": (gpt2, GPT2, 8)}


def tokens():
    return torch.randint(2, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.mark.parametrize("name", MODELS)
def test_sparse_by_name_trained_and_dense_again(name):
    torch.manual_seed(0)
    make, rules, n_layers = MODELS[name]
    model = make()
    kinds = {each: type(module) for each, module in model.named_modules()}
    sparsify(model, rules)
    layers = dict(find_sparse(model))
    assert len(layers) == n_layers
    positions = {each: layer.positions().clone() for each, layer in layers.items()}
    algorithm = RigL(update_freq=3, drop_fraction=0.3)
    model.train().apply(algorithm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        algorithm.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(layer.positions(), positions[each]) for each, layer in layers.items())
    expected = logits(model)
    densify(model)
    assert {each: type(module) for each, module in model.named_modules()} == kinds
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits_of_a_fresh(make, model), expected)


def logits_of_a_fresh(make, model):
    """Of a dense model that has loaded the state of this one."""
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    return logits(fresh)


def test_conv1d_keeps_its_function():
    torch.manual_seed(0)
    model = gpt2()
    expected = logits(model)
    assert sum(isinstance(each, Conv1D) for each in model.modules()) == 8
    sparsify(model, {"transformer.h.*": 0.0}, init="magnitude")
    assert sum(isinstance(each, SparseLinear) for each in model.modules()) == 8
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("layer", ["sparse", "masked"])
def test_a_sparse_gpt2_is_saved_and_read_sparse_and_dense(tmp_path, layer):
    model = sparsify(gpt2(), GPT2, layer=layer)
    expected = logits(model)
    model.save_pretrained(tmp_path / "sparse")
    again = from_pretrained(tmp_path / "sparse")
    kind = {"sparse": SparseLinear, "masked": MaskedLinear}[layer]
    assert [type(each) for _, each in find_sparse(again)] == [kind] * 8
    assert torch.equal(logits(again), expected)
    densify(model).save_pretrained(tmp_path / "dense")
    dense = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), expected)


def test_a_sparse_gpt2_generates():
    torch.manual_seed(0)
    model = sparsify(gpt2(), GPT2).eval()
    prompt = tokens()[:2, :5]
    settings = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "min_new_tokens": 6,
        "max_new_tokens": 6,
    }
    written = model.generate(prompt, **settings)
    assert written.shape == (2, 11)
    assert torch.equal(densify(model).generate(prompt, **settings), written)


@pytest.mark.parametrize(
    ("rules", "tied"),
    [
        (0.9, True),
        ({"*": 0.9}, True),
        ({torch.nn.Linear: 0.9}, True),
        ({lambda module, name: isinstance(module, torch.nn.Linear): 0.9}, True),
        ({"lm_head.decoder": None, "*": 0.9}, False),
    ],
    ids=["number", "glob", "class", "function", "none"],
)
def test_a_tied_head_stays_tied_and_everything_else_is_swapped(rules, tied):
    model = roberta()
    plan = plan_sparsify(model, rules)
    assert ("lm_head.decoder" in {each.name for each in plan.left}) == tied
    sizes = plan.parameters_swapped, plan.parameters_left, plan.parameters_elsewhere
    assert sum(sizes) == sum(each.numel() for each in model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(model, rules)
    assert [str(each.message).partition(" shares")[0] for each in caught] == tied * [
        "sparsify leaves layers that the rules match as they are: 'lm_head.decoder'"
    ]
    assert len(list(find_sparse(model))) == len(plan.layers) == 2 * 6 + 1
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    held = (*model.parameters(), *model.buffers())
    assert sum(each.nbytes for each in held) == plan.bytes_after
    assert logits(model).isfinite().all()


def test_an_expression_as_other_packages_write_it_is_told_how():
    expression = r".*\.(query|value)$"
    with pytest.raises(ValueError, match=r"read as a glob, and only as a regular expression .*'re:\.\*"):
        sparsify(roberta(), {expression: 0.9})
    assert len(plan_sparsify(roberta(), {f"re:{expression}": 0.9}).layers) == 4


def test_fused_experts_are_listed():
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, intermediate_size=48, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    experts = [name for name, each in model.named_parameters() if each.ndim == 3]
    if not experts:
        pytest.skip("this version of transformers has a layer for each expert")
    plan = plan_sparsify(model, 0.9)
    assert set(experts) <= {each.name for each in plan.left}
    with pytest.warns(UserWarning, match=f"'{experts[0]}'.* is a Parameter of class MixtralExperts"):
        sparsify(model, 0.9)


def test_layers_of_falcon_become_theirs_again():
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, bias=True
    )
    model = transformers.FalconForCausalLM(config)
    kinds = {name: type(each) for name, each in model.named_modules()}
    expected = logits(model)
    sparsify(model, {"*.mlp.*": 0.0}, init="magnitude")
    assert len(list(find_sparse(model))) == 2
    torch.testing.assert_close(logits(model), expected)
    assert {name: type(each) for name, each in densify(model).named_modules()} == kinds
    torch.testing.assert_close(logits(model), expected)
