"""Nothing stays of a model and its algorithm that somebody lets go of, wherever the training was."""

import gc
import weakref

import pytest
import torch

from tests.dst.contract_rows import ROWS
from tests.dst.harness import KINDS, OPTIMIZERS, backward, build, train

STEPS = {
    "attached": lambda model, optimizer, algorithm: None,
    "after a backward pass": lambda model, optimizer, algorithm: backward(model, 1),
    "before an update": lambda model, optimizer, algorithm: train(model, optimizer, algorithm, 1, 6),
    "within an update step": lambda model, optimizer, algorithm: (
        train(model, optimizer, algorithm, 1, 6), backward(model, 7), optimizer.step()
    ),
    "after an update": lambda model, optimizer, algorithm: train(model, optimizer, algorithm, 1, 7),
}  # fmt: skip


def left_of(kind, row, stop, kept=None):
    """What is alive of a run that ended so: its layers, weights, optimizer and algorithm."""
    model = row.prepare(build(kind, sparsity=row.start))
    model.apply(algorithm := row.make())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    stop(model, optimizer, algorithm)
    if kept is not None:
        kept.append(algorithm)
    return [weakref.ref(each) for each in (*model, *model.parameters(), optimizer, algorithm)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("real", name) for name in ROWS), *((kind, "rigl") for kind in ("fake", *KINDS) if "fan" not in kind)],
)
def test_nothing_stays_of_a_run_that_is_given_up(kind, name):
    runs = {when: left_of(kind, ROWS[name], stop) for when, stop in STEPS.items()}
    gc.collect()
    alive = {when: [each() for each in run if each() is not None] for when, run in runs.items()}
    assert not any(alive.values()), alive


def test_what_stays_would_be_seen():
    kept = []
    run = left_of("real", ROWS["set"], STEPS["attached"], kept)
    gc.collect()
    assert sum(each() is not None for each in run) > 5


def test_nothing_stays_of_layers_by_themselves():
    def run():
        model = build("real")
        output = model(torch.randn(4, 20, requires_grad=True))
        (slope,) = torch.autograd.grad(output.sum(), model[0].weight_values, create_graph=True)
        slope.square().sum().backward()
        return [weakref.ref(each) for each in (*model, *model.parameters())]

    left = run()
    gc.collect()
    assert not any(each() is not None for each in left)
