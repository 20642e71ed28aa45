"""Steps that multiply: the three products with odd operands, aliases, plans of others, and forks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.fuzz import adapter
from tests.fuzz.case import REFUSED, Case, Found, Skipped
from tests.fuzz.judge import Twin, exact_product, expect
from tests.fuzz.kernel_state import State
from tests.guards import empty, guarded, matrix, operand
from tests.oracle import Exact
from tests.strategies import BROADCASTS, LAYOUTS

Array = np.ndarray[Any, Any]

TOKENS = (0, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 63, 64, 65, 66, 100, 130)
OPERATIONS = "spmm", "spmm_t", "sddmm_dw"


class Product(NamedTuple):
    """One call of a product: its operands by name, and what must come out."""

    name: str
    operands: dict[str, Array]
    exact: Exact
    shape: tuple[int, ...]

    def call(self, W: Any, **others: Any) -> Array:
        """Do it."""
        bias = {"bias": self.operands["bias"]} if "bias" in self.operands else {}
        positional = [self.operands[name] for name in ("DY", "X") if name in self.operands]
        return adapter.product(self.name)(W, *positional, **bias, **others)  # type: ignore[no-any-return]

    def judge(self, result: Any, state: State, what: str = "") -> None:
        """Raise `Found` unless the result is right."""
        if self.name == "sddmm_dw":
            live, _ = adapter.slots(state.W)
            if not isinstance(result, np.ndarray) or result.shape != self.shape:
                raise Found("wrong", f"{what}: expected shape {self.shape}, got {np.shape(result)}")
            spare = np.delete(result, live, 0)
            if np.any(spare != 0):
                raise Found("wrong", f"{what}: spare slots hold {spare.reshape(-1)[:3]}")
            result = result[live].reshape(self.exact.value.shape)
        expect(result, self.exact, state.dtype, what)


def draw(case: Case, state: State, name: str, tokens: int | None = None, *, plain: bool = False) -> Product:
    """Random operands of a product."""
    W, twin = state.W, state.twin
    tokens = case.pick(TOKENS) if tokens is None else tokens
    if max(twin.shape) > 1000:
        tokens = min(tokens, 17)
    layouts = ["C", "Fortran"] if plain else [*LAYOUTS, *BROADCASTS, "unaligned", "Fortran", "C", "Fortran"]
    rows, columns = twin.shape
    X = operand(case.rng, (columns, tokens), state.dtype, case.pick(layouts))
    DY = operand(case.rng, (rows, tokens), state.dtype, case.pick(layouts))
    if name == "spmm_t":
        exact = exact_product(twin.dense().T, DY.astype(float), twin.live().T)
        return Product(name, {"DY": DY}, exact, (columns, tokens))
    if name == "sddmm_dw":
        return Product(
            name, {"DY": DY, "X": X}, twin.gradient(DY.astype(float), X.astype(float)), W.values.shape
        )
    operands = {"X": X}
    bias = None
    if case.chance(0.5):
        bias = guarded(case.rng.standard_normal(rows).astype(state.dtype), front=case.chance(0.5))
        operands["bias"] = bias
    wide = None if bias is None else bias.astype(float)
    exact = exact_product(twin.dense(), X.astype(float), twin.live(), wide)
    return Product(name, operands, exact, (rows, tokens))


def draw_out(case: Case, product: Product, dtype: Any) -> Array:
    """A poisoned output in a random layout."""
    front = case.chance(0.5)
    if len(product.shape) == 2:
        return matrix(product.shape, dtype, case.pick(sorted(LAYOUTS)), np.nan, front=front)  # type: ignore[arg-type]
    out = empty(product.shape, dtype, front=front)
    out[...] = np.nan
    return out


def multiply(case: Case, state: State) -> None:
    """A product that must be right."""
    name = case.pick(OPERATIONS)
    product = draw(case, state, name)
    out = draw_out(case, product, state.dtype) if case.chance(0.5) else None
    others = {} if out is None else {"out": out}
    case.note(name)
    if adapter.takes_plans() and case.chance(0.5):
        others["plan"] = state.plans[name] if name in state.plans else adapter.plan(name, state.W)
        state.plans[name] = others["plan"]
    result = case.valid(lambda: product.call(state.W, **others))
    if out is not None and result is not out:
        raise Found("wrong", "out was not returned")
    product.judge(result, state)


def out_over_inputs(case: Case, state: State) -> None:
    """`out` over an operand, or over what the matrix is made of: an error, or the right number."""
    name = case.pick(OPERATIONS)
    product = draw(case, state, name, case.pick((1, 1, 1, 2, 20, 70)), plain=True)
    buffers = {f"out over {key}": array for key, array in product.operands.items()}
    buffers |= {f"out over {key}": array for _, key, array in adapter.exposed(state.W)}
    buffers["out over values"] = state.W.values
    others = {}
    if adapter.takes_plans() and name in state.plans:
        others["plan"] = state.plans[name]
        for path, array in adapter.plan_arrays(others["plan"]):
            buffers[f"out over plan.{'.'.join(path)}"] = array
    how = case.pick(sorted(buffers))
    needed = int(np.prod(product.shape)) * np.dtype(state.dtype).itemsize
    buffer = buffers[how]
    shift = int(case.rng.integers(3)) * 8
    if buffer.nbytes < needed + shift or needed == 0 or not buffer.flags.c_contiguous:
        raise Skipped
    case.note(name, how)
    if not buffer.flags.writeable and how.split()[-1] in product.operands:
        buffer.flags.writeable = True
    flat = buffer.reshape(-1).view(np.uint8)[shift : shift + needed]
    if flat.ctypes.data % 8:
        raise Skipped
    out = flat.view(state.dtype).reshape(product.shape)
    before = state.W.values.copy()
    result = case.attempt(lambda: product.call(state.W, out=out, **others), "out")
    if result is REFUSED:
        return
    if how == "out over values":  # allowed: its caller owns the weights
        if name != "sddmm_dw":
            product.judge(result, state, how)
        state.W.values[...] = before
        return
    if how.split()[-1] not in product.operands:
        raise Found("wrong", f"wrote {how}, which other calls read")
    product.judge(result, state, how)


WRONG = "dtype", "rows", "1-D", "3-D", "list", "int", "None", "empty"


def wrong_operand(case: Case, state: State) -> None:
    """Operands that do not fit must be refused."""
    name = case.pick(OPERATIONS)
    product = draw(case, state, name, case.pick((1, 3, 17, 70)), plain=True)
    target = case.pick([*product.operands, "out"])
    how = case.pick(WRONG)
    given = product.operands[target] if target != "out" else draw_out(case, product, state.dtype)
    other = np.float64 if state.dtype == np.float32 else np.float32
    wrong: Any = {
        "dtype": lambda: given.astype(other), "rows": lambda: guarded(given[:-1]),
        "1-D": lambda: given.reshape(-1), "3-D": lambda: given[None], "list": given.tolist, "int": lambda: 3,
        "None": lambda: object(), "empty": lambda: given[:0],
    }[how]()  # fmt: skip
    if np.shape(wrong) == given.shape and how not in ("dtype", "list"):
        raise Skipped
    case.note(name, f"{target} {how}")
    others = {"out": wrong} if target == "out" else {}
    bad = product if target == "out" else product._replace(operands={**product.operands, target: wrong})
    case.refuse(lambda: bad.call(state.W, **others), target, *product.operands, what=f"{target} {how}")


def read_only_out(case: Case, state: State) -> None:
    """A read-only `out` must be refused."""
    product = draw(case, state, case.pick(OPERATIONS))
    out = draw_out(case, product, state.dtype)
    out.flags.writeable = False
    case.note(product.name, "out read-only")
    case.refuse(lambda: product.call(state.W, out=out), "out", what="a read-only out")


def stale_plan(case: Case, state: State) -> None:
    """A plan of another topology, of equal counts or not: an error, or the right number."""
    if not adapter.takes_plans():
        raise Skipped
    name, twin = case.pick(OPERATIONS), state.twin
    how = case.pick(("before a rewrite", "equal counts", "another product", "tampered"))
    if twin.nnz == 0 or twin.nnz == twin.grid[0] * twin.grid[1]:
        raise Skipped
    made = adapter.plan(name, state.W)
    W, now = state.W, state
    if how in ("before a rewrite", "equal counts"):
        from tests.fuzz.kernel_steps import _choose

        drop, grow = _choose(case, twin, "same rows")
        if how == "equal counts":
            drop = np.sort(case.rng.permutation(twin.nnz)[: max(1, twin.nnz // 3)])
            grow = case.rng.permutation(twin.free())[: len(drop)]
            drop = drop[: len(grow)]
        if len(drop) == 0:
            raise Skipped
        live, _ = adapter.slots(W)
        new, _ = adapter.rewrite(W, live[drop], grow, False)
        now = State(new, twin.rewritten(drop, grow), {})
    elif how == "another product":
        made = adapter.plan(case.pick([each for each in OPERATIONS if each != name]), W)
    else:
        path, array = case.pick([each for each in adapter.plan_arrays(made) if each[1].size])
        changed = array.copy()
        at = int(case.rng.integers(array.size))
        changed.flat[at] = min(
            int(changed.flat[at]) + case.pick((1, 10**4, 10**7)), np.iinfo(array.dtype).max
        )
        made = adapter.replaced(made, path, changed)
        how = f"{how} {'.'.join(path)}"
    product = draw(case, now, name, case.pick((17, 33, 70, 100)), plain=True)
    case.note(name, f"plan {how}")
    result = case.attempt(lambda: product.call(now.W, plan=made), "plan")
    if result is not REFUSED:
        product.judge(result, now, f"plan {how}")


def fork(case: Case, state: State) -> None:
    """Parent and forked child multiply at the same time; both must be right."""
    large = _large(case)
    products = [draw(case, large, name, 130, plain=True) for name in OPERATIONS]
    for product in products:  # whatever is made once is made before the fork
        product.judge(case.valid(lambda: product.call(large.W)), large)  # noqa: B023
    case.note("fork", "parent and child at once")
    child = os.fork()
    if child == 0:
        os._exit(_repeat(products, large))
    mine = _repeat(products, large)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Found("crash", f"the child died of {signal.Signals(os.WTERMSIG(status)).name}")
    if mine or os.WEXITSTATUS(status):
        raise Found("wrong", f"{mine} calls of the parent and {os.WEXITSTATUS(status)} of the child, of 30")


def _repeat(products: list[Product], state: State) -> int:
    """How many of the calls were wrong."""
    wrong = 0
    for _ in range(10):
        for product in products:
            try:
                product.judge(product.call(state.W), state)
            except Exception:
                wrong += 1
    return wrong


def _large(case: Case) -> State:
    from tests.fuzz.kernel_state import padded_arrays

    twin = Twin((150, 400))
    positions = np.flatnonzero(case.rng.random(150 * 400) < 0.1)
    twin.set(positions, case.rng.standard_normal(len(positions)).astype(np.float32))
    arrays = padded_arrays(case, twin)
    return State(adapter.padded(twin.shape, **arrays), twin, arrays)


STEPS: list[tuple[Callable[[Case, State], None], float]] = [
    (multiply, 20), (out_over_inputs, 3), (wrong_operand, 2), (read_only_out, 0.3), (stale_plan, 2),
    (fork, 0.1),
]  # fmt: skip
