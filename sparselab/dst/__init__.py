"""Dynamic sparse training: algorithms that rewire sparse layers while a model trains.

Attach one with ``algorithm.attach(model, optimizer)``, which steps along with the optimizer; or with
``model.apply(algorithm)``, and call ``algorithm.step()`` after every ``optimizer.step()``.
"""

from sparselab.dst.allocation import allocate, apportion, er, erk, uniform
from sparselab.dst.base import SparsityAlgorithm
from sparselab.dst.chts import CHTs, CHTss
from sparselab.dst.deepr import DeepR
from sparselab.dst.drop import (
    DropScore,
    Magnitude,
    MagnitudeAndGradient,
    RelativeImportance,
    SignedMagnitude,
    Soft,
)
from sparselab.dst.dsr import DSR
from sparselab.dst.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.gmp import GMP
from sparselab.dst.granet import GraNet
from sparselab.dst.group import Group
from sparselab.dst.grow import GradientGrowth, Growth, RandomGrowth
from sparselab.dst.grown import FanInUniform, Normal
from sparselab.dst.gse import GSE
from sparselab.dst.mest import MEST
from sparselab.dst.momentum import MomentumGrowth
from sparselab.dst.monitor import Monitor
from sparselab.dst.one_shot import prune, train_prune_finetune
from sparselab.dst.paths import PathGrowth
from sparselab.dst.redistribute import ByMagnitude, ByMomentum, ByRemaining, Redistribution
from sparselab.dst.rigl import RigL
from sparselab.dst.sampled import SampledGradientGrowth
from sparselab.dst.schedule import (
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
from sparselab.dst.set import SET
from sparselab.dst.snfs import SNFS
from sparselab.dst.srigl import SRigL
from sparselab.dst.static import Static
from sparselab.dst.topkast import TopKAST
from sparselab.dst.update import LayerView, UpdateReport, Vacancy
from sparselab.dst.when import AtSteps, EverySteps, UpdateSchedule, as_update_schedule

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
