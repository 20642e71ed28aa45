"""Different algorithms for different layers."""

import copy
import re

import pytest
import torch

from sparselab.dst import SET, SNFS, Group, RigL, Static
from sparselab.nn import BlockSparseLinear, FanInLinear, SparseLinear
from tests.dst.fake import FakeSparse
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


def is_last(layer, name):
    return name == "2"


MIXED = {is_last: SNFS, re.compile("[01]"): RigL, BlockSparseLinear: Static, SparseLinear: SET, "*": RigL}


def mixed():
    torch.manual_seed(0)
    linear = [SparseLinear(8, 8, sparsity=0.5) for _ in range(4)]
    block = BlockSparseLinear(8, 8, block_shape=(2, 2), sparsity=0.5)
    return torch.nn.Sequential(*linear, block, FanInLinear(8, 8, sparsity=0.5))


def test_expressions_classes_and_functions_choose_beside_globs():
    model = mixed()
    group = Group({key: algorithm() for key, algorithm in MIXED.items()})
    group.attach(model)
    assert [each.names for each in group] == [("2",), ("0", "1"), ("4",), ("3",), ("5",)]
    assert group[is_last].layers == (model[2],)
    assert group[BlockSparseLinear].layers == (model[4],)
    assert repr(group).startswith("Group({is_last: SNFS(")


def test_a_state_keeps_keys_that_are_no_str_by_name_and_place(tmp_path):
    group = Group({key: algorithm() for key, algorithm in MIXED.items()})
    group.attach(mixed())
    group.step()
    names = ["is_last at 0", "re.compile('[01]') at 1", "BlockSparseLinear at 2", "SparseLinear at 3", "*"]
    assert list(group.state_dict()) == names
    torch.save(group.state_dict(), tmp_path / "state.pt")
    other = Group({key: algorithm() for key, algorithm in MIXED.items()})
    other.attach(mixed())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [algorithm.steps_done for algorithm in other] == [1] * 5
    with pytest.raises(ValueError, match=r"but this group has \['SparseLinear at 0'\]"):
        Group({SparseLinear: SET()}).load_state_dict(group.state_dict())


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
    with pytest.raises(ValueError, match=r"saved for keys \['attn', '\*'\], but this group has \['\*'\]"):
        Group({"*": SET()}).load_state_dict(state)


def test_two_algorithms_of_one_seed_draw_apart():
    def grown(make_algorithms):
        model = torch.nn.ModuleDict({name: FakeSparse(20, 20, 0.5, seed=0) for name in "ab"})
        group = Group(make_algorithms())
        group.attach(model)
        group.step()
        return [layer.positions().tolist() for layer in model.values()]

    def two():
        return {"a": SET(update_freq=1), "b": SET(update_freq=1)}

    first, second = grown(two)
    assert first != second
    assert grown(two) == [first, second]
    assert first == grown(lambda: {"*": SET(update_freq=1)})[0]


def test_a_state_that_one_member_refuses_changes_none():
    def attached():
        group = Group({"attn": RigL(), "*": SNFS(update_freq=9)})
        group.attach(model := make())
        return group, model

    group, model = attached()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    (model["attn"](torch.ones(2, 12)).sum() + model["mlp"](torch.ones(2, 10)).sum()).backward()
    optimizer.step()
    group.step()
    state = group.state_dict()
    state["*"]["parts"]["grow"]["0"] = torch.zeros(3, 3)
    other, _ = attached()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="averages must be of layers"):
        other.load_state_dict(state)
    assert other.state_dict() == before
    assert [algorithm.steps_done for algorithm in other] == [0, 0]


def test_a_group_is_shown_with_its_members():
    text = repr(Group({"attn": RigL(0.9), "*": Static()}))
    assert text.startswith("Group({'attn': RigL(sparsity=0.9, ")
    assert text.endswith("'*': Static(sparsity=None) of 0 layers after 0 steps})")


def test_a_group_can_be_detached_and_begin_anew():
    model, group = make(), Group({"attn": SET(update_freq=1), "*": SET(update_freq=1)})
    group.attach(model, OPTIMIZERS["sgd"](model.parameters()))
    group.detach()
    group.detach()
    assert group.layers == ()
    group.attach(model)
    group.step()
    group.detach()
    with pytest.raises(RuntimeError, match="after 1 steps of this SET"):
        group.attach(model)
    group.reset()
    group.attach(model)
    assert len(group.layers) == 2


@pytest.mark.parametrize(
    ("make_group", "error", "message"),
    [
        (lambda: Group({}), ValueError, "at least one key"),
        (lambda: Group({"*": SET}), TypeError, r"got '\*': type"),
        (lambda: Group({3: SET()}), TypeError, "algorithms must choose layers by a str, .* got 3"),
        (lambda: Group({"re:(": SET()}), ValueError, r"a regular expression after 're:', got 're:\('"),
        (
            lambda: Group({BlockSparseLinear: SET()}).attach(make()),
            ValueError,
            "got BlockSparseLinear without",
        ),
        (
            lambda: Group({"a|mlp": SET()}).attach(make()),
            ValueError,
            "only as a regular expression would match",
        ),
        (lambda: Group({is_last: SET()}).attach(make()), ValueError, "got is_last without one; .*attn, mlp"),
        (lambda: Group({lambda *_: 1: SET()}).attach(make()), TypeError, "return a bool, got 1 for 'attn'"),
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
