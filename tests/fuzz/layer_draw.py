"""Random layers of every kind."""

from __future__ import annotations

from typing import Any

import torch

from tests.fuzz import adapter
from tests.fuzz.case import Case
from tests.fuzz.layer_state import LayerTwin
from tests.fuzz.shared import Shared

BLOCKS = ((4, 4), (1, 8), (4, 1), (3, 5), (8, 8))
WIDTHS = (1, 2, 3, 7, 8, 16, 17, 33, 64, 80)
CONVOLUTIONS = "SparseConv1d", "SparseConv2d", "SparseConv3d"
TRANSPOSED = "SparseConvTranspose1d", "SparseConvTranspose2d", "SparseConvTranspose3d"
TIED = "TiedLinear", "TransposedLinear"
KINDS = (
    "SparseLinear", "FanInLinear", "BlockSparseLinear", *CONVOLUTIONS, *TRANSPOSED, "SparseEmbedding", *TIED,
    "masked",
)  # fmt: skip


def draw_layer(case: Case, kind: str) -> tuple[Any, LayerTwin]:
    """A random layer of that kind and its twin; "masked" is the masked twin of a layer of any kind."""
    torch.manual_seed(int(case.rng.integers(2**31)))
    if kind in TIED:
        layer = _draw_tied(case, kind)
    elif kind == "masked":
        sparse = case.pick(("SparseLinear", "SparseLinear", "SparseConv2d", *CONVOLUTIONS, *TRANSPOSED))
        layer = _masked(case, _draw(case, sparse))
    else:
        layer = _draw(case, kind)
    return layer, LayerTwin(layer)


def _draw(case: Case, kind: str, **settings: Any) -> Any:
    """A layer of a class that has weights of its own."""
    dtype = case.pick((torch.float32,) * 3 + (torch.float64,))
    density = case.pick((0.0, 0.05, 0.2, 0.5, 1.0))
    sizes, others = _settings(case, kind)
    settings = {"bias": case.chance(0.7), "density": density, "dtype": dtype, **others, **settings}
    case.note("make", kind)
    return case.valid(lambda: adapter.make_layer(kind, sizes, **settings))


def _settings(case: Case, kind: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """Sizes, and what only a layer of this kind is told."""
    sizes = case.pick(WIDTHS), case.pick(WIDTHS)
    if kind == "BlockSparseLinear":
        return sizes, {"block_shape": case.pick(BLOCKS)}
    if kind == "SparseEmbedding":
        padding = case.pick((None, None, 0, -1, sizes[0] // 2))
        return sizes, {"padding_idx": padding, "scale_grad_by_freq": case.chance(0.2)}
    if "Conv" in kind:
        return _convolution(case, kind, int(kind[-2]))
    return sizes, {}


def _convolution(case: Case, kind: str, n_dims: int) -> tuple[tuple[int, int], dict[str, Any]]:
    groups = case.pick((1, 1, 2, 3))
    sizes = groups * case.pick((1, 2, 3, 5)), groups * case.pick((1, 2, 4, 9))

    def each(*numbers: int) -> Any:
        """One for all dimensions, or one for each."""
        if case.chance(0.6):
            return case.pick(numbers)
        return tuple(int(case.pick(numbers)) for _ in range(n_dims))

    largest = 5 if n_dims < 3 else 2
    settings = {
        "kernel_size": each(1, 3, 3, 2, largest), "stride": each(1, 1, 2), "padding": each(0, 1, 2),
        "dilation": each(1, 1, 2), "groups": groups,
    }  # fmt: skip
    if kind in TRANSPOSED:
        settings["output_padding"] = 1 if case.chance(0.2) and _leaves_room(settings) else 0
    elif case.chance(0.15):
        settings |= {"padding": "same", "stride": 1}
    elif case.chance(0.15):
        settings["padding_mode"] = case.pick(("circular", "replicate", "reflect"))
    return sizes, settings


def _leaves_room(settings: dict[str, Any]) -> bool:
    """Whether an output padding of 1 is below the stride everywhere."""
    stride = settings["stride"]
    return min(stride) > 1 if isinstance(stride, tuple) else stride > 1


def _masked(case: Case, layer: Any) -> Any:
    case.note("make", "masked")
    return case.valid(lambda: adapter.masked(layer))


def _draw_tied(case: Case, kind: str) -> Shared:
    """A layer, what is tied to it, and maybe both one after the other."""
    owner = case.pick(("SparseLinear", "FanInLinear", "BlockSparseLinear", "SparseEmbedding", "masked"))
    chained = kind == "TransposedLinear" and owner != "SparseEmbedding" and case.chance(0.4)
    settings = {"bias": False} if chained else {}
    layer = _draw(case, "SparseLinear" if owner == "masked" else owner, **settings)
    layer = _masked(case, layer) if owner == "masked" else layer
    bias = case.chance(0.7)
    case.note("make", kind)
    return Shared(layer, case.valid(lambda: adapter.tied(kind, layer, bias)), chained)
