"""What the products compute, for every pattern, layout and dtype."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import PaddedCSR, spmm
from tests import strategies
from tests.kernels.contract import OPERATIONS, Operation, assert_same_bits, dense
from tests.oracle import Exact, assert_close, product
from tests.strategies import LAYOUTS, TOKENS, build

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
tokens_around_tiles = st.sampled_from(TOKENS)


@pytest.mark.any_width
@every_operation
@given(
    W=strategies.matrices(),
    tokens=tokens_around_tiles,
    layouts=st.tuples(*[strategies.operand_layouts()] * 2),
    rng=strategies.generators(),
)
def test_equals_the_oracle(
    operation: Operation, W: PaddedCSR, tokens: int, layouts: tuple[str, str], rng: np.random.Generator
) -> None:
    shapes = [shape(W, tokens) for shape in operation.operands.values()]
    operands = [strategies.operand(rng, *each) for each in zip(shapes, [W.dtype] * 2, layouts, strict=False)]
    before = [array.copy() for array in (*operands, W.indptr, W.row_nnz, W.indices, W.values)]
    result = operation.call(W, *operands)
    assert_close(result, operation.exact(W, *operands), W.dtype)
    for array, copy in zip((*operands, W.indptr, W.row_nnz, W.indices, W.values), before, strict=True):
        assert_same_bits(array, copy)


@every_operation
@given(
    W=strategies.matrices(sizes=(1, 7, 9, 33, 64)), tokens=tokens_around_tiles, rng=strategies.generators()
)
def test_equals_the_reference(
    operation: Operation, W: PaddedCSR, tokens: int, rng: np.random.Generator
) -> None:
    operands = operation.draw(rng, W, tokens)
    exact = operation.exact(W, *operands)
    meant = operation.reference(W.astype(np.float64), *(array.astype(np.float64) for array in operands))
    assert_close(meant, exact, np.float64)
    assert_close(operation.reference(W, *operands), exact, W.dtype)
    assert_close(operation.call(W, *operands), Exact(meant, exact.magnitude, exact.terms), W.dtype)


@pytest.mark.any_width
@every_operation
@given(
    W=strategies.matrices(sizes=(1, 7, 8, 9, 33, 65, 129)), tokens=tokens_around_tiles,
    layout=st.sampled_from(sorted(LAYOUTS)), rng=strategies.generators(),
)  # fmt: skip
def test_writes_all_of_out_and_nothing_else(
    operation: Operation, W: PaddedCSR, tokens: int, layout: str, rng: np.random.Generator
) -> None:
    operands = operation.draw(rng, W, tokens)
    shape = operation.output(W, tokens)
    base = strategies.base_array(layout, (shape[0], shape[1] if len(shape) == 2 else 1), W.dtype)
    out = LAYOUTS[layout].cut(base)
    out[...] = np.nan
    written = LAYOUTS[layout].cut(inside := np.zeros_like(base, np.bool_))
    written[...] = True
    out = out if len(shape) == 2 else out[:, 0]
    result = operation.call(W, *operands, out)
    assert result is out
    assert_close(result, operation.exact(W, *operands), W.dtype)
    np.testing.assert_array_equal(base[~inside], -77)


@every_operation
def test_writes_an_unaligned_out(operation: Operation) -> None:
    rng = np.random.default_rng(0)
    W = build((33, 20), "unequal", rng, spare=2)
    operands = operation.draw(rng, W, 65)
    records = np.zeros(operation.output(W, 65), [("odd", np.uint8), ("number", np.float32)])
    records["number"] = np.nan
    result = operation.call(W, *operands, records["number"])
    assert_close(result, operation.exact(W, *operands), np.float32)
    np.testing.assert_array_equal(records["odd"], 0)


@every_operation
@pytest.mark.parametrize("layout", [*LAYOUTS, "unaligned"])
def test_the_layout_of_operands_changes_no_bit(operation: Operation, layout: str) -> None:
    rng = np.random.default_rng(1)
    W = build((70, 90), "unequal", rng)
    plain = operation.draw(rng, W, 67)
    moved = []
    for array in plain:
        view = strategies.operand(rng, array.shape, W.dtype, layout)
        view.flags.writeable = True
        view[...] = array
        moved.append(view)
    assert_same_bits(operation.call(W, *moved), operation.call(W, *plain))


@every_operation
@given(W=strategies.matrices(sizes=(7, 33, 65)), tokens=tokens_around_tiles, rng=strategies.generators())
def test_nan_and_infinity_come_out_where_live_connections_carry_them(
    operation: Operation, W: PaddedCSR, tokens: int, rng: np.random.Generator
) -> None:
    operands = operation.draw(rng, W, tokens)
    for array in operands:
        for value in (np.nan, np.inf, -np.inf):
            array[rng.random(array.shape) < 0.01] = value
    values = W.values.copy()
    live = W.live_slots()
    values[rng.choice(live, min(2, len(live)), replace=False)] = np.inf
    W = W.with_values(values)
    assert_close(operation.call(W, *operands), operation.exact(W, *operands), W.dtype)


def test_a_missing_connection_keeps_infinity_out() -> None:
    W = PaddedCSR.from_dense(np.array([[1, 0], [0, 1]], np.float32))
    X = np.array([[np.inf, 1, np.nan], [2, np.nan, 3]], np.float32)
    np.testing.assert_array_equal(spmm(W, X), X)


@pytest.mark.parametrize("order", ["C", "F"])
@given(W=strategies.matrices(sizes=(1, 8, 33, 65)), tokens=tokens_around_tiles, rng=strategies.generators())
def test_bias_is_added_to_every_token(
    order: str, W: PaddedCSR, tokens: int, rng: np.random.Generator
) -> None:
    X = np.asarray(rng.standard_normal((W.shape[1], tokens)), W.dtype, order=order)  # type: ignore[call-overload]
    bias = rng.standard_normal(W.shape[0]).astype(W.dtype)
    matrix, live = dense(W)
    exact = product(matrix, X, live=live, bias=bias)
    assert_close(spmm(W, X, bias=bias), exact, W.dtype)
    both = np.repeat(bias, 2)
    both.flags.writeable = False
    assert_same_bits(spmm(W, X, bias=both[::2]), spmm(W, X, bias=bias))


@pytest.mark.parametrize("shift", [-8, -1, 0, 1, 8])
@pytest.mark.parametrize("order", ["C", "F"])
def test_out_may_overlap_the_input(order: str, shift: int) -> None:
    rng = np.random.default_rng(2)
    for operation in OPERATIONS[:2]:
        W = build((40, 40), "even", rng)
        buffer = rng.standard_normal(40 * 70 + 16).astype(np.float32)
        X = buffer[8 : 8 + 2800].reshape((40, 70), order=order)  # type: ignore[call-overload]
        out = buffer[8 + shift : 8 + shift + 2800].reshape((40, 70), order=order)  # type: ignore[call-overload]
        assert np.shares_memory(X, out)
        exact = operation.exact(W, X)
        assert_close(operation.call(W, X, out), exact, np.float32)


def test_gradient_out_may_overlap_the_inputs() -> None:
    rng = np.random.default_rng(3)
    operation = OPERATIONS[2]
    W = build((30, 40), "even", rng)
    for k in range(2):
        operands = operation.draw(rng, W, 65)
        out = operands[k].T.reshape(-1)[: W.capacity]
        assert len(out) == W.capacity
        assert np.shares_memory(out, operands[k])
        exact = operation.exact(W, *operands)
        assert_close(operation.call(W, *operands, out), exact, np.float32)


def test_out_may_overlap_bias_and_values() -> None:
    rng = np.random.default_rng(4)
    W = build((40, 40), "even", rng)
    X = rng.standard_normal((40, 300)).astype(np.float32)
    out = rng.standard_normal((300, 40)).astype(np.float32).T
    matrix, live = dense(W)
    exact = product(matrix, X, live=live, bias=out[:, 0])
    assert_close(spmm(W, X, out, bias=out[:, 0]), exact, np.float32)
    buffer = np.zeros(40 * 300, np.float32)
    buffer[: W.capacity] = W.values
    shared = W.with_values(buffer[: W.capacity])
    assert_close(spmm(shared, X, buffer.reshape(40, 300)), product(matrix, X, live=live), np.float32)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_new_result_is_laid_out_as_the_tokens_are(order: str, reverse: bool) -> None:
    W = build((20, 30), "even", np.random.default_rng(0))
    X = np.ones((30, 40), np.float32, order=order)  # type: ignore[call-overload]
    Y = spmm(W, X[::-1, ::-1] if reverse else X)
    assert Y.flags.f_contiguous is (order == "F")


@every_operation
@pytest.mark.parametrize("shape", [(0, 9), (9, 0), (0, 0), (9, 9)])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_add_up_gives_zeros(operation: Operation, shape: tuple[int, int], tokens: int) -> None:
    W = PaddedCSR.from_dense(np.zeros(shape, np.float32))
    result = operation.call(
        W, *(np.ones(draw(W, tokens), np.float32) for draw in operation.operands.values())
    )
    assert_same_bits(result, np.zeros(operation.output(W, tokens), np.float32))


def test_no_columns_leave_the_bias() -> None:
    W = PaddedCSR.from_dense(np.zeros((2, 0), np.float32))
    Y = spmm(W, np.ones((0, 3), np.float32), bias=np.array([1, 2], np.float32))
    np.testing.assert_array_equal(Y, [[1, 1, 1], [2, 2, 2]])


@every_operation
@pytest.mark.parametrize("shape", [(5, 70_000), (70_000, 5)])
def test_more_than_65536_rows_or_columns(operation: Operation, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    W = PaddedCSR.random(shape, 0.99, rng)
    assert W.indices.dtype == (np.int32 if shape[1] > 65_536 else np.uint16)
    assert max(W.indices.max(), W.live_slots().max()) > 2
    operands = operation.draw(rng, W, 3)
    assert_close(operation.call(W, *operands), operation.exact(W, *operands), np.float32)
