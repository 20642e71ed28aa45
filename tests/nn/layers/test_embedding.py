"""SparseEmbedding against torch's embedding: rows, gradients, what is saved, how it is made."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from sparselab import (
    GSE,
    MEST,
    SET,
    SNFS,
    CHTs,
    DeepR,
    RigL,
    SparseEmbedding,
    SRigL,
    TiedLinear,
    TopKAST,
    condense,
    load_model,
    materialize,
    measure_sparsity,
    memory_report,
    save_model,
)
from sparselab.nn import constant_fan_in_, find_sparse
from sparselab.nn.ops.lookup.operands import LookupOperands

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

F64 = torch.float64
N, DIM = 13, 9
SETTINGS: list[dict[str, Any]] = [
    {},
    {"padding_idx": 3},
    {"padding_idx": -2},
    {"scale_grad_by_freq": True},
    {"padding_idx": 0, "scale_grad_by_freq": True},
    {"max_norm": 1.5},
    {"max_norm": 2.0, "norm_type": 1.0, "padding_idx": 1},
]
of_all_settings = pytest.mark.parametrize("given_settings", SETTINGS, ids=str)


def make(**changes: Any) -> SparseEmbedding:
    return SparseEmbedding(N, DIM, **{"sparsity": 0.6, "dtype": F64, **changes})


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, N, shape, generator=torch.Generator().manual_seed(1))


def live(layer: SparseEmbedding, dense: Tensor) -> Tensor:
    """Entries of a dense tensor at the connections, laid out as the Parameter."""
    return dense.reshape(-1)[layer.positions()].view(-1, 1, 1)


@of_all_settings
@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (2, 3, 5), (0,), (0, 4)])
def test_rows_and_gradients_are_those_of_torch(given_settings: Any, shape: Any) -> None:
    layer = make(**given_settings)
    dense = layer.to_dense()
    numbers = tokens(*shape)
    upstream = torch.randn(*shape, DIM, dtype=F64)
    y, expected = layer(numbers), dense(numbers)
    torch.testing.assert_close(y, expected)
    for each in (y, expected):
        each.backward(upstream)
    torch.testing.assert_close(layer.weight_values.grad, live(layer, dense.weight.grad))
    torch.testing.assert_close(layer.to_dense().weight, dense.weight)  # what max_norm wrote


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_every_dtype(dtype: Any, index: Any) -> None:
    layer = make(dtype=dtype)
    dense = layer.to_dense()
    numbers = tokens(40).to(index)
    y, expected = layer(numbers), dense(numbers)
    assert torch.equal(y, expected)
    upstream = torch.randn(40, DIM).to(dtype)
    y.backward(upstream)
    exact = torch.zeros(N, DIM, dtype=F64).index_add_(0, numbers.long(), upstream.double())
    torch.testing.assert_close(layer.weight_values.grad, live(layer, exact).to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(0, 20), density=st.sampled_from([0.0, 0.2, 1.0]),
    n=st.integers(0, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_pattern(rows: int, columns: int, density: float, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = SparseEmbedding.from_pattern(rng.random((rows, columns)) < density, dtype=F64)
    dense, numbers = layer.to_dense(), torch.from_numpy(rng.integers(0, rows, n))
    y, expected = layer(numbers), dense(numbers)
    assert torch.equal(y, expected)
    upstream = torch.from_numpy(rng.standard_normal((n, columns)))
    for each in (y, expected):
        each.backward(upstream)
    torch.testing.assert_close(layer.weight_values.grad, live(layer, dense.weight.grad))


@of_all_settings
@pytest.mark.parametrize("number", [-1, N, 1 << 40, -(1 << 40)])
def test_a_number_of_no_row_is_told(given_settings: Any, number: int) -> None:
    with pytest.raises(IndexError, match=rf"input must hold numbers of 0\.\.{N - 1}, got"):
        make(**given_settings)(torch.tensor([1, number, 1]))


def test_an_input_elsewhere_is_refused_by_its_name() -> None:
    with pytest.raises(RuntimeError, match="input must be on cpu, as the layer, got meta"):
        make()(tokens(3).to("meta"))


def test_the_number_of_threads_changes_no_bit() -> None:
    layer, numbers = SparseEmbedding(300, 4096, sparsity=0.9), torch.randint(0, 300, (700,))
    upstream, found = torch.randn(700, 4096), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            layer.zero_grad()
            y = layer(numbers)
            y.backward(upstream)
            found.append((y.detach(), layer.weight_values.grad.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_derivatives_of_higher_order() -> None:
    layer, numbers = make(), tokens(3, 4)

    def rows(values: Tensor) -> Tensor:
        return functional_call(layer, {"weight_values": values}, numbers).sin()

    values = layer.weight_values.detach().clone().requires_grad_()
    torch.autograd.gradcheck(rows, values, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(rows, values)


def test_transforms_of_torch_func() -> None:
    layer, numbers = make(), tokens(2, 5)
    positions, values = layer.positions(), layer.weight_values.detach()

    def rows(values: Tensor, numbers: Tensor) -> Tensor:
        return functional_call(layer, {"weight_values": values}, numbers)

    def dense(values: Tensor, numbers: Tensor) -> Tensor:
        table = values.new_zeros(N * DIM).index_copy(0, positions, values.reshape(-1)).view(N, DIM)
        return nn.functional.embedding(numbers, table)

    torch.testing.assert_close(vmap(rows, (None, 0))(values, numbers), dense(values, numbers))
    assert vmap(rows, (None, 0))(values, numbers[:0]).shape == (0, *numbers.shape[1:], DIM)
    several = torch.stack([values, 2 * values])
    torch.testing.assert_close(
        vmap(rows)(several, numbers),
        torch.stack([dense(v, n) for v, n in zip(several, numbers, strict=True)]),
    )
    tangent = torch.randn_like(values)
    found = jvp(lambda v: rows(v, numbers), (values,), (tangent,))
    torch.testing.assert_close(found, (dense(values, numbers), dense(tangent, numbers)))


def test_torch_compiles_it() -> None:
    layer = make(dtype=torch.float32, padding_idx=2, scale_grad_by_freq=True)
    dense, numbers = layer.to_dense(), tokens(4, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for each in (compiled, dense):
        each(numbers).square().sum().backward()
    torch.testing.assert_close(layer.weight_values.grad, live(layer, dense.weight.grad))


@of_all_settings
def test_an_algorithm_sees_the_dense_gradient(given_settings: Any) -> None:
    layer = make(**given_settings)
    dense, seen = layer.to_dense(), []
    layer.gradient_hook = seen.append
    numbers, upstream = tokens(5, 4), torch.randn(5, 4, DIM, dtype=F64)
    for each in (layer, dense):
        each(numbers).backward(upstream)
    (operands,) = seen
    G = dense.weight.grad
    found = torch.full((5, DIM), torch.nan, dtype=F64)
    operands.add_rows(4, found, beta=0)
    torch.testing.assert_close(found, G[4:9])
    operands.add_rows(0, found, beta=2)
    torch.testing.assert_close(found, 2 * G[4:9] + G[:5])
    positions = np.array([0, 5, DIM * 3 + 1, DIM * 7, N * DIM - 1])
    np.testing.assert_allclose(operands.to(F64).sampled(positions), G.reshape(-1)[positions], atol=1e-14)
    assert operands.n_tokens == 20
    assert operands.to(torch.float32).dy.dtype == torch.float32
    assert operands.is_finite()


@pytest.mark.parametrize("transformed", [False, True])
def test_a_table_in_the_place_of_its_own_is_not_shown(transformed: bool) -> None:
    layer, tokens = SparseEmbedding(9, 6, sparsity=0.5), torch.tensor([1, 4, 1])
    other = layer.weight_values.detach().clone().requires_grad_()
    seen: list[Any] = []
    layer.gradient_hook = seen.append

    def loss(values: Tensor) -> Tensor:
        call = lambda values: functional_call(layer, {"weight_values": values}, (tokens,)).square().sum()  # noqa: E731
        return jvp(call, (values,), (torch.ones_like(values),))[1] if transformed else call(values)

    (loss(other) + loss(2 * other)).backward()
    assert not seen
    assert other.grad is not None
    (loss(other) + loss(layer.weight_values)).backward()
    assert len(seen) == 1


def test_totals_are_those_of_the_one_hot_product() -> None:
    x, dy = tokens(30), torch.randn(30, DIM, dtype=F64)
    one_hot = nn.functional.one_hot(x, N).double()
    operands, signs = LookupOperands(x, dy, N), np.where(np.arange(30) % 3, 1.0, -1.0)
    for given_signs, of_rows, of_columns in (
        (None, one_hot.sum(0), dy.abs().sum(0)),
        (signs, torch.from_numpy(signs) @ one_hot, torch.from_numpy(signs) @ dy),
    ):
        rows, columns = operands.totals(given_signs)
        np.testing.assert_allclose(rows, of_rows)
        np.testing.assert_allclose(columns, of_columns, atol=1e-13)


ALGORITHMS = {
    "set": lambda: SET(drop_fraction=0.3, update_freq=1),
    "rigl": lambda: RigL(drop_fraction=0.3, update_freq=1),
    "rigl by row": lambda: RigL(drop_fraction=0.3, update_freq=1, scope="row"),
    "gse": lambda: GSE(drop_fraction=0.3, update_freq=1, sampler="graest"),
    "snfs": lambda: SNFS(drop_fraction=0.3, update_freq=1),
    "mest": lambda: MEST(delta=0.05, soft_bound=False, update_freq=1),
    "deepr": lambda: DeepR(temperature=0.01),
    "chts": lambda: CHTs(drop_fraction=0.3, update_freq=1),
    "srigl": lambda: SRigL(drop_fraction=0.3, update_freq=1, gamma_sal=0),
    "topkast": lambda: TopKAST(0.6, forward_sparsity=0.7, update_freq=1),
}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = SparseEmbedding(N, DIM, padding_idx=0, sparsity=0.6)
        self.head = TiedLinear(self.embed)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.embed(numbers).tanh())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_rewire_it_with_its_head(name: str) -> None:
    model = Tiny()
    if name == "srigl":
        constant_fan_in_(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    algorithm = ALGORITHMS[name]()
    algorithm.attach(model, optimizer)
    assert [name for name, _ in find_sparse(model)] == ["embed"]
    nnz, before = model.embed.nnz, model.embed.positions()
    for step in range(4):
        optimizer.zero_grad()
        numbers = torch.randint(0, N, (24,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(numbers), numbers).backward()
        optimizer.step()
    assert model.embed.nnz == nnz
    assert not torch.equal(model.embed.positions(), before)
    dense = model.embed.to_dense()
    numbers = torch.arange(N)
    torch.testing.assert_close(model.embed(numbers), dense(numbers))
    expected = nn.functional.linear(dense(numbers).tanh(), dense.weight, model.head.bias)
    torch.testing.assert_close(model(numbers), expected)


def test_growth_sees_the_lookup_and_the_head() -> None:
    model = Tiny().double()
    dense = model.embed.to_dense()
    seen: list[Any] = []
    model.embed.gradient_hook = seen.append
    numbers = tokens(20)
    model(numbers).square().sum().backward()
    nn.functional.linear(dense(numbers).tanh(), dense.weight, model.head.bias).square().sum().backward()
    G = torch.zeros(N, DIM, dtype=F64)
    for operands in seen:
        operands.add_rows(0, G)
    assert len(seen) == 2
    torch.testing.assert_close(G, dense.weight.grad)
    torch.testing.assert_close(model.embed.weight_values.grad, live(model.embed, dense.weight.grad))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict", "file"])
def test_saved_and_copied(way: str, tmp_path: Any) -> None:
    model = Tiny()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif way == "state_dict":
        other = Tiny()
        other.load_state_dict(model.state_dict())
    else:
        save_model(model, tmp_path / "model.safetensors")
        load_model(other := Tiny(), tmp_path / "model.safetensors")
    assert torch.equal(other(torch.arange(N)), model(torch.arange(N)))
    assert other.head.layer is other.embed


def test_counted_by_what_exists() -> None:
    layer = make(sparsity=0.5)
    assert layer.nnz == round(0.5 * N * DIM)
    assert measure_sparsity(layer) == layer.sparsity
    report = memory_report(Tiny())
    assert (report.parameters_live, report.parameters_dense) == (round(0.4 * N * DIM) + N, N * DIM + N)


def test_from_dense_keeps_the_largest_and_the_settings() -> None:
    dense = nn.Embedding(N, DIM, padding_idx=2, max_norm=3.0, norm_type=1.0, scale_grad_by_freq=True).eval()
    dense.weight.requires_grad_(False)
    layer = SparseEmbedding.from_dense(dense, 0.7)
    threshold = dense.weight.abs().flatten().topk(layer.nnz).values[-1]
    kept = torch.where(dense.weight.abs() >= threshold, dense.weight, 0)
    back = layer.to_dense()
    assert torch.equal(back.weight, kept)
    for name in (*SparseEmbedding.settings, "training"):
        assert getattr(back, name) == getattr(dense, name) == getattr(layer, name), name
    assert not back.weight.requires_grad


def test_rows_have_the_norm_of_dense_ones() -> None:
    layer = SparseEmbedding(2000, 32, padding_idx=5, sparsity=0.9)
    norm = layer.weight.detach().to_dense().square().sum(1)
    assert norm.mean() == pytest.approx(32, rel=0.05)
    assert norm[5] == 0
    small = nn.Embedding(2000, 32)
    with torch.no_grad():
        small.weight.mul_(0.02)
    layer = SparseEmbedding.like(small, 0.9)
    assert layer.weight.detach().to_dense().square().sum(1).mean() == pytest.approx(32 * 4e-4, rel=0.05)
    with torch.device("meta"):
        later = SparseEmbedding(50, 8, 1)
    assert materialize(nn.Sequential(later))[0](torch.tensor([1])).eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sparse": True}, ValueError, "sparse must be False, for the gradient has one entry"),
        ({"padding_idx": N}, ValueError, rf"padding_idx must be one of -{N}\.\.{N - 1}, got {N}"),
        ({"sparsity": 1.5}, ValueError, "sparsity must be"),
        ({"dtype": torch.complex64}, TypeError, "dtype must be torch.float32"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make(**arguments)


def test_wrong_input_is_refused() -> None:
    layer = make()
    for numbers in (torch.ones(3), [1, 2], torch.ones(2, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="input must be a tensor of int32 or int64"):
            layer(numbers)
    for at in (-1, N):
        with pytest.raises(IndexError, match=rf"numbers of 0\.\.{N - 1}, got {at}\.\.{at}"):
            layer(torch.tensor([at]))


def test_condense_takes_rows_without_connections_for_no_outputs() -> None:
    pattern = torch.ones(4, 6, dtype=torch.bool)
    pattern[1] = False
    assert condense(nn.Sequential(SparseEmbedding.from_pattern(pattern), nn.Linear(6, 2))) == ()


def test_factors_that_a_hook_shortens_are_refused() -> None:
    layer = SparseEmbedding(8, 6, sparsity=0.5, padding_idx=0)
    tokens = torch.tensor([1, 2, 3])

    def unpack(tensor: Tensor) -> Tensor:
        return tensor[:1].clone() if tensor.shape == (3,) and tensor.is_floating_point() else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        y = layer(tokens)
    with pytest.raises(RuntimeError, match=r"factors must be of shape \(3,\), got \(1,\)"):
        y.sum().backward()
