"""Steps that pass something through a layer: what it returns and sends back, or that it is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fuzz import adapter
from tests.fuzz.case import Case, Skipped
from tests.fuzz.layer_inputs import draw_input, hostile_input, odd_input, plain, takes_odd_inputs
from tests.fuzz.layer_state import State


def train(case: Case, state: State) -> None:
    """A forward and a backward pass."""
    x = draw_input(case, state.layer).detach()
    if x.is_floating_point():
        x.requires_grad_(case.chance(0.8))
    case.note(f"{state.kind} forward")
    _train(case, state, x, x)


def train_odd(case: Case, state: State) -> None:
    """The same with a sparse or jagged input."""
    how, given, numbers = odd_input(case, state.layer)
    case.note(f"{state.kind} forward", how)
    _train(case, state, given, numbers)


def _train(case: Case, state: State, given: Tensor, x: Tensor) -> None:
    """Both passes of what is given, which is made of the numbers x."""
    layer, twin = state.layer, state.twin
    trained = adapter.stored(layer).requires_grad
    layer.zero_grad(set_to_none=True)
    y = plain(case.valid(lambda: layer(given)))
    dy = torch.from_numpy(case.rng.standard_normal(tuple(y.shape))).to(y.dtype)
    if case.chance(0.3) and dy.ndim == 2:
        dy = dy.T.contiguous().T
    outcome = twin.outcome(layer, x, dy)
    twin.expect_output(layer, x, y, outcome)
    if not y.requires_grad:
        return
    case.note(f"{state.kind} backward", case.label.mutation)
    case.valid(lambda: y.backward(dy))
    if trained:
        twin.expect_gradients(layer, x, outcome)


def infer(case: Case, state: State) -> None:
    """A forward pass without gradients."""
    x = draw_input(case, state.layer)
    mode = case.pick((torch.no_grad, torch.inference_mode))
    case.note(f"{state.kind} infer", mode.__name__)
    outcome = state.twin.outcome(state.layer, x)
    with mode():
        y = case.valid(lambda: state.layer(x))
    state.twin.expect_output(state.layer, x, y, outcome)


def wrong_input(case: Case, state: State) -> None:
    """An input that does not fit must be refused."""
    layer = state.layer
    x = draw_input(case, layer)
    how, wrong = (_wrong_numbers if hasattr(layer, "num_embeddings") else _wrong_tensor)(case, state, x)
    case.note(f"{state.kind} forward", f"input {how}")
    names = () if how == "numpy" or adapter.has_mask(layer) else ("input", "x")
    also = {"numpy": (AttributeError,), "outside": (IndexError,)}.get(how, ())
    case.refuse(lambda: layer(wrong), *names, what=f"an input that is {how}", also=also)


def _wrong_tensor(case: Case, state: State, x: Tensor) -> tuple[str, Any]:
    how = case.pick(("narrow", "wide", "dtype", "int", "scalar", "numpy", "meta"))
    dim = -state.layer.n_dims - 1 if hasattr(state.layer, "kernel_size") else -1
    if (how == "narrow" and x.shape[dim] == 1) or (how == "meta" and adapter.has_mask(state.layer)):
        raise Skipped
    other = torch.float64 if x.dtype == torch.float32 else torch.float32
    wrong: Any = {
        "narrow": lambda: x.narrow(dim, 0, x.shape[dim] - 1), "wide": lambda: torch.cat([x, x], dim),
        "dtype": lambda: x.to(other), "int": lambda: x.long(),
        "scalar": lambda: torch.ones((), dtype=x.dtype),
        "numpy": x.numpy, "meta": lambda: x.to("meta"),
    }[how]()  # fmt: skip
    return how, wrong


def _wrong_numbers(case: Case, state: State, x: Tensor) -> tuple[str, Any]:
    """Of rows of an embedding."""
    how = case.pick(("outside", "float", "int16", "bool", "numpy", "meta"))
    if how == "outside":
        numbers = torch.cat([x.flatten(), x.new_zeros(1)])
        rows = state.layer.num_embeddings
        numbers[int(case.rng.integers(len(numbers)))] = case.pick((rows, -1, 2**31 - 1, -(2**31)))
        return how, numbers
    makers = {
        "float": x.double, "int16": x.short, "bool": x.bool, "numpy": x.numpy, "meta": lambda: x.to("meta"),
    }  # fmt: skip
    return how, makers[how]()


def hostile(case: Case, state: State) -> None:
    """A sparse input with numbers out of range must be refused before anything is read by them."""
    if not takes_odd_inputs(state.layer):
        raise Skipped
    how, given = hostile_input(case, state.layer)
    case.note(f"{state.kind} forward", how)
    with torch.set_grad_enabled(case.chance(0.5)):
        case.refuse(lambda: state.layer(given), "input", what=how)


def sized(case: Case, state: State) -> None:
    """A transposed convolution that is told the size of its output."""
    layer = state.layer
    if not adapter.is_transposed_conv(layer):
        raise Skipped
    x = draw_input(case, layer)
    least = layer.space.least(x.shape[-layer.n_dims :])
    more = [int(case.rng.integers(-1, step + 1)) for step in layer.stride]
    size = [n + m for n, m in zip(least, more, strict=True)]
    case.note(f"{state.kind} forward", "output_size")
    fits = all(0 <= m < step for m, step in zip(more, layer.stride, strict=True)) and min(size) > 0
    if not fits:
        case.refuse(lambda: layer(x, size), "output_size", "input", what=f"output_size {size}")
        return
    before, layer.output_padding = layer.output_padding, tuple(more)
    outcome = state.twin.outcome(layer, x)
    layer.output_padding = before
    state.twin.expect_output(layer, x, case.valid(lambda: layer(x, size)), outcome)
