"""What users of sparse layers elsewhere reported, each as a test: here it works, or says at once why not.

Each test names the report in a few words; most are of other packages for sparse training, of torch's sparse
tensors, and of kernels that Numba compiles.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

import sparselab
from sparselab import SET, BlockSparseLinear, FanInLinear, MaskedLinear, SparseConv2d, SparseLinear

F64 = torch.float64
KINDS: dict[str, Callable[..., Any]] = {
    "single": lambda **kw: SparseLinear(24, 16, sparsity=0.75, **kw),
    "fan-in": lambda **kw: FanInLinear(24, 16, sparsity=0.75, **kw),
    "blocks": lambda **kw: BlockSparseLinear(24, 16, sparsity=0.75, block_shape=(4, 2), **kw),
    "conv": lambda **kw: SparseConv2d(6, 16, 2, sparsity=0.75, **kw),
    "masked": lambda **kw: MaskedLinear(24, 16, sparsity=0.75, **kw),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return KINDS[kind](**settings)


def batch(layer: Any, n: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    shape = (n, 6, 3, 3) if isinstance(layer, SparseConv2d) else (n, 24)
    return torch.randn(shape, dtype=layer.stored.dtype if dtype is None else dtype)


@every_kind
def test_a_saved_layer_loads_into_one_of_another_seed(kind: str) -> None:
    """Elsewhere the topology was in no state: the same seed or silently other numbers."""
    layer, other = made(kind, 0), made(kind, 1)
    layer.apply(algorithm := SET(update_freq=1, **({"scope": "row"} if kind == "fan-in" else {})))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x := batch(layer)).sum().backward()
    optimizer.step()
    algorithm.step()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))


@every_kind
def test_copies_pickles_and_whole_modules_in_files(kind: str) -> None:
    """Elsewhere: cannot pickle the object that holds the matrix."""
    layer = made(kind)
    x = batch(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(each(x), layer(x))


@every_kind
def test_kernels_read_the_parameter_after_it_was_moved_or_replaced(kind: str) -> None:
    """Elsewhere a kernel went on reading the memory of the first weights."""
    layer = made(kind, dtype=F64)
    x = batch(layer)
    before = layer(x)
    for change in (lambda: layer.float().double(), layer.share_memory):
        change()
        with torch.no_grad():
            layer.stored.mul_(2)
            layer.bias.zero_()
        dense = layer.to_dense()
        torch.testing.assert_close(layer(x), dense(x))
        assert not torch.allclose(layer(x), before)
    parameters = {name: 0 * each for name, each in layer.named_parameters()}
    assert not torch.func.functional_call(layer, parameters, (x,)).any()


@every_kind
def test_double_input_of_a_float_layer_is_no_silent_float_output(kind: str) -> None:
    """Elsewhere float64 came back as float32."""
    layer = made(kind)
    with pytest.raises((TypeError, RuntimeError), match=r"dtype|float32|Float"):
        layer(batch(layer, dtype=F64))


@every_kind
def test_bfloat16_autocast_computes(kind: str) -> None:
    """Elsewhere: unsupported scalar type, or wrong numbers."""
    layer = made(kind)
    x = batch(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = layer.to_dense()(x)
    assert (y.float() - expected).abs().max() < 0.03 * expected.abs().max()


@every_kind
def test_double_backward(kind: str) -> None:
    """Elsewhere: derivative not implemented."""
    layer = made(kind, dtype=F64)
    dense, x = layer.to_dense(), batch(layer)
    found = []
    for each in (layer, dense):
        y = each(own := x.clone().requires_grad_()).tanh().sum()
        (slope,) = torch.autograd.grad(y, own, create_graph=True)
        slope.square().sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(*found)


def test_deleted_models_leave_nothing() -> None:
    """Elsewhere a cache by `id` kept the transpose of every layer that ever was."""

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(each), (Tensor, np.ndarray)) for each in gc.get_objects())

    def use() -> None:
        layer = made("single")
        layer(batch(layer).requires_grad_()).sum().backward()

    use()
    before = held()
    for _ in range(20):
        use()
    assert held() <= before + 5


def test_a_row_may_take_all_the_growth() -> None:
    """Elsewhere a row never held more than a fifth above what it was born with."""
    layer = made("single")
    dropped = (layer.positions() >= 24).nonzero().flatten()
    row = torch.arange(24)
    grow = row[~torch.isin(row, layer.positions())]
    layer.rewrite(dropped[: len(grow)], grow)
    assert layer.indptr[:2].diff().item() == 24
    x = batch(layer)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_code_that_reads_weight() -> None:
    """Elsewhere: no attribute `weight`, which tied heads and host models read."""
    layer = made("single")
    assert layer.weight.shape == (16, 24)
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(nn.functional.linear(batch(layer), layer.weight).shape, torch.Size([5, 16]))


@pytest.mark.parametrize("kind", ["single", "blocks"])
def test_connections_that_the_user_gives_are_the_ones(kind: str) -> None:
    """Elsewhere: another sparsity than that of the given connectivity; no way to give one."""
    pattern = scipy.sparse.random(16, 24, 0.2, "csr", np.float32, np.random.default_rng(0))
    make: Any = SparseLinear
    if kind == "blocks":
        make, pattern = (
            BlockSparseLinear,
            scipy.sparse.kron(pattern, np.ones((2, 2), np.float32)).tobsr((2, 2)),
        )
    layer = make.from_pattern(pattern)
    dense = torch.from_numpy(pattern.toarray())
    assert torch.equal(layer.to_dense().weight != 0, dense != 0)
    assert layer.n_weights == np.count_nonzero(dense)


@every_kind
def test_a_gradient_of_zeros(kind: str) -> None:
    """Elsewhere an assertion failed in the backward pass."""
    layer = made(kind)
    layer(batch(layer)).mul(0).sum().backward()
    assert not layer.stored.grad.any()


@pytest.mark.parametrize("block", [(32, 32), (5, 7), (1, 16)])
def test_blocks_that_do_not_divide_the_layer(block: tuple[int, int]) -> None:
    """Elsewhere features had to be multiples of the block, and other blocks were emulated densely."""
    layer = BlockSparseLinear(50, 37, sparsity=0.5, block_shape=block, dtype=F64)
    x = torch.randn(4, 50, dtype=F64, requires_grad=True)
    dense = layer.to_dense()
    torch.testing.assert_close(layer(x), dense(x))
    layer(x).sum().backward()
    assert layer.stored.grad.isfinite().all()


@every_kind
def test_no_tokens(kind: str) -> None:
    """Elsewhere: an invalid configuration argument for an empty batch."""
    layer = made(kind)
    x = batch(layer, 0).requires_grad_()
    y = layer(x)
    assert y.shape[0] == 0
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.stored.grad.any()


@every_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_pass_through(kind: str, bad: float) -> None:
    """Elsewhere fast arithmetic hid them."""
    layer = made(kind)
    x = batch(layer)
    x[0] = bad
    y = layer(x)
    assert not y[0].isfinite().all()
    assert y[1:].isfinite().all()


@every_kind
def test_inputs_that_are_not_contiguous(kind: str) -> None:
    """Elsewhere wrong numbers for transposed, sliced or expanded inputs."""
    layer = made(kind, dtype=F64)
    dense, x = layer.to_dense(), batch(layer, 6)
    views = [x[::2], x.flip(0)[1:], x[:1].expand_as(x), x.transpose(0, -1).contiguous().transpose(0, -1)]
    for view in views:
        torch.testing.assert_close(layer(view), dense(view))


def test_training_holds_as_much_after_many_steps_as_after_few() -> None:
    """Of torch's CSR: memory grows with every backward pass on the CPU."""
    layer = made("single")
    optimizer = torch.optim.Adam(layer.parameters())

    def held_after(steps: int) -> int:
        for _ in range(steps):
            optimizer.zero_grad()
            layer(batch(layer)).sum().backward()
            optimizer.step()
        gc.collect()
        return sum(
            each.nbytes for each in gc.get_objects() if type(each) is Tensor and each.layout is torch.strided
        )

    held_after(3)
    assert held_after(30) <= held_after(2)


def test_a_layer_whose_dense_gradient_would_fill_the_machine() -> None:
    """Of torch.sparse: the backward pass asks for the dense matrix. Here that would be 16 GiB."""
    n = 1 << 16
    layer = SparseLinear(n, n, bias=False, density=8e-7)
    layer.apply(algorithm := SET(update_freq=1))
    optimizer = torch.optim.Adam(layer.parameters())
    x = torch.randn(2, n, requires_grad=True)
    layer(x).square().sum().backward()
    optimizer.step()
    algorithm.step()
    assert layer.nnz == round(8e-7 * n * n)
    assert algorithm.last_update[0].grown


@pytest.mark.parametrize("kind", ["single", "blocks", "conv"])
def test_weights_that_are_computed_get_their_gradient(kind: str) -> None:
    """Of torch.sparse: making the matrix from values cuts the graph."""
    layer = made(kind, dtype=F64)
    scale = torch.ones((), dtype=F64, requires_grad=True)
    x = batch(layer)
    values = {"weight_values": layer.weight_values.detach() * scale, "bias": torch.zeros_like(layer.bias)}
    torch.func.functional_call(layer, values, (x,)).sum().backward()
    with torch.no_grad():
        expected = torch.func.functional_call(layer, values, (x,)).sum()
    torch.testing.assert_close(scale.grad, expected)  # the output is linear in the weights


@pytest.mark.parametrize("how", ["beyond", "negative", "twice", "descending"])
def test_a_state_with_impossible_indices_is_refused(how: str) -> None:
    """Of torch.sparse: a segmentation fault after loading."""
    layer = SparseLinear(24, 16, sparsity=0.75)
    state = {name: each.clone() for name, each in layer.state_dict().items()}
    name = next(name for name in state if name.endswith("indices"))
    indices = state[name].long()
    first = int(layer.indptr.diff().gt(1).nonzero()[0])
    at = int(layer.indptr[first])
    indices[at] = {"beyond": 24, "negative": -1, "twice": indices[at + 1], "descending": 23}[how]
    if how == "descending":
        indices[at + 1] = 0
    state[name] = indices.to(torch.int32)
    before = layer(x := batch(layer))
    with pytest.raises(RuntimeError, match=r"indices|column|ascending"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)


@pytest.fixture
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_kind
@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_takes_the_layer(kind: str) -> None:
    """Of torch.sparse: parameters refused, or buffers of a dtype that cannot be sent."""
    layer = made(kind)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
    x = batch(layer)
    for each in (wrapped, layer):
        each(x).square().sum().backward()
    assert torch.equal(wrapped.module.stored.grad, layer.stored.grad)


def test_torch_keeps_its_threads() -> None:
    """Of Numba: its first launch set torch's number of threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        layer = SparseLinear(256, 256)
        layer(torch.randn(300, 256)).sum().backward()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_two_threads_compute_at_once() -> None:
    """Of Numba: concurrent access has been detected, and the process ends."""
    layer = SparseLinear(128, 128, dtype=F64)
    x = torch.randn(70, 128, dtype=F64)
    expected, wrong = layer.to_dense()(x).detach(), []

    def compute() -> None:
        for _ in range(20):
            y = layer(x)
            y.sum().backward()
            if not torch.allclose(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_a_model_of_ones_own_and_a_budget_over_its_layers() -> None:
    """Asked for: to use it on my own model, and by ERK."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    sparselab.sparsify(model, sparselab.allocate(model, 0.9, "erk"))
    layers = [each for each in model if hasattr(each, "nnz")]
    weights = sum(each.shape[0] * each.shape[1] for each in layers)
    assert len(layers) == 3
    assert sum(each.nnz for each in layers) == round(0.1 * weights)
    model(torch.randn(2, 3, 8, 8)).sum().backward()


def test_the_largest_weights_are_kept_and_give_the_numbers_of_the_pruned_model() -> None:
    """Of a converter elsewhere: wrong results after the swap."""
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    pruned = copy.deepcopy(model)
    for layer in (pruned[0], pruned[2]):
        k = round(0.25 * layer.weight.numel())
        least = layer.weight.detach().abs().flatten().topk(k).values[-1]
        layer.weight.data[layer.weight.abs() < least] = 0
    sparselab.sparsify(model, 0.75, init="magnitude")
    x = torch.randn(5, 24, dtype=F64)
    torch.testing.assert_close(model(x), pruned(x))


def test_the_memory_is_that_of_what_is_stored() -> None:
    """Elsewhere: the tensors occupy the same memory, what is the pruning for?"""
    layer = SparseLinear(512, 512, bias=False, sparsity=0.9)
    held = sum(each.nbytes for each in (*layer.parameters(), *layer.buffers()))
    assert held < 0.2 * 4 * 512 * 512
