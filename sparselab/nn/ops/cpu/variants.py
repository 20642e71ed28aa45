"""Which of several ways a product of a sparse layer is computed, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sparselab.kernels.cpu.bsr.skinny import MOST_BLOCK_TOKENS
from sparselab.kernels.cpu.csr.skinny import MOST_TOKENS
from sparselab.kernels.cpu.csr.skinny_dw import MOST_SAMPLED_TOKENS
from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES

#: Density from which expanding blocks of rows and calling the dense library is faster. Without AVX-512 as
#: timed on a Zen 3, with it from the rates of the kernels and of the dense library in benchmarks/LOG.md.
DENSE_FROM = {
    "forward": 0.42 if VECTOR_BYTES == 64 else 0.55,
    "input_grad": 0.42 if VECTOR_BYTES == 64 else 0.45,
    "values_grad": 0.32 if VECTOR_BYTES == 64 else 0.38,
}

#: The same for convolutions, whose dense library is the faster one; as timed on a Zen 3.
DENSE_CONVOLUTION_FROM = {"forward": 0.42, "input_grad": 0.36, "values_grad": 0.55}

#: The same for layers of dense blocks.
BLOCK_DENSE_FROM = {"forward": 0.75, "input_grad": 0.75, "values_grad": 0.65}

#: Fewer tokens do not repay the expansion of the weights.
_DENSE_TOKENS = 128


class Rules(NamedTuple):
    """When a layer computes a product in another way than by tiles.

    By operation: from a density on (`dense_from`) it expands blocks of rows for the dense library; up to so
    many tokens (`skinny`; 0 if there is none) it has a kernel of its own.
    """

    dense_from: Mapping[str, float]
    skinny: Mapping[str, int]


SINGLE = Rules(
    DENSE_FROM, {"forward": MOST_TOKENS, "input_grad": MOST_TOKENS, "values_grad": MOST_SAMPLED_TOKENS}
)
BLOCKS = Rules(BLOCK_DENSE_FROM, {"forward": MOST_BLOCK_TOKENS, "input_grad": 0, "values_grad": 0})
CONVOLUTIONS = Rules(DENSE_CONVOLUTION_FROM, dict.fromkeys(DENSE_CONVOLUTION_FROM, 0))

#: The ways to compute the forward pass.
FORWARD = ("skinny", "tiles", "dense blocks")


class Variant(NamedTuple):
    """How one product is computed: `name` is ``"skinny"``, ``"tiles"`` or ``"dense blocks"``."""

    operation: str
    name: str
    reason: str


class Measured:
    """Microseconds of the forward variants of a layer, for some counts of tokens; see `sparselab.tune`.

    What was measured for a count holds for those from half of it to twice it; of two such counts, the one
    that differs by the smaller factor.
    """

    def __init__(self, density: float, microseconds: Mapping[int, Mapping[str, float]]) -> None:
        self.density = density
        self._microseconds = microseconds
        self._names: dict[int, str | None] = {}

    def name(self, n_tokens: int) -> str | None:
        """The fastest variant, or None if the count is far from those measured."""
        if n_tokens not in self._names:
            ranked = self._ranked(n_tokens)
            self._names[n_tokens] = ranked[0][0] if ranked else None
        return self._names[n_tokens]

    def reason(self, n_tokens: int) -> str:
        """Why `name` is what it is, if it is not None."""
        (_, best), *others = self._ranked(n_tokens)
        losers = ", ".join(f"{_time(time)} ({name})" for name, time in others)
        at = self._nearest(n_tokens)
        return f"measured: {_time(best)} against {losers}" + (f", at {at} tokens" if at != n_tokens else "")

    def _ranked(self, n_tokens: int) -> list[tuple[str, float]]:
        nearest = self._nearest(n_tokens)
        able = possible(n_tokens)
        times = {} if nearest is None else self._microseconds[nearest]
        return sorted(
            ((name, time) for name, time in times.items() if name in able), key=lambda each: each[1]
        )

    def _nearest(self, n_tokens: int) -> int | None:
        nearest = min(self._microseconds, key=lambda n: max(n, n_tokens) / max(min(n, n_tokens), 1))
        return nearest if nearest <= 2 * n_tokens and n_tokens <= 2 * nearest else None


def possible(n_tokens: int, rules: Rules = SINGLE) -> tuple[str, ...]:
    """The forward variants that can compute so many tokens."""
    return FORWARD if n_tokens <= rules.skinny["forward"] else FORWARD[1:]


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f} us" if microseconds >= 9.95 else f"{microseconds:.1f} us"


def choose(
    operation: str,
    n_tokens: int,
    density: float,
    measured: Measured | None = None,
    rules: Rules = SINGLE,
) -> Variant:
    """The variant for one product.

    Parameters
    ----------
    operation : {"forward", "input_grad", "values_grad"}
    n_tokens : int
        Rows of the batch, all leading dimensions together.
    density : float
        Live fraction of the weights.
    measured : Measured, optional
        Of the forward pass; the rule is for what it does not cover.
    rules : Rules
        Of the kind of layer.

    Raises
    ------
    ValueError
        If the operation is unknown.
    """
    dense_from = rules.dense_from
    if operation not in dense_from:
        raise ValueError(f"operation must be one of {', '.join(dense_from)}, got {operation!r}")
    if operation == "forward" and measured is not None and (name := measured.name(n_tokens)) is not None:
        return Variant(operation, name, measured.reason(n_tokens))
    name = choose_name(operation, n_tokens, density, rules)
    if name == "skinny":
        reason = f"{n_tokens} tokens (at most {rules.skinny[operation]}) do not fill a tile"
    elif name == "dense blocks":
        reason = f"density {density:.2f} is at least {dense_from[operation]:.2f}, where a dense product wins"
    elif density >= dense_from[operation]:
        reason = f"{n_tokens} tokens (fewer than {_DENSE_TOKENS}) do not repay dense blocks"
    else:
        reason = f"density {density:.2f} is below {dense_from[operation]:.2f}"
    return Variant(operation, name, reason)


def choose_name(operation: str, n_tokens: int, density: float, rules: Rules = SINGLE) -> str:
    """The name alone of what `choose` returns by the rule; costs a fraction of a microsecond."""
    if 0 < n_tokens <= rules.skinny[operation]:
        return "skinny"
    if density >= rules.dense_from[operation] and n_tokens >= _DENSE_TOKENS:
        return "dense blocks"
    return "tiles"
