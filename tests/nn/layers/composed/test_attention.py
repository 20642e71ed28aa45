"""Attention with projections of its own is the attention it was made from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselab import SparseLinear, SparseMultiheadAttention, densify, sparsify

E, HEADS, N, L, S = 16, 4, 3, 5, 7

SETTINGS: dict[str, dict[str, Any]] = {
    "sequence first": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False, "batch_first": True},
    "learned and zero keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 10, "batch_first": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": True},
    "padding, no weights": {"key_padding_mask": True, "need_weights": False},
    "mask": {"attn_mask": "bool", "need_weights": False},
    "causal": {"attn_mask": "causal", "is_causal": True, "need_weights": False},
    "float mask for each head": {"attn_mask": "float"},
    "mask and padding": {"attn_mask": "bool", "key_padding_mask": True},
}


def dense_attention(**settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, HEADS, dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.uniform_(-0.5, 0.5)  # biases are 0 otherwise
    return attention


def inputs(attention: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    sizes = [(L, E), (S, attention.kdim), (S, attention.vdim)]
    if not batched:
        shapes = [list(size) for size in sizes]
    elif attention.batch_first:
        shapes = [[N, *size] for size in sizes]
    else:
        shapes = [[length, N, width] for length, width in sizes]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masks(call: dict[str, Any], batched: bool = True) -> dict[str, Any]:
    torch.manual_seed(2)
    call = dict(call)
    if "key_padding_mask" in call:
        hidden = torch.arange(S) >= torch.tensor([[S], [3], [1]])
        call["key_padding_mask"] = hidden if batched else hidden[1]
    kind = call.get("attn_mask")
    if kind == "float":
        call["attn_mask"] = torch.randn((N if batched else 1) * HEADS, L, S, dtype=torch.float64)
    elif kind is not None:
        call["attn_mask"] = torch.ones(L, S, dtype=torch.bool).triu(1)
    return call


def results(attention: nn.Module, tokens: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
    """Outputs, then the gradients of the inputs."""
    output, weights = attention(*tokens, **call)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    loss = (output * upstream).sum()
    if weights is not None:
        loss = loss + (weights**2).sum()
    return [output, *([] if weights is None else [weights]), *torch.autograd.grad(loss, tokens)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batched", [True, False])
def test_without_zeros_it_is_the_dense_one(settings: str, call: str, batched: bool) -> None:
    dense = dense_attention(**SETTINGS[settings])
    sparse = SparseMultiheadAttention.from_dense(dense, 0.0)
    assert sum(isinstance(each, SparseLinear) for each in sparse.children()) == 4
    tokens, options = inputs(dense, batched), masks(CALLS[call], batched)
    as_torch = options
    if "add_bias_kv" in SETTINGS[settings]:
        # By this hint torch would hide the keys that it adds.
        as_torch = {key: value for key, value in options.items() if key != "is_causal"}
    torch.testing.assert_close(results(sparse, tokens, options), results(dense, tokens, as_torch))


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_reach_every_parameter(settings: str) -> None:
    dense = dense_attention(**SETTINGS[settings])
    sparse = SparseMultiheadAttention.from_dense(dense, 0.0)
    tokens = inputs(dense)
    for attention in (dense, sparse):
        attention(*tokens)[0].square().sum().backward()
    # The gradients of the sparse one, packed as its weights are.
    with torch.no_grad():
        for parameter in sparse.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    packed = sparse.to_dense()
    assert dict(packed.named_parameters()).keys() == dict(dense.named_parameters()).keys()
    for name, parameter in packed.named_parameters():
        expected = dense.get_parameter(name).grad
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_the_dense_one_draws(need_weights: bool) -> None:
    dense = dense_attention(dropout=0.5)
    sparse = SparseMultiheadAttention.from_dense(dense, 0.0)
    tokens = inputs(dense)
    outputs = []
    for attention in (dense, sparse):
        torch.manual_seed(3)
        outputs.append(attention(*tokens, need_weights=need_weights)[0])
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], dense.eval()(*tokens)[0])
    torch.testing.assert_close(sparse.eval()(*tokens)[0], dense(*tokens)[0])


@pytest.mark.parametrize("settings", SETTINGS)
def test_dense_again_it_gives_the_same_outputs(settings: str) -> None:
    dense = dense_attention(**SETTINGS[settings])
    dense.out_proj.requires_grad_(False)
    sparse = SparseMultiheadAttention.from_dense(dense, 0.7).eval()
    again = sparse.to_dense()
    assert type(again) is nn.MultiheadAttention
    assert (again.training, again.out_proj.weight.requires_grad) == (False, False)
    tokens = inputs(dense)
    torch.testing.assert_close(results(again, tokens, {}), results(sparse, tokens, {}))


def test_unmatched_projections_stay_dense_and_are_copies() -> None:
    model = nn.ModuleDict({"attn": dense_attention()})
    before, tokens = model["attn"], inputs(model["attn"])
    sparsify(model, {"attn.[qk]_proj": 0.5}, init="magnitude")
    assert [type(each) for each in model["attn"].children()] == [
        SparseLinear, SparseLinear, nn.Linear, nn.Linear
    ]  # fmt: skip
    assert torch.equal(model["attn"].v_proj.weight, before.in_proj_weight[2 * E :])
    expected = model["attn"](*tokens)[0]
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.zero_()
    torch.testing.assert_close(model["attn"](*tokens)[0], expected)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("swapped", ["*_proj", "*.out_proj", "*.self_attn.q_proj"])
def test_a_transformer_evaluates_as_it_trains(swapped: str, padding: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    model = sparsify(nn.Sequential(nn.TransformerEncoder(layer, 2)), {swapped: 0.5})
    x = torch.randn(3, 5, E)
    hidden = torch.arange(5) >= torch.tensor([[5], [4], [2]])
    options = {"src_key_padding_mask": hidden} if padding else {}
    expected = model[0].train()(x, **options)[~hidden]
    with torch.no_grad():
        torch.testing.assert_close(model[0].eval()(x, **options)[~hidden], expected)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_sparse_layer_can_be_made_an_encoder() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)])
    encoder = nn.TransformerEncoder(sparsify(model, {"*.q_proj": 0.5})[0], 2)
    x = torch.randn(3, 5, E)
    expected = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), expected)


def test_a_decoder_attends_to_its_memory() -> None:
    torch.manual_seed(0)
    dense = nn.Transformer(E, HEADS, 1, 1, 32, dropout=0.0, batch_first=True)
    sparse = sparsify(copy.deepcopy(dense), {"*": 0.0}, init="magnitude")
    assert not any(isinstance(each, nn.MultiheadAttention) for each in sparse.modules())
    source, target = torch.randn(2, 5, E), torch.randn(2, 4, E)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    expected = dense(source, target, tgt_mask=causal)
    torch.testing.assert_close(sparse(source, target, tgt_mask=causal), expected)
    torch.testing.assert_close(densify(sparse)(source, target, tgt_mask=causal), expected)


def test_a_copy_and_a_loaded_state_compute_the_same() -> None:
    dense = dense_attention(add_bias_kv=True)
    sparse, other = (SparseMultiheadAttention.from_dense(dense, each) for each in (0.5, 0.9))
    other.load_state_dict(sparse.state_dict())
    tokens = inputs(dense)
    for twin in (other, copy.deepcopy(sparse)):
        assert torch.equal(twin(*tokens)[0], sparse(*tokens)[0])


def test_a_new_one_takes_torch_s_own_arguments() -> None:
    settings: dict[str, Any] = {
        "dropout": 0.0,
        "add_bias_kv": True,
        "kdim": 6,
        "vdim": 10,
        "batch_first": True,
    }
    sparse = SparseMultiheadAttention(32, 4, **settings, density=0.25)
    dense = nn.MultiheadAttention(32, 4, **settings)
    assert [getattr(sparse, name).nnz for name in ("q_proj", "k_proj", "v_proj", "out_proj")] == [
        256,
        48,
        80,
        256,
    ]
    shapes = {name: parameter.shape for name, parameter in sparse.to_dense().named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in dense.named_parameters()}
    x = torch.randn(2, 5, 32), torch.randn(2, 7, 6), torch.randn(2, 7, 10)
    torch.testing.assert_close(sparse(*x), sparse.to_dense()(*x))
    assert SparseMultiheadAttention(32, 4).q_proj.sparsity == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 32 and 5"):
        SparseMultiheadAttention(32, 5)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"attention must be a torch.nn.MultiheadAttention, got Linear"):
        SparseMultiheadAttention.from_dense(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers must be named q_proj, .* got 'in_proj'"):
        SparseMultiheadAttention.of_layers(dense_attention(), {"in_proj": nn.Linear(3, 3)})
    sparse = SparseMultiheadAttention.from_dense(dense_attention(), 0.5)
    tokens = inputs(dense_attention())
    with pytest.raises(RuntimeError, match="attn_mask must be given with is_causal=True"):
        sparse(*tokens, is_causal=True)
    with pytest.raises(
        RuntimeError, match=r"attn_mask must have shape \(5, 7\) or \(12, 5, 7\), got \(7, 5\)"
    ):
        sparse(*tokens, attn_mask=torch.zeros(7, 5))
    with pytest.raises(RuntimeError, match=r"key_padding_mask must have shape \(3, 7\), got \(7, 3\)"):
        sparse(*tokens, key_padding_mask=torch.zeros(7, 3))
    sparse.q_proj = nn.Identity()
    with pytest.raises(TypeError, match="projections must be linear layers to be packed, got Identity"):
        sparse.to_dense()
