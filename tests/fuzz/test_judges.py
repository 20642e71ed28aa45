"""What judges the package must refuse wrong answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.fuzz.case import REFUSED, Case, Found
from tests.fuzz.judge import Twin, exact_product, expect, expect_equal
from tests.fuzz.operator_judge import EPS, Invalid, judge, results


@pytest.fixture
def twin() -> Twin:
    """A matrix of 2 x 2 blocks, of which the last hang over the edge."""
    return Twin((3, 5), (2, 2)).set(np.array([0, 2, 5]), np.arange(12.0))


def test_a_twin_is_the_dense_matrix(twin: Twin) -> None:
    assert twin.dense().tolist() == [[0, 1, 0, 0, 4], [2, 3, 0, 0, 6], [0, 0, 0, 0, 8]]
    assert twin.live().sum() == 7
    assert twin.free().tolist() == [1, 3, 4]
    inside = twin.gather(np.ones(twin.shape))
    assert inside.tolist() == [[[1, 1], [1, 1]], [[1, 0], [1, 0]], [[1, 0], [0, 0]]]


def test_a_rewrite_of_a_twin_keeps_drops_and_grows(twin: Twin) -> None:
    new = twin.rewritten(np.array([0, 1]), np.array([2, 4]))
    assert new.positions.tolist() == [2, 4, 5]
    assert new.weights[:, 0, 0].tolist() == [4, 0, 8]
    assert twin.positions.tolist() == [0, 2, 5]


def test_a_product_off_by_more_than_its_rounding_is_refused(twin: Twin) -> None:
    X = np.random.default_rng(0).standard_normal((5, 4))
    exact = exact_product(twin.dense(), X, twin.live())
    right = twin.dense() @ X
    expect(right, exact, np.float64)
    right[1, 2] += 1e-13
    with pytest.raises(Found, match=r"wrong: .*worst at \(1, 2\)"):
        expect(right, exact, np.float64)
    with pytest.raises(Found, match="differ"):
        expect_equal([1, 2], [1, 3], "numbers")
    with pytest.raises(Found, match="shape"):
        expect_equal([1, 2], [1], "numbers")


def arguments() -> dict[str, object]:
    """Of ``linear``, for a matrix of 3 x 4 with five connections."""
    return {
        "x": torch.arange(8.0).reshape(2, 4), "values": torch.arange(1.0, 6), "bias": torch.ones(3),
        "indptr": torch.tensor([0, 2, 2, 5]), "indices": torch.tensor([1, 3, 0, 2, 3], dtype=torch.uint16),
        "plans": 0,
    }  # fmt: skip


def test_an_operator_is_judged_by_its_arguments() -> None:
    W = torch.tensor([[0.0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 4, 5]])
    given = arguments()
    y = given["x"] @ W.T + 1  # type: ignore[operator]
    judge(y, results("linear", given), EPS[torch.float32])
    y[1, 2] += 1e-3
    with pytest.raises(Found, match="output 0: 1 of 6 are off"):
        judge(y, results("linear", given), EPS[torch.float32])
    with pytest.raises(Found, match="output 0"):
        judge(y[:1], results("linear", given), EPS[torch.float32])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", torch.ones(4)), ("x", torch.ones(2, 3)), ("x", torch.ones(2, 4).int()),
        ("values", torch.ones(4)), ("bias", torch.ones(2)), ("indptr", torch.tensor([0, 2, 1, 5])),
        ("indices", torch.tensor([1, 3, 0, 2, 4])), ("indices", torch.tensor([3, 1, 0, 2, 3])),
    ],
)  # fmt: skip
def test_arguments_without_a_right_result_are_told(name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(Invalid):
        results("linear", {**arguments(), name: wrong})


def test_a_wrong_call_must_raise_a_clean_error_that_names_an_argument() -> None:
    def fail(error: Exception) -> None:
        raise error

    case = Case("none", 0)
    assert case.attempt(lambda: fail(ValueError("out must be writable")), "out") is REFUSED
    assert case.attempt(lambda: 3, "out") == 3
    for error in (IndexError("out"), ZeroDivisionError("out"), ValueError("outside"), TypeError("unpack")):
        with pytest.raises(Found, match="unclean"):
            case.attempt(lambda: fail(error), "out")  # noqa: B023
    with pytest.raises(Found, match="accepted"):
        case.refuse(lambda: 3, "out")
    with pytest.raises(Found, match="refused"):
        case.valid(lambda: fail(ValueError("out")))
