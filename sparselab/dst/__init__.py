"""Dynamic sparse training: algorithms that rewire sparse layers while a model trains.

Attach one with ``algorithm.attach(model, optimizer)``, which steps along with the optimizer; or with
``model.apply(algorithm)``, and call ``algorithm.step()`` after every ``optimizer.step()``.
"""

from sparselab.dst.allocation import allocate, apportion, er, erk, uniform
from sparselab.dst.base import SparsityAlgorithm
from sparselab.dst.drop import DropScore, Magnitude
from sparselab.dst.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.group import Group
from sparselab.dst.grow import GradientGrowth, Growth, RandomGrowth
from sparselab.dst.grown import FanInUniform, Normal
from sparselab.dst.monitor import Monitor
from sparselab.dst.one_shot import prune, train_prune_finetune
from sparselab.dst.redistribute import ByRemaining, Redistribution
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
from sparselab.dst.update import LayerView, UpdateReport, Vacancy
from sparselab.dst.when import AtSteps, EverySteps, UpdateSchedule, as_update_schedule

__all__ = [
    "SET",
    "AtSteps",
    "ByRemaining",
    "Constant",
    "Cosine",
    "Cycling",
    "DropScore",
    "DynamicSparsityAlgorithm",
    "EverySteps",
    "Exponential",
    "FanInUniform",
    "GradientGrowth",
    "Group",
    "Growth",
    "LayerView",
    "Linear",
    "Magnitude",
    "Monitor",
    "Normal",
    "Polynomial",
    "RandomGrowth",
    "Redistribution",
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
    "prune",
    "train_prune_finetune",
    "uniform",
]
