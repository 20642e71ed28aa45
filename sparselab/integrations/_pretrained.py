"""Reading what ``save_pretrained`` of transformers wrote of sparse models, by transformers itself.

Transformers lets a quantizer change a model before and after its weights are read. The one below puts a
stand-in, which takes any tensors, into the place of each layer that was saved sparse, and then makes the
sparse layers of what the stand-ins were given. So names are converted, files joined and dtypes and devices
chosen as for any other model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparselab.nn import find_sparse, freeze, sparsify
from sparselab.nn.follow.hosts import note
from sparselab.nn.models.rules import Given, layers_of_saved
from sparselab.nn.models.swap import replace, tied_head
from sparselab.nn.models.weights import find_dense
from sparselab.nn.storage.narrow import SCALES

#: What transformers calls the two classes below, which are made for one call of ``from_pretrained``.
_METHOD = "sparselab"


def read(model_class: Any, folder: str | os.PathLike[str], config: Any, settings: dict[str, Any]) -> Any:
    """The model and what transformers says of names; see `sparselab.integrations.transformers`."""
    for each in _all_configs(config):
        note(each, False)
    return model_class.from_pretrained(
        folder,
        config=config,
        quantization_config=_Reading(settings.get("key_mapping")),
        output_loading_info=True,
        **settings,
    )


def _all_configs(config: Any) -> Iterator[Any]:
    """A configuration and those of its parts."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _all_configs(part)


class _StandIn(nn.Module):
    """Holds the tensors of a layer that was saved sparse, by their names.

    Parameters
    ----------
    dense : torch.nn.Module
        What the layer is before it is made sparse. Whatever is asked of the stand-in besides, as the code of
        a model that initialises its layers does, is answered by it.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.__dict__["dense"] = dense
        for parameter in dense.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["dense"], name)

    def hold(self, name: str, tensor: Tensor) -> None:
        """Make room for a tensor, in the dtype of the model; dots in its name lead to parts of the layer."""
        *parts, last = name.split(".")
        at: nn.Module = self
        for part in parts:
            if part not in at._modules:
                # Not by add_module, which minds what the dense layer has of that name.
                at._modules[part] = _StandIn(getattr(self.dense, part, nn.Module()))
            at = at._modules[part]  # type: ignore[assignment]
        if tensor.is_floating_point():
            tensor = tensor if last == SCALES else tensor.to(next(self.dense.parameters()).dtype)
            at._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            at._buffers[last] = tensor


@register_quantization_config(_METHOD)
class _Reading(QuantizationConfigMixin):  # type: ignore[misc]
    """What is asked of `_Reader`."""

    def __init__(self, key_mapping: dict[str, str] | None = None) -> None:
        self.quant_method: Any = _METHOD
        self.key_mapping = key_mapping


@register_quantizer(_METHOD)
class _Reader(HfQuantizer):  # type: ignore[misc]
    """Makes the layers sparse that were saved so."""

    rules: dict[str, dict[str, Given]]
    #: Heads by name, with the sparse embeddings that they are tied to.
    heads: dict[str, str]

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Put stand-ins into a model on the meta device, whose names and sizes are those in the files."""
        saved = _saved_tensors(model, kwargs["checkpoint_files"], self.quantization_config.key_mapping)
        layers = find_dense(model)
        names = {module: name for name, module in model.named_modules()}
        self.rules = {}
        for name, rule in layers_of_saved(saved).items():
            found = layers.get(name)
            if found is None and name.rpartition(".")[0] not in names.values():
                continue  # which transformers reports, as the head of another class
            if found is None:
                raise ValueError(
                    f"folder must hold the weights of a {type(model).__name__}, got a sparse layer {name!r}, "
                    "which cannot be sparse there"
                )
            self.rules.setdefault(names[found.owner], {})[found.part] = rule
        stand_ins: dict[nn.Module, nn.Module] = {}
        for name in self.rules:
            owner = model.get_submodule(name)
            stand_ins[owner] = stand_in = _StandIn(owner)
            for key, tensor in saved.items():
                if key.startswith(f"{name}."):
                    stand_in.hold(key.removeprefix(f"{name}."), tensor)
        ties = getattr(model, "all_tied_weights_keys", {}).items()
        named = ((head.rpartition(".")[0], embedding.rpartition(".")[0]) for head, embedding in ties)
        self.heads = {head: embedding for head, embedding in named if embedding in self.rules}
        replace(model, stand_ins)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Make sparse layers of what the stand-ins hold."""
        layers: dict[nn.Module, nn.Module] = {}
        for name, rules in self.rules.items():
            stand_in: Any = model.get_submodule(name)
            layers[stand_in] = _sparse(name, stand_in, rules)
        self.remove_quantization_config(model)
        for name, embedding in self.heads.items():
            head = model.get_submodule(name)
            layers[head] = tied_head(head, layers[model.get_submodule(embedding)])
        replace(model, layers)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _sparse(name: str, stand_in: Any, rules: Mapping[str, Given]) -> nn.Module:
    """The layer that a stand-in stands for; one at a time, as some need the memory of the dense one."""
    state = stand_in.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError(
            f"folder must hold all tensors of a sparse layer, and device_map no disk, got none for {name!r}"
        )
    device = next(iter(state.values())).device
    with torch.random.fork_rng(devices=()):  # what a new layer draws is overwritten
        box = nn.ModuleDict({"layer": stand_in.dense.to_empty(device=device)})
        sparsify(box, {f"layer.{part}".rstrip("."): rule for part, rule in rules.items()})
    for part, layer in find_sparse(box["layer"]):
        held = state.get(f"{part}.{layer.storage.parameter}".lstrip("."))
        if held is not None and held.dtype is torch.int8:
            freeze(layer, torch.int8)
    try:
        box["layer"].load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"folder must hold a sparse layer {name!r} that is valid: {error}") from error
    return box["layer"].train(stand_in.training)


def _saved_tensors(model: Any, files: Iterable[str], key_mapping: Any) -> dict[str, Tensor]:
    """The tensors in files by the names that they have in a model, on the meta device."""
    mapping = get_model_conversion_mapping(model, key_mapping)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    modules = [name for name, _ in model.named_modules()]
    # All names that such a part of a layer may have: where adding or taking away the prefix of the base model
    # gives one of them, transformers does so.
    known: dict[str, dict[str, bool]] = {}
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118
                part = key.rpartition(".")[2]
                if part not in known:
                    known[part] = {f"{name}.{part}": True for name in modules}
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known[part])
                if name not in known[part] and key in known[part]:
                    name = key
                found[name] = file.get_tensor(key).to("meta")
    return found
