"""The oracle must refuse wrong answers, or the tests that rely on it prove nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle import Exact, assert_close, error_bound, product


@pytest.fixture
def exact() -> Exact:
    rng = np.random.default_rng(0)
    live = rng.random((5, 30)) < 0.5
    return product(rng.standard_normal((5, 30)), rng.standard_normal((30, 4)), live=live, bias=np.ones(5))


def test_it_knows_a_product_by_hand() -> None:
    exact = product([[1, -2], [3, 4]], [[10], [np.inf]], live=[[True, True], [True, False]], bias=[100, 0])
    np.testing.assert_array_equal(exact.value, [[-np.inf], [30]])
    np.testing.assert_array_equal(exact.magnitude, [[np.inf], [30]])
    np.testing.assert_array_equal(exact.terms, [[3], [2]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_accepts_the_right_answer_and_an_error_within_the_bound(exact: Exact, dtype: type) -> None:
    assert_close(exact.value.astype(dtype), exact, dtype)
    assert_close((exact.value + 0.9 * error_bound(exact, dtype)).astype(dtype), exact, dtype)


@pytest.mark.parametrize("bounds", [1.5, -1.5, 5, 1e6])
def test_it_refuses_one_entry_off_by_a_few_bounds(exact: Exact, bounds: float) -> None:
    wrong = exact.value.copy()
    wrong[2, 3] += bounds * error_bound(exact, np.float64)[2, 3]
    with pytest.raises(AssertionError, match=r"1 of 20 entries .* worst at \(2, 3\)"):
        assert_close(wrong, exact, np.float64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_it_refuses_what_is_not_finite_where_a_number_belongs(exact: Exact, value: float) -> None:
    wrong = exact.value.copy()
    wrong[4, 0] = value
    with pytest.raises(AssertionError, match=r"worst at \(4, 0\)"):
        assert_close(wrong, exact, np.float64)


@pytest.mark.parametrize(
    ("belongs", "comes"), [(np.nan, 1.0), (np.inf, -np.inf), (np.inf, np.nan), (np.nan, np.inf)]
)
def test_it_refuses_a_number_where_nan_or_infinity_belongs(
    exact: Exact, belongs: float, comes: float
) -> None:
    exact.value[1, 1] = belongs
    right, wrong = exact.value.copy(), exact.value.copy()
    wrong[1, 1] = comes
    assert_close(right, exact, np.float64)
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_close(wrong, exact, np.float64)


def test_it_refuses_another_shape_dtype_or_type(exact: Exact) -> None:
    with pytest.raises(AssertionError, match="expected dtype float32"):
        assert_close(exact.value, exact, np.float32)
    with pytest.raises(AssertionError, match=r"expected shape \(5, 4\), got \(4, 5\)"):
        assert_close(exact.value.T, exact, np.float64)
    with pytest.raises(AssertionError, match="expected an array, got list"):
        assert_close(exact.value.tolist(), exact, np.float64)


def test_an_error_that_only_underflow_explains_passes() -> None:
    tiny = np.finfo(np.float32).tiny
    assert_close(np.array([[tiny / 2]], np.float32), product([[0.0]], [[1.0]]), np.float32)
    with pytest.raises(AssertionError):
        assert_close(np.array([[2 * tiny]], np.float32), product([[0.0]], [[1.0]]), np.float32)
