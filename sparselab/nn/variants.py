"""Which of several ways a product of a sparse layer is computed, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sparselab.kernels._few_tokens import MOST_TOKENS
from sparselab.kernels._target import VECTOR_BYTES

#: Density from which expanding blocks of rows and calling the dense library is faster. Without AVX-512 as
#: timed on a Zen 3, with it from the rates of the kernels and of the dense library in benchmarks/LOG.md.
DENSE_FROM = {
    "forward": 0.42 if VECTOR_BYTES == 64 else 0.55,
    "input_grad": 0.42 if VECTOR_BYTES == 64 else 0.45,
    "values_grad": 0.32 if VECTOR_BYTES == 64 else 0.38,
}

#: The same for layers of dense blocks.
BLOCK_DENSE_FROM = {"forward": 0.75, "input_grad": 0.75, "values_grad": 0.65}

#: Fewer tokens do not repay the expansion of the weights.
_DENSE_TOKENS = 128


class Variant(NamedTuple):
    """How one product is computed: `name` is ``"few tokens"``, ``"tiles"`` or ``"dense blocks"``."""

    operation: str
    name: str
    reason: str


def choose(
    operation: str, n_tokens: int, density: float, dense_from: Mapping[str, float] = DENSE_FROM
) -> Variant:
    """The variant for one product.

    Parameters
    ----------
    operation : {"forward", "input_grad", "values_grad"}
    n_tokens : int
        Rows of the batch, all leading dimensions together.
    density : float
        Live fraction of the weights.
    dense_from : mapping of str to float
        Density from which dense blocks win, by operation.

    Raises
    ------
    ValueError
        If the operation is unknown.
    """
    if operation not in dense_from:
        raise ValueError(f"operation must be one of {', '.join(dense_from)}, got {operation!r}")
    name = choose_name(operation, n_tokens, density, dense_from)
    if name == "few tokens":
        reason = f"{n_tokens} tokens (at most {MOST_TOKENS}) do not fill a tile"
    elif name == "dense blocks":
        reason = f"density {density:.2f} is at least {dense_from[operation]:.2f}, where a dense product wins"
    elif density >= dense_from[operation]:
        reason = f"{n_tokens} tokens (fewer than {_DENSE_TOKENS}) do not repay dense blocks"
    else:
        reason = f"density {density:.2f} is below {dense_from[operation]:.2f}"
    return Variant(operation, name, reason)


def choose_name(
    operation: str, n_tokens: int, density: float, dense_from: Mapping[str, float] = DENSE_FROM
) -> str:
    """The name alone of what `choose` returns; costs a fraction of a microsecond."""
    if operation == "forward" and n_tokens <= MOST_TOKENS and dense_from is DENSE_FROM:
        return "few tokens"
    if density >= dense_from[operation] and n_tokens >= _DENSE_TOKENS:
        return "dense blocks"
    return "tiles"
