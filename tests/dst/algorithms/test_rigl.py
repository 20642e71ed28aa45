"""RigL against the definition: the whole gradient in float64, sorted."""

import copy
import doctest
import pickle
import tracemalloc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselab.dst import EverySteps, Group, RigL, UpdateReport
from sparselab.dst.algorithms import rigl
from sparselab.dst.parts import dense_gradient as gradient
from sparselab.dst.parts import passes
from sparselab.dst.parts.passes import GradientCollector, PassCount
from sparselab.kernels.rewiring.topk import StreamedTopK
from sparselab.nn import SparseLinear
from sparselab.nn.ops.operands import LinearOperands
from tests.dst.fake import FakeSparse
from tests.dst.harness import LAYERS

ROWS, COLS = 23, 37


def make(kind, dtype=torch.float32, sparsity=0.8):
    torch.manual_seed(0)
    if kind == "fake":
        return FakeSparse(COLS, ROWS, sparsity, dtype=dtype)
    return SparseLinear(COLS, ROWS, sparsity=sparsity, dtype=dtype)


def operands(seed, dtype=torch.float32, n_tokens=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, COLS, generator=generator, dtype=dtype)
    return x, torch.randn(n_tokens, ROWS, generator=generator, dtype=dtype)


def backward(layer, x, dy):
    (layer(x) * dy).sum().backward()


def slow_update(positions, weights, dense_gradient, k):
    """Positions after one update, by sorting everything."""
    order = sorted(range(len(positions)), key=lambda slot: (-abs(weights[slot]), positions[slot]))
    kept = {positions[slot] for slot in order[: len(order) - k]}
    scores = dense_gradient.double().abs().reshape(-1).tolist()
    free = [p for p in range(len(scores)) if p not in kept]
    grown = sorted(free, key=lambda p: (-scores[p], p))[:k]
    return sorted(kept | set(grown))


def expected_after(layer, pairs, fraction=0.3):
    dense = sum(dy.double().T @ x.double() for x, dy in pairs)
    weights = layer.weight_values.flatten().tolist()
    return slow_update(layer.positions().tolist(), weights, dense, int(fraction * layer.nnz))


def test_the_oracle_by_hand():
    # Slot 1 (position 3) is weakest. Position 3 itself has the largest free gradient but for position 1.
    after = slow_update([0, 3], [2.0, 0.1], torch.tensor([[9.0, 5.0], [1.0, 4.0]]), 1)
    assert after == [0, 1]
    after = slow_update([0, 3], [2.0, 0.1], torch.tensor([[9.0, 4.0], [1.0, 4.0]]), 1)
    assert after == [0, 1]
    after = slow_update([0, 3], [2.0, 0.1], torch.tensor([[9.0, 3.0], [1.0, 4.0]]), 1)
    assert after == [0, 3]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rows_per_block", [1, 5, ROWS])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_grows_where_the_whole_gradient_is_largest(monkeypatch, kind, dtype, rows_per_block, sparsity):
    monkeypatch.setattr(gradient, "_BLOCK_BYTES", rows_per_block * COLS * dtype.itemsize)
    layer = make(kind, dtype, sparsity)
    algorithm = RigL(drop_fraction=0.3, update_freq=2)
    layer.apply(algorithm)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    for step in range(1, 7):
        optimizer.zero_grad()
        x, dy = operands(step, dtype)
        backward(layer, x, dy)
        optimizer.step()
        expected = layer.positions().tolist()
        if step % 2 == 0:
            expected = expected_after(layer, [(x, dy)])
        optimizer.zero_grad()
        algorithm.step()
        assert layer.positions().tolist() == expected
    assert algorithm.last_update[0].grown == int(0.3 * layer.nnz)


def test_equal_gradients_grow_the_lowest_positions():
    layer = make("fake")
    algorithm = RigL(drop_fraction=0.5, update_freq=1)
    layer.apply(algorithm)
    ones = torch.ones(1, COLS), torch.ones(1, ROWS)
    backward(layer, *ones)
    expected = expected_after(layer, [ones], 0.5)
    algorithm.step()
    assert layer.positions().tolist() == expected


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["one after the other", "one backward pass"])
def test_the_gradient_is_the_sum_over_micro_batches(kind, interleaved):
    layer = make(kind, torch.float64)
    algorithm = RigL(update_freq=1, grad_accumulation=1 if interleaved else 3)
    layer.apply(algorithm)
    pairs = [operands(seed, torch.float64, n_tokens=seed + 2) for seed in range(3)]
    if interleaved:
        sum((layer(x) * dy).sum() for x, dy in pairs).backward()
    else:
        reused = torch.empty(4, COLS, dtype=torch.float64)
        for x, dy in pairs:
            reused[: len(x)] = x
            backward(layer, reused[: len(x)], dy)
    expected = expected_after(layer, pairs)
    assert expected != expected_after(layer, pairs[-1:])
    algorithm.step()
    assert layer.positions().tolist() == expected


@pytest.mark.parametrize("told", ["before", "after"])
def test_a_step_that_sums_over_another_number_of_passes(told):
    layer = make("fake", torch.float64)
    algorithm = RigL(update_freq=1, grad_accumulation=3)
    group = Group({"*": algorithm})
    group.attach(torch.nn.ModuleDict({"layer": layer}))
    pairs = [operands(seed, torch.float64) for seed in range(2)]
    if told == "before":
        group.expect_passes(2)
    for x, dy in pairs:
        backward(layer, x, dy)
    if told == "after":
        group.expect_passes(2)
    expected = expected_after(layer, pairs)
    algorithm.step()
    assert layer.positions().tolist() == expected
    assert algorithm.grad_accumulation == 3


def test_a_layer_used_twice_in_every_micro_batch():
    layer = make("fake", torch.float64)
    algorithm = RigL(update_freq=1, grad_accumulation=2)
    layer.apply(algorithm)
    pairs = [operands(seed, torch.float64) for seed in range(4)]
    for first, second in (pairs[:2], pairs[2:]):
        ((layer(first[0]) * first[1]).sum() + (layer(second[0]) * second[1]).sum()).backward()
    expected = expected_after(layer, pairs)
    algorithm.step()
    assert layer.positions().tolist() == expected


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_pass_without_backward_changes_nothing(kind, when):
    layer = make(kind, torch.float64)
    algorithm = RigL(update_freq=1)
    layer.apply(algorithm)
    x, dy = operands(0, torch.float64)
    if when == "before":
        layer(x)
    backward(layer, x, dy)
    if when == "after":
        layer(x)
    expected = expected_after(layer, [(x, dy)])
    algorithm.step()
    assert layer.positions().tolist() == expected


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind, reentrant):
    layer = make(kind, torch.float64)
    algorithm = RigL(update_freq=1)
    layer.apply(algorithm)
    x, dy = operands(0, torch.float64)
    x.requires_grad_()
    (checkpoint(layer, x, use_reentrant=reentrant) * dy).sum().backward()
    expected = expected_after(layer, [(x.detach(), dy)])
    algorithm.step()
    assert layer.positions().tolist() == expected


@pytest.mark.parametrize(("declared", "came"), [(1, 2), (2, 1), (3, 2), (1, 3)])
def test_another_number_of_backward_passes_than_declared_is_right_too(declared, came):
    layer = make("fake", torch.float64)
    algorithm = RigL(update_freq=1, grad_accumulation=declared)
    layer.apply(algorithm)
    pairs = [operands(seed, torch.float64) for seed in range(came)]
    for x, dy in pairs:
        backward(layer, x, dy)
    expected = expected_after(layer, pairs)
    algorithm.step()
    assert layer.positions().tolist() == expected


def test_a_pass_after_the_gradient_was_formed_skips_the_layer_once_and_is_learnt():
    model = torch.nn.ModuleList([make("real"), make("real")])
    algorithm = RigL(update_freq=1)
    model.apply(algorithm)
    backward(model[0], *operands(0))
    backward(model[1], *operands(1))
    algorithm.step()
    model.zero_grad()
    born = model[0].positions().clone()
    backward(model[0], *operands(2))
    backward(model[1], *operands(3))
    with pytest.warns(
        UserWarning, match=r"had 2 backward passes where 1 were expected. Pass grad_accumulation="
    ):
        backward(model[0], *operands(4))
    algorithm.step()
    reason = "2 backward passes, after the gradient was formed from 1"
    assert [report.skipped for report in algorithm.last_update] == [reason, ""]
    assert torch.equal(model[0].positions(), born)
    model.zero_grad()
    for seed in (5, 6):
        backward(model[0], *operands(seed))
    algorithm.step()
    assert [report.skipped for report in algorithm.last_update] == ["", "no gradient"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_that_is_not_finite_skips_its_layer_only(kind, bad):
    model = torch.nn.ModuleList([make(kind), make(kind)])
    algorithm = RigL(update_freq=1)
    model.apply(algorithm)
    born = [layer.positions().clone() for layer in model]
    x, dy = operands(0)
    backward(model[1], x, dy)
    dy = dy.clone()
    dy[2, 20] = bad
    backward(model[0], x, dy)
    algorithm.step()
    assert algorithm.last_update[0] == UpdateReport(skipped="gradient is not finite", nnz=170)
    assert torch.equal(model[0].positions(), born[0])
    assert not torch.equal(model[1].positions(), born[1])


def test_a_layer_without_gradient_is_skipped():
    model = torch.nn.ModuleList([make("real"), make("real"), make("real")])
    algorithm = RigL(update_freq=1)
    model.apply(algorithm)
    model[1].weight_values.requires_grad_(False)
    x, dy = operands(0)
    backward(model[1], x.requires_grad_(), dy)
    backward(model[2], x, dy)
    algorithm.step()
    assert [report.skipped for report in algorithm.last_update] == ["no gradient", "frozen", ""]


def test_settings_changed_too_late_for_the_gradient_skip_the_update():
    layer = make("fake")
    algorithm = RigL(update_freq=10)
    layer.apply(algorithm)
    algorithm.update = EverySteps(1)
    backward(layer, *operands(0))
    algorithm.step()
    assert algorithm.last_update == (UpdateReport(skipped="no gradient", nnz=170),)
    layer.zero_grad()
    backward(layer, *operands(1))
    algorithm.step()
    assert algorithm.last_update[0].grown > 0


def test_layers_are_watched_on_the_step_that_updates_only(monkeypatch):
    formed = []
    original = gradient.summarise
    monkeypatch.setattr(passes, "summarise", lambda *args: formed.append(0) or original(*args))
    layer = make("real")
    algorithm = RigL(update={"freq": 3, "stop": 7})
    layer.apply(algorithm)
    watched = []
    for step in range(1, 10):
        watched.append(layer.gradient_hook is not None)
        backward(layer, *operands(step))
        algorithm.step()
        layer.zero_grad()
        assert len(formed) == sum(watched)
    assert [step for step, seen in enumerate(watched, start=1) if seen] == [3, 6]


def test_nothing_is_formed_when_nothing_is_dropped(monkeypatch):
    monkeypatch.setattr(gradient, "StreamedTopK", None)
    layer = make("fake")
    algorithm = RigL(drop_fraction=0.0, update_freq=1)
    layer.apply(algorithm)
    backward(layer, *operands(0))
    algorithm.step()
    assert algorithm.last_update == (UpdateReport(nnz=170, skipped="there was nothing to drop or to grow"),)


def test_operands_are_not_copied_once_the_number_of_passes_is_known(monkeypatch):
    seen = []
    original = gradient.summarise
    monkeypatch.setattr(
        passes,
        "summarise",
        lambda operands, *rest: seen.append(operands[0].x.data_ptr()) or original(operands, *rest),
    )
    layer = make("real")
    layer.apply(algorithm := RigL(update_freq=1))
    x, dy = operands(0)
    backward(layer, x, dy)
    assert not seen
    x_then = x.clone()
    x.zero_()  # it is the caller's, who may use it again before the step
    algorithm.step()
    assert seen[0] != x.data_ptr()
    layer.zero_grad()
    backward(layer, x_then, dy)
    assert seen[1:] == [x_then.data_ptr()]


def test_what_was_overwritten_is_never_used():
    layer = make("real")
    layer.apply(algorithm := RigL(update_freq=1))
    hidden = torch.randn(9, COLS, requires_grad=True) * 1
    backward(layer, hidden, operands(0)[1])
    with torch.no_grad():
        hidden.zero_()
    algorithm.step()
    assert algorithm.last_update[0].skipped == "what the gradient is made of was overwritten"


def test_lower_precision_operands_are_widened():
    x, dy = operands(0)
    live = torch.arange(0, ROWS * COLS, 11).numpy()
    low = [LinearOperands(x.bfloat16(), dy.bfloat16())]
    wide = [low[0].to(torch.float32)]
    results = [gradient.summarise(p, live, (ROWS, COLS), 20, torch.float32) for p in (low, wide)]
    assert results[0].free_positions.tolist() == results[1].free_positions.tolist()


def test_a_collector_does_not_travel_with_a_copy():
    layer = make("fake")
    layer.apply(algorithm := RigL(update_freq=1))
    assert layer.gradient_hook is not None
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.gradient_hook is None
        backward(twin, *operands(0))
    algorithm.step()
    assert algorithm.last_update[0].skipped == "no gradient"


def test_a_collector_outlives_its_layer_quietly():
    layer = make("fake")
    collector = GradientCollector(layer, lambda: 3, PassCount(2))
    loss = (layer(operands(0)[0])).sum()
    see = layer.gradient_hook
    del layer, loss
    x, dy = operands(0)
    see(LinearOperands(x, dy))
    assert collector.summary() is None


def test_loading_arms_the_very_next_step():
    layer = make("fake")
    algorithm = RigL(update_freq=5)
    layer.apply(algorithm)
    assert layer.gradient_hook is None
    algorithm.load_state_dict({**algorithm.state_dict(), "step": 4})
    assert layer.gradient_hook is not None
    backward(layer, *operands(0))
    algorithm.step()
    assert algorithm.last_update[0].grown > 0


def test_memory_does_not_grow_with_the_size_of_the_matrix(monkeypatch):
    blocks = []
    push = StreamedTopK.push
    monkeypatch.setattr(
        StreamedTopK, "push", lambda top, row, b: blocks.append(b.nbytes) or push(top, row, b)
    )
    torch.manual_seed(0)
    rows, cols = 3000, 4000
    layer = SparseLinear(cols, rows, sparsity=0.999)
    layer.apply(algorithm := RigL(update_freq=1))
    x, dy = torch.randn(2, cols), torch.randn(2, rows)
    backward(layer, x, dy)
    algorithm.step()  # compiles, which takes memory of its own
    layer.zero_grad()
    backward(layer, x, dy)
    tracemalloc.start()
    algorithm.step()
    layer.zero_grad()
    backward(layer, x, dy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(blocks) == 3 * rows * cols * 4
    assert max(blocks) <= 4 << 20
    assert peak < rows * cols / 4


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(rigl).attempted > 5
    assert doctest.testmod(rigl).failed == 0
