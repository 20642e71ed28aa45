"""Dynamic sparse training: algorithms that rewire sparse layers while a model trains.

Attach one with ``model.apply(algorithm)``, and call ``algorithm.step()`` after every ``optimizer.step()``.
"""

from sparselab.dst.allocation import allocate, apportion, er, erk, uniform
from sparselab.dst.base import DynamicSparsityAlgorithm, SparsityAlgorithm, UpdateReport, Vacancy
from sparselab.dst.rigl import RigL
from sparselab.dst.schedule import (
    Constant,
    Cosine,
    Cycling,
    Exponential,
    Linear,
    Polynomial,
    Schedule,
    as_schedule,
)
from sparselab.dst.set import SET
from sparselab.dst.static import Static
from sparselab.dst.when import AtSteps, EverySteps, UpdateSchedule, as_update_schedule

__all__ = [
    "SET",
    "AtSteps",
    "Constant",
    "Cosine",
    "Cycling",
    "DynamicSparsityAlgorithm",
    "EverySteps",
    "Exponential",
    "Linear",
    "Polynomial",
    "RigL",
    "Schedule",
    "SparsityAlgorithm",
    "Static",
    "UpdateReport",
    "UpdateSchedule",
    "Vacancy",
    "allocate",
    "apportion",
    "as_schedule",
    "as_update_schedule",
    "er",
    "erk",
    "uniform",
]
