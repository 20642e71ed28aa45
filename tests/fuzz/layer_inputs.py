"""Random inputs of layers: dense in any strides, numbers of rows, sparse, jagged, and hostile ones."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz import adapter
from tests.fuzz.case import Case, Skipped

TOKENS = ((1,), (2,), (3, 5), (16,), (17,), (33,), (64,), (65,), (130,), (0,), (2, 0), ())
#: What torch calls the order of memory in which channels come last, by the number of dimensions.
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def draw_input(case: Case, layer: Any) -> Tensor:
    """A random batch, in any strides; numbers of rows for an embedding."""
    if hasattr(layer, "num_embeddings"):
        return _numbers(case, layer)
    dtype = adapter.stored(layer).dtype
    if hasattr(layer, "kernel_size"):
        return _images(case, layer, dtype)
    shape = (*case.pick(TOKENS), layer.in_features)
    x = torch.from_numpy(case.rng.standard_normal(shape)).to(dtype)
    if len(shape) == 2 and case.chance(0.3):
        x = x.T.contiguous().T
    elif case.chance(0.2):
        wide = torch.from_numpy(np.repeat(x.numpy(), 2, -1))
        x = wide[..., ::2]
    return x


def differentiable(case: Case, layer: Any) -> Tensor:
    """An input that requires a gradient if it can."""
    x = draw_input(case, layer)
    return x.requires_grad_(x.is_floating_point())


def _numbers(case: Case, layer: Any) -> Tensor:
    """Few rows or many, so that some come more than once."""
    rows = case.pick((1, 3, layer.num_embeddings))
    numbers = case.rng.integers(min(rows, layer.num_embeddings), size=case.pick(TOKENS))
    found = torch.from_numpy(np.asarray(numbers)).to(case.pick((torch.int64, torch.int64, torch.int32)))
    return found.T if found.ndim == 2 and case.chance(0.3) else found


def _images(case: Case, layer: Any, dtype: torch.dtype) -> Tensor:
    """Images of a size that has outputs; now and then a single one."""
    kernel = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    more = 12 if layer.n_dims < 3 else 5
    size = [n + int(case.rng.integers(more)) for n in kernel]
    # What is reflected must be larger than its padding, and a transposed convolution takes it off.
    if layer.padding_mode != "zeros" or adapter.is_transposed_conv(layer):
        size = [n + 4 for n in size]
    n = () if case.chance(0.1) else (case.pick((1, 2, 5)),)
    x = torch.from_numpy(case.rng.standard_normal((*n, layer.in_channels, *size))).to(dtype)
    if x.ndim == layer.n_dims + 2 and x.ndim in _FORMATS and case.chance(0.3):
        return x.to(memory_format=_FORMATS[x.ndim])
    return x


# --- sparse matrices and jagged tensors -------------------------------------------------------------------


def takes_odd_inputs(layer: Any) -> bool:
    """Whether it is a linear layer, which takes inputs that are no dense tensors."""
    return not hasattr(layer, "kernel_size") and not hasattr(layer, "num_embeddings")


def odd_input(case: Case, layer: Any) -> tuple[str, Any, Tensor]:
    """A sparse or jagged input: its name, the tensor, and the dense numbers of which it is made."""
    if not takes_odd_inputs(layer):
        raise Skipped
    how = case.pick(
        ("jagged", "vector", "coo", "coo", "coo twice", "csr", "csr twice", "csc", "csc twice", "bsr")
    )
    if how == "jagged":
        return how, *_jagged(case, layer)
    if how == "vector":
        x = _mostly_zeros(case, (layer.in_features,), adapter.stored(layer).dtype)
        return how, x.to_sparse(), x
    x = _mostly_zeros(case, (case.pick((0, 1, 2, 17, 65)), layer.in_features), adapter.stored(layer).dtype)
    if how == "bsr" and len(x) % 2:
        how = "csc"
    if how == "coo twice":
        return how, *_twice(case, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse layouts are new
        if how.endswith("twice"):
            doubled, whole = _twice(case, x)
            return how, _compressed(case, doubled, how == "csr twice"), whole
        make = {"coo": x.to_sparse, "csr": x.to_sparse_csr, "csc": x.to_sparse_csc}
        given = x.to_sparse_bsr((2, 1)) if how == "bsr" else make[how]()
    return how, given, x


def _mostly_zeros(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = case.rng.standard_normal(shape) * (case.rng.random(shape) < case.pick((0.0, 0.02, 0.1, 0.5, 1.0)))
    if x.ndim == 2 and case.chance(0.3):
        x[case.rng.random(len(x)) < 0.5] = 0
    return torch.from_numpy(x).to(dtype)


def _twice(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """A COO matrix in any order, in which some entries come once more as a half, and its dense form."""
    at = x.nonzero().T
    again = at[:, torch.from_numpy(case.rng.random(at.shape[1]) < 0.4)]
    order = torch.from_numpy(case.rng.permutation(at.shape[1] + again.shape[1]))
    indices = torch.cat([at, again], 1)[:, order]
    entries = torch.cat([x[tuple(at)], x[tuple(again)] / 2])[order]
    whole = x.double()
    whole[tuple(again)] *= 1.5
    return torch.sparse_coo_tensor(indices, entries, x.shape, check_invariants=False), whole


def _compressed(case: Case, x: Tensor, by_rows: bool) -> Tensor:
    """The entries of a COO matrix in compressed rows, whose columns are in any order; or in columns."""
    line, place = x._indices() if by_rows else x._indices().flip(0)
    order = torch.argsort(line, stable=True)
    starts = torch.searchsorted(line[order], torch.arange(x.shape[0 if by_rows else 1] + 1))
    narrow = case.pick((torch.int32, torch.int64))
    parts = starts.to(narrow), place[order].to(narrow), x._values()[order]
    make = torch.sparse_csr_tensor if by_rows else torch.sparse_csc_tensor
    return make(*parts, x.shape, check_invariants=False)


def _jagged(case: Case, layer: Any) -> tuple[Any, Tensor]:
    lengths = case.rng.integers(0, 6, size=int(case.rng.integers(1, 6)))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    shape = (int(offsets[-1]), *case.pick(((), (), (3,))), layer.in_features)
    values = torch.from_numpy(case.rng.standard_normal(shape)).to(adapter.stored(layer).dtype)
    return torch.nested.nested_tensor_from_jagged(values.requires_grad_(), offsets), values


def plain(y: Any) -> Tensor:
    """The numbers of an output, if it is jagged."""
    return y.values() if y.is_nested else y  # type: ignore[no-any-return]


# --- hostile inputs ---------------------------------------------------------------------------------------

_COMPRESSED = {
    "column huge": (1, -1, 2**31 - 1), "column one too many": (1, -1, "n"), "column negative": (1, 0, -1),
    "starts huge": (0, 1, 2**31 - 1), "starts negative": (0, 1, -5), "starts not from 0": (0, 0, 1),
    "ends before": (0, -1, 0), "ends behind": (0, -1, 10**6),
}  # fmt: skip


def hostile_input(case: Case, layer: Any) -> tuple[str, Tensor]:
    """A sparse matrix of which a number is out of range: its name and the tensor."""
    dtype, columns = adapter.stored(layer).dtype, layer.in_features
    x = torch.zeros(6, columns, dtype=dtype)
    x[torch.from_numpy(case.rng.random(x.shape) < 0.3)] = 1.0
    x[2, 0] = x[4, columns - 1] = 1.0
    layout = case.pick(("coo", "coo", "csr", "csr", "csc", "bsr"))
    if layout == "coo":
        how, given = _hostile_coo(case, x)
        return f"coo {how}", given
    how = case.pick(sorted(_COMPRESSED))
    part, at, number = _COMPRESSED[how]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse layouts are new
        made = {"csr": x.to_sparse_csr, "csc": x.to_sparse_csc, "bsr": lambda: x.to_sparse_bsr((1, 1))}
        good = made[layout]()
        rows = layout != "csc"
        parts = (
            [good.crow_indices(), good.col_indices()] if rows else [good.ccol_indices(), good.row_indices()]
        )
        parts = [each.to(case.pick((torch.int32, torch.int64))).clone() for each in parts]
        parts[1] = parts[1].to(parts[0].dtype)
        parts[part][at] = (columns if rows else len(x)) if number == "n" else number
        make = {
            "csr": torch.sparse_csr_tensor,
            "csc": torch.sparse_csc_tensor,
            "bsr": torch.sparse_bsr_tensor,
        }
        given = make[layout](*parts, good.values(), x.shape, check_invariants=False)
    return f"{layout} {how}", given


def _hostile_coo(case: Case, x: Tensor) -> tuple[str, Tensor]:
    indices = x.nonzero().T.clone()
    coalesced = case.chance(0.5)
    how = case.pick(("row huge", "row negative", "column huge", "column negative", "rows that descend"))
    if how == "rows that descend":  # which what is called coalesced has not
        indices, coalesced = indices.flip(1), True
    else:
        part, size = (0, len(x)) if "row" in how else (1, x.shape[1])
        indices[part, int(case.rng.integers(indices.shape[1]))] = -1 if "negative" in how else size
    entries = torch.ones(indices.shape[1], dtype=x.dtype)
    given = torch.sparse_coo_tensor(indices, entries, x.shape, is_coalesced=coalesced, check_invariants=False)
    return f"{how}{' coalesced' if coalesced else ''}", given
