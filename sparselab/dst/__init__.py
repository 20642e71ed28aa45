"""Dynamic sparse training: algorithms that rewire sparse layers while a model trains.

Attach one with ``algorithm.attach(model, optimizer)``, which steps along with the optimizer; or with
``model.apply(algorithm)``, and call ``algorithm.step()`` after every ``optimizer.step()``.
"""

from sparselab.dst.algorithms.chts import CHTs, CHTss
from sparselab.dst.algorithms.deepr import DeepR
from sparselab.dst.algorithms.dsr import DSR
from sparselab.dst.algorithms.gmp import GMP
from sparselab.dst.algorithms.granet import GraNet
from sparselab.dst.algorithms.gse import GSE
from sparselab.dst.algorithms.mest import MEST
from sparselab.dst.algorithms.rigl import RigL
from sparselab.dst.algorithms.set import SET
from sparselab.dst.algorithms.snfs import SNFS
from sparselab.dst.algorithms.srigl import SRigL
from sparselab.dst.algorithms.static import Static
from sparselab.dst.algorithms.topkast import TopKAST
from sparselab.dst.budget.allocate import allocate, apportion, er, erk, uniform
from sparselab.dst.budget.prune import prune, train_prune_finetune
from sparselab.dst.engine.base import SparsityAlgorithm
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.engine.group import Group
from sparselab.dst.monitor.monitor import Monitor
from sparselab.dst.parts.drop import (
    DropScore,
    Magnitude,
    MagnitudeAndGradient,
    RelativeImportance,
    SignedMagnitude,
    Soft,
)
from sparselab.dst.parts.grow import GradientGrowth, Growth, RandomGrowth
from sparselab.dst.parts.grow_momentum import MomentumGrowth
from sparselab.dst.parts.grow_paths import PathGrowth
from sparselab.dst.parts.grow_sampled import SampledGradientGrowth
from sparselab.dst.parts.grown import FanInUniform, Normal
from sparselab.dst.parts.redistribute import ByMagnitude, ByMomentum, ByRemaining, Redistribution
from sparselab.dst.parts.view import LayerView, UpdateReport, Vacancy
from sparselab.dst.schedules.schedule import (
    Constant,
    Cosine,
    Cycling,
    Exponential,
    Linear,
    Polynomial,
    Schedule,
    Sigmoid,
    as_schedule,
)
from sparselab.dst.schedules.when import AtSteps, EverySteps, UpdateSchedule, as_update_schedule

__all__ = [
    "DSR",
    "GMP",
    "GSE",
    "MEST",
    "SET",
    "SNFS",
    "AtSteps",
    "ByMagnitude",
    "ByMomentum",
    "ByRemaining",
    "CHTs",
    "CHTss",
    "Constant",
    "Cosine",
    "Cycling",
    "DeepR",
    "DropScore",
    "DynamicSparsityAlgorithm",
    "EverySteps",
    "Exponential",
    "FanInUniform",
    "GraNet",
    "GradientGrowth",
    "Group",
    "Growth",
    "LayerView",
    "Linear",
    "Magnitude",
    "MagnitudeAndGradient",
    "MomentumGrowth",
    "Monitor",
    "Normal",
    "PathGrowth",
    "Polynomial",
    "RandomGrowth",
    "Redistribution",
    "RelativeImportance",
    "RigL",
    "SRigL",
    "SampledGradientGrowth",
    "Schedule",
    "Sigmoid",
    "SignedMagnitude",
    "Soft",
    "SparsityAlgorithm",
    "Static",
    "TopKAST",
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
