"""Different algorithms for different layers."""

import copy

import pytest
import torch

from sparselab.dst import SET, Group, RigL, Static
from sparselab.nn import SparseLinear
from tests.dst.harness import OPTIMIZERS, assert_same_state, backward, build


def make():
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"attn": SparseLinear(12, 10, sparsity=0.5), "mlp": SparseLinear(10, 8, sparsity=0.5)}
    )


def test_the_first_matching_pattern_counts():
    model = make()
    group = Group({"attn": RigL(), "*": SET()})
    group.attach(model)
    assert group["attn"].layers == (model["attn"],)
    assert group["*"].layers == (model["mlp"],)
    assert [algorithm.names for algorithm in group] == [("attn",), ("mlp",)]
    assert len(group) == 2


def test_layers_that_match_nothing_keep_their_topology():
    model = build("real")
    born = [model[0].positions().clone(), model[2].positions().clone()]
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    Group({"2": SET(update_freq=1)}).attach(model, optimizer)
    backward(model, 1)
    optimizer.step()
    assert torch.equal(model[0].positions(), born[0])
    assert not torch.equal(model[2].positions(), born[1])


def test_it_drives_each_algorithm_as_that_drives_itself():
    alone, grouped = build("real"), build("real")
    optimizers = [OPTIMIZERS["adamw"](model.parameters()) for model in (alone, grouped)]
    algorithm = SET(update_freq=2)
    alone.apply(algorithm)
    group = Group({"*": SET(update_freq=2)})
    group.attach(grouped, optimizers[1])
    for step in range(1, 8):
        for model, optimizer in zip((alone, grouped), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        algorithm.step()
    assert_same_state(alone, optimizers[0], grouped, optimizers[1])


def test_its_state_is_the_state_of_each():
    group = Group({"attn": RigL(), "*": SET()})
    group.attach(make())
    group.step()
    state = copy.deepcopy(group.state_dict())
    other = Group({"attn": RigL(), "*": SET()})
    other.attach(make())
    other.load_state_dict(state)
    assert [algorithm.steps_done for algorithm in other] == [1, 1]
    with pytest.raises(ValueError, match=r"saved for patterns \['attn', '\*'\], but this group has \['\*'\]"):
        Group({"*": SET()}).load_state_dict(state)


@pytest.mark.parametrize(
    ("make_group", "error", "message"),
    [
        (lambda: Group({}), ValueError, "at least one pattern"),
        (lambda: Group({"*": SET}), TypeError, r"got '\*': type"),
        (lambda: Group({"*": Group({"*": SET()})}), TypeError, r"got '\*': Group"),
        (lambda: Group(dict.fromkeys("ab", Static())), ValueError, "each algorithm once"),
        (
            lambda: Group({"*": SET(), "mlp": SET()}).attach(make()),
            ValueError,
            "'mlp' without one.*attn, mlp",
        ),
        (lambda: make().apply(Group({"*": SET()})), TypeError, r"call group.attach\(model\)"),
    ],
)
def test_misuse_is_named(make_group, error, message):
    with pytest.raises(error, match=message):
        make_group()
