"""Sparse models that ``save_pretrained`` wrote are read by transformers' own ways, and by no dense class."""

import copy
import json
import pickle

import pytest
import torch

from sparselab import SparseLinear, SparseMultiheadAttention, densify, freeze, sparsify
from sparselab.nn import find_sparse

transformers = pytest.importorskip("transformers", reason="needs transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from sparselab.integrations.transformers import from_pretrained  # noqa: E402

VOCABULARY, LENGTH = 40, 8
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
VIT = {
    "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip
KINDS = {
    "sparse": {"sparsity": 0.7},
    "masked": {"sparsity": 0.7},
    "fan_in": {"fan_in": 5},
    "block": {"sparsity": 0.7, "block_shape": (4, 4)},
}

pytestmark = pytest.mark.filterwarnings("ignore:sparsify leaves layers:UserWarning")


def tokens():
    return torch.randint(4, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def made(config, model, **sizes):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, f"{config}Config")(**sizes))


def bert(rules=0.7, model="BertForMaskedLM"):
    return sparsify(made("Bert", model, **BERT), rules).eval()


def logits(model):
    with torch.no_grad():
        return model(tokens())[0]


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


#: Models whose names in files are others than those in the model.
RENAMED = {
    "GPT-NeoX": ("GPTNeoX", "GPTNeoXForCausalLM", BERT),
    "Mixtral": ("Mixtral", "MixtralForCausalLM", {**BERT, "num_local_experts": 2, "num_key_value_heads": 2}),
    "Swin": (
        "Swin",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 4},
    ),
    "BEiT": ("Beit", "BeitForImageClassification", VIT),
    "ViT-MAE": (
        "ViTMAE",
        "ViTMAEForPreTraining",
        {**VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
         "decoder_intermediate_size": 24},
    ),
    "SigLIP": ("SiglipVision", "SiglipVisionModel", VIT),
    "Falcon": (
        "Falcon",
        "FalconForCausalLM",
        {key: BERT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@pytest.mark.parametrize("name", RENAMED)
def test_names_are_converted(tmp_path, name, shard):
    config, model, sizes = RENAMED[name]
    model = sparsify(made(config, model, **sizes), 0.8).eval()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert same(model, again)
    again.save_pretrained(tmp_path / "again")
    assert same(model, from_pretrained(tmp_path / "again"))


def test_attention_of_torch_is_read_whole(tmp_path):
    model = sparsify(made("SiglipVision", "SiglipVisionModel", **VIT), {"*head.attention.q_proj": 0.5}).eval()
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    attention = next(each for each in again.modules() if isinstance(each, SparseMultiheadAttention))
    assert isinstance(attention.q_proj, SparseLinear)
    assert type(attention.out_proj) is not SparseLinear
    assert same(model, again)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(tmp_path, kind):
    model = bert({"*": {"layer": kind, **KINDS[kind]}})
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert same(model, again)
    assert torch.equal(logits(model), logits(again))
    layers = dict(find_sparse(again))
    for name, layer in find_sparse(model):
        assert type(layers[name]) is type(layer)
        assert torch.equal(layers[name].positions(), layer.positions())
        assert layers[name].stored.requires_grad
    again(tokens())[0].square().sum().backward()
    assert all(layer.stored.grad is not None for name, layer in layers.items() if "pooler" not in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "masked"])
def test_layers_frozen_in_int8(tmp_path, kind, dtype):
    model = freeze(bert({"*": {"layer": kind, **KINDS[kind]}}), torch.int8)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype=dtype)
    layers = dict(find_sparse(again))
    for name, layer in find_sparse(model):
        # Neither is cast to the dtype of the model.
        assert torch.equal(layers[name].weight_values, layer.weight_values)
        assert torch.equal(layers[name].weight_scales, layer.weight_scales)
    if dtype is torch.float32:
        assert same(model, again)
        assert torch.equal(logits(model), logits(again))
    assert logits(again).dtype is dtype


def test_reading_draws_nothing(tmp_path):
    bert().save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    from_pretrained(tmp_path)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("device_map", [None, "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_another_dtype(tmp_path, dtype, device_map):
    model = bert()
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype=dtype, device_map=device_map)
    assert again.dtype == dtype
    assert {each.dtype for each in again.parameters()} == {dtype}
    for (_, layer), (_, other) in zip(find_sparse(model), find_sparse(again), strict=True):
        assert torch.equal(layer.positions(), other.positions())
        assert torch.equal(layer.weight_values.to(dtype), other.weight_values)


@pytest.mark.parametrize(
    "reader",
    [
        lambda folder: transformers.BertForMaskedLM.from_pretrained(folder),
        lambda folder: transformers.AutoModel.from_pretrained(folder),
        lambda folder: transformers.AutoModelForMaskedLM.from_pretrained(folder),
    ],
)
def test_dense_classes_read_no_sparse_folder(tmp_path, reader):
    bert().save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "from_pretrained of sparselab.integrations.transformers" in entry["sparse_layers"]
    with pytest.raises(ValueError, match=r"quantization config .* has no `quant_method`"):
        reader(tmp_path)


def test_a_dense_model_of_the_same_configuration_is_not_noted(tmp_path):
    config = transformers.BertConfig(**BERT)
    dense = transformers.BertForMaskedLM(config)
    model = sparsify(transformers.BertForMaskedLM(config), 0.7)
    assert not hasattr(config, "quantization_config")
    assert dense.config is config
    configs = [each.config for each in model.modules() if hasattr(each, "config")]
    assert all(each is model.config for each in configs)
    assert model.config.quantization_config["quant_method"] is None
    # As its copies, and as packages that expect an object of transformers' read it.
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.config.quantization_config.to_dict() == model.config.quantization_config
    dense.save_pretrained(tmp_path / "dense")
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "dense")
    densify(model).save_pretrained(tmp_path / "again")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "again")
    assert same(model, again)


def test_parts_with_configurations_of_their_own(tmp_path):
    model = made("CLIP", "CLIPModel", text_config={**BERT, "eos_token_id": 2}, vision_config=VIT)
    sparsify(model, {"vision_model.*.fc1": 0.8}).eval()
    assert model.vision_model.config is model.config.vision_config
    model.save_pretrained(tmp_path)
    assert same(model, from_pretrained(tmp_path))
    model.text_model.save_pretrained(tmp_path / "text")
    transformers.CLIPTextModel.from_pretrained(tmp_path / "text")


def test_another_class_than_the_saved_one(tmp_path, caplog):
    model = bert()
    model.save_pretrained(tmp_path / "whole")
    base = from_pretrained(tmp_path / "whole", transformers.BertModel, add_pooling_layer=False)
    assert same(base, model.bert)
    auto = from_pretrained(tmp_path / "whole", transformers.AutoModelForMaskedLM)
    assert same(auto, model)
    model.bert.save_pretrained(tmp_path / "base")
    new, info = from_pretrained(
        tmp_path / "base", transformers.BertForSequenceClassification, num_labels=3, output_loading_info=True
    )
    assert new.classifier.out_features == 3
    assert {name.partition(".")[0] for name in info["missing_keys"]} <= {"classifier", "bert"}
    assert same(new.bert.encoder, model.bert.encoder)


def test_what_does_not_fit_is_refused(tmp_path):
    bert().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    saved = load_file(path)

    def save(**changes):
        save_file({name: each.clone() for name, each in {**saved, **changes}.items()}, path, {"format": "pt"})

    name = "bert.encoder.layer.0.output.dense"
    save(**{f"{name}.indices": torch.full_like(saved[f"{name}.indices"], 1000)})
    with pytest.raises(ValueError, match=rf"folder must hold a sparse layer '{name}' that is valid"):
        from_pretrained(tmp_path)
    parts = "weight_values", "indptr", "indices"
    save(**{f"bert.other.layer.{part}": saved[f"{name}.{part}"] for part in parts})
    with pytest.raises(ValueError, match=r"\['bert\.other\.layer\.indices', .*'\] are left over"):
        from_pretrained(tmp_path)
    save(**{f"bert.encoder.layer.0.output.LayerNorm.{part}": saved[f"{name}.{part}"] for part in parts})
    with pytest.raises(ValueError, match=r"a sparse layer 'bert\.\S+\.LayerNorm', which cannot be sparse"):
        from_pretrained(tmp_path)
    saved.pop("cls.predictions.transform.LayerNorm.weight")
    save()
    with pytest.raises(ValueError, match=r"no \['cls\.predictions\.transform\.LayerNorm\.weight'\]"):
        from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="folder must be a path, and comes before model_class, got BertModel"):
        from_pretrained(transformers.BertModel, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["OfMine"]}))
    with pytest.raises(ValueError, match=r"model_class must be given .*, got \['OfMine'\]"):
        from_pretrained(tmp_path)
