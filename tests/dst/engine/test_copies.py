"""A copy of a model with its optimizer and its algorithm trains on as the three would have done."""

import copy
import gc
import io
import pickle

import pytest
import torch

from sparselab import SET, Group, RigL
from tests.dst.contract_rows import ROWS
from tests.dst.harness import OPTIMIZERS, assert_same_state, backward, build, sparse_layers, train
from tests.shared import n_steps, usual


def train_alone(model, optimizer, first, last):
    """Steps of an optimizer that the algorithm steps along with."""
    for step in range(first, last + 1):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def trained(three, by_hand, first, last):
    train(*three, first, last) if by_hand else train_alone(*three[:2], first, last)


def assert_goes_on_alike(three, by_hand, done):
    """Through the two updates, or the one, that come in steps 7 and 14."""
    twins = copy.deepcopy(three)
    before = [layer.positions().tolist() for layer in sparse_layers(three[0])]
    for each in (three, twins):
        trained(each, by_hand, done + 1, n_steps(15, 22))
    assert_same_state(three[0], three[1], twins[0], twins[1])
    return before


#: Chains name layers as `apply` does.
PAIRS = [(name, by_hand) for name in ROWS for by_hand in (True, False) if by_hand or name != "chts chained"]


@pytest.mark.parametrize(("name", "by_hand"), PAIRS)
def test_a_copy_of_all_three_goes_on_alike(name, by_hand):
    row = ROWS[name]
    for done in (0, 5, 6, 7) if by_hand else (6, 7):  # an update comes with every seventh step
        model = row.prepare(build("real", sparsity=row.start))
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        algorithm = row.make()
        if by_hand:
            model.apply(algorithm)
        else:
            algorithm.attach(model, optimizer)
        three = model, optimizer, algorithm
        trained(three, by_hand, 1, done)
        before = assert_goes_on_alike(three, by_hand, done)
        moved = before != [layer.positions().tolist() for layer in sparse_layers(model)]
        assert moved == (row is not ROWS["static"])


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_a_group_and_any_order_of_the_three(by_hand, order):
    for done in (6, 7):
        model = build("real")
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        algorithm = Group({"0": RigL(update_freq=7), "*": SET(update_freq=7)})
        algorithm.attach(model, None if by_hand else optimizer)
        three = model, optimizer, algorithm
        trained(three, by_hand, 1, done)
        mixed = copy.deepcopy(tuple(three[i] for i in order))
        twins = [mixed[order.index(i)] for i in range(3)]
        for each in (three, twins):
            trained(each, by_hand, done + 1, 16)
        assert_same_state(model, optimizer, twins[0], twins[1])


@pytest.mark.parametrize("done", [usual(False, 0), usual(False, 5), 6, usual(False, 7)])
@pytest.mark.parametrize("name", ROWS)
def test_layers_are_free_once_their_algorithm_is_gone(name, done):
    row = ROWS[name]
    model = row.prepare(build("real", sparsity=row.start))
    model.apply(algorithm := row.make())
    train(model, OPTIMIZERS["adamw"](model.parameters()), algorithm, 1, done)
    del algorithm
    gc.collect()
    model.apply(algorithm := SET(update_freq=1))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithm, 1, 2)


@pytest.mark.parametrize("name", ROWS)
def test_an_algorithm_without_a_model_goes_through_a_pickle(name):
    row = ROWS[name]
    threes = []
    for way in (lambda algorithm: algorithm, lambda algorithm: pickle.loads(pickle.dumps(algorithm))):
        model = row.prepare(build("real", sparsity=row.start))
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        model.apply(algorithm := way(row.make()))
        train(model, optimizer, algorithm, 1, 15)
        threes.append((model, optimizer, algorithm))
    (model, optimizer, algorithm), twins = threes
    assert_same_state(model, optimizer, *twins[:2])
    assert repr(algorithm) == repr(twins[2])


@pytest.mark.parametrize("make", [lambda: RigL(update_freq=7), lambda: Group({"*": SET(update_freq=7)})])
@pytest.mark.parametrize(
    "way", [pickle.dumps, copy.copy, lambda algorithm: torch.save([algorithm], io.BytesIO())]
)
def test_an_attached_algorithm_is_not_pickled_or_copied_by_itself(make, way):
    model, algorithm = build("real"), make()
    algorithm.attach(model)
    with pytest.raises(TypeError, match=r"must not be attached when it is pickled or copied.*state_dict"):
        way(algorithm)
    algorithm.detach()
    way(algorithm)
