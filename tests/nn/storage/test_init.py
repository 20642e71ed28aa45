"""Initial weights: the distribution of torch.nn.Linear at each row's own fan-in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparselab import MaskedLinear, SparseLinear
from sparselab.nn import constant_fan_in_, fan_in_uniform_

#: Rows of 0, 1, 4, 100 and 3000 connections.
INDPTR = torch.tensor([0, 0, 1, 5, 105, 3105])


def test_every_row_has_its_own_bound() -> None:
    values = fan_in_uniform_(torch.empty(3105), INDPTR)
    for begin, end in zip(INDPTR[:-1].tolist(), INDPTR[1:].tolist(), strict=True):
        assert (values[begin:end].abs() <= max(end - begin, 1) ** -0.5).all()
    longest = values[105:].double() * 3000**0.5
    assert longest.abs().max() > 0.99


def test_weights_are_uniform_between_the_bounds() -> None:
    n = 200_000
    values = fan_in_uniform_(torch.empty(n), torch.tensor([0, n])).double() * n**0.5
    counts = torch.histc(values, 20, -1, 1)
    assert counts.sum() == n
    # A bin holds n / 20 draws with standard deviation below (n / 20) ** 0.5; five of them bound every bin.
    assert (counts - n / 20).abs().max() < 5 * (n / 20) ** 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_the_variance_of_an_output_does_not_depend_on_sparsity(sparsity: float) -> None:
    """Unit inputs give outputs of variance 1/3 from the weights and at most 1/3 / fan_in from the bias."""
    layer = SparseLinear(2000, 500, sparsity=sparsity, bias=False)
    y = layer(torch.randn(500, 2000)).double()
    # 500 rows x 500 tokens; rows with few connections vary most: 20 x 500 draws of weights at 99%.
    assert y.var().item() == pytest.approx(1 / 3, rel=0.04)


def test_the_dense_layer_draws_from_the_same_range() -> None:
    """At sparsity 0 both bounds are 1 / sqrt(in_features); the largest of 40,000 draws is within 0.1%."""
    dense, sparse = torch.nn.Linear(200, 200), SparseLinear(200, 200, sparsity=0.0)
    bound = 200**-0.5
    for weights in (dense.weight, sparse.weight_values):
        assert 0.999 * bound < weights.abs().max() <= bound * (1 + 1e-6)


def test_the_variance_check_would_see_the_dense_bound() -> None:
    layer = SparseLinear(2000, 500, sparsity=0.9, bias=False)
    with torch.no_grad():
        layer.weight_values.uniform_(-(2000**-0.5), 2000**-0.5)
    assert layer(torch.randn(500, 2000)).var().item() != pytest.approx(1 / 3, rel=0.04)


def test_rows_without_connections_give_their_bias() -> None:
    layer = SparseLinear(40, 300, sparsity=0.99)
    empty = torch.diff(layer.indptr) == 0
    assert empty.any()
    assert not empty.all()
    assert layer.bias.isfinite().all()
    assert layer.bias[empty].abs().max() <= 1
    assert layer.bias[empty].abs().max() > 0.9
    assert torch.equal(layer(torch.randn(3, 40))[:, empty], layer.bias[empty].expand(3, -1))


def test_an_empty_layer_and_an_empty_row_list() -> None:
    layer = SparseLinear(40, 30, sparsity=1.0)
    assert layer.nnz == 0
    assert torch.equal(layer(torch.randn(3, 40)), layer.bias.expand(3, 30))
    assert fan_in_uniform_(torch.empty(0), torch.zeros(1, dtype=torch.int64)).shape == (0,)


def test_filled_in_place_also_where_gradients_are_recorded() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3105, dtype=torch.float64))
    assert fan_in_uniform_(parameter, INDPTR) is parameter
    assert parameter.grad_fn is None
    assert (parameter != 0).all()


def test_torch_s_seed_decides_everything_and_numpy_s_nothing() -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return SparseLinear(300, 200).state_dict()

    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = draw(1), draw(1), draw(2)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_drawing_anew_keeps_the_count_and_changes_the_rest() -> None:
    layer = SparseLinear(300, 200)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parameter, nnz = layer.weight_values, layer.nnz
    layer.reset_parameters()
    assert layer.weight_values is parameter
    assert layer.nnz == nnz
    for name, tensor in layer.state_dict().items():
        assert not torch.equal(tensor, before[name])


def test_a_layer_may_get_its_memory_later() -> None:
    torch.manual_seed(1)
    at_once = SparseLinear(300, 200)
    later = SparseLinear(300, 200, device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    later.reset_parameters()
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name])


def test_a_default_device_without_memory_does_not_reach_a_layer_placed_elsewhere() -> None:
    with torch.device("meta"):
        assert SparseLinear(30, 20).weight_values.is_meta
        layer = SparseLinear(30, 20, device="cpu")
    assert layer(torch.randn(2, 30)).isfinite().all()


def test_every_connection_is_equally_likely() -> None:
    """2000 draws of 6 of 24 positions: each position is drawn 500 times, give or take five deviations."""
    counts = torch.zeros(24)
    layer = SparseLinear(6, 4, sparsity=0.75)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such small work two cost a thousand times more where cores are busy
    for _ in range(2000):
        layer.reset_parameters()
        counts[layer.positions()] += 1
    torch.set_num_threads(threads)
    deviation = (2000 * 0.25 * 0.75) ** 0.5
    assert counts.sum() == 2000 * 6
    assert (counts - 500).abs().max() < 5 * deviation


@pytest.mark.parametrize("make", [SparseLinear, MaskedLinear])
@pytest.mark.parametrize(("sparsity", "fan_in"), [(0.9, 2), (0.5, 10), (0.0, 20)])
def test_a_constant_fan_in(
    make: type[SparseLinear] | type[MaskedLinear], sparsity: float, fan_in: int
) -> None:
    torch.manual_seed(0)
    layer = make(20, 31, sparsity=sparsity)
    parameter = layer.stored
    assert constant_fan_in_(layer) is layer
    assert layer.stored is parameter
    rows = torch.bincount(layer.positions() // 20, minlength=31)
    assert rows.tolist() == [fan_in] * 31
    weights = layer.per_connection(layer.stored.detach())
    assert (weights != 0).all()
    assert 0.9 * fan_in**-0.5 < weights.abs().max() <= fan_in**-0.5
    again = make(20, 31, sparsity=sparsity)
    torch.manual_seed(1)
    drawn = [constant_fan_in_(again).positions().tolist() for _ in range(2)]
    assert (drawn[0] == drawn[1]) == (sparsity == 0)


def test_all_sparse_layers_of_a_model_get_a_constant_fan_in() -> None:
    model = torch.nn.Sequential(SparseLinear(20, 31), torch.nn.ReLU(), SparseLinear(31, 10))
    fan_ins = [torch.diff(layer.indptr).unique().tolist() for layer in constant_fan_in_(model)[::2]]
    assert fan_ins == [[2], [3]]


def test_a_constant_fan_in_needs_connections_and_layers() -> None:
    with pytest.raises(ValueError, match=r"at least one connection for each output, got 6 for 10 in 1"):
        constant_fan_in_(torch.nn.Sequential(SparseLinear(9, 4), SparseLinear(6, 10)))
    with pytest.raises(ValueError, match="model must have sparse layers, got a Linear"):
        constant_fan_in_(torch.nn.Linear(2, 2))
