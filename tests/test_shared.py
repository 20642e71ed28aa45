"""What thins the combinations that a run tries leaves no pair out."""

from __future__ import annotations

import itertools

from tests.shared import half


def test_half_of_the_combinations_has_every_pair() -> None:
    axes = "abc", range(5), "CF", [None, 1.5]
    found = half(*axes)
    assert len(found) == len(set(found)) == len(list(itertools.product(*axes))) // 2
    for one, other in itertools.combinations(range(len(axes)), 2):
        pairs = {(each[one], each[other]) for each in found}
        assert pairs == set(itertools.product(axes[one], axes[other]))
