"""What every algorithm promises, with every optimizer, precision and layer: one row per combination."""

import copy
import io

import pytest
import torch

from tests.dst.harness import (
    ALGORITHMS,
    LAYERS,
    OPTIMIZERS,
    START,
    assert_counts,
    assert_followed,
    assert_same_state,
    assert_topology,
    backward,
    build,
    by_position,
    sparse_layers,
    train,
)

pytestmark = [
    pytest.mark.parametrize("kind", LAYERS),
    pytest.mark.parametrize("algorithm_name", ALGORITHMS),
    pytest.mark.parametrize("optimizer_name", OPTIMIZERS),
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"]),
]


@pytest.fixture
def run(kind, algorithm_name, optimizer_name, dtype):
    def start(seed=0):
        model = build(kind, dtype, seed, START.get(algorithm_name, 0.8))
        algorithm = ALGORITHMS[algorithm_name]()
        model.apply(algorithm)
        return model, OPTIMIZERS[optimizer_name](model.parameters()), algorithm

    return start


def test_nnz_stays_exact(run, algorithm_name):
    model, optimizer, algorithm = run()
    layers = sparse_layers(model)
    counts = [layer.nnz for layer in layers]
    born = [layer.positions().clone() for layer in layers]
    parameters = [layer.stored for layer in layers]
    for step in range(7, 301, 7):
        train(model, optimizer, algorithm, step - 6, step)
        assert_counts(algorithm_name, layers, counts, step)
    for layer, positions, parameter in zip(layers, born, parameters, strict=True):
        assert_topology(layer, layer.nnz)
        assert layer.stored is parameter
        assert torch.equal(layer.positions(), positions) == (algorithm_name == "static")
        assert bool(layer.stored.detach().isfinite().all())


def test_state_follows_the_connection(run, algorithm_name):
    model, optimizer, algorithm = run()
    train(model, optimizer, algorithm, 1, 20)
    optimizer.zero_grad()
    backward(model, 21)
    optimizer.step()
    layers = sparse_layers(model)
    before = [by_position(layer, optimizer) for layer in layers]
    counts = [layer.nnz for layer in layers]
    storage = [entry.data_ptr() for entry in _moments(optimizer, layers)]
    algorithm.step()
    after = [by_position(layer, optimizer) for layer in layers]
    moved = 0
    for old, new in zip(before, after, strict=True):
        assert_followed(old, new)
        moved += len(new["value"].keys() ^ old["value"].keys())
    assert (moved > 0) == (algorithm_name != "static")
    if counts == [layer.nnz for layer in layers]:
        assert storage == [entry.data_ptr() for entry in _moments(optimizer, layers)], "not moved in place"


def _moments(optimizer, layers):
    return [
        entry
        for layer in layers
        for entry in optimizer.state[layer.stored].values()
        if isinstance(entry, torch.Tensor) and entry.dim() > 0
    ]


def test_seeded_runs_repeat(run):
    first, second = run(), run()
    train(*first, 1, 50)
    train(*second, 1, 50)
    assert_same_state(first[0], first[1], second[0], second[1])


@pytest.mark.parametrize("stop", [20, 27, 28], ids=["between", "before an update", "after an update"])
def test_resume_is_bit_exact(run, stop):
    model, optimizer, algorithm = run()
    train(model, optimizer, algorithm, 1, stop)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, algorithm)], saved)
    train(model, optimizer, algorithm, stop + 1, 60)

    saved.seek(0)
    resumed, resumed_optimizer, resumed_algorithm = run(seed=5)
    states = torch.load(saved, weights_only=True)
    for part, state in zip((resumed, resumed_optimizer, resumed_algorithm), states, strict=True):
        part.load_state_dict(state)
    assert resumed_algorithm.steps_done == stop
    train(resumed, resumed_optimizer, resumed_algorithm, stop + 1, 60)
    assert_same_state(model, optimizer, resumed, resumed_optimizer)


def test_a_copy_of_the_model_belongs_to_no_algorithm(run, algorithm_name):
    model, optimizer, algorithm = run()
    train(model, optimizer, algorithm, 1, 6)
    twin = copy.deepcopy(model)
    assert all(layer.gradient_watcher is None for layer in sparse_layers(twin))
    twin.apply(ALGORITHMS[algorithm_name]())
