"""Dynamic sparse training: algorithms that rewire sparse layers while a model trains.

Attach one with ``algorithm.attach(model, optimizer)``, which steps along with the optimizer; or with
``model.apply(algorithm)``, and call ``algorithm.step()`` after every ``optimizer.step()``.
"""

from sparselab.dst.allocation import allocate, apportion, er, erk, uniform
from sparselab.dst.base import SparsityAlgorithm
from sparselab.dst.deepr import DeepR
from sparselab.dst.drop import DropScore, Magnitude, SignedMagnitude
from sparselab.dst.dsr import DSR
from sparselab.dst.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.group import Group
from sparselab.dst.grow import GradientGrowth, Growth, RandomGrowth
from sparselab.dst.grown import FanInUniform, Normal
from sparselab.dst.momentum import MomentumGrowth
from sparselab.dst.one_shot import prune, train_prune_finetune
from sparselab.dst.redistribute import ByMagnitude, ByMomentum, ByRemaining, Redistribution
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
from sparselab.dst.snfs import SNFS
from sparselab.dst.static import Static
from sparselab.dst.update import LayerView, UpdateReport, Vacancy
from sparselab.dst.when import AtSteps, EverySteps, UpdateSchedule, as_update_schedule

__all__ = [
    "DSR",
    "SET",
    "SNFS",
    "AtSteps",
    "ByMagnitude",
    "ByMomentum",
    "ByRemaining",
    "Constant",
    "Cosine",
    "Cycling",
    "DeepR",
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
    "MomentumGrowth",
    "Normal",
    "Polynomial",
    "RandomGrowth",
    "Redistribution",
    "RigL",
    "Schedule",
    "SignedMagnitude",
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
