"""The operators of `torch.ops.sparselab` with one argument changed: an error, or the right number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz import adapter
from tests.fuzz.case import REFUSED, Case, Found, Skipped
from tests.fuzz.layer_draw import KINDS, draw_layer
from tests.fuzz.layer_inputs import differentiable, odd_input, plain, takes_odd_inputs
from tests.fuzz.operator_inputs import RESULTS
from tests.fuzz.operator_judge import EPS, Invalid, TooLarge, judge, results
from tests.guards import guarded

SPARSE = [kind for kind in KINDS if kind != "masked"]


def fenced(tensor: Tensor, front: bool) -> Tensor:
    """A contiguous copy between forbidden pages, where numpy knows the dtype."""
    if tensor.dtype == torch.bfloat16 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    array = tensor.detach().resolve_neg().numpy()
    return torch.from_numpy(guarded(np.ascontiguousarray(array).reshape(array.shape), front=front))


# --- changes of one argument ------------------------------------------------------------------------------


def _narrow(case: Case, tensor: Tensor) -> Tensor:
    dim = int(case.rng.integers(max(tensor.ndim, 1)))
    return tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def _shift(case: Case, tensor: Tensor) -> Tensor:
    dim = int(case.rng.integers(max(tensor.ndim, 1)))
    return tensor.narrow(dim, 1, tensor.shape[dim] - 1)


def _longer(case: Case, tensor: Tensor) -> Tensor:
    dim = int(case.rng.integers(max(tensor.ndim, 1)))
    return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)


def _many_more(case: Case, tensor: Tensor) -> Tensor:
    dim = int(case.rng.integers(max(tensor.ndim, 1)))
    return torch.cat([tensor] * 40, dim)


def _dtype(case: Case, tensor: Tensor) -> Tensor:
    other = case.pick(
        (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int16,
         torch.bool, torch.complex64)
    )  # fmt: skip
    if other == tensor.dtype:
        raise Skipped
    return tensor.to(other)


def _entry(case: Case, tensor: Tensor) -> Tensor:
    """One integer of a topology changed."""
    if tensor.is_floating_point() or tensor.numel() == 0:
        raise Skipped
    array = tensor.numpy().copy()
    at = int(case.rng.integers(array.size))
    info = np.iinfo(array.dtype)
    new = case.pick((info.max, info.min, int(array.flat[at]) + 1, int(array.flat[at]) - 1, 2**15, 100))
    array.flat[at] = min(max(new, info.min), info.max)
    return torch.from_numpy(array)


def _strided(case: Case, tensor: Tensor) -> Tensor:
    """The same numbers at every second place."""
    wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
    wide[..., ::2] = tensor
    return fenced(wide, case.chance(0.5))[..., ::2]


def _expanded(case: Case, tensor: Tensor) -> Tensor:
    return tensor.narrow(0, 0, 1).expand(tensor.shape)


def _swapped_dims(case: Case, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        raise Skipped
    return tensor.transpose(-1, int(case.rng.integers(tensor.ndim - 1)))


def _turned(case: Case, tensor: Tensor) -> Tensor:
    """The same numbers with the strides of the transpose."""
    if tensor.ndim < 2:
        raise Skipped
    return fenced(tensor.transpose(0, -1), case.chance(0.5)).transpose(0, -1)


TENSORS: dict[str, Callable[[Case, Tensor], Any]] = {
    "narrow": _narrow,
    "shift": _shift,
    "longer": _longer,
    "many more": _many_more,
    "dtype": _dtype,
    "entry": _entry,
    "strided": _strided,
    "turned": _turned,
    "expanded": _expanded,
    "transposed": _swapped_dims,
    "three": lambda case, tensor: tensor.reshape(-1)[:3] if tensor.ndim == 1 else tensor[:3],
    "empty": lambda case, tensor: tensor[:0],
    "flat": lambda case, tensor: tensor.reshape(-1),
    "one more dimension": lambda case, tensor: tensor[None],
    "scalar": lambda case, tensor: tensor.reshape(-1)[0],
    "None": lambda case, tensor: None,
    "negative view": lambda case, tensor: torch._neg_view(tensor) if tensor.is_floating_point() else _skip(),
    "zero tensor": lambda case, tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "meta": lambda case, tensor: tensor.to("meta"),
    "sparse": lambda case, tensor: tensor.to_sparse(),
    "requires grad": lambda case, tensor: tensor.requires_grad_() if tensor.is_floating_point() else _skip(),
}


def _skip() -> None:
    raise Skipped


def change(case: Case, func: Any, args: list[Any]) -> tuple[str, list[Any]]:
    """One argument changed; what was changed, and all arguments."""
    arguments = func._schema.arguments
    k = int(case.rng.integers(len(args)))
    name, given = arguments[k].name, args[k]
    if isinstance(given, Tensor):
        if case.chance(0.05):
            others = [j for j, arg in enumerate(args) if isinstance(arg, Tensor) and j != k]
            j = case.pick(others)
            changed = list(args)
            changed[k], changed[j] = args[j], args[k]
            return f"{name} swapped with {arguments[j].name}", changed
        how = case.pick(sorted(TENSORS))
        if how == "None" and "Optional" not in str(arguments[k].type):
            raise Skipped
        new: Any = _changed_tensor(case, how, given)
    elif isinstance(given, bool):
        how, new = "flipped", not given
    elif isinstance(given, int):
        how = case.pick(("-1", "0", "1", "one more", "one less", "doubled", "2^31", "2^62"))
        new = {"-1": -1, "0": 0, "1": 1, "one more": given + 1, "one less": given - 1, "doubled": 2 * given,
               "2^31": 2**31, "2^62": 2**62}[how]  # fmt: skip
    elif isinstance(given, str):
        how, new = "unknown", case.pick(("", given + "s", "dense"))
    elif isinstance(given, (list, tuple)) and given:
        how, new = _changed_list(case, list(given))
    elif given is None:
        how, new = "given", case.pick([arg for arg in args if isinstance(arg, Tensor)])
    else:
        raise Skipped
    return f"{name} {how}", [*args[:k], new, *args[k + 1 :]]


def _changed_tensor(case: Case, how: str, given: Tensor) -> Any:
    if given.numel() == 0 and how not in ("None", "meta", "one more dimension", "dtype"):
        raise Skipped
    try:
        new = TENSORS[how](case, given)
    except (RuntimeError, TypeError, NotImplementedError):
        raise Skipped from None  # torch has no such tensor
    if how in (
        "narrow",
        "shift",
        "longer",
        "many more",
        "three",
        "empty",
        "dtype",
        "entry",
        "scalar",
        "flat",
    ):
        return fenced(new, case.chance(0.5))
    return new


def _changed_list(case: Case, given: list[int]) -> tuple[str, list[int]]:
    at = int(case.rng.integers(len(given)))
    how = case.pick(("shorter", "longer", "-1", "0", "one more", "one less", "huge"))
    if how == "shorter":
        return how, given[:-1]
    if how == "longer":
        return how, [*given, 1]
    number = {"-1": -1, "0": 0, "one more": given[at] + 1, "one less": given[at] - 1, "huge": 2**40}[how]
    return f"[{at}] {how}", [*given[:at], number, *given[at + 1 :]]


# --- sequences --------------------------------------------------------------------------------------------


def record(case: Case) -> tuple[Any, list[tuple[Any, list[Any]]]]:
    """A random layer, and the calls of operators of one forward and backward pass."""
    layer, _ = draw_layer(case, case.pick(SPARSE))
    if adapter.has_mask(layer):
        raise Skipped  # computed by torch's own operators
    odd = takes_odd_inputs(layer) and case.chance(0.4)
    x = odd_input(case, layer)[1] if odd else differentiable(case, layer)

    def run() -> None:
        y = plain(layer(x))
        y.backward(torch.from_numpy(case.rng.standard_normal(tuple(y.shape))).to(y.dtype))

    case.note("record", type(layer).__name__)
    calls = adapter.record_operators(lambda: case.valid(run))
    return layer, calls


def run_operators(case: Case) -> None:
    """Calls recorded from a layer, with one argument changed at a time."""
    layer, calls = record(case)
    if not calls:
        raise Found("unclean", "no operator was recorded")
    for _ in range(int(case.rng.integers(4, 20))):
        case.next_step()
        func, args = case.pick(calls)
        args = [fenced(arg, case.chance(0.5)) if isinstance(arg, Tensor) else arg for arg in args]
        try:
            if case.chance(0.1):
                how, changed = "valid", args
            elif case.chance(0.08):
                how, changed = _stale(case, func, args)
            else:
                how, changed = change(case, func, args)
            _call(case, func, changed, how)
        except Skipped:
            continue
    del layer


def _stale(case: Case, func: Any, args: list[Any]) -> tuple[str, list[Any]]:
    """The topology written over in place after a call, as a rewrite does."""
    by_name = dict(zip((argument.name for argument in func._schema.arguments), args, strict=True))
    indices = by_name.get("indices")
    if indices is None or indices.numel() == 0:
        raise Skipped
    case.note(func._schema.name, "before a change in place")
    case.valid(lambda: func(*args))
    changed = _entry(case, indices)
    indices.copy_(changed)
    return "indices changed in place", args


def _call(case: Case, func: Any, args: list[Any], how: str) -> None:
    operator = func._schema.name.split("::")[1]
    case.note(operator, how)
    given = adapter.named(func, args)
    invalid, expected, names = None, None, [argument.name for argument in func._schema.arguments]
    try:
        expected = RESULTS[operator](given) if operator in RESULTS else results(operator, given)
    except Invalid as why:
        invalid = why
    except TooLarge:
        names = []  # memory may be what is missing
    except (AttributeError, IndexError, TypeError) as why:  # a tensor where a number belongs, and so on
        invalid = Invalid(str(why))
    if how.endswith("sparse"):
        names = []  # torch itself refuses such a tensor, in words of its own
    names = [*names, "input", "size", "sizes", "shape", "block_shape"] if names else names
    with torch.set_grad_enabled(case.chance(0.3)):
        also = (IndexError,) if operator.startswith("lookup") else ()  # as torch says that there is no row
        outputs = case.attempt(lambda: func(*args), *names, also=also)
    if outputs is REFUSED:
        if how == "valid":
            raise Found("refused", "a right call")
        return
    if expected is None and invalid is None:
        return
    made = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    if how.endswith("meta") and all(output.is_meta for output in made):
        return  # what the operator says of shapes; there is no number
    if invalid is not None:
        raise Found("wrong", f"accepted {invalid}")
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    assert expected is not None
    judge(outputs, expected, max([EPS[tensor.dtype] for tensor in tensors] or [2.0**-52]))
    for output in made:
        if output.dtype not in [tensor.dtype for tensor in tensors] or math.prod(output.shape) < 0:
            raise Found("wrong", f"output of {output.dtype}")


FAMILIES: dict[str, Callable[[Case], None]] = {"operators": run_operators}
