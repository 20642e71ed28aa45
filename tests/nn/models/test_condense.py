"""condense removes what is constant and nothing else: outputs stay those of the float64 dense model."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselab import BlockSparseLinear, FanInLinear, MaskedLinear, SparseLinear, SRigL, condense, densify
from sparselab.nn.models import condense as _condense


def without(layer: SparseLinear, *outputs: int) -> SparseLinear:
    """The layer without the connections of some outputs."""
    gone = torch.isin(layer.positions() // layer.in_features, torch.tensor(outputs)).nonzero()[:, 0]
    layer.rewrite(gone, torch.empty(0, dtype=torch.int64))
    return layer


def fan_in(inputs: int, outputs: int, *gone: int, **settings: Any) -> SparseLinear:
    return without(FanInLinear(inputs, outputs, fan_in=inputs // 2, **settings), *gone)


def sparse(inputs: int, outputs: int, *gone: int, **settings: Any) -> SparseLinear:
    return without(SparseLinear(inputs, outputs, sparsity=0.4, **settings), *gone)


MAKERS = {"fan-in": fan_in, "sparse": sparse}


def check(model: nn.Module, **tolerance: float) -> tuple[Any, ...]:
    """Condense a model; its outputs are what they were, and those of the dense model in float64."""
    x = torch.randn(17, next(layer for layer in model.modules() if hasattr(layer, "in_features")).in_features)
    before = model(x)
    exact = densify(copy.deepcopy(model)).double()(x.double())
    condensed = condense(model)
    after = model(x)
    assert after.shape == before.shape
    torch.testing.assert_close(after.double(), exact, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))
    return condensed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reader_bias", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Sigmoid, lambda: nn.ReLU(inplace=True)])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("reader", [*MAKERS, "dense"])
def test_outputs_stay_the_same(
    kind: str, reader: str, act: Callable[[], nn.Module], bias: bool, reader_bias: bool
) -> None:
    second = (MAKERS.get(reader) or nn.Linear)(9, 5, bias=reader_bias)
    model = nn.Sequential(MAKERS[kind](12, 9, 0, 4, 8, bias=bias), act(), nn.Dropout(), second).eval()
    read = nn.Linear(9, 5).weight.numel() if reader == "dense" else second.nnz
    (found,) = check(model)
    assert (found.name, found.reader, found.outputs_before, found.outputs_after) == ("0", "3", 9, 6)
    assert type(model[0]) is (FanInLinear if kind == "fan-in" else SparseLinear)
    assert (model[0].out_features, model[3].in_features) == (6, 6)
    assert (model[0].bias is None) == (not bias)
    constant = bool(act()(torch.zeros(1))) or bias
    assert (model[3].bias is None) == (not reader_bias and not constant)
    left = model[3].weight.numel() if reader == "dense" else model[3].nnz
    assert found.connections_removed == read - left > 0
    assert condense(model) == ()


def test_the_check_sees_a_constant_that_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_condense, "_behind", lambda modules, numbers: torch.zeros_like(numbers))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(nn.Sequential(fan_in(12, 9, 0), nn.Sigmoid(), fan_in(9, 5)).eval())


def test_a_layer_that_loses_an_output_s_last_connection_is_condensed_in_turn() -> None:
    first = sparse(6, 4, 0, 1)
    pattern = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]]).bool()
    model = nn.Sequential(first, nn.Tanh(), SparseLinear.from_pattern(pattern), nn.Tanh(), nn.Linear(3, 2))
    found = check(model.eval())
    assert [(each.name, each.outputs_after) for each in found] == [("0", 2), ("2", 2)]


def test_nested_chains_are_one_and_names_are_qualified() -> None:
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Sequential(fan_in(8, 6, 1)), nn.Sequential(nn.GELU(), fan_in(6, 4)))}
    )
    (found,) = check(nn.Sequential(*model["body"]).eval())
    assert (found.name, found.reader) == ("0.0", "1.1")
    inner = nn.ModuleDict({"body": nn.Sequential(fan_in(8, 6, 1), nn.Sequential(fan_in(6, 4)))})
    assert [(each.name, each.reader) for each in condense(inner)] == [("body.0", "body.1.0")]


def test_all_outputs_may_go() -> None:
    model = nn.Sequential(fan_in(8, 4, 0, 1, 2, 3), nn.Sigmoid(), nn.Linear(4, 3)).eval()
    check(model)
    assert model[2].in_features == 0


def test_a_fan_in_that_becomes_unequal_is_stored_in_compressed_rows() -> None:
    reader = FanInLinear.from_pattern(torch.tensor([[1, 1, 0], [0, 1, 1]]).bool())
    model = nn.Sequential(fan_in(8, 3, 0), reader).eval()
    check(model)
    assert type(model[1]) is SparseLinear


def test_connections_that_are_not_in_use_go_too() -> None:
    first, second = sparse(8, 4), sparse(4, 3)
    first.forward_mask = (first.positions() // 8 != 2).view(-1, 1, 1)
    second.forward_mask = torch.rand(second.nnz, 1, 1) > 0.3
    model = nn.Sequential(first, nn.GELU(), second).eval()
    (found,) = check(model)
    assert found.outputs_after == 3
    assert model[0].forward_mask is None


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


class MyReLU(nn.ReLU):
    pass


@pytest.mark.parametrize(
    "between",
    [
        lambda: nn.Softmax(-1),
        lambda: nn.LayerNorm(6),
        nn.Dropout,
        lambda: hooked(nn.ReLU()),
        MyReLU,
        lambda: nn.PReLU(6),
    ],
)
def test_what_is_not_known_to_be_elementwise_is_left_alone(between: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(fan_in(8, 6, 1), between(), fan_in(6, 4)).train()
    layers = list(model)
    assert condense(model) == ()
    assert list(model) == layers


class Reader(nn.Linear):
    pass


def test_layers_that_something_else_may_read_are_left_alone() -> None:
    shared = fan_in(6, 6, 1)
    for model in (
        nn.Sequential(shared, shared, nn.Linear(6, 2)),
        nn.ModuleList([nn.Sequential(shared, nn.Linear(6, 2)), shared]),
        nn.ModuleList([shared, nn.Linear(6, 2)]),
        nn.Sequential(shared),
        shared,
    ):
        before = list(model.modules())
        assert condense(model) == ()
        assert list(model.modules()) == before


class Scaled(SparseLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_buffer() -> nn.Module:
    layer = fan_in(6, 6, 1)
    layer.register_buffer("scale", torch.ones(1))
    return layer


def tied() -> nn.Sequential:
    first, reader = fan_in(6, 6, 1), nn.Linear(6, 6)
    reader.bias = first.bias
    return nn.Sequential(first, reader)


def diagonal_blocks() -> nn.Module:
    """The last two outputs have no block."""
    pattern = np.eye(3, 2, dtype=bool)
    return BlockSparseLinear.from_pattern(pattern, block_shape=(2, 3), shape=(6, 6))


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass that reads": (
        lambda: nn.Sequential(fan_in(6, 6, 1), Reader(6, 2)), "'1' is of class Reader, which may compute"
    ),
    "a subclass": (
        lambda: nn.Sequential(without(Scaled(6, 6, sparsity=0.4), 1), nn.Linear(6, 2)),
        "'0' is of class Scaled, which",
    ),
    "a masked layer": (
        lambda: nn.Sequential(MaskedLinear.from_sparse(fan_in(6, 6, 1)), nn.Linear(6, 2)),
        "'0' is of kind 'masked', which is not condensed",
    ),
    "blocks": (
        lambda: nn.Sequential(diagonal_blocks(), nn.Linear(6, 2)),
        "'0' is of kind 'block', which is not condensed",
    ),
    "hooks": (lambda: nn.Sequential(hooked(fan_in(6, 6, 1)), nn.Linear(6, 2)), "'0' has forward hooks"),
    "hooks that read": (
        lambda: nn.Sequential(fan_in(6, 6, 1), hooked(nn.Linear(6, 2))), "'1' has forward hooks"
    ),
    "a buffer": (lambda: nn.Sequential(with_buffer(), nn.Linear(6, 2)), "'0' has the buffer scale"),
    "a tied bias": (tied, "'0' has the shared parameter bias"),
}  # fmt: skip


@pytest.mark.parametrize("what", REASONS)
def test_what_would_lose_something_is_left_and_named(what: str) -> None:
    make, reason = REASONS[what]
    model = make().eval()
    before = list(model.modules())
    with pytest.warns(UserWarning, match=f"condense leaves outputs .* where they are: {reason}"):
        assert condense(model) == ()
    assert list(model.modules()) == before


def test_without_such_outputs_nothing_is_said() -> None:
    assert condense(nn.Sequential(Scaled(6, 6, sparsity=0.0), nn.Linear(6, 2))) == ()


def test_an_activation_may_be_used_in_several_places() -> None:
    act = nn.Tanh()
    model = nn.Sequential(fan_in(8, 6, 1), act, fan_in(6, 6, 3), act, nn.Linear(6, 2)).eval()
    assert len(check(model)) == 2


def test_modes_trainability_and_dtype_stay() -> None:
    model = nn.Sequential(fan_in(8, 6, 1), nn.ReLU(), nn.Linear(6, 2)).eval().to(torch.bfloat16)
    model[0].weight_values.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    condense(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(each.training for each in model.modules())


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="model must hold data, got '0' on the meta device"):
        condense(nn.Sequential(SparseLinear(4, 4, device="meta"), nn.Linear(4, 2)))


def test_a_model_trained_by_srigl() -> None:
    model = nn.Sequential(FanInLinear(20, 40, fan_in=4), nn.GELU(), FanInLinear(40, 10, fan_in=8))
    algorithm = SRigL(update_freq=2, gamma_sal=0.95)
    model.apply(algorithm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        x = torch.randn(16, 20)
        optimizer.zero_grad()
        (model(x) - x[:, :10]).square().mean().backward()
        optimizer.step()
        algorithm.step()
    ablated = len(algorithm.ablated_rows()[0])
    (found,) = check(model.eval())
    assert found.outputs_after == 40 - ablated < 40


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(_condense)
    assert (result.failed, result.attempted > 3) == (0, True)
