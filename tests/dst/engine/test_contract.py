"""What every algorithm promises, with every optimizer, precision and layer: one row per combination."""

import copy
import io

import pytest
import torch

from sparselab.dst import Static
from tests.dst.contract_rows import ROWS
from tests.dst.harness import (
    OPTIMIZERS,
    assert_followed,
    assert_same_state,
    assert_topology,
    backward,
    build,
    by_position,
    sparse_layers,
    train,
)
from tests.shared import n_steps, usual

#: Each precision and each optimizer, not each pair of them.
REAL = [("real", torch.float32, "adamw"), ("real", torch.float64, "sgd")]
#: The fake offers the protocol and nothing else, so it proves that algorithms need nothing else.
OTHERS = [("fake", torch.float32, "sgd"), ("masked", torch.float64, "adamw")]
FAN_IN = ("fan-in", torch.float32, "adamw")
BLOCKS = [("block", torch.float32, "adamw"), ("block", torch.float64, "sgd")]
#: Convolutions in a row have no neurons in common, so they make no chain. Of masked ones, one algorithm for
#: each way to look at a gradient: averaged, at a sample, and whole.
CONVOLUTIONS = {
    ("conv", torch.float32, "sgd"): [name for name in ROWS if name != "chts chained"],
    ("masked conv", torch.float64, "adamw"): ["snfs", "gse grabo", "topkast"],
    ("conv 1d", torch.float32, "adamw"): ["rigl"],
    ("conv 3d", torch.float32, "sgd"): ["set"],
    ("transposed 1d", torch.float32, "sgd"): ["set"],
    ("transposed", torch.float32, "adamw"): ["rigl", "snfs", "topkast", "gmp"],
    ("transposed 3d", torch.float64, "sgd"): ["rigl"],
}
COMBINATIONS = [
    *((*each, name) for each in REAL + OTHERS for name in ROWS),
    *((*FAN_IN, name) for name, row in ROWS.items() if row.keeps_fan_in),
    *((*each, name) for each in BLOCKS for name, row in ROWS.items() if row.of_blocks),
    *((*each, name) for each, names in CONVOLUTIONS.items() for name in names),
]

#: Of whom every run tries each layer; of the others, the usual one.
FIRST = "static", "set", "rigl", "srigl", "snfs", "topkast", "gmp", "deepr"

pytestmark = pytest.mark.parametrize(
    ("kind", "dtype", "optimizer_name", "row"),
    [usual(each == list(REAL[0]) or name in FIRST, *each, ROWS[name]) for *each, name in COMBINATIONS],
    ids=["-".join(map(str, each)).replace("torch.", "") for each in COMBINATIONS],
)


@pytest.fixture
def run(kind, row, optimizer_name, dtype):
    def start(seed=0):
        model = row.prepare(build(kind, dtype, seed, row.start))
        model.apply(algorithm := row.make())
        return model, OPTIMIZERS[optimizer_name](model.parameters()), algorithm

    return start


def test_counts_are_exact_after_every_update(run, row):
    model, optimizer, algorithm = run()
    layers = sparse_layers(model)
    counts = [layer.nnz for layer in layers]
    born = [layer.positions().clone() for layer in layers]
    parameters = [layer.stored for layer in layers]
    for step in range(7, n_steps(57, 71), 7):  # schedules end at 50
        train(model, optimizer, algorithm, step - 6, step)
        row.counts(layers, counts, step)
    for layer, positions, parameter in zip(layers, born, parameters, strict=True):
        assert_topology(layer, layer.nnz)
        assert layer.stored is parameter
        assert torch.equal(layer.positions(), positions) == (row is ROWS["static"])
        assert bool(layer.stored.detach().isfinite().all())


def test_state_follows_the_connection(run, row):
    model, optimizer, algorithm = run()
    train(model, optimizer, algorithm, 1, 20)
    optimizer.zero_grad()
    backward(model, 21)
    optimizer.step()
    layers = sparse_layers(model)
    before = [by_position(layer, optimizer) for layer in layers]
    storage = _moments(optimizer, layers)
    algorithm.step()
    after = [by_position(layer, optimizer) for layer in layers]
    moved = 0
    for old, new in zip(before, after, strict=True):
        moved += len(new["value"].keys() ^ old["value"].keys())
        if row.walks:
            del old["value"], new["value"]
        assert_followed(old, new, row.brings_weights)
    assert (moved > 0) == (row is not ROWS["static"])
    for old, new in zip(storage, _moments(optimizer, layers), strict=True):
        assert old.data_ptr() == new.data_ptr() or old.shape != new.shape, "not moved in place"


def _moments(optimizer, layers):
    return [
        entry
        for layer in layers
        for entry in optimizer.state[layer.stored].values()
        if isinstance(entry, torch.Tensor) and entry.dim() > 0
    ]


def test_seeded_runs_repeat(run):
    first, second = run(), run()
    train(*first, 1, 16)
    train(*second, 1, 16)
    assert_same_state(first[0], first[1], second[0], second[1])


def test_resume_is_bit_exact(run):
    """From between two updates, from before one, and from after one."""
    model, optimizer, algorithm = run()
    first, end = n_steps(9, 23), n_steps(22, 44)
    done, saved = 0, {}
    for stop in (first, first + 4, first + 5):
        train(model, optimizer, algorithm, done + 1, stop)
        done, saved[stop] = stop, io.BytesIO()
        torch.save([part.state_dict() for part in (model, optimizer, algorithm)], saved[stop])
    train(model, optimizer, algorithm, done + 1, end)

    for stop, file in saved.items():
        file.seek(0)
        resumed, resumed_optimizer, resumed_algorithm = run(seed=5)
        states = torch.load(file, weights_only=True)
        for part, state in zip((resumed, resumed_optimizer, resumed_algorithm), states, strict=True):
            part.load_state_dict(state)
        assert resumed_algorithm.steps_done == stop
        train(resumed, resumed_optimizer, resumed_algorithm, stop + 1, end)
        assert_same_state(model, optimizer, resumed, resumed_optimizer)


def test_a_copy_of_the_model_belongs_to_no_algorithm(run):
    model, optimizer, algorithm = run()
    train(model, optimizer, algorithm, 1, 6)
    twin = copy.deepcopy(model)
    assert all(layer.gradient_hook is None for layer in sparse_layers(twin))
    twin.apply(Static())
