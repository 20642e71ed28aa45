"""Adam's bias correction by the age of each connection.

Adam keeps means of gradients that start at 0, and corrects them for that by the number of its steps. A
connection that was grown at step 10,000 starts at 0 as well, but is corrected for 10,000 steps: its first
move is ``(1 - beta1) / sqrt(1 - beta2)`` times the learning rate, 3.2 with the usual betas, later ones up to
6.6 (SMET, arXiv 2606.00888, traces spikes of the loss after updates to this). So the state of the optimizer
gets the number of steps that each grown connection has taken, 2 bytes for each, and what it has moved young
ones by is put right after its step; all others are left as they are, to the bit.

Ages follow connections, are saved and loaded, as all state of an optimizer. They end where the correction is
1 to the precision of float32, or after 32,766 steps (of a beta2 of 0.9999 it is 0.98 then).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sparselab.kernels.cpu.bias_correction import Factors, Kept, Rate, correct_moves

#: Names in the state of an optimizer: the own step that each connection takes next (0: that of the
#: optimizer), the optimizer's step that ages were last looked at, and over how many own steps moves grow.
AGE, AGED_AT, WARMUP = "connection_age", "connection_aged_at", "connection_warmup"

_MOST = int(np.iinfo(np.int16).max)
#: Steps after which nothing is left of a product of momentums that are not nearly 1.
_VANISHED = 1 << 14
#: What is 1 within this is 1 in float32.
_EXACT = 2.0**-25


class _Rule(NamedTuple):
    """How an optimizer of torch moves weights: what `Factors` say, and the names of its m and s."""

    factors: Callable[[dict[str, Any], Any], Factors]
    m: str
    s: str
    is_squared: bool = True
    has_gradient: bool = False


def _corrections(group: dict[str, Any], ages: Any) -> tuple[Any, Any]:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return 1 - beta1**ages, 1 - beta2**ages


def _of_adam(group: dict[str, Any], ages: Any) -> Factors:
    first, second = _corrections(group, ages)
    zero = np.zeros_like(ages)
    return Factors(1 / first, zero, 1 / np.sqrt(second), zero + group["eps"])


def _of_adamax(group: dict[str, Any], ages: Any) -> Factors:
    first, _ = _corrections(group, ages)
    zero = np.zeros_like(ages)
    return Factors(1 / first, zero, zero + 1, zero)


def _of_radam(group: dict[str, Any], ages: Any) -> Factors:
    """Liu et al., arXiv 1908.03265, algorithm 2; without the second moment while its variance is unknown."""
    first, second = _corrections(group, ages)
    beta2 = float(group["betas"][1])
    most = 2 / (1 - beta2) - 1
    length = most - 2 * ages * beta2**ages / second
    is_known = length > 5
    known = np.where(is_known, length, 6.0)
    rectified = np.sqrt((known - 4) * (known - 2) * most / ((most - 4) * (most - 2) * known))
    return Factors(
        np.where(is_known, rectified * np.sqrt(second), 1.0) / first,
        np.zeros_like(ages),
        np.where(is_known, 1.0, 0.0),
        np.where(is_known, float(group["eps"]), 1.0),
    )


def _of_nadam(group: dict[str, Any], ages: Any) -> Factors:
    """Dozat, "Incorporating Nesterov momentum into Adam", as torch has it."""
    _, second = _corrections(group, ages)
    products = np.cumprod(_momentum(group, np.arange(1, _VANISHED + 1)))
    product = products[np.minimum(ages, _VANISHED).astype(np.int64) - 1]
    now, coming = _momentum(group, ages), _momentum(group, ages + 1)
    return Factors(
        coming / (1 - product * coming), (1 - now) / (1 - product), 1 / np.sqrt(second),
        np.zeros_like(ages) + group["eps"],
    )  # fmt: skip


def _momentum(group: dict[str, Any], steps: Any) -> Any:
    return float(group["betas"][0]) * (1 - 0.5 * 0.96 ** (steps * group["momentum_decay"]))


_RULES: dict[type[Optimizer], _Rule] = {
    torch.optim.NAdam: _Rule(_of_nadam, "exp_avg", "exp_avg_sq", has_gradient=True),
    torch.optim.RAdam: _Rule(_of_radam, "exp_avg", "exp_avg_sq"),
    torch.optim.Adamax: _Rule(_of_adamax, "exp_avg", "exp_inf", is_squared=False),
    torch.optim.Adam: _Rule(_of_adam, "exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: _Rule(_of_adam, "exp_avg", "exp_avg_sq"),
}
#: As torch wrote them: it wraps the step of every class that is used.
_STEPS = {kind: inspect.unwrap(kind.step) for kind in _RULES}


def rule_of(optimizer: Any) -> _Rule | None:
    """How an optimizer corrects for bias; None if it does not, or is not known to step as torch's do."""
    kind: Any = type(optimizer)
    return _rule_of(kind, getattr(kind, "step", None))


@functools.lru_cache(maxsize=64)
def _rule_of(kind: Any, step: Any) -> _Rule | None:
    known = (rule for each, rule in _RULES.items() if issubclass(kind, each))
    return next(known, None) if step and inspect.unwrap(step) in _STEPS.values() else None


def corrects_bias(optimizer: Any) -> bool:
    """Whether an optimizer corrects for bias in a way that is known here."""
    return rule_of(optimizer) is not None


def begin_ages(state: dict[str, Any], shape: tuple[int, ...], warmup: int) -> Tensor:
    """Ages in the state that such an optimizer has for a Parameter, all 0 if there were none.

    Parameters
    ----------
    state : dict
    shape : tuple of int
        Of the ages.
    warmup : int
        Own steps over which the moves of what is grown grow.
    """
    if AGE not in state:
        state[AGE] = torch.zeros(shape, dtype=torch.int16)
        state[AGED_AT] = _step_of(state)
    state[WARMUP] = warmup
    return ages_in(state)


def ages_in(state: dict[str, Any]) -> Tensor:
    """The ages in a state that has them; loading gives all state the dtype of its Parameter."""
    ages: Tensor = state[AGE]
    if ages.dtype != torch.int16:
        state[AGE] = ages = ages.to(torch.int16)
    return ages


def settle_ages(optimizer: Any, parameter: Tensor) -> None:
    """Put right how an optimizer has moved the young connections of a Parameter, once for each step."""
    for group in optimizer.param_groups:
        if any(each is parameter for each in group["params"]):
            _settle(optimizer, group, parameter)


def _settle_all(optimizer: Any, *_: Any) -> None:
    if rule_of(optimizer) is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _settle(optimizer, group, parameter)


@torch.no_grad()
def _settle(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> None:
    state, rule = optimizer.state.get(parameter), rule_of(optimizer)
    if not state or AGE not in state or rule is None or group.get("differentiable"):
        return
    step = _step_of(state)
    if step == state[AGED_AT]:
        return
    ages, weights = ages_in(state), _flat(parameter)
    factors, now = _factors_at(rule, group, step, weights.dtype)
    gradient, decay = np.empty(0, weights.dtype), 0.0
    if rule.has_gradient and parameter.grad is not None:
        gradient = _flat(parameter.grad)
        decay = 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])
    s = state["max_exp_avg_sq" if group.get("amsgrad") else rule.s]
    sign = -1.0 if group.get("maximize") else 1.0
    n_young = correct_moves(
        _flat(ages), weights, Kept(_flat(state[rule.m]), _flat(s), gradient), factors, now,
        Rate(float(group["lr"]), sign, decay, int(state[WARMUP])), rule.is_squared,
    )  # fmt: skip
    state[AGED_AT] = step
    if not n_young:
        for name in (AGE, AGED_AT, WARMUP):
            del state[name]


def _step_of(state: dict[str, Any]) -> int:
    return int(state["step"])


def _flat(tensor: Tensor) -> Any:
    """All entries in the order of memory; those of ages, weights and state lie alike."""
    return tensor.detach().view(-1).numpy()


def _factors_at(rule: _Rule, group: dict[str, Any], step: int, dtype: Any) -> tuple[Factors, Factors]:
    """The factors of all ages, and those of the optimizer's step."""
    settings = tuple(
        (name, tuple(map(float, value)) if name == "betas" else float(value))
        for name, value in group.items()
        if name in ("betas", "eps", "momentum_decay")
    )
    return _factors(rule, settings, dtype), _factors_of_step(rule, settings, step)


@functools.lru_cache(maxsize=64)
def _factors_of_step(rule: _Rule, settings: tuple[tuple[str, Any], ...], step: int) -> Factors:
    """Once for all Parameters."""
    return Factors(*(float(column[0]) for column in rule.factors(dict(settings), np.array([float(step)]))))


@functools.lru_cache(maxsize=16)
def _factors(rule: _Rule, settings: tuple[tuple[str, Any], ...], dtype: Any) -> Factors:
    """By age, from 1 to where they stay as they are in float32."""
    group = dict(settings)
    last, slowest = _MOST - 1, max(*group["betas"], 0.5)
    if "momentum_decay" not in group:
        # In RAdam the age itself is a factor, too.
        last = min(last, math.ceil((math.log(_EXACT) - 2 * math.log(_MOST)) / math.log(slowest)))
    columns = rule.factors(group, np.arange(1, last + 1, dtype=np.float64))
    return Factors(*(np.concatenate([[np.nan], column]).astype(dtype) for column in columns))


register_optimizer_step_post_hook(_settle_all)
