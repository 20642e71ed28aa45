"""Sequences with a fault on purpose, by which the driver is seen to find each kind."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from tests.fuzz.case import Case, Found


def crash(case: Case) -> None:
    """Reads address 0."""
    case.note("planted", "crash")
    ctypes.string_at(0)


def hang(case: Case) -> None:
    """Never comes back."""
    case.note("planted", "hang")
    time.sleep(10_000)


def wrong(case: Case) -> None:
    """A wrong result."""
    case.note("planted", "wrong")
    raise Found("wrong", "3 instead of 2")


def unclean(case: Case) -> None:
    """An error of a kind that says nothing of the arguments."""
    case.note("planted", "unclean")
    case.refuse(lambda: {}["key"], "X")


def unnamed(case: Case) -> None:
    """An error that does not name the argument."""
    case.note("planted", "unnamed")
    case.refuse(lambda: int("x"), "out")


def refused(case: Case) -> None:
    """An error where the call was right."""
    case.note("planted", "refused")
    case.valid(lambda: int("x"))


def fine(case: Case) -> None:
    """Right calls, and a wrong one that is refused."""
    case.note("planted", "fine")
    case.valid(lambda: 1)
    case.refuse(lambda: int("x"), "base")


def off_gradient(kind: str) -> Callable[[Case], None]:
    """Passes through a layer of that kind, the gradient of whose weights is off by a thousandth."""

    def run(case: Case) -> None:
        # Where torch is at hand: kernels are tested without.
        from tests.fuzz import adapter, layer_passes
        from tests.fuzz.layer_draw import draw_layer
        from tests.fuzz.layer_state import State

        layer, twin = draw_layer(case, kind)
        adapter.stored(layer).register_hook(lambda gradient: gradient * 1.001)
        for _ in range(6):
            case.next_step()
            layer_passes.train(case, State(kind, layer, twin))

    return run


#: Kinds of layers with a planted fault.
OFF = "SparseEmbedding", "SparseConvTranspose3d", "TransposedLinear"

FAMILIES: dict[str, Callable[[Case], None]] = {
    f"planted {function.__name__}": function
    for function in (crash, hang, wrong, unclean, unnamed, refused, fine)
} | {f"planted {kind}": off_gradient(kind) for kind in OFF}
