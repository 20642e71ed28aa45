"""Takes one architecture all the way and says how each part of it went."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselab import RigL, densify, plan_sparsify, sparsify
from sparselab.nn import SparsifyPlan, find_sparse
from tests.models.case import Case

STEPS, RATE = 3, 1e-3
#: Of the largest output: what may lie between a sparse model and its dense form, which sum in other orders.
CLOSE = 1e-4


class Wrong(Exception):
    """A part of the way that went wrong."""


@dataclass
class Row:
    """What came of one architecture; an empty `failed` is a pass.

    Attributes
    ----------
    swapped : int
        Layers made sparse.
    left : tuple of (reason, names)
        What the rules match and what stays dense, by reason.
    before, after : int
        Parameters.
    parts : dict
        "trained", "saved and read", "generated" and "densified": "ok", "-" where there is nothing to do, or
        the error.
    """

    name: str
    library: str
    swapped: int = 0
    left: tuple[tuple[str, tuple[str, ...]], ...] = ()
    before: int = 0
    after: int = 0
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The parts that are not right."""
        return [part for part, said in self.parts.items() if said not in ("ok", "-")]


def judge(case: Case) -> Row:
    """Go all the way; what fails is told in the row, and the parts after it are tried all the same."""
    row = Row(case.name, case.library)
    torch.manual_seed(0)
    model = _attempt(row, "sparse", lambda: _make_sparse(case, row))
    if model is None:
        return row
    _attempt(row, "trained", lambda: train(case, model))
    model.eval()
    _attempt(row, "saved and read", lambda: save_and_read(case, model))
    row.parts.setdefault("generated", "-" if case.generate is None else "ok")
    _attempt(row, "densified", lambda: make_dense(case, model))
    return row


def _attempt(row: Row, part: str, do: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = do()
    except Exception as error:
        part = error.args[1] if isinstance(error, Wrong) and len(error.args) > 1 else part
        row.parts[part] = f"{type(error).__name__}: {error.args[0] if error.args else ''}".splitlines()[0]
        return None
    row.parts[part] = "ok"
    return result


def _make_sparse(case: Case, row: Row) -> nn.Module:
    dense = case.make()
    row.before = sum(each.numel() for each in dense.parameters())
    plan = plan_sparsify(dense, case.rules)
    model = sparsify(dense, case.rules)
    row.swapped, row.left = len(plan.layers), _reasons(plan)
    row.after = sum(each.numel() for each in model.parameters())
    if row.swapped != len(list(find_sparse(model))):
        raise Wrong(f"{row.swapped} layers were planned, {len(list(find_sparse(model)))} are sparse")
    return model


def _reasons(plan: SparsifyPlan) -> tuple[tuple[str, tuple[str, ...]], ...]:
    reasons: dict[str, list[str]] = {}
    for each in plan.left:
        # Which modules share a weight is told by their names.
        reasons.setdefault(each.reason.partition(":")[0], []).append(each.name)
    return tuple((reason, tuple(names)) for reason, names in reasons.items())


def train(case: Case, model: nn.Module) -> None:
    """Three steps in which connections move, and nothing but numbers."""
    algorithm = RigL(update_freq=1, drop_fraction=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    algorithm.attach(model)
    born = {name: layer.positions().clone() for name, layer in find_sparse(model)}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.stack([each.float().square().mean() for each in outputs(case, model)]).sum()
        loss.backward()
        optimizer.step()
        algorithm.step()
    algorithm.detach()
    unmoved = [
        name
        for name, layer in find_sparse(model)
        if _can_move(layer) and torch.equal(layer.positions(), born[name])
    ]
    if unmoved:
        raise Wrong(f"no connection of {', '.join(unmoved[:3])} moved ({len(unmoved)} of {len(born)} layers)")
    if bad := [name for name, each in model.named_parameters() if not each.isfinite().all()]:
        raise Wrong(f"{bad[0]} is not finite")


def _can_move(layer: Any) -> bool:
    """Whether RigL has connections to drop and places for others: a model need not use all of its layers."""
    gradient = layer.stored.grad
    return gradient is not None and bool(gradient.any()) and layer.nnz >= 8 and layer.sparsity > 0.1


def save_and_read(case: Case, model: nn.Module) -> None:
    """A fresh model that has read what was saved: the same bits, outputs, and tokens."""
    expected, tokens = evaluated(case, model), written(case, model)
    with tempfile.TemporaryDirectory() as folder:
        again = (_through_transformers if case.library == "transformers" else _through_torch)(
            case, model, Path(folder)
        )
    compare_states(model.state_dict(), again.state_dict())
    found = evaluated(case, again)
    if not (len(found) == len(expected) and all(map(torch.equal, found, expected))):
        raise Wrong("outputs differ after reading")
    if tokens is not None and not torch.equal(tokens, written(case, again)):  # type: ignore[arg-type]
        raise Wrong("other tokens are written after reading", "generated")


def _through_transformers(case: Case, model: Any, folder: Path) -> nn.Module:
    from sparselab.integrations.transformers import from_pretrained

    model.save_pretrained(folder)
    again: nn.Module = from_pretrained(folder)
    return again


def _through_torch(case: Case, model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model.state_dict(), folder / "state.pt")
    again = sparsify(case.make(), case.rules).eval()
    again.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return again


def compare_states(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise Wrong unless two states are the same to the bit."""
    if one.keys() != other.keys():
        raise Wrong(f"names differ after reading: {sorted(one.keys() ^ other.keys())[:3]}")
    for name, tensor in one.items():
        same = tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        if not same:
            raise Wrong(f"{name} differs after reading")


def make_dense(case: Case, model: nn.Module) -> None:
    """The dense model: no sparse layer, and the same outputs to rounding."""
    expected = evaluated(case, model)
    dense = densify(copy.deepcopy(model))
    if any(True for _ in find_sparse(dense)):
        raise Wrong("layers are still sparse")
    for mine, wanted in zip(evaluated(case, dense), expected, strict=True):
        error, size = (mine - wanted).abs().max().item(), wanted.abs().max().item()
        if not error <= CLOSE * max(size, 1e-3):
            raise Wrong(f"outputs of up to {size:.3g} differ by {error:.3g}")


def outputs(case: Case, model: nn.Module) -> list[Tensor]:
    """All numbers that a call returns, with gradients."""
    found = [each for each in _tensors(model(**case.inputs())) if each.is_floating_point()]
    return [each for each in found if each.requires_grad] if torch.is_grad_enabled() else found


def evaluated(case: Case, model: nn.Module) -> list[Tensor]:
    """As `outputs`, without gradients, and finite."""
    with torch.no_grad():
        torch.manual_seed(0)
        found = outputs(case, model)
    if not found or not all(each.isfinite().all() for each in found):
        raise Wrong("outputs are not finite")
    return found


def written(case: Case, model: Any) -> Tensor | None:
    """The tokens that a model writes greedily; None if it writes none."""
    if case.generate is None or case.prompt is None:
        return None
    prompt = case.prompt()
    if "input_ids" in prompt:
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    tokens: Tensor = model.generate(**prompt, **case.generate)
    return tokens


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for each in result.values():
            yield from _tensors(each)
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from _tensors(each)
