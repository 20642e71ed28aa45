"""Models of timm and torchvision, in their smallest shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.models.case import CASES, Case, add, image


def pictured(
    name: str, library: str, make: Callable[[], nn.Module], pixels: int = 32, call: str = "x"
) -> None:
    """A model that is given images under the name that its ``forward`` has for them."""
    add(Case(f"{library} {name}", library, make, lambda: {call: image(pixels)}))


def of_timm(name: str, pixels: int = 32, **sizes: Any) -> None:
    """A model of timm, by its name there."""

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **sizes)
        return model

    pictured(name, "timm", make, pixels)


def of_class(name: str, module: str, cls: str, **sizes: Any) -> None:
    """A class of timm; layers that it is made of go by their names in its module."""

    def make() -> nn.Module:
        from importlib import import_module

        source = import_module(f"timm.models.{module}")
        model: nn.Module = getattr(source, cls)(
            **{key: getattr(source, each) if isinstance(each, str) else each for key, each in sizes.items()}
        )
        return model

    pictured(name, "timm", make)


def of_torchvision(name: str, pixels: int = 32, call: str = "x", **sizes: Any) -> None:
    """A model of torchvision, by its name there."""

    def make() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None, **{"num_classes": 5, **sizes})
        return model

    pictured(name, "torchvision", make, pixels, call)


TRANSFORMER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MIXER: dict[str, Any] = {"num_classes": 5, "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}

of_timm("vit_tiny_patch16_224", **TRANSFORMER)
of_timm("deit_tiny_distilled_patch16_224", **TRANSFORMER)
of_timm("deit3_small_patch16_224", **TRANSFORMER)
of_timm("beit_base_patch16_224", **TRANSFORMER)
of_timm("eva02_tiny_patch14_224", **TRANSFORMER)
of_timm("vit_small_patch14_dinov2", **TRANSFORMER)
of_timm("cait_xxs24_224", **TRANSFORMER)
of_class("mixer", "mlp_mixer", "MlpMixer", **MIXER)
of_class("resmlp", "mlp_mixer", "MlpMixer", block_layer="ResBlock", norm_layer="Affine", mlp_ratio=4, **MIXER)
of_class(
    "gmlp",
    "mlp_mixer",
    "MlpMixer",
    block_layer="SpatialGatingBlock",
    mlp_layer="GatedMlp",
    mlp_ratio=4,
    **MIXER,
)
of_timm(
    "swin_tiny_patch4_window7_224",
    img_size=32,
    patch_size=2,
    window_size=4,
    embed_dim=16,
    depths=(1, 1),
    num_heads=(2, 2),
)
of_timm(
    "swinv2_tiny_window8_256",
    img_size=32,
    patch_size=2,
    window_size=4,
    embed_dim=16,
    depths=(1, 1),
    num_heads=(2, 2),
)
of_timm("edgenext_xx_small", pixels=64)
of_timm("convnext_atto", **STAGES)
of_timm("convnextv2_atto", **STAGES)
of_class("poolformer", "metaformer", "MetaFormer", num_classes=5, **STAGES)
of_timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2))
of_timm("efficientformer_l1", pixels=224, depths=(1, 1, 1, 2), embed_dims=(16, 16, 32, 32))
of_timm("resnet18", layers=(1, 1, 1, 1), channels=(16, 16, 32, 32))
of_timm("resnet50", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
of_timm("resnext50_32x4d", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), cardinality=4, base_width=32)
of_timm("seresnet50", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
of_timm("regnety_002")
of_timm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2))
of_timm("mobilenetv2_035")
of_timm("mobilenetv3_small_050")
of_timm("efficientnet_lite0")
of_timm("ghostnet_050")
of_timm("mnasnet_050")
of_timm("repvgg_a0")
of_timm("xcit_nano_12_p16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
of_timm("coat_tiny", img_size=32)
of_timm("levit_128s", pixels=224)
of_timm("maxvit_rmlp_pico_rw_256", pixels=64, img_size=64)
of_timm("mobilevit_xxs", pixels=64)

of_torchvision("alexnet", pixels=64)
of_torchvision("squeezenet1_1", pixels=64)
of_torchvision("resnet18")
of_torchvision("mobilenet_v2", width_mult=0.25)
of_torchvision("mobilenet_v3_small", width_mult=0.25)
of_torchvision("shufflenet_v2_x0_5")
of_torchvision("efficientnet_b0")
of_torchvision("googlenet", pixels=64, init_weights=False, aux_logits=False)
of_torchvision("densenet121")
of_torchvision("convnext_tiny", pixels=32)
of_torchvision("vit_b_16", image_size=32)
of_torchvision("swin_t", pixels=64)
of_torchvision("regnet_y_400mf")
of_torchvision("fcn_resnet50", pixels=32, weights_backbone=None)
assert CASES
