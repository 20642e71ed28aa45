"""Models of transformers for images, sound, series, and images with text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models.case import LENGTH, Case, add, image, noise, tokens
from tests.models.text import BART, BERT, GREEDY, build

#: As ViT names its sizes.
VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {**BERT, "projection_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def seeing(name: str, config: str, model: str, rules: Any = 0.8, **sizes: Any) -> None:
    """A model that is given images."""
    make = lambda: build(config, model, **sizes)  # noqa: E731
    add(Case(name, "transformers", make, lambda: {"pixel_values": image()}, rules))


def given(
    name: str,
    config: str,
    model: str,
    inputs: Callable[[], dict[str, Tensor]],
    rules: Any = 0.8,
    **sizes: Any,
) -> None:
    """A model that is given something else."""
    add(Case(name, "transformers", lambda: build(config, model, **sizes), inputs, rules))


seeing("ViT", "ViT", "ViTForImageClassification", **VIT)
seeing("DeiT", "DeiT", "DeiTForImageClassification", **VIT)
seeing("BEiT", "Beit", "BeitForImageClassification", **VIT)
# Which patches it is shown is drawn from the noise.
add(
    Case(
        "ViT-MAE", "transformers", lambda: build("ViTMAE", "ViTMAEModel", **VIT),
        lambda: {"pixel_values": image(), "noise": noise(2, 16)},
    )
)  # fmt: skip
seeing("DINOv2", "Dinov2", "Dinov2ForImageClassification", **VIT)
seeing("YOLOS", "Yolos", "YolosModel", **{**VIT, "image_size": [32, 32]}, num_detection_tokens=4)
seeing("Swin", "Swin", "SwinForImageClassification", **SWIN)
seeing("Swin v2", "Swinv2", "Swinv2ForImageClassification", **SWIN)
seeing(
    "ConvNeXt",
    "ConvNext",
    "ConvNextForImageClassification",
    hidden_sizes=[16, 16, 32, 32],
    depths=[1, 1, 1, 1],
)
seeing(
    "ConvNeXt v2",
    "ConvNextV2",
    "ConvNextV2ForImageClassification",
    hidden_sizes=[16, 16, 32, 32],
    depths=[1, 1, 1, 1],
)
seeing(
    "ResNet",
    "ResNet",
    "ResNetForImageClassification",
    embedding_size=16,
    hidden_sizes=[16, 32],
    depths=[1, 1],
)
seeing(
    "RegNet",
    "RegNet",
    "RegNetForImageClassification",
    embedding_size=16,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    groups_width=8,
)
seeing(
    "MobileNet v2", "MobileNetV2", "MobileNetV2ForImageClassification", image_size=32, depth_multiplier=0.25
)
seeing(
    "SegFormer",
    "Segformer",
    "SegformerForSemanticSegmentation",
    hidden_sizes=[16, 16, 32, 32],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=16,
)
seeing(
    "PVT v2",
    "PvtV2",
    "PvtV2ForImageClassification",
    hidden_sizes=[16, 16, 32, 32],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
)
seeing(
    "MobileViT",
    "MobileViT",
    "MobileViTForImageClassification",
    image_size=32,
    hidden_sizes=[16, 24, 32],
    neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
    num_attention_heads=2,
)
seeing(
    "PoolFormer",
    "PoolFormer",
    "PoolFormerForImageClassification",
    hidden_sizes=[16, 16, 32, 32],
    depths=[1, 1, 1, 1],
)
seeing(
    "DPT",
    "DPT",
    "DPTForDepthEstimation",
    **{**VIT, "num_hidden_layers": 4},
    backbone_out_indices=[0, 1, 2, 3],
    neck_hidden_sizes=[8, 8, 8, 8],
    fusion_hidden_size=8,
    readout_type="project",
)

given(
    "CLIP", "CLIP", "CLIPModel", lambda: {"input_ids": tokens(), "pixel_values": image()},
    text_config=TEXT, vision_config=VIT, projection_dim=16,
)  # fmt: skip
given(
    "SigLIP", "Siglip", "SiglipModel", lambda: {"input_ids": tokens(), "pixel_values": image()},
    text_config={**TEXT, "max_position_embeddings": LENGTH}, vision_config=VIT,
)  # fmt: skip
given(
    "BLIP", "Blip", "BlipModel", lambda: {"input_ids": tokens(), "pixel_values": image()},
    text_config={**TEXT, "encoder_hidden_size": 32}, vision_config=VIT, projection_dim=16,
)  # fmt: skip
given(
    "ViLT", "Vilt", "ViltModel", lambda: {"input_ids": tokens(), "pixel_values": image()}, **BERT,
    image_size=32, patch_size=8,
)  # fmt: skip
given(
    "LayoutLM", "LayoutLM", "LayoutLMModel",
    lambda: {"input_ids": tokens(), "bbox": torch.zeros(2, LENGTH, 4, dtype=torch.long)}, **BERT,
)  # fmt: skip
CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}  # fmt: skip
SPEECH = {key: BERT[key] for key in BERT if key not in ("vocab_size", "max_position_embeddings")}
given(
    "wav2vec 2.0",
    "Wav2Vec2",
    "Wav2Vec2Model",
    lambda: {"input_values": noise(2, 400)},
    **SPEECH,
    **CONVOLUTIONS,
)
given("HuBERT", "Hubert", "HubertModel", lambda: {"input_values": noise(2, 400)}, **SPEECH, **CONVOLUTIONS)
given(
    "AST",
    "AST",
    "ASTForAudioClassification",
    lambda: {"input_values": noise(2, 32, 16)},
    **SPEECH,
    patch_size=8,
    max_length=32,
    num_mel_bins=16,
    frequency_stride=8,
    time_stride=8,
)
add(
    Case(
        "Whisper", "transformers",
        lambda: build(
            "Whisper", "WhisperForConditionalGeneration", **{**BART, "decoder_start_token_id": 1},
            num_mel_bins=8, max_source_positions=16, max_target_positions=16, suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        lambda: {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens(6)},
        generate=GREEDY, prompt=lambda: {"input_features": noise(2, 8, 32)},
    )
)  # fmt: skip
given(
    "PatchTST", "PatchTST", "PatchTSTForPrediction", lambda: {"past_values": noise(2, 32, 3)},
    num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=32, ffn_dim=48,
    num_attention_heads=2, num_hidden_layers=2, prediction_length=4,
)  # fmt: skip
given(
    "Perceiver", "Perceiver", "PerceiverForMaskedLM", lambda: {"inputs": tokens(32)}, vocab_size=40,
    num_latents=8, d_latents=32, d_model=32, num_blocks=1, num_self_attends_per_block=1,
    num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=32, qk_channels=32,
    v_channels=32,
)  # fmt: skip
