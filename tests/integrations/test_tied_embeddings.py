"""A language model whose head is tied to its embedding: sparse in both, trained, saved and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparselab import RigL, SparseEmbedding, TiedLinear, densify, sparsify
from sparselab.integrations.transformers import from_pretrained

transformers = pytest.importorskip("transformers")


def test_both_are_sparse_and_come_back(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = sparsify(transformers.LlamaForCausalLM(config), {"lm_head": 0.7, "*": 0.5})
    assert type(model.get_input_embeddings()) is SparseEmbedding
    assert type(model.lm_head) is TiedLinear
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    algorithm = RigL(drop_fraction=0.3, update_freq=1)
    algorithm.attach(model, optimizer)
    assert "model.embed_tokens" in algorithm.names
    before = model.model.embed_tokens.positions()
    tokens = torch.arange(20).view(2, 10)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert not torch.equal(model.model.embed_tokens.positions(), before)
    logits = model.eval()(tokens).logits
    model.save_pretrained(tmp_path)
    other = from_pretrained(tmp_path, transformers.LlamaForCausalLM)
    assert other.lm_head.layer is other.model.embed_tokens
    assert torch.equal(other(tokens).logits, logits)
    other.tie_weights()
    assert other.lm_head.layer is other.model.embed_tokens
    assert torch.equal(other(tokens).logits, logits)
    dense = densify(other)
    dense.tie_weights()
    assert dense.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(dense(tokens).logits, logits)
