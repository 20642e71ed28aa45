"""Sparse recurrent networks against torch's: outputs, states, gradients, conversions, algorithms."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from sparselab import (
    RigL,
    SparseGRU,
    SparseLinear,
    SparseLSTM,
    SparseRNN,
    densify,
    materialize,
    measure_sparsity,
    plan_sparsify,
    sparsify,
)
from sparselab.nn import find_sparse
from sparselab.nn.models.rules import layers_of_saved

F64 = torch.float64
KINDS: dict[str, Any] = {
    "gru": SparseGRU,
    "lstm": SparseLSTM,
    "rnn": SparseRNN,
    "relu": lambda *sizes, **settings: SparseRNN(*sizes, nonlinearity="relu", **settings),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.5},
]
of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_all_settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)
N_IN, N_HIDDEN = 5, 4


def make(kind: str, **settings: Any) -> Any:
    return KINDS[kind](N_IN, N_HIDDEN, **{"sparsity": 0.4, "dtype": F64, **settings}).eval()


def tensors(found: Any) -> list[Tensor]:
    """All tensors of what a network returned, or was given."""
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, Tensor) else [each for part in found for each in tensors(part)]


def first_states(network: Any, *batch: int) -> Any:
    shape = network.num_layers * (1 + network.bidirectional), *batch, N_HIDDEN
    states = tuple(torch.randn(shape, dtype=F64, requires_grad=True) for _ in range(network.n_states))
    return states if network.n_states > 1 else states[0]


def assert_as_dense(network: Any, x: Any, hx: Any) -> None:
    """Outputs, states and every gradient, those of weights at the connections."""
    dense = network.to_dense()
    network.zero_grad()
    leaves = [each for each in tensors([x, *([] if hx is None else [hx])]) if each.is_leaf]
    found, expected = network(x, hx), dense(x, hx)
    torch.testing.assert_close(found, expected)
    upstream = [torch.randn_like(each) for each in tensors(found)]
    gradients = []
    for result in (found, expected):
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(tensors(result), upstream)
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
    for name, parameter in dense.named_parameters():
        if name.startswith("weight"):
            layer = getattr(network, name)
            grad = parameter.grad.reshape(-1)[layer.positions()]
            torch.testing.assert_close(layer.weight_values.grad.flatten(), grad, msg=name)
        else:
            torch.testing.assert_close(
                getattr(network, name.replace("bias", "weight")).bias.grad, parameter.grad
            )


@of_every_kind
@of_all_settings
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch", [(3,), ()])
def test_outputs_states_and_gradients_are_those_of_torch(
    kind: str, settings: Any, given: bool, batch: Any
) -> None:
    network = make(kind, **settings)
    shape = (7, *batch, N_IN) if not (network.batch_first and batch) else (*batch, 7, N_IN)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    assert_as_dense(network, x, first_states(network, *batch) if given else None)


@of_every_kind
@of_all_settings
@pytest.mark.parametrize("lengths", [(4, 4, 2, 1), (2, 5, 1, 5), (3,)])
def test_packed_sequences(kind: str, settings: Any, lengths: Any) -> None:
    network = make(kind, **settings)
    sequences = [torch.randn(n, N_IN, dtype=F64) for n in lengths]
    packed = pack_sequence(sequences, enforce_sorted=False)
    x = PackedSequence(
        packed.data.requires_grad_(), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
    )
    for hx in (None, first_states(network, len(lengths))):
        assert_as_dense(network, x, hx)


@of_every_kind
def test_dropout_lies_between_layers_in_training(kind: str) -> None:
    network = make(kind, num_layers=2, dropout=0.5)
    x = torch.randn(3, 2, N_IN, dtype=F64)
    assert torch.equal(network(x)[0], network(x)[0])
    network.train()
    assert not torch.equal(network(x)[0], network(x)[0])
    alone = make(kind).train()
    assert torch.equal(alone(x)[0], alone(x)[0])


@of_every_kind
@of_all_settings
def test_from_dense_without_zeros_and_back(kind: str, settings: Any) -> None:
    network = make(kind, **settings)
    dense = network.to_dense()
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_("ih" in name)
    again = type(network).from_dense(dense, 0.4)
    back = again.to_dense()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    for (name, a), (_, b) in zip(dense.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad
    assert not back.training


class Tagger(nn.Module):
    def __init__(self, kind: str = "gru") -> None:
        super().__init__()
        cls = {"gru": nn.GRU, "lstm": nn.LSTM}.get(kind, nn.RNN)
        extra = {"nonlinearity": "relu"} if kind == "relu" else {}
        self.rnn: Any = cls(N_IN, N_HIDDEN, 2, batch_first=True, bidirectional=True, **extra)
        self.out = nn.Linear(2 * N_HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        y: Tensor = self.out(self.rnn(x)[0])
        return y


X = torch.randn(6, 8, N_IN, generator=torch.Generator().manual_seed(3))


@of_every_kind
def test_sparsify_by_part_name_and_class_and_densify(kind: str) -> None:
    model = Tagger(kind)
    rules = {"rnn.weight_hh*": 0.5, "*.weight_ih_l0": 0.75}
    plan = plan_sparsify(model, rules)
    assert len(plan.layers) == 5
    assert plan.left == ()
    sparsify(model, rules)
    sparse = {name for name, _ in find_sparse(model)}
    assert sparse == {each.name for each in plan.layers}
    assert sum(each.connections for each in plan.layers) == sum(each.nnz for _, each in find_sparse(model))
    assert type(model.rnn.weight_ih_l1) is nn.Linear
    y, saved = model(X), model.state_dict()
    fresh = sparsify(Tagger(kind), layers_of_saved(saved))
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(X), y)
    densify(model)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in Tagger(kind).named_parameters()
    ]
    torch.testing.assert_close(model(X), y)
    sparsify(model, {type(model.rnn): 0.0}, init="magnitude")
    torch.testing.assert_close(model(X), y)
    assert measure_sparsity(sparsify(Tagger(kind), 0.5)) == pytest.approx(0.5, abs=0.01)


def test_projections_are_not_made_sparse() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 5, proj_size=3), "out": nn.Linear(3, 3)})
    with pytest.warns(UserWarning, match=r"'rnn' has projections \(proj_size\)"):
        sparsify(model, 0.5)
    assert type(model["rnn"]) is nn.LSTM
    with pytest.raises(ValueError, match="proj_size must be 0, which is what sparse networks have, got 3"):
        SparseLSTM(4, 5, proj_size=3)
    with pytest.raises(ValueError, match="network must have a proj_size of 0"):
        SparseLSTM.from_dense(model["rnn"])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "meta"])
def test_copies_and_the_meta_device(way: str) -> None:
    model = sparsify(Tagger(), 0.5)
    if way == "meta":
        with torch.device("meta"):
            model = Tagger()
        assert torch.isfinite(materialize(sparsify(model, 0.5))(X)).all()
        return
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(X), model(X))


def test_growth_by_gradient_sees_all_steps() -> None:
    model = sparsify(Tagger(), {"rnn.*": 0.5}).double()
    dense = model.rnn.to_dense()
    x = X.double()
    dense(x)[0].square().sum().backward()
    seen: dict[str, list[Any]] = {}
    for name, layer in find_sparse(model.rnn):
        layer.gradient_hook = seen.setdefault(name, []).append
    model.rnn(x)[0].square().sum().backward()
    for name, layer in find_sparse(model.rnn):
        assert len(seen[name]) == (8 if "hh" in name else 1)
        total = torch.zeros(layer.shape, dtype=F64)
        for operands in seen[name]:
            operands.add_rows(0, total)
        torch.testing.assert_close(total, getattr(dense, name).grad)


def test_rigl_trains_it() -> None:
    model = sparsify(Tagger("lstm"), 0.5)
    algorithm, optimizer = (
        RigL(drop_fraction=0.3, update_freq=2),
        torch.optim.Adam(model.parameters(), lr=0.02),
    )
    algorithm.attach(model, optimizer)
    before = {name: (layer.nnz, layer.positions()) for name, layer in find_sparse(model)}
    target, losses = X.cumsum(1)[..., :3].sign(), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, layer in find_sparse(model):
        assert layer.nnz == before[name][0]
    assert any(not torch.equal(layer.positions(), before[name][1]) for name, layer in find_sparse(model))


def test_wrong_input_is_refused() -> None:
    network = make("lstm")
    x = torch.randn(3, 2, N_IN, dtype=F64)
    for wrong, words in (
        (x[None], "input must have 2 or 3 dimensions, got 4"),
        (x[:0], "input must have at least one step, got none"),
        (x[..., :3], r"in_features=5"),
        (x.float(), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=words):
            network(wrong)
    state = torch.zeros(1, 3, N_HIDDEN, dtype=F64)
    with pytest.raises(
        RuntimeError, match=r"hx must be 2 of shape \(1, 2, 4\), got \(1, 3, 4\), \(1, 3, 4\)"
    ):
        network(x, (state, state))
    with pytest.raises(
        ValueError, match="layers must be named weight_ih_l0, weight_hh_l0, got 'weight_ih_l1'"
    ):
        SparseLSTM.of_layers(nn.LSTM(3, 3), {"weight_ih_l1": SparseLinear(3, 12)})
    with pytest.raises(TypeError, match=r"network must be a torch.nn.GRU, got LSTM"):
        SparseGRU.from_dense(nn.LSTM(3, 3))


def test_states_of_the_wrong_kind_are_refused() -> None:
    x, state = torch.randn(3, 2, 4), torch.zeros(1, 2, 5)
    with pytest.raises(RuntimeError, match="hx must be a tuple of two tensors, got a Tensor"):
        SparseLSTM(4, 5)(x, torch.stack([state, state]))
    with pytest.raises(RuntimeError, match="hx must be one tensor, got a tuple"):
        SparseGRU(4, 5)(x, (state, state))
