"""Feed-forward blocks: the two ways give the same, the right one is taken, and nobody notices which."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import sparselab
from sparselab import FanInLinear, RigL, SparseLinear, SparseMLP
from sparselab.nn import feed_forward, find_sparse
from sparselab.nn.layers.composed import mlp as _mlp
from sparselab.nn.ops.cpu import mlp as _kernels
from sparselab.nn.ops.mlp.function import apply_activation
from tests.nn.layers.composed.blocks import (
    apart,
    gradients,
    is_fused,
    make,
    of_every_kind,
    of_two_kinds,
    tokens,
)
from tests.nn.twin import twin_of


@pytest.fixture(autouse=True)
def _pays_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mlp, "pays", _kernels.serves)


@of_every_kind
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("shape", [(1, 12), (130, 12), (3, 50, 12), (12,)])
def test_outputs_and_gradients_are_those_of_dense_layers(
    kind: str, activation: str, shape: tuple[int, ...]
) -> None:
    block, x = make(kind, activation=activation), tokens(*shape)
    twin = twin_of(block).double()
    y = block(x)
    assert is_fused(y)
    far = x.detach().double().requires_grad_()
    expected = twin.down(apply_activation(activation, twin.up(far)))  # type: ignore[operator, union-attr]
    dy = torch.randn_like(y)
    found = [y, *gradients(y, dy, x, *block.parameters())]
    right = [expected, *gradients(expected, dy.double(), far, *twin.parameters())]
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=2e-5)


@of_every_kind
def test_outputs_that_nothing_comes_from(kind: str) -> None:
    """Rows without connections on either side, and weights that are 0."""
    block = make(kind, 12, 40, 16, sparsity=0.97)
    x = tokens(70, 12)
    y = block(x)
    assert is_fused(y)
    torch.testing.assert_close(y, apart(block, x))


def test_what_the_block_is_made_of() -> None:
    block = SparseMLP(8, 20, layer="fan-in", gated=True, bias=False, sparsity=0.5)
    assert isinstance(block.gate, FanInLinear)
    assert [name for name, _ in find_sparse(block)] == ["gate", "up", "down"]
    assert block.down.out_features == 8
    assert block.up.bias is None
    x = tokens(100, 8)
    torch.testing.assert_close(block(x), block.down(torch.nn.functional.gelu(block.gate(x)) * block.up(x)))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"activation": "tanh"}, ValueError, "activation must be one of relu, gelu, gelu_tanh, silu"),
        ({"layer": "dense"}, ValueError, "layer must be one of single, fan-in, block"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"sparsity": 0.5, "density": 0.5}, ValueError, "sparsity"),
    ],
)
def test_errors(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SparseMLP(4, 8, **settings)
    with pytest.raises(ValueError, match="activation must be"):
        feed_forward(torch.zeros(1, 4), nn.Linear(4, 8), nn.Linear(8, 4), "tanh")


@of_two_kinds
def test_the_layers_say_what_is_wrong_with_the_input(kind: str) -> None:
    block = make(kind)
    with pytest.raises(RuntimeError, match="12"):
        block(torch.zeros(5, 11))
    with pytest.raises(RuntimeError):
        block(torch.zeros(5, 12, dtype=torch.float64))


def hooked(block: SparseMLP) -> None:
    block.up.register_forward_hook(lambda *_: None)


def masked(block: SparseMLP) -> None:
    block.down.forward_mask = torch.rand(block.down.weight_values.shape) < 0.5


def parametrized(block: SparseMLP) -> None:
    parametrize.register_parametrization(block.up, "weight_values", nn.Identity())


def replaced(block: SparseMLP) -> None:
    block.up = nn.Linear(12, 37)  # type: ignore[assignment]


def mixed(block: SparseMLP) -> None:
    block.up = sparselab.BlockSparseLinear(12, 37, sparsity=0.5, block_shape=(4, 4))


def wide(block: SparseMLP) -> None:
    block.double()


def biases_alone(block: SparseMLP) -> None:
    block.up.weight_values.requires_grad_(False)


def watched(block: SparseMLP) -> None:
    block.up.gradient_hook = lambda operands: None


def forward_of_its_own(block: SparseMLP) -> None:
    block.down.forward = SparseLinear(37, 10).forward  # type: ignore[method-assign]


def large_blocks(block: SparseMLP) -> None:
    block.up, block.down = (sparselab.BlockSparseLinear(*n, sparsity=0) for n in ((12, 37), (37, 10)))


@pytest.mark.parametrize(
    "change",
    [hooked, masked, parametrized, replaced, mixed, wide, biases_alone, watched, forward_of_its_own,
     large_blocks],
)  # fmt: skip
def test_layers_are_called_where_somebody_would_notice(change: Any) -> None:
    block = make("single")
    assert is_fused(block(tokens(70, 12)))
    change(block)
    x = tokens(70, 12) if change is not wide else torch.randn(70, 12, dtype=torch.float64, requires_grad=True)
    y = block(x)
    assert not is_fused(y)
    torch.testing.assert_close(y, apart(block, x))


def test_few_tokens_are_no_work_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    block = make("single", sparsity=0.8)
    assert not is_fused(block(tokens(8, 12)))
    assert is_fused(block(tokens(4096, 12)))


@of_two_kinds
def test_what_is_frozen(kind: str) -> None:
    for frozen in (["up.weight_values", "up.bias"], ["down.weight_values"], ["down.bias"], ["up.bias"]):
        block, x = make(kind), tokens(70, 12)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name not in frozen)
        y = block(x)
        assert is_fused(y)
        dy = torch.randn_like(y)
        leaves = [x, *(each for each in block.parameters() if each.requires_grad)]
        for one, other in zip(
            gradients(y, dy, *leaves), gradients(apart(block, x), dy, *leaves), strict=True
        ):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@of_two_kinds
@pytest.mark.parametrize("bias", [False, True])
def test_an_input_without_gradient_and_no_gradient_at_all(kind: str, bias: bool) -> None:
    block, x = make(kind, bias=bias), torch.randn(70, 12)
    y = block(x)
    assert is_fused(y)
    dy = torch.randn_like(y)
    leaves = list(block.parameters())
    for one, other in zip(gradients(y, dy, *leaves), gradients(apart(block, x), dy, *leaves), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(block(x), y)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), y)


@of_two_kinds
def test_algorithms_step_through_it(kind: str) -> None:
    """RigL makes the topologies that it makes of the layers one after the other."""
    blocks = [make(kind, 16, 40, 16, activation="relu")]
    blocks.append(copy.deepcopy(blocks[0]))
    batches = [torch.randn(96, 16) for _ in range(13)]
    for block, call in zip(blocks, (SparseMLP.forward, apart), strict=True):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
        algorithm = RigL(0.5, update_freq=4)
        algorithm.attach(block, optimizer)
        fused = 0
        for x in batches:
            optimizer.zero_grad()
            y = call(block, x)
            fused += is_fused(y)
            y.square().mean().backward()
            optimizer.step()
        assert algorithm.last_update
        assert call is apart or 0 < fused < len(batches)
    for one, other in zip(blocks[0].buffers(), blocks[1].buffers(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@of_every_kind
def test_copies_and_states(kind: str) -> None:
    block, x = make(kind), torch.randn(70, 12)
    expected = block(x)
    other = make(kind)
    other.load_state_dict(block.state_dict())
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), other):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    report = sparselab.memory_report(block)
    assert str(report)
    assert "activation='gelu'" in repr(block)


@of_two_kinds
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    block = make(kind)
    x = torch.randn(70, 12).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = block(x), apart(block, x)
    assert is_fused(y)
    assert y.dtype is expected.dtype is torch.bfloat16
    dy = torch.randn(70, 10).bfloat16()
    leaves = [x, *block.parameters()]
    results = [[each, *gradients(each, dy, *leaves)] for each in (y, expected)]
    for one, other in zip(*results, strict=True):
        assert one.dtype is other.dtype
        size = float(other.detach().float().abs().max())
        torch.testing.assert_close(one.float(), other.float(), atol=0.02 * size, rtol=0.02)


def test_autocast_in_another_dtype_calls_the_layers() -> None:
    block, x = make("single"), tokens(70, 12)
    with torch.autocast("cpu", torch.float16):
        assert not is_fused(block(x))


def test_dropout_is_of_the_hidden_numbers() -> None:
    block, x = make("single", dropout=0.5), tokens(70, 12)
    assert not is_fused(block(x))
    torch.manual_seed(1)
    y = block(x)
    torch.manual_seed(1)
    hidden = nn.functional.dropout(nn.functional.gelu(block.up(x)), 0.5)
    torch.testing.assert_close(y, block.down(hidden))
    assert is_fused(block.eval()(x))


def test_compiled_and_traced() -> None:
    block, x = make("single"), torch.randn(70, 12)
    compiled = torch.compile(block, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@of_two_kinds
def test_one_thread_and_strides(kind: str) -> None:
    block = make(kind)
    wide = torch.randn(70, 24)
    for x in (wide[:, ::2], wide[:, :12], wide[:35].reshape(70, 12).T.contiguous().T):
        y = block(x)
        assert is_fused(y)
        torch.testing.assert_close(y, apart(block, x))
        found = gradients(y, torch.ones(1, 1).expand(70, 10), *block.parameters())
        right = gradients(apart(block, x), torch.ones(70, 10), *block.parameters())
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
