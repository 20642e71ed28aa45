"""What the operators of sparse inputs and of embeddings must return, or that their arguments are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.case import Skipped
from tests.fuzz.operator_judge import Results, dense, integers, need, topology, weighted

#: Entries of dense tokens; a size that was made huge is the operator's to refuse or to compute.
_MOST = 1 << 24


def _sizes(args: dict[str, Any]) -> tuple[int, int]:
    need(min(args["out_features"], args["in_features"]) >= 0, "sizes")
    return int(args["out_features"]), int(args["in_features"])


def _tokens(args: dict[str, Any], columns: int) -> tuple[Tensor, Tensor, int]:
    """The dense tokens, the magnitudes of their entries, and the most entries that one has."""
    starts, at = integers(args["starts"], "starts"), integers(args["columns"], "columns")
    entries = dense(args["entries"], "entries")
    need(starts.ndim == at.ndim == 1 and entries.shape == at.shape and len(starts) > 0, "shapes of entries")
    need(starts[0] == 0 and starts[-1] == len(at) and bool(np.all(np.diff(starts) >= 0)), "starts")
    need(bool(np.all((at >= 0) & (at < columns))), "columns out of range")
    if len(starts) * columns > _MOST:
        raise Skipped
    row = torch.from_numpy(np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
    where = row, torch.from_numpy(at)
    x, size = (
        torch.zeros(len(starts) - 1, columns, dtype=torch.float64).index_put_(where, each, accumulate=True)
        for each in (entries, entries.abs())
    )
    return x, size, int(np.diff(starts).max(initial=0))


def _product(args: dict[str, Any]) -> Results:
    rows, columns = _sizes(args)
    x, size, most = _tokens(args, columns)
    W = torch.from_numpy(weighted(args, (rows, columns)).dense())
    y, magnitude = x @ W.T, size @ W.T.abs()
    if args["bias"] is not None:
        bias = dense(args["bias"], "bias")
        need(bias.shape == (rows,), f"bias of shape {tuple(bias.shape)}")
        y, magnitude = y + bias, magnitude + bias.abs()
    return [(y, magnitude, max(most, columns) + 1)]


def _product_values_grad(args: dict[str, Any]) -> Results:
    rows, columns = _sizes(args)
    x, size, most = _tokens(args, columns)
    grad = dense(args["grad"], "grad")
    need(grad.shape == (len(x), rows), f"grad of shape {tuple(grad.shape)}")
    return [_at_connections(args, grad.T @ x, grad.T.abs() @ size, len(x) + most)]


def _at_connections(args: dict[str, Any], full: Tensor, magnitude: Tensor, n: int) -> Any:
    block: Any = tuple(args["block_shape"])
    need(len(block) == 2, "block_shape")
    twin = topology(args, _sizes(args), block)
    gathered = [torch.from_numpy(twin.gather(each.numpy())) for each in (full, magnitude)]
    return gathered[0], gathered[1], n


def _numbers(args: dict[str, Any], rows: int) -> Tensor:
    numbers = integers(args["tokens"], "tokens")
    need(numbers.ndim == 1 and bool(np.all((numbers >= 0) & (numbers < rows))), "tokens")
    return torch.from_numpy(numbers)


def _lookup(args: dict[str, Any]) -> Results:
    rows, columns = _sizes(args)
    W = torch.from_numpy(weighted(args, (rows, columns)).dense())
    y = W[_numbers(args, rows)]
    return [(y, y.abs(), 1)]


def _lookup_values_grad(args: dict[str, Any]) -> Results:
    rows, columns = _sizes(args)
    numbers, grad = _numbers(args, rows), dense(args["grad"], "grad")
    if rows * columns > _MOST:
        raise Skipped
    need(grad.shape == (len(numbers), columns), f"grad of shape {tuple(grad.shape)}")
    none = torch.zeros(rows, columns, dtype=torch.float64)
    full, magnitude = (none.index_add(0, numbers, each) for each in (grad, grad.abs()))
    return [_at_connections(args, full, magnitude, len(numbers))]


RESULTS: dict[str, Callable[[dict[str, Any]], Results]] = {
    "sparse_input": _product,
    "sparse_input_values_grad": _product_values_grad,
    "lookup": _lookup,
    "lookup_values_grad": _lookup_values_grad,
}
