"""Rewriting a layer: weights and gradients follow (row, column)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselab import SparseLinear
from sparselab.nn.ops.operands import GradientOperands, LinearOperands


def keyed(layer: SparseLinear, tensor: Tensor) -> dict[int, float]:
    return dict(zip(layer.positions().tolist(), tensor.flatten().tolist(), strict=True))


def free_positions(layer: SparseLinear, n: int) -> Tensor:
    free = torch.ones(layer.in_features * layer.out_features, dtype=torch.bool)
    free[layer.positions()] = False
    return free.nonzero().flatten()[torch.randperm(int(free.sum()))[:n]]


@pytest.mark.parametrize(("n_drop", "n_grow"), [(0, 0), (10, 10), (10, 3), (3, 10), (60, 0), (0, 40)])
def test_values_and_gradient_follow_their_connection(n_drop: int, n_grow: int) -> None:
    layer = SparseLinear(30, 20, sparsity=0.9)
    parameter = layer.weight_values
    layer(torch.randn(4, 30)).sum().backward()
    values, gradient = keyed(layer, layer.weight_values), keyed(layer, layer.weight_values.grad)
    old = layer.positions()
    drop = torch.randperm(layer.nnz)[:n_drop]
    grow = free_positions(layer, n_grow)
    source = layer.rewrite(drop, grow)
    new = layer.positions()
    assert layer.weight_values is parameter
    assert sorted(new.tolist()) == sorted({*old.tolist()} - {*old[drop].tolist()} | {*grow.tolist()})
    assert torch.equal(torch.where(source >= 0, old[source], new), new)
    for now, before in ((layer.weight_values, values), (layer.weight_values.grad, gradient)):
        for position, number in keyed(layer, now).items():
            assert number == (0 if position in grow.tolist() else before[position])


def test_a_gradient_is_moved_in_place_and_a_rotten_one_spreads_nothing() -> None:
    layer = SparseLinear(30, 20, sparsity=0.9)
    gradient = layer.weight_values.grad = torch.full((60, 1, 1), torch.nan)
    source = layer.rewrite(torch.arange(20), free_positions(layer, 20))
    assert layer.weight_values.grad is gradient
    assert torch.equal(gradient.isnan().flatten(), source >= 0)
    assert not gradient[source < 0].any()


def test_a_regrown_connection_keeps_its_weight() -> None:
    layer = SparseLinear(30, 20, sparsity=0.9)
    before = layer.weight_values.clone()
    source = layer.rewrite(torch.tensor([5]), layer.positions()[5:6])
    assert torch.equal(layer.weight_values, before)
    assert torch.equal(source, torch.arange(layer.nnz))


def test_the_next_forward_uses_the_new_topology() -> None:
    layer = SparseLinear(30, 20, sparsity=0.9)
    x = torch.randn(4, 30, requires_grad=True)
    layer(x).sum().backward()
    x.grad = None
    layer.rewrite(torch.arange(20), free_positions(layer, 20))
    with torch.no_grad():
        layer.weight_values.normal_()
    layer(x).sum().backward()
    dense, y = layer.to_dense(), x.detach().requires_grad_()
    dense(y).sum().backward()
    torch.testing.assert_close(layer(x), dense(y))
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize(
    ("drop", "grow", "message"),
    [
        ([60], [], "drop must hold live slots, got 60"),
        ([-1], [], "drop must hold live slots, got -1"),
        ([1, 1], [], "drop must name each slot once"),
        ([], [600], r"grow must hold positions of 0\.\.599, got 600"),
        ([], "live", "grow must hold distinct positions that are free or dropped"),
        ([], "twice", "grow must hold distinct positions that are free or dropped"),
    ],
)
def test_a_wrong_request_is_refused_and_changes_nothing(drop: list[int], grow: object, message: str) -> None:
    layer = SparseLinear(30, 20, sparsity=0.9)
    if grow == "live":
        grow = layer.positions()[:1].tolist()
    if grow == "twice":
        grow = free_positions(layer, 1).tolist() * 2
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        layer.rewrite(torch.tensor(drop, dtype=torch.int64), torch.tensor(grow, dtype=torch.int64))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


class Seen:
    """A gradient hook that keeps copies of what it is shown."""

    def __init__(self) -> None:
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __call__(self, operands: GradientOperands) -> None:
        assert isinstance(operands, LinearOperands)
        self.operands.append((operands.x.clone(), operands.dy.clone()))


def test_a_hook_sees_both_operands_of_the_gradient() -> None:
    layer, seen = SparseLinear(6, 4), Seen()
    layer.gradient_hook = seen
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        layer(x)
    loss = (layer(x) * 2).sum()
    assert not seen.operands
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(seen.operands) == 2
    for seen_x, seen_dy in seen.operands:
        assert torch.equal(seen_x, x.reshape(6, 6))
        assert torch.equal(seen_dy, torch.full((6, 4), 2.0))
    layer.weight_values.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert len(seen.operands) == 2


def test_a_hook_follows_a_rewrite() -> None:
    layer, seen = SparseLinear(6, 4, sparsity=0.5), Seen()
    layer.gradient_hook = seen
    layer(torch.randn(3, 6)).sum().backward()
    layer.rewrite(torch.arange(2), free_positions(layer, 3))
    layer(torch.randn(3, 6)).sum().backward()
    assert len(seen.operands) == 2


def test_an_input_is_let_go_with_the_graph() -> None:
    import weakref

    layer = SparseLinear(6, 4)
    layer.gradient_hook = Seen()
    hidden = torch.randn(3, 6, requires_grad=True).sin()
    reference = weakref.ref(hidden)
    loss = layer(hidden).sum()
    del hidden
    loss.backward()
    assert reference() is None
    assert loss.item() == loss.item()
