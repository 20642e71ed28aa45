"""What the products compute, for every layout on every device, pattern, memory order and dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.kernels import PaddedCSR, sddmm_dw, spmm
from tests import strategies
from tests.kernels.contract import (
    BACKENDS,
    OPERATIONS,
    Backend,
    Operation,
    assert_same_bits,
    dense,
    every_backend,
    every_operation,
    every_product,
    places,
)
from tests.oracle import Exact, assert_close, product
from tests.strategies import LAYOUTS

Array = np.ndarray[Any, Any]


@pytest.mark.any_width
@every_product
@given(
    data=st.data(),
    layouts=st.tuples(*[strategies.operand_layouts()] * 2),
    rng=strategies.generators(),
)
def test_equals_the_oracle(
    backend: Backend,
    operation: Operation,
    data: st.DataObject,
    layouts: tuple[str, str],
    rng: np.random.Generator,
) -> None:
    W, tokens = data.draw(backend.matrices()), data.draw(st.sampled_from(backend.tokens))
    shapes = [shape(W, tokens) for shape in operation.operands.values()]
    operands = [strategies.operand(rng, *each) for each in zip(shapes, [W.dtype] * 2, layouts, strict=False)]
    before = [array.copy() for array in (*operands, W.positions(), W.values)]
    result = operation.call(W, *operands, device=backend.device)
    assert_close(result, operation.exact(W, *operands), W.dtype)
    for array, copy in zip((*operands, W.positions(), W.values), before, strict=True):
        assert_same_bits(array, copy)


@every_backend
def test_places_agree_with_the_layout(backend: Backend) -> None:
    W = backend.example((37, 50))
    matrix, live = dense(W)
    np.testing.assert_array_equal(W.to_dense(), matrix)
    assert 0 < live.sum() < live.size
    assert len(places(W)[0]) == live.sum()


@pytest.mark.any_width
@every_product
@given(data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)), rng=strategies.generators())
def test_writes_all_of_out_and_nothing_else(
    backend: Backend, operation: Operation, data: st.DataObject, layout: str, rng: np.random.Generator
) -> None:
    W, tokens = data.draw(backend.matrices()), data.draw(st.sampled_from(backend.tokens))
    operands = operation.draw(rng, W, tokens)
    shape = operation.output(W, tokens)
    base = strategies.base_array(layout, (shape[0], int(np.prod(shape[1:]))), W.dtype)
    out = LAYOUTS[layout].cut(base)
    out[...] = np.nan
    written = LAYOUTS[layout].cut(inside := np.zeros_like(base, np.bool_))
    written[...] = True
    view = out.reshape(shape) if len(shape) == 2 else _unfold(out, shape)
    result = operation.call(W, *operands, view, device=backend.device)
    assert result is view
    assert_close(result, operation.exact(W, *operands), W.dtype)
    np.testing.assert_array_equal(base[~inside], -77)


def _unfold(out: Array, shape: tuple[int, ...]) -> Array:
    """The same memory, if in any way possible, with the second dimension cut into several."""
    if len(shape) == 1:
        return out[:, 0]
    steps = out.strides[0], out.strides[1] * shape[2], out.strides[1]
    return np.lib.stride_tricks.as_strided(out, shape, steps)


@every_product
def test_writes_an_unaligned_out(backend: Backend, operation: Operation) -> None:
    rng = np.random.default_rng(0)
    W = backend.example((33, 20))
    operands = operation.draw(rng, W, 65)
    records = np.zeros(operation.output(W, 65), [("odd", np.uint8), ("number", np.float32)])
    records["number"] = np.nan
    result = operation.call(W, *operands, records["number"], device=backend.device)
    assert_close(result, operation.exact(W, *operands), np.float32)
    np.testing.assert_array_equal(records["odd"], 0)


@every_operation
@pytest.mark.parametrize("backend", BACKENDS[:2], ids=repr)  # NumPy's own order of addition may depend on it
@pytest.mark.parametrize("layout", [*LAYOUTS, "unaligned"])
def test_the_layout_of_operands_changes_no_bit(backend: Backend, operation: Operation, layout: str) -> None:
    rng = np.random.default_rng(1)
    W = backend.example((70, 90))
    plain = operation.draw(rng, W, 67)
    moved = []
    for array in plain:
        view = strategies.operand(rng, array.shape, W.dtype, layout)
        view.flags.writeable = True
        view[...] = array
        moved.append(view)
    assert_same_bits(operation.call(W, *moved), operation.call(W, *plain))


@every_product
@given(data=st.data(), rng=strategies.generators())
def test_nan_and_infinity_come_out_where_live_connections_carry_them(
    backend: Backend, operation: Operation, data: st.DataObject, rng: np.random.Generator
) -> None:
    W, tokens = data.draw(backend.matrices()), data.draw(st.sampled_from(backend.tokens))
    operands = operation.draw(rng, W, tokens)
    for array in operands:
        for value in (np.nan, np.inf, -np.inf):
            array[rng.random(array.shape) < 0.01] = value
    values = W.values.copy()
    slots = places(W)[0]
    values.reshape(-1)[rng.choice(slots, min(2, len(slots)), replace=False)] = np.inf
    W = W.with_values(values)
    with np.errstate(invalid="ignore"):
        result = operation.call(W, *operands, device=backend.device)
    assert_close(result, operation.exact(W, *operands), W.dtype)


@every_backend
def test_a_missing_connection_keeps_infinity_out(backend: Backend) -> None:
    W = backend.example((40, 36), density=0.1)
    _, live = dense(W)
    X = np.where(live.any(0)[:, None], 1, np.inf).astype(np.float32).repeat(9, 1)
    assert np.isinf(X).any()
    assert np.isfinite(spmm(W, X, device=backend.device)).all()


@every_backend
@pytest.mark.parametrize("order", ["C", "F"])
@given(data=st.data(), rng=strategies.generators())
def test_bias_is_added_to_every_token(
    order: str, backend: Backend, data: st.DataObject, rng: np.random.Generator
) -> None:
    W, tokens = data.draw(backend.matrices()), data.draw(st.sampled_from(backend.tokens))
    X = np.asarray(rng.standard_normal((W.shape[1], tokens)), W.dtype, order=order)  # type: ignore[call-overload]
    bias = rng.standard_normal(W.shape[0]).astype(W.dtype)
    matrix, live = dense(W)
    Y = spmm(W, X, bias=bias, device=backend.device)
    assert_close(Y, product(matrix, X, live=live, bias=bias), W.dtype)
    both = np.repeat(bias, 2)
    both.flags.writeable = False
    assert_same_bits(spmm(W, X, bias=both[::2], device=backend.device), Y)


@every_backend
@pytest.mark.parametrize("shift", [-8, -1, 0, 1, 8])
@pytest.mark.parametrize("order", ["C", "F"])
def test_out_may_overlap_the_input(order: str, shift: int, backend: Backend) -> None:
    rng = np.random.default_rng(2)
    W = backend.example((40, 40))
    for operation in OPERATIONS[:2]:
        buffer = rng.standard_normal(40 * 70 + 16).astype(np.float32)
        X = buffer[8 : 8 + 2800].reshape((40, 70), order=order)  # type: ignore[call-overload]
        out = buffer[8 + shift : 8 + shift + 2800].reshape((40, 70), order=order)  # type: ignore[call-overload]
        assert np.shares_memory(X, out)
        exact = operation.exact(W, X)
        assert_close(operation.call(W, X, out, device=backend.device), exact, np.float32)


@every_backend
def test_gradient_out_may_overlap_the_inputs_and_the_values(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    operation = OPERATIONS[2]
    W = backend.example((30, 40))
    for k in range(2):
        operands = operation.draw(rng, W, 65)
        out = operands[k].T.reshape(-1)[: W.values.size].reshape(W.values.shape)
        assert np.shares_memory(out, operands[k])
        exact = operation.exact(W, *operands)
        assert_close(operation.call(W, *operands, out, device=backend.device), exact, np.float32)
    operands = operation.draw(rng, W, 65)
    exact = operation.exact(W, *operands)
    assert_close(sddmm_dw(W, *operands, W.values, device=backend.device), exact, np.float32)


@every_backend
def test_out_may_overlap_bias_and_values(backend: Backend) -> None:
    rng = np.random.default_rng(4)
    W = backend.example((40, 40))
    X = rng.standard_normal((40, 300)).astype(np.float32)
    out = rng.standard_normal((300, 40)).astype(np.float32).T
    matrix, live = dense(W)
    exact = product(matrix, X, live=live, bias=out[:, 0])
    assert_close(spmm(W, X, out, bias=out[:, 0], device=backend.device), exact, np.float32)
    buffer = np.zeros(40 * 300, np.float32)
    buffer[: W.values.size] = W.values.reshape(-1)
    shared = W.with_values(buffer[: W.values.size].reshape(W.values.shape))
    Y = spmm(shared, X, buffer.reshape(40, 300), device=backend.device)
    assert_close(Y, product(matrix, X, live=live), np.float32)


@every_backend
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_new_result_is_laid_out_as_the_tokens_are(order: str, reverse: bool, backend: Backend) -> None:
    W = backend.example((20, 30))
    X = np.ones((30, 40), np.float32, order=order)  # type: ignore[call-overload]
    Y = spmm(W, X[::-1, ::-1] if reverse else X, device=backend.device)
    assert Y.flags.f_contiguous is (order == "F")


@every_product
@pytest.mark.parametrize("shape", [(0, 9), (9, 0), (0, 0), (9, 9)])
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
def test_nothing_to_add_up_gives_zeros(
    backend: Backend, operation: Operation, shape: tuple[int, int], tokens: int
) -> None:
    W = backend.example(shape, density=0)
    operands = (np.ones(draw(W, tokens), np.float32) for draw in operation.operands.values())
    result = operation.call(W, *operands, device=backend.device)
    assert_same_bits(result, np.zeros(operation.output(W, tokens), np.float32))


@every_backend
@pytest.mark.parametrize("tokens", [3, 70])
def test_no_columns_leave_the_bias(backend: Backend, tokens: int) -> None:
    W = backend.example((2, 0), density=0)
    Y = spmm(W, np.ones((0, tokens), np.float32), bias=np.array([1, 2], np.float32), device=backend.device)
    np.testing.assert_array_equal(Y, [[1] * tokens, [2] * tokens])


@every_operation
@pytest.mark.parametrize("shape", [(5, 70_000), (70_000, 5)])
def test_more_than_65536_rows_or_columns(operation: Operation, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    W = PaddedCSR.random(shape, 0.99, rng)
    assert W.indices.dtype == (np.int32 if shape[1] > 65_536 else np.uint16)
    _, rows, columns = places(W)
    assert max(rows.max(), columns.max()) > 65_536
    operands = operation.draw(rng, W, 3)
    assert_close(operation.call(W, *operands), operation.exact(W, *operands), np.float32)


@every_backend
def test_a_transposed_matrix_and_another_device_compute_the_same(backend: Backend) -> None:
    rng = np.random.default_rng(6)
    W = backend.example((40, 50))
    DY = rng.standard_normal((40, 9)).astype(np.float32)
    exact = OPERATIONS[1].exact(W, DY)
    for result in (spmm(W.transpose(), DY, device=backend.device), OPERATIONS[1].call(W, DY)):
        assert_close(result, Exact(*exact), np.float32)
