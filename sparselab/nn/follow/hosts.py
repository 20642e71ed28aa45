"""Models of transformers whose configuration must say, where it is saved, that they hold sparse layers.

``save_pretrained`` writes the configuration beside the weights, and ``from_pretrained`` asks it what to
build. Without an entry it would build dense layers, find no weights for them, and leave them random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

_MODEL = "transformers.modeling_utils.PreTrainedModel"
_CONFIG = "transformers.configuration_utils.PreTrainedConfig"

#: Where transformers looks for what a model's layers are made of.
_PLACE = "quantization_config"


class SparseEntry(dict[str, Any]):
    """What a configuration says of sparse layers.

    Transformers refuses to read a model whose entry has no method. `sparselab.integrations.transformers`
    takes the entry away before it reads.
    """

    def to_dict(self) -> dict[str, Any]:
        """As the entries of transformers have it."""
        return dict(self)


def note_sparse(model: nn.Module, is_sparse: Callable[[nn.Module], bool]) -> None:
    """Let the configurations of transformers' models in a model say whether these hold sparse layers.

    A configuration may be that of a dense model, too. So one that must change is replaced by a copy, in all
    modules of this model that hold it.

    Parameters
    ----------
    model : torch.nn.Module
    is_sparse : callable
        Whether a module is a sparse layer.
    """
    hosts: list[Any] = [module for module in model.modules() if _is(module, _MODEL)]
    for host in hosts:
        _note_ties(host, is_sparse)
    says = {host: any(map(is_sparse, host.modules())) for host in hosts}
    if all(holds == is_noted(host.config) for host, holds in says.items()):
        return
    copies: dict[int, Any] = {}
    for host in hosts:
        copy.deepcopy(host.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in copies and _is(value, _CONFIG):
                module.__dict__[name] = copies[id(value)]
    # A part of a model may have the configuration of the whole: what the whole says goes.
    for host in reversed(hosts):
        note(host.config, says[host])


def _note_ties(host: Any, is_sparse: Callable[[nn.Module], bool]) -> None:
    """Let ``tie_weights`` leave out the weights of sparse layers, which are tied by `TiedLinear`."""
    vars(host).pop("_tied_weights_keys", None)  # what stays is that of the class

    def dense(ties: dict[str, str]) -> dict[str, str]:
        return {
            name: source
            for name, source in ties.items()
            if not is_sparse(host.get_submodule(source.rpartition(".")[0]))
        }

    if isinstance(getattr(host, "_tied_weights_keys", None), dict):
        ties = host.get_expanded_tied_weights_keys(all_submodels=False)
        if (kept := dense(ties)) != ties:
            host._tied_weights_keys = kept
    if getattr(host, "all_tied_weights_keys", None) is not None:
        host.all_tied_weights_keys = dense(host.get_expanded_tied_weights_keys(all_submodels=True))


def note(config: Any, sparse: bool) -> None:
    """Write or remove the entry; one of another package stays."""
    if is_noted(config):
        delattr(config, _PLACE)
    if sparse and getattr(config, _PLACE, None) is None:
        how = "read this folder with from_pretrained of sparselab.integrations.transformers"
        setattr(config, _PLACE, SparseEntry({"quant_method": None, "sparse_layers": how}))


def is_noted(config: Any) -> bool:
    """Whether a configuration, made or read, has the entry."""
    entry = getattr(config, _PLACE, None)
    return isinstance(entry, dict) and "sparse_layers" in entry


def _is(value: object, name: str) -> bool:
    """Whether a class or a base has that name: transformers need not be installed."""
    return any(f"{base.__module__}.{base.__qualname__}" == name for base in type(value).__mro__)
