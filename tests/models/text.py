"""Language models of transformers, from their configurations."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from tests.models.case import LENGTH, VOCABULARY, Case, add, tokens

#: As BERT names its sizes.
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
#: As Llama names them.
LLAMA: dict[str, Any] = {
    **BERT,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: As GPT-2 names them.
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
#: As BART names them.
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
#: As T5 names them.
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GREEDY = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}


def build(config: str, model: str, **sizes: Any) -> nn.Module:
    """A model of transformers; the configuration is made anew, as models write into theirs."""
    made = getattr(transformers, f"{config}Config")(**sizes)
    cls: Any = getattr(transformers, model)
    return cls(made)  # type: ignore[no-any-return]


def encoder(name: str, config: str, model: str, rules: Any = 0.8, **sizes: Any) -> None:
    """A model that reads tokens."""
    make = lambda: build(config, model, **sizes)  # noqa: E731
    add(Case(name, "transformers", make, lambda: {"input_ids": tokens()}, rules))


def decoder(name: str, config: str, model: str, **sizes: Any) -> None:
    """A model that reads tokens and writes more."""

    def inputs() -> dict[str, Any]:
        return {"input_ids": tokens()}

    make = lambda: build(config, model, **sizes)  # noqa: E731
    add(Case(name, "transformers", make, inputs, generate=GREEDY, prompt=inputs))


def translator(name: str, config: str, model: str, **sizes: Any) -> None:
    """A model that reads tokens and writes others."""

    def inputs() -> dict[str, Any]:
        return {"input_ids": tokens(), "decoder_input_ids": tokens(LENGTH - 2, 1)}

    make = lambda: build(config, model, **sizes)  # noqa: E731
    add(Case(name, "transformers", make, inputs, generate=GREEDY, prompt=lambda: {"input_ids": tokens()}))


encoder("BERT", "Bert", "BertForMaskedLM", **BERT)
encoder("RoBERTa", "Roberta", "RobertaForMaskedLM", **BERT)
encoder("XLM-RoBERTa", "XLMRoberta", "XLMRobertaForSequenceClassification", **BERT)
encoder("ALBERT", "Albert", "AlbertForMaskedLM", **BERT, embedding_size=16)
encoder(
    "DistilBERT", "DistilBert", "DistilBertForMaskedLM", vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2,
    hidden_dim=48, max_position_embeddings=32,
)  # fmt: skip
encoder("ELECTRA", "Electra", "ElectraForPreTraining", **BERT, embedding_size=16)
encoder(
    "DeBERTa-v2",
    "DebertaV2",
    "DebertaV2ForMaskedLM",
    **BERT,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
)
encoder("MPNet", "MPNet", "MPNetForMaskedLM", **BERT)
encoder("ConvBERT", "ConvBert", "ConvBertForMaskedLM", **BERT, embedding_size=32)
encoder("FNet", "FNet", "FNetForMaskedLM", **{k: v for k, v in BERT.items() if k != "num_attention_heads"})
# Its head multiplies with the weight of one layer and that of the embedding at once, joined by torch.cat.
encoder(
    "MobileBERT",
    "MobileBert",
    "MobileBertForMaskedLM",
    rules={"cls.predictions.dense": None, "*": 0.8},
    **BERT,
    embedding_size=32,
    intra_bottleneck_size=32,
)
encoder(
    "ModernBERT",
    "ModernBert",
    "ModernBertForMaskedLM",
    **BERT,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
)
encoder(
    "Longformer",
    "Longformer",
    "LongformerForMaskedLM",
    **{**BERT, "max_position_embeddings": 40},
    attention_window=4,
)
encoder(
    "Funnel",
    "Funnel",
    "FunnelForMaskedLM",
    vocab_size=VOCABULARY,
    block_sizes=[1, 1],
    num_decoder_layers=1,
    d_model=32,
    n_head=2,
    d_head=8,
    d_inner=48,
)
encoder(
    "XLNet", "XLNet", "XLNetLMHeadModel", vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=2, d_inner=48
)
encoder("ESM", "Esm", "EsmForMaskedLM", **BERT, pad_token_id=1, mask_token_id=3)

decoder("GPT-2", "GPT2", "GPT2LMHeadModel", **GPT2)
decoder(
    "GPT-Neo",
    "GPTNeo",
    "GPTNeoForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=8,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_id=2,
)
decoder("GPT-J", "GPTJ", "GPTJForCausalLM", **GPT2, rotary_dim=8)
decoder("GPT-NeoX", "GPTNeoX", "GPTNeoXForCausalLM", **BERT, bos_token_id=1, eos_token_id=2)
decoder("GPT-BigCode", "GPTBigCode", "GPTBigCodeForCausalLM", **GPT2)
decoder("CodeGen", "CodeGen", "CodeGenForCausalLM", **{**GPT2, "n_head": 4}, rotary_dim=4)
decoder("CTRL", "CTRL", "CTRLLMHeadModel", **GPT2, dff=48)
decoder(
    "OPT",
    "OPT",
    "OPTForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=32,
    word_embed_proj_dim=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=48,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
decoder(
    "BLOOM",
    "Bloom",
    "BloomForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=32,
    n_layer=2,
    n_head=2,
    bos_token_id=1,
    eos_token_id=2,
)
decoder(
    "MPT",
    "Mpt",
    "MptForCausalLM",
    vocab_size=VOCABULARY,
    d_model=32,
    n_layers=2,
    n_heads=2,
    max_seq_len=32,
    expansion_ratio=2,
)
decoder(
    "Falcon",
    "Falcon",
    "FalconForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
for name, kind in {
    "Llama": "Llama", "Mistral": "Mistral", "Qwen2": "Qwen2", "StableLM": "StableLm", "OLMo-2": "Olmo2",
    "Phi": "Phi", "Phi-3": "Phi3", "Cohere": "Cohere", "Granite": "Granite", "StarCoder2": "Starcoder2",
}.items():  # fmt: skip
    decoder(name, kind, f"{kind}ForCausalLM", **LLAMA)
for name, kind in {"Qwen3": "Qwen3", "Gemma": "Gemma", "Gemma 2": "Gemma2"}.items():
    decoder(name, kind, f"{kind}ForCausalLM", **LLAMA, head_dim=16)
decoder("Mixtral", "Mixtral", "MixtralForCausalLM", **LLAMA, num_local_experts=2)
decoder(
    "Qwen2-MoE",
    "Qwen2Moe",
    "Qwen2MoeForCausalLM",
    **LLAMA,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
)
decoder(
    "DeepSeek-V3",
    "DeepseekV3",
    "DeepseekV3ForCausalLM",
    **LLAMA,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
decoder(
    "Mamba",
    "Mamba",
    "MambaForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=32,
    state_size=4,
    num_hidden_layers=2,
    time_step_rank=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
decoder(
    "Mamba-2",
    "Mamba2",
    "Mamba2ForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=32,
    state_size=4,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=16,
    n_groups=1,
    chunk_size=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
decoder(
    "RWKV",
    "Rwkv",
    "RwkvForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    bos_token_id=1,
    eos_token_id=2,
)

translator("T5", "T5", "T5ForConditionalGeneration", **T5)
translator(
    "FLAN-T5",
    "T5",
    "T5ForConditionalGeneration",
    **T5,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
translator("mT5", "MT5", "MT5ForConditionalGeneration", **T5)
translator("BART", "Bart", "BartForConditionalGeneration", **BART)
translator("mBART", "MBart", "MBartForConditionalGeneration", **BART)
translator("Pegasus", "Pegasus", "PegasusForConditionalGeneration", **BART)
translator("Marian", "Marian", "MarianMTModel", **BART)
translator(
    "LED",
    "LED",
    "LEDForConditionalGeneration",
    **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
    max_encoder_position_embeddings=32,
    max_decoder_position_embeddings=32,
    attention_window=4,
)
translator("M2M-100", "M2M100", "M2M100ForConditionalGeneration", **BART)
