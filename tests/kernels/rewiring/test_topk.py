import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselab.kernels.rewiring import topk as _topk
from sparselab.kernels.rewiring.topk import StreamedTopK, largest


def slow_largest(scores, k):
    order = sorted(range(len(scores)), key=lambda i: (-np.nan_to_num(scores[i], nan=-np.inf), i))
    return sorted(order[:k])


def slow_free_topk(matrix, live, k):
    flat = np.abs(matrix.ravel())
    free = [p for p in range(flat.size) if p not in set(live.tolist())]
    return sorted(sorted(free, key=lambda p: (-flat[p], p))[:k])


def stream(matrix, live, k, heights):
    top = StreamedTopK(k, live, matrix.shape[1], matrix.dtype)
    row = 0
    for height in [*heights, matrix.shape[0]]:
        top.push(row, matrix[row : row + height])
        row = min(row + height, matrix.shape[0])
    return top


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, np.inf, -1.0, np.nan]), max_size=30),
    st.data(),
)
def test_largest_breaks_ties_by_index(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    assert largest(np.array(scores), k).tolist() == slow_largest(scores, k)


@pytest.mark.parametrize("k", [-1, 4])
def test_largest_refuses_an_impossible_count(k):
    with pytest.raises(ValueError, match=r"k must lie in \[0, 3\]"):
        largest(np.zeros(3), k)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    cols=st.integers(1, 40),
    k=st.integers(0, 60),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    n_levels=st.sampled_from([1, 3, 10**6]),
    heights=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_stream_agrees_with_sorting(seed, rows, cols, k, density, n_levels, heights, dtype):
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-n_levels, n_levels + 1, (rows, cols)).astype(dtype)
    live = np.flatnonzero(rng.random(rows * cols) < density)
    positions, scores = stream(matrix, live, k, heights).result()
    expected = slow_free_topk(matrix, live, k)
    assert positions.tolist() == expected
    assert scores.dtype == dtype
    np.testing.assert_array_equal(scores, np.abs(matrix.ravel()[expected]))


@pytest.mark.parametrize("order", ["ascending", "descending", "random", "equal", "two levels"])
@pytest.mark.parametrize("k", [1, 7, 900])
@pytest.mark.parametrize("heights", [[], [1] * 49, [20, 13]], ids=["whole", "rows", "uneven"])
def test_a_full_buffer_is_compacted_exactly(monkeypatch, order, k, heights):
    monkeypatch.setattr(_topk, "_SLACK", 32)
    rng = np.random.default_rng(0)
    flat = np.arange(1, 5001.0)
    flat = {
        "ascending": flat,
        "descending": flat[::-1].copy(),
        "random": rng.permutation(flat),
        "equal": np.ones(5000),
        "two levels": rng.integers(1, 3, 5000).astype(float),
    }[order]
    flat *= rng.choice([-1, 1], 5000)
    live = np.sort(rng.choice(5000, 500, replace=False))
    top = stream(flat.reshape(50, 100), live, k, heights)
    free = np.setdiff1d(np.arange(5000), live)
    expected = np.sort(free[np.lexsort((free, -np.abs(flat[free])))[:k]])
    np.testing.assert_array_equal(top.result()[0], expected)
    assert top._scores.size <= 2 * k + 32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 17, 99], ids=["live", "middle", "last"])
def test_values_that_are_not_finite_are_reported(bad, position):
    matrix = np.ones((10, 10), np.float32)
    live = np.array([0, 5])
    assert stream(matrix, live, 4, [3]).finite
    matrix.ravel()[position] = bad
    top = stream(matrix, live, 4, [3])
    assert not top.finite
    with pytest.raises(ValueError, match="not finite"):
        top.result()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_seen_behind_a_high_threshold(monkeypatch, bad):
    monkeypatch.setattr(_topk, "_SLACK", 16)
    matrix = np.arange(2000.0, 0, -1).reshape(20, 100)
    matrix[19, 50] = bad
    assert not stream(matrix, np.empty(0, np.int64), 3, []).finite


def test_positions_beyond_32_bits_do_not_wrap():
    cols = 2**20
    first_row = 2**12
    block = np.zeros((1, cols), np.float32)
    block[0, 3:6] = 5, 9, 7
    top = StreamedTopK(2, np.array([first_row * cols + 4]), cols, np.float32)
    top.push(first_row, block)
    assert top.result()[0].tolist() == [first_row * cols + 3, first_row * cols + 5]


def test_misuse_is_named():
    live = np.empty(0, np.int64)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        StreamedTopK(-1, live, 3, np.float32)
    top = StreamedTopK(2, live, 3, np.float32)
    with pytest.raises(ValueError, match=r"float32 of shape \(n, 3\)"):
        top.push(0, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="got float64"):
        top.push(0, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="C-contiguous"):
        top.push(0, np.zeros((3, 2), np.float32).T)
    top.push(0, np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="first_row must be at least 2, the row after those seen"):
        top.push(1, np.zeros((2, 3), np.float32))


def test_the_matrix_is_only_read():
    matrix = np.arange(12.0).reshape(3, 4)
    matrix.setflags(write=False)
    assert stream(matrix, np.array([11]), 2, []).result()[0].tolist() == [9, 10]
