"""Low-rank adapters of peft (LoRA) on sparse layers. Needs peft."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from sparselab.nn import BlockSparseLinear, FanInLinear, MaskedLinear, SparseLinear

try:
    from peft import LoraConfig
    from peft.tuners import lora
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "sparselab.integrations.peft needs peft, which is not installed; install it, or sparselab with its "
        "'peft' extra: pip install '.[peft]'",
        name=error.name,
    ) from error

_LAYERS = (SparseLinear, FanInLinear, BlockSparseLinear, MaskedLinear)


class SparseLora(lora.Linear):  # type: ignore[misc]
    """A sparse linear layer, and beside it the product of two thin dense ones, which is what is trained.

    The variants of LoRA that look at the weight of the layer (DoRA and others) are refused by peft.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """LoRA itself alone."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused: what is added is dense, and the connections of the layer have no room for it.

        Raises
        ------
        TypeError
        """
        raise TypeError(
            "adapters of a sparse layer must not be merged into it, as their product is dense, got a "
            f"{type(self.get_base_layer()).__name__}; merge_and_unload() makes dense layers of both, and "
            "unload() gives the sparse layers back"
        )

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The sparse layer; or a dense one that computes what it and its adapters do, as peft asks for.

        Raises
        ------
        ValueError
            If `safe_merge`, and a merged weight is not finite.
        """
        layer: Any = self.get_base_layer()
        if not merge:
            return layer  # type: ignore[no-any-return]
        dense: Any = layer.to_dense()
        for name in adapter_names or self.active_adapters:
            if name not in self.lora_A:
                continue
            dense.weight += self.get_delta_weight(name).to(dense.weight.dtype)
            if self.lora_bias[name]:
                dense.bias += self.lora_B[name].bias * self.scaling[name]
        if safe_merge and not all(tensor.isfinite().all() for tensor in dense.parameters()):
            raise ValueError(f"adapters must be finite to be merged, got those of a {type(layer).__name__}")
        return dense  # type: ignore[no-any-return]


def support_sparse(config: LoraConfig) -> LoraConfig:
    """Let a LoRA configuration of peft adapt sparse linear layers, in place, and return it.

    Parameters
    ----------
    config : peft.LoraConfig
        Its ``target_modules`` name sparse layers (`SparseLinear`, `FanInLinear`, `BlockSparseLinear`,
        `MaskedLinear`), dense ones, or both.

    Returns
    -------
    peft.LoraConfig
        The configuration itself.

    Raises
    ------
    TypeError
        If it is none.

    Notes
    -----
    Peft does not save what kinds of layers a configuration supports. To read adapters, write
    ``PeftModel.from_pretrained(model, folder, config=support_sparse(LoraConfig.from_pretrained(folder)))``.

    ``merge_and_unload()`` makes dense layers of the adapted sparse ones; ``unload()`` gives these back. Where
    that leaves no sparse layer in a model of transformers, call `sparselab.densify` before
    ``save_pretrained``, so that its configuration no longer says that it has some.

    Examples
    --------
    >>> from peft import LoraConfig, get_peft_model  # doctest: +SKIP
    >>> from sparselab.integrations.peft import support_sparse  # doctest: +SKIP
    >>> config = support_sparse(LoraConfig(r=8, target_modules=["c_attn"]))  # doctest: +SKIP
    >>> model = get_peft_model(sparselab.sparsify(model, {"*.c_attn": 0.9}), config)  # doctest: +SKIP
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module(dict.fromkeys(_LAYERS, SparseLora))
    return config
