"""Models of transformers whose code reads, multiplies, rescales or initialises the weight of a layer."""

import copy

import pytest
import torch

from sparselab import densify, sparsify
from sparselab.nn import find_sparse

transformers = pytest.importorskip("transformers", reason="needs transformers")

VOCABULARY, LENGTH = 48, 12


def tokens(seed):
    return torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def vision(name):
    config = getattr(transformers, f"{name}Config")(
        image_size=16, patch_size=4, num_hidden_layers=2, hidden_size=32, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return getattr(transformers, f"{name}Model")(config)


def swin():
    return transformers.SwinModel(
        transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
    )


def t5():
    return transformers.T5Model(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def mamba():
    return transformers.MambaModel(
        transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=8
        )
    )


def rwkv():
    return transformers.RwkvModel(
        transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, rescale_every=2)
    )


def neox():
    return transformers.GPTNeoXModel(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64,
        )
    )  # fmt: skip


IMAGES = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TEXT = {"input_ids": tokens(0)}
#: How the model is made, what is made sparse, and its input.
MODELS = {
    "T5": (t5, {"*.wo": 0.5, "*.wi": 0.5}, {**TEXT, "decoder_input_ids": tokens(1)}),
    "ViT": (lambda: vision("ViT"), {"embeddings.*": 0.5}, IMAGES),
    "DeiT": (lambda: vision("DeiT"), {"embeddings.*": 0.5}, IMAGES),
    "DINOv2": (lambda: vision("Dinov2"), {"embeddings.*": 0.5}, IMAGES),
    "CLIP": (lambda: vision("CLIPVision"), {"*patch_embedding": 0.5}, IMAGES),
    "SigLIP": (lambda: vision("SiglipVision"), {"*patch_embedding": 0.5}, IMAGES),
    "BEiT": (lambda: vision("Beit"), {"embeddings.*": 0.5, "*.attention.*": 0.5}, IMAGES),
    "Swin": (swin, {"*bias_table": None, "embeddings.*": 0.5, "*.attention.*": 0.5}, IMAGES),
    "Mamba": (mamba, {"*.dt_proj": 0.5, "*.x_proj": 0.5, "*.in_proj": 0.5}, TEXT),
    "RWKV": (rwkv, {"*.attention.output": 0.5, "*.feed_forward.value": 0.5}, TEXT),
    "GPT-NeoX": (neox, {"*.dense*": 0.5, "*.query_key_value": 0.5}, TEXT),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_the_dense_model(name):
    torch.manual_seed(0)
    make, rules, inputs = MODELS[name]
    model = sparsify(make().double(), rules).eval()
    inputs = {key: each.double() if each.is_floating_point() else each for key, each in inputs.items()}
    dense = densify(copy.deepcopy(model))
    layers = dict(find_sparse(model))
    assert layers
    y = model(**inputs)[0]
    torch.testing.assert_close(y, dense(**inputs)[0])
    if name == "RWKV":  # which rescales in evaluation, in place, and only then
        torch.testing.assert_close(
            layers["blocks.2.attention.output"].weight.to_dense(), dense.blocks[2].attention.output.weight
        )
        model, dense = model.train(), dense.train()
        y = model(**inputs)[0]
    y.square().sum().backward()
    dense(**inputs)[0].square().sum().backward()
    for each, layer in layers.items():
        wanted = dense.get_submodule(each).weight.grad.reshape(-1)[layer.positions()]
        torch.testing.assert_close(layer.weight_values.grad.flatten(), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_live_weights_are_decayed(name):
    make, rules, _ = MODELS[name]
    model = sparsify(make(), rules)
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    assert {f"{each}.weight_values" for each, _ in find_sparse(model)} <= set(decayed)
    assert not any(each.endswith("bias") for each in decayed)


@pytest.mark.parametrize("name", ["T5", "GPT-NeoX", "BEiT"])
def test_initialising_anew_leaves_the_model_sound(name):
    torch.manual_seed(0)
    make, rules, inputs = MODELS[name]
    model = sparsify(make(), rules)
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(**inputs)[0]).all()
