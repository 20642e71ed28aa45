"""Sequences of what a user does with one layer, beside its dense twin."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz import adapter
from tests.fuzz.case import REFUSED, Case, Found, Skipped
from tests.fuzz.judge import expect_equal
from tests.fuzz.layer_draw import KINDS, draw_layer
from tests.fuzz.layer_inputs import differentiable, draw_input
from tests.fuzz.layer_passes import hostile, infer, sized, train, train_odd, wrong_input
from tests.fuzz.layer_state import LayerTwin, State


def _choose(case: Case, state: State) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Slots to drop and positions to grow; of a `FanInLinear` as many in each row."""
    matrix = state.twin.matrix
    free, columns = matrix.free(), matrix.grid[1]
    drop = np.flatnonzero(case.rng.random(matrix.nnz) < 0.3)
    if type(adapter.owner(state.layer)).__name__ != "FanInLinear":
        n = int(case.rng.integers(len(drop) + 3))
        return drop, np.sort(case.rng.permutation(free)[:n])
    grow, used = [], []
    for k, row in enumerate(matrix.positions[drop] // columns):
        row_free = np.setdiff1d(free[free // columns == row], grow)
        if len(row_free):
            grow.append(case.pick(row_free))
            used.append(k)
    return drop[used], np.array(sorted(grow), np.int64)


def rewrite(case: Case, state: State) -> None:
    """A change of topology in place; the gradient follows."""
    layer, matrix = state.layer, state.twin.matrix
    drop, grow = _choose(case, state)
    stored = adapter.stored(layer)
    old = None if stored.grad is None else adapter.per_connection(layer, stored.grad).copy()
    old_positions = matrix.positions
    case.note(f"{state.kind} rewrite")
    case.valid(lambda: layer.rewrite(torch.from_numpy(drop), torch.from_numpy(grow)))
    state.twin.matrix = matrix.rewritten(drop, grow)
    state.twin.expect_state(layer, "after a rewrite")
    if old is not None and adapter.stored(layer).grad is not None:
        new = adapter.per_connection(layer, adapter.stored(layer).grad)
        positions = state.twin.matrix.positions
        kept = np.isin(positions, old_positions)
        moved = np.zeros_like(new)
        moved[kept] = old[np.searchsorted(old_positions, positions[kept])]
        expect_equal(new, moved, "the gradient after a rewrite")


def rewrite_wrong(case: Case, state: State) -> None:
    """Slots and positions that cannot be dropped or grown must be refused, and nothing change."""
    matrix = state.twin.matrix
    size = matrix.grid[0] * matrix.grid[1]
    none, numbers = torch.empty(0, dtype=torch.int64), torch.tensor
    wrong = {
        "drop twice": (numbers([0, 0]) if matrix.nnz else none, none),
        "drop huge": (numbers([matrix.nnz + 3]), none),
        "drop negative": (numbers([-1]), none),
        "grow live": (none, torch.from_numpy(matrix.positions[:1])),
        "grow huge": (none, numbers([size])),
        "grow negative": (none, numbers([-1])),
        "grow float": (none, numbers([0.5])),
    }
    how = case.pick(sorted(wrong))
    if sum(map(len, wrong[how])) == 0:
        raise Skipped
    case.note(f"{state.kind} rewrite", how)
    case.refuse(lambda: state.layer.rewrite(*wrong[how]), how.split()[0], what=how)


def backward_after_rewrite(case: Case, state: State) -> None:
    """A graph from before a change of topology must not give gradients of the new one."""
    layer = state.layer
    if not adapter.stored(layer).requires_grad or adapter.has_mask(layer):
        raise Skipped
    x = differentiable(case, layer)
    y = layer(x)
    before = state.twin.matrix.positions
    layer.zero_grad(set_to_none=True)
    rewrite(case, state)
    if np.array_equal(before, state.twin.matrix.positions) or y.numel() == 0:
        raise Skipped
    case.note(f"{state.kind} backward", "after a rewrite")
    if case.attempt(lambda: y.sum().backward()) is not REFUSED:
        raise Found("wrong", "a graph from before a rewrite gave gradients")
    layer.zero_grad(set_to_none=True)


def write_weights(case: Case, state: State) -> None:
    """Weights changed in place, as optimizers do."""
    stored = adapter.stored(state.layer)
    if stored.dtype == torch.float32 and not stored.is_inference():
        case.note(f"{state.kind} write")
        with torch.no_grad():
            stored.mul_(-2)
        state.twin.matrix.weights = state.twin.matrix.weights * -2


def copies(case: Case, state: State) -> None:
    """Copies and files hold the same layer, and share nothing with it."""
    how = case.pick(("deepcopy", "pickle", "torch.save", "state_dict"))
    layer = state.layer
    case.note(f"{state.kind} copy", how)
    if how == "deepcopy":
        new = case.valid(lambda: copy.deepcopy(layer))
    elif how == "pickle":
        new = case.valid(lambda: pickle.loads(pickle.dumps(layer)))
    else:
        file = io.BytesIO()
        case.valid(lambda: torch.save(layer if how == "torch.save" else layer.state_dict(), file))
        file.seek(0)
        loaded = case.valid(lambda: torch.load(file, weights_only=False))
        new = loaded if how == "torch.save" else _loaded(case, state, loaded)
    state.replace(new)


def _loaded(case: Case, state: State, saved: dict[str, Tensor]) -> Any:
    """A layer of another topology that has loaded the state."""
    new = copy.deepcopy(state.layer)
    if case.chance(0.5):
        case.valid(new.reset_parameters)
    if case.chance(0.3) and state.twin.matrix.nnz:
        other = State(state.kind, new, LayerTwin(new))
        rewrite(case, other)
    case.note(f"{state.kind} copy", "state_dict")
    case.valid(lambda: new.load_state_dict(saved))
    return new


def load_wrong(case: Case, state: State) -> None:
    """A damaged state must be refused, and change nothing."""
    saved = {name: tensor.clone() for name, tensor in state.layer.state_dict().items()}
    name = case.pick(sorted(saved))
    how = case.pick(("short", "missing", "dtype", "entry", "one more dimension"))
    tensor = saved[name]
    if how == "missing":
        del saved[name]
    elif how == "short":
        if tensor.ndim == 0:
            raise Skipped
        saved[name] = tensor[:-1]
    elif how == "dtype":
        saved[name] = tensor.to(torch.complex64)
    elif how == "one more dimension":
        saved[name] = tensor[None]
    elif tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.numel() == 0:
        raise Skipped
    else:
        array = tensor.numpy().copy()
        array.flat[int(case.rng.integers(array.size))] = case.pick((np.iinfo(array.dtype).max, 2**15))
        saved[name] = torch.from_numpy(array)
    if how == "dtype" or (tensor.numel() == 0 and how == "short"):
        raise Skipped
    case.note(f"{state.kind} load_state_dict", f"{name} {how}")
    names = {part for each in (name, *saved) for part in (each, each.rsplit(".", 1)[-1])}
    case.refuse(lambda: state.layer.load_state_dict(saved), *names, what=f"{name} {how}")


def freeze(case: Case, state: State) -> None:
    """Frozen, the layer gives the same outputs; thawed, it trains."""
    owner = adapter.owner(state.layer)
    if not hasattr(owner, "freeze"):
        raise Skipped
    case.note(f"{state.kind} freeze")
    case.valid(owner.freeze)
    infer(case, state)
    state.layer.requires_grad_(True)


def freeze_narrow(case: Case, state: State) -> None:
    """Frozen in few bits, a copy computes with the weights that these stand for, and so does its own copy."""
    layer = state.layer
    if not adapter.can_be_narrow(layer) or not bool(layer.in_use.isfinite().all()):
        raise Skipped
    dtype = case.pick((torch.int8, torch.bfloat16))
    case.note(f"{state.kind} freeze", str(dtype))
    frozen = copy.deepcopy(layer)
    case.valid(lambda: frozen.freeze(weights=dtype))
    wide = copy.deepcopy(frozen).freeze(weights=torch.float32)
    x = draw_input(case, wide)
    twin = LayerTwin(wide)
    outcome = twin.outcome(wide, x)
    for each in (frozen, pickle.loads(pickle.dumps(frozen))):
        twin.expect_output(wide, x, case.valid(lambda each=each: each(x)), outcome)
    other = copy.deepcopy(wide).freeze(weights=dtype)
    case.valid(lambda: other.load_state_dict(frozen.state_dict()))
    twin.expect_output(wide, x, case.valid(lambda: other(x)), outcome)


def write_topology(case: Case, state: State) -> None:
    """A topology buffer written over by the user: an error, or a right product of what it says now."""
    buffers = {name: t for name, t in adapter.topology_tensors(state.layer).items() if t.numel()}
    if not buffers or adapter.has_mask(state.layer):
        raise Skipped
    name = case.pick(sorted(buffers))
    tensor = buffers[name]
    if case.chance(0.7):
        with torch.no_grad():
            state.layer(draw_input(case, state.layer))
    before = tensor.clone()
    array = tensor.numpy().copy()
    array.flat[int(case.rng.integers(array.size))] = case.pick((np.iinfo(array.dtype).max, 2**15, 0))
    case.note(f"{state.kind} write", f"{name} by the user")
    if case.attempt(lambda: tensor.copy_(torch.from_numpy(array))) is REFUSED:
        return
    if torch.equal(tensor.long(), before.long()):
        return
    x = draw_input(case, state.layer)
    y = case.attempt(lambda: state.layer(x), "indptr", "indices", "row_nnz", "topology")
    if y is not REFUSED:
        try:
            twin = LayerTwin(state.layer)
        except Exception:
            raise Found("wrong", f"a product with {name} that is none") from None
        twin.expect_output(state.layer, x, y, twin.outcome(state.layer, x))
    with torch.no_grad():
        tensor.copy_(before)


def forward_mask(case: Case, state: State) -> None:
    """Connections that the forward pass leaves out contribute nothing, whatever their weight."""
    layer, matrix = state.layer, state.twin.matrix
    if not hasattr(layer, "forward_mask") or matrix.nnz == 0 or adapter.has_mask(layer):
        raise Skipped
    stored = adapter.stored(layer)
    kept = case.rng.random(matrix.nnz) < 0.5
    shape = (-1, *[1] * (stored.ndim - 1)) if len(stored) == matrix.nnz else stored.shape
    number = case.pick((1.0, float("inf"), float("nan")))
    mask = torch.from_numpy(kept).reshape(shape).expand(stored.shape).clone()
    before = stored.detach().clone()
    x = draw_input(case, layer)
    case.note(f"{state.kind} forward_mask", "finite" if number == 1.0 else "not finite")
    with torch.no_grad():
        stored.masked_fill_(~mask, number)
    layer.forward_mask = mask
    masked = state.twin.copy()
    masked.matrix.weights = matrix.weights * kept[:, None, None]
    try:
        y = case.valid(lambda: layer(x))
        masked.expect_output(layer, x, y, masked.outcome(layer, x))
    finally:
        layer.forward_mask = None
        with torch.no_grad():
            stored.copy_(before)


def short_saved_tensor(case: Case, state: State) -> None:
    """A hook on saved tensors that returns another shape: an error, or the right gradients."""
    layer = state.layer
    if not adapter.stored(layer).requires_grad or adapter.has_mask(layer):
        raise Skipped
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise Skipped  # what torch saves to pad an image is not looked at by torch
    x = differentiable(case, layer)
    layer.zero_grad(set_to_none=True)
    which, count = int(case.rng.integers(5)), [0]

    def unpack(tensor: Tensor) -> Tensor:
        count[0] += 1
        return tensor[: len(tensor) // 2].clone() if count[0] - 1 == which and tensor.ndim else tensor

    case.note(f"{state.kind} backward", "short saved tensor")
    outcome = state.twin.outcome(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        y = layer(x)
    if case.attempt(lambda: y.sum().backward()) is not REFUSED:
        state.twin.expect_gradients(layer, x, outcome)
    layer.zero_grad(set_to_none=True)


def to_masked(case: Case, state: State) -> None:
    """The masked twin computes the same."""
    own = adapter.owner(state.layer) is state.layer and not hasattr(state.layer, "num_embeddings")
    if not own or adapter.has_mask(state.layer) or adapter.block_of(state.layer) != (1, 1):
        raise Skipped
    x = draw_input(case, state.layer)
    case.note("masked from_sparse", state.kind)
    twin = case.valid(lambda: adapter.masked(state.layer))
    state.twin.expect_state(twin, "the masked twin")
    state.twin.expect_output(twin, x, twin(x), state.twin.outcome(state.layer, x))


STEPS: list[tuple[Callable[[Case, State], None], float]] = [
    (train, 8), (train_odd, 3), (hostile, 1.5), (sized, 1), (infer, 4), (wrong_input, 2), (rewrite, 5),
    (rewrite_wrong, 2), (backward_after_rewrite, 0.5),
    (write_weights, 1), (copies, 2), (load_wrong, 2), (freeze, 0.5), (freeze_narrow, 0.5),
    (write_topology, 0.5), (forward_mask, 1), (short_saved_tensor, 1), (to_masked, 0.5),
]  # fmt: skip
_WEIGHTS = np.array([weight for _, weight in STEPS])
_WEIGHTS /= _WEIGHTS.sum()


def _sequence(kind: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        layer, twin = draw_layer(case, kind)
        state = State(kind, layer, twin)
        for _ in range(int(case.rng.integers(4, 16))):
            case.next_step()
            step, _ = STEPS[int(case.rng.choice(len(STEPS), p=_WEIGHTS))]
            try:
                step(case, state)
            except Skipped:
                continue
            state.check(f"after {case.label.operation}, {case.label.mutation}")

    return run


FAMILIES: dict[str, Callable[[Case], None]] = {kind: _sequence(kind) for kind in KINDS}
