"""Budgets: exact totals, bounds, proportions; and models that get precisely what was allocated."""

import functools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import sparselab
from sparselab.dst import allocate, apportion, er, erk, uniform
from sparselab.kernels.arrays import n_connections

LENET = [(300, 784), (100, 300), (10, 100)]
METHODS = {"uniform": uniform, "er": er, "erk": erk, "power": functools.partial(erk, power=0.5)}

shapes_of_layers = st.lists(
    st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8
)


@st.composite
def budgets(draw):
    """Weights, caps, floors and a total between the sums of both."""
    n = draw(st.integers(1, 6))
    floors = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    caps = [floor + draw(st.integers(0, 50)) for floor in floors]
    weights = draw(st.lists(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 1.5, 3.0, 700.0]), min_size=n, max_size=n))
    return draw(st.integers(sum(floors), sum(caps))), weights, caps, floors


def shares(total, weights, caps, floors):
    """``clip(scale * weight, floor, cap)``, the scale by bisection, in floats; weights of 0 count as tiny."""
    tiny = min((weight for weight in weights if weight), default=1.0) * 1e-9
    bounds = list(zip([weight or tiny for weight in weights], floors, caps, strict=True))
    low, high = -300.0, 300.0
    for _ in range(200):
        middle = (low + high) / 2
        clipped = [min(max(10**middle * weight, floor), cap) for weight, floor, cap in bounds]
        low, high = (middle, high) if sum(clipped) < total else (low, middle)
    return clipped


def off_by_less_than_one(counts, total, weights, caps, floors):
    """Whether every count is its share of the total rounded up or down."""
    expected = shares(total, weights, caps, floors)
    return all(abs(count - share) < 1 + 1e-6 for count, share in zip(counts, expected, strict=True))


@given(budgets())
def test_apportion_is_exact_within_bounds_and_proportional(budget):
    total, weights, caps, floors = budget
    counts = apportion(total, weights, caps, floors)
    assert sum(counts) == total
    assert all(floor <= n <= cap for floor, n, cap in zip(floors, counts, caps, strict=True))
    assert off_by_less_than_one(counts, *budget)


def test_unproportional_counts_are_seen():
    budget = 10, [1.0, 1.0, 2.0], [9, 9, 9], [0, 0, 0]
    assert off_by_less_than_one([3, 2, 5], *budget)
    assert not off_by_less_than_one([4, 1, 5], *budget)
    assert not off_by_less_than_one([2, 2, 6.5], *budget)


@pytest.mark.parametrize(
    ("total", "weights", "caps", "floors", "expected"),
    [
        (0, [], [], None, []),
        (0, [1, 2], [5, 5], None, [0, 0]),
        (7, [1, 1, 1], [9, 9, 9], None, [3, 2, 2]),  # ties go to the first
        (10, [3, 3, 4], [9, 9, 9], None, [3, 3, 4]),
        (10, [1, 1, 8], [9, 9, 4], None, [3, 3, 4]),  # a cap: the surplus is shared
        (9, [1, 2, 8], [9, 9, 3], None, [2, 4, 3]),
        (12, [1, 2, 8], [9, 3, 4], None, [5, 3, 4]),  # the surplus itself meets a cap
        (10, [0, 1, 9], [9, 9, 9], [2, 0, 0], [2, 1, 7]),  # a floor is paid for by the others
        (15, [1, 0], [10, 10], [0, 5], [10, 5]),
        (17, [1, 0], [10, 10], [0, 5], [10, 7]),
        (14, [1, 0], [10, 10], [0, 5], [9, 5]),
        (6, [0, 0, 0], [9, 9, 1], None, [3, 2, 1]),  # no weights at all: equal
        (9, [5, 0, 0], [3, 9, 9], None, [3, 3, 3]),  # those without weight get what the others cannot
        (10**18, [1, 1, 1], [10**18] * 3, None, [333333333333333334, *[333333333333333333] * 2]),
        (3, [1e-300, 1e300], [2, 9], None, [0, 3]),
    ],
)
def test_apportion_by_hand(total, weights, caps, floors, expected):
    assert apportion(total, weights, caps, floors) == expected


def test_er_and_erk_of_lenet_by_hand():
    # 10% of 266200 are 26620. By n_out + n_in, the last layer would get 26620 * 110 / 1594 = 1837 > 1000: it
    # is dense, and the others share 25620 as 1084 : 400, which is 18714.3 : 6905.7.
    assert erk(LENET, 0.9) == er(LENET, 0.9) == [18714, 6906, 1000]
    # 2% are 5324, shared as 1084 : 400 : 110, which is 3620.6 : 1336.0 : 367.4.
    assert erk(LENET, 0.98) == [3621, 1336, 367]
    assert [round(n / math.prod(s), 4) for n, s in zip(erk(LENET, 0.98), LENET, strict=True)] == [
        0.0154,
        0.0445,
        0.367,
    ]


def test_uniform_of_lenet_by_hand():
    assert uniform(LENET, 0.9) == [23520, 3000, 100]
    assert uniform([(3, 3), (3, 3), (3, 3)], 0.5) == [5, 5, 4]  # 13.5 rounds to 14, 4.5 each


def test_small_layers_keep_a_connection_while_there_are_enough():
    assert uniform([(100, 100), (2, 2)], 0.99) == [99, 1]
    assert uniform([(100, 100), (2, 2), (2, 2)], 0.9999) == [1, 0, 0]


def test_kernels_count_in_erk_and_not_in_er():
    shapes = [(8, 4, 3, 3), (16, 18)]  # both of 288 positions
    # Sums 18 and 34: 144 * 18/52 = 49.8. (8+4)/32 against 34/288: 144 * 0.375/0.493 = 109.5.
    assert erk(shapes, 0.75) == [50, 94]
    assert er(shapes, 0.75) == [110, 34]


def test_power_of_erk():
    shapes = [(10, 10), (40, 10)]
    assert erk(shapes, 0.9, power=0) == uniform(shapes, 0.9) == [10, 40]
    # (20/100) ** 2 * 100 : (50/400) ** 2 * 400 = 4 : 6.25
    assert erk(shapes, 0.9, power=2) == [20, 30]


def dense_set_recipe(shapes, sparsity):
    """Densities by the loop of the RigL paper's code: make dense what overflows, solve again."""
    dense = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        sizes = [math.prod(shape) for shape in shapes]
        budget = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(sum(shapes[i]) for i in free)
        overflowing = {i for i in free if scale * sum(shapes[i]) > sizes[i]}
        if not overflowing:
            return [1.0 if i in dense else scale * sum(s) / math.prod(s) for i, s in enumerate(shapes)]
        dense |= overflowing


@given(
    st.lists(
        st.tuples(*[st.integers(4, 60)] * 2) | st.tuples(*[st.integers(2, 7)] * 4), min_size=1, max_size=6
    ),
    st.sampled_from([0.1, 0.5, 0.8, 0.9]),
)
def test_erk_agrees_with_the_recipe(shapes, sparsity):
    sizes = [math.prod(shape) for shape in shapes]
    expected = [
        density * size for density, size in zip(dense_set_recipe(shapes, sparsity), sizes, strict=True)
    ]
    assume(min(expected) >= 1)  # the recipe leaves layers empty
    for count, share in zip(erk(shapes, sparsity), expected, strict=True):
        assert abs(count - share) < 1.5  # 1 from rounding here, 1/2 from that of the total


@given(st.sampled_from(sorted(METHODS)), shapes_of_layers, st.floats(0, 1))
def test_totals_are_exact_and_no_layer_is_empty_or_too_full(name, shapes, sparsity):
    counts = METHODS[name](shapes, sparsity)
    sizes = [math.prod(shape) for shape in shapes]
    total = n_connections((sum(sizes), 1), sparsity)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if total >= sum(size > 0 for size in sizes):
        assert all(count > 0 for count, size in zip(counts, sizes, strict=True) if size)


@given(shapes_of_layers, st.floats(0, 1))
def test_er_is_erk_in_two_dimensions(shapes, sparsity):
    flat = [shape[:2] for shape in shapes]
    assert er(flat, sparsity) == erk(flat, sparsity)


def lenet(device="meta"):
    return nn.Sequential(*[nn.Linear(*shape[::-1], device=device) for shape in LENET])


def counts_of(model, rules):
    return [layer.nnz for layer in sparselab.sparsify(model, rules) if hasattr(layer, "nnz")]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.98, 0.9999, 1.0])
@pytest.mark.parametrize("name", ["uniform", "er", "erk"])
def test_sparsify_gives_each_layer_what_was_allocated(name, sparsity):
    model = lenet("cpu")
    rules = allocate(model, sparsity, name)
    assert list(rules) == ["0", "1", "2"]
    assert counts_of(model, rules) == METHODS[name](LENET, sparsity)


@given(st.data(), st.integers(1, 2**21), st.integers(1, 2**21))
def test_the_sparsity_of_a_layer_rounds_to_its_count(data, rows, columns):
    count = data.draw(st.integers(0, rows * columns))
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, device="meta"))
    (sparsity,) = allocate(model, 0.5, lambda shapes, sparsity: [count]).values()
    assert n_connections((rows, columns), sparsity) == count


def test_erk_is_the_default():
    assert allocate(lenet(), 0.9) == allocate(lenet(), 0.9, "erk") != allocate(lenet(), 0.9, "uniform")


def test_first_and_last_may_stay_dense_and_are_not_counted():
    assert list(allocate(lenet(), 0.9, first="dense")) == ["1", "2"]
    assert list(allocate(lenet(), 0.9, last="dense")) == ["0", "1"]
    rules = allocate(lenet(), 0.9, "uniform", first="dense", last="dense")
    assert rules == {"1": 0.9}
    assert counts_of(lenet("cpu"), allocate(lenet(), 0.9, last="dense")) == erk(LENET[:2], 0.9)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 32, device="meta")
        self.down = nn.Linear(32, 8, device="meta")


class Gate(Block):
    pass


class Named(nn.Linear):
    pass


def tower():
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 8, device="meta"))
    model.add_module("blocks", nn.Sequential(Block(), Gate()))
    model.add_module("own", Named(8, 8, device="meta"))
    model.add_module("head", nn.Linear(8, 2, device="meta"))
    return model


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, ["stem", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "own", "head"]),
        ({"include": "blocks.*"}, ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        ({"include": ["head", "stem"]}, ["stem", "head"]),
        ({"exempt": "blocks.*"}, ["stem", "own", "head"]),
        ({"exempt": ("*.up", "stem")}, ["blocks.0.down", "blocks.1.down", "own", "head"]),
        ({"exempt_types": Block}, ["stem", "own", "head"]),
        ({"exempt_types": [Gate]}, ["stem", "blocks.0.up", "blocks.0.down", "own", "head"]),
        ({"exempt_types": [Gate], "exempt": ["own", "head"], "last": "dense"}, ["stem", "blocks.0.up"]),
        ({"include": "*.up", "first": "dense"}, ["blocks.1.up"]),
    ],
)
def test_which_layers_are_chosen(choice, expected):
    assert list(allocate(tower(), 0.5, **choice)) == expected


def test_the_budget_is_that_of_the_chosen_layers():
    rules = allocate(tower(), 0.5, include="blocks.*", exempt="blocks.1.*")
    assert sum(n_connections((8, 32), sparsity) for sparsity in rules.values()) == 256


def test_a_mapping_gives_layers_their_own_sparsity():
    rules = allocate(tower(), 0.5, {"blocks.0.*": 0.75, "*.up": 0.25}, exempt=["stem", "head", Named])
    assert list(rules.values()) == [0.75, 0.75, 0.25, 0.5]


def test_a_function_decides_the_counts():
    seen = []

    def one_each(shapes, sparsity):
        seen.append((shapes, sparsity))
        return torch.ones(len(shapes), dtype=torch.int64).numpy()

    model = lenet("cpu")
    assert counts_of(model, allocate(model, 0.9, one_each)) == [1, 1, 1]
    assert seen == [(LENET, 0.9)]


def test_names_with_pattern_characters_match_their_own_layer_only():
    names = ["a[0]", "a0", "b*", "bc", "?", "d"]
    model = nn.Sequential()
    for width, name in enumerate(names, start=3):
        model.add_module(name, nn.Linear(width, 7))
    expected = erk([(7, width) for width in range(3, 9)], 0.7)
    assert counts_of(model, allocate(model, 0.7)) == expected
    assert len(set(expected)) > 2


def test_layers_without_positions_get_nothing():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 5), nn.Linear(4, 5))
    assert allocate(model, 0.5) == {"0": 0.0, "1": 0.5}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: apportion(1.0, [1], [1]), TypeError, "total must be an integer, got 1.0"),
        (lambda: apportion(5, [1, 1], [2, 2]), ValueError, "sums of floors and caps, 0 and 4, got 5"),
        (lambda: apportion(1, [1, 1], [2, 2], [1, 1]), ValueError, "sums of floors and caps, 2 and 4, got 1"),
        (lambda: apportion(1, [1], []), ValueError, "must be equally long, got 1, 0, 0"),
        (lambda: apportion(1, [1, math.nan], [1, 1]), ValueError, r"weights\[1\] must be finite, got nan"),
        (lambda: apportion(1, [math.inf], [1]), ValueError, r"weights\[0\] must be finite, got inf"),
        (lambda: apportion(1, [-1], [1]), ValueError, r"weights\[0\] must be at least 0, got -1"),
        (lambda: apportion(1, [None], [1]), TypeError, r"weights\[0\] must be a number, got None"),
        (lambda: apportion(1, [1], [-1]), ValueError, r"caps\[0\] must be at least 0, got -1"),
        (
            lambda: apportion(1, [1], [1], [2]),
            ValueError,
            r"floors\[0\] must not exceed caps\[0\], got 2 and 1",
        ),
        (lambda: uniform(LENET, 1.5), ValueError, r"sparsity must be a finite number in \[0, 1\], got 1.5"),
        (lambda: er(LENET, "0.5"), TypeError, "sparsity must be a number"),
        (lambda: erk([(3, 2.0)], 0.5), TypeError, r"shapes\[0\]\[1\] must be an integer, got 2.0"),
        (lambda: erk([(3, -1)], 0.5), ValueError, r"shapes\[0\]\[1\] must be at least 0, got -1"),
        (lambda: erk(LENET, 0.5, power=-1), ValueError, "power must be at least 0, got -1"),
        (lambda: erk(LENET, 0.5, power=None), TypeError, "power must be a number, got None"),
        (lambda: allocate(lenet(), 2.0), ValueError, "sparsity must be a finite number"),
        (lambda: allocate(lenet(), 2.0, {"*": 0.5}), ValueError, "sparsity must be a finite number"),
        (lambda: allocate(lenet(), 0.5, {"*": 2.0}), ValueError, "sparsity must be a finite number"),
        (
            lambda: allocate(lenet(), 0.5, {"3": 0.5}),
            ValueError,
            "method must match .* got '3' without one; .* 0, 1, 2",
        ),
        (lambda: allocate(lenet(), 0.5, "ERK"), ValueError, "method must be \"uniform\", .* got 'ERK'"),
        (lambda: allocate(lenet(), 0.5, None), ValueError, "mapping from keys to sparsity, got None"),
        (lambda: allocate(lenet(), 0.5, lambda *_: [1]), ValueError, r"a count for each layer.* got \[1\]"),
        (lambda: allocate(lenet(), 0.5, lambda *_: [1, 1, 1001]), ValueError, "at most its size"),
        (lambda: allocate(lenet(), 0.5, lambda *_: [1, 1, 0.5]), TypeError, "from method must be an integer"),
        (lambda: allocate(lenet(), 0.5, include="x*"), ValueError, r"include must match .* got 'x\*'"),
        (lambda: allocate(lenet(), 0.5, exempt=["0", "y"]), ValueError, "exempt must match .* got 'y'"),
        (lambda: allocate(tower(), 0.5, exempt="owns"), ValueError, "exempt must match .* got 'owns'"),
        (lambda: allocate(lenet(), 0.5, exempt_types=nn.ReLU), ValueError, "got ReLU, which has none"),
        (
            lambda: allocate(lenet(), 0.5, first=True),
            ValueError,
            'first must be "sparse" or "dense", got True',
        ),
        (
            lambda: allocate(lenet(), 0.5, last="no"),
            ValueError,
            'last must be "sparse" or "dense", got \'no\'',
        ),
        (lambda: allocate(lenet(), 0.5, exempt="*"), ValueError, "left none of 0, 1, 2"),
        (lambda: allocate(lenet(), 0.5, include="0", last="dense"), ValueError, "left none of 0$"),
        (lambda: allocate(nn.Linear(2, 2), 0.5), ValueError, "got a Linear itself"),
        (lambda: allocate(nn.ReLU(), 0.5), ValueError, "include must match .* the dense layers are: none"),
    ],
)
def test_misuse_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
