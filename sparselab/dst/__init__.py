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
from sparselab.dst.budget.targets import Budget, Exchange, KeepCount, Prune
from sparselab.dst.engine.base import SparsityAlgorithm
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm
from sparselab.dst.engine.group import Group
from sparselab.dst.monitor.monitor import Monitor
from sparselab.dst.part import Part
from sparselab.dst.parts.drop import (
    DropScore,
    Magnitude,
    MagnitudeAndGradient,
    RelativeImportance,
    SignedMagnitude,
    Soft,
)
from sparselab.dst.parts.grow import GradientGrowth, Growth, RandomGrowth, random_free
from sparselab.dst.parts.grow_momentum import MomentumGrowth
from sparselab.dst.parts.grow_paths import PathGrowth
from sparselab.dst.parts.grow_sampled import SampledGradientGrowth
from sparselab.dst.parts.grown import FanInUniform, Normal
from sparselab.dst.parts.redistribute import ByMagnitude, ByMomentum, ByRemaining, ByWeight, Redistribution
from sparselab.dst.parts.select import (
    LayerSelection,
    NetworkSelection,
    RowBudget,
    RowSelection,
    Selection,
    UpdateContext,
)
from sparselab.dst.replicas import Ranks, Replicas
from sparselab.dst.schedules.schedule import (
    ConstantSchedule,
    CosineSchedule,
    CyclingSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PolynomialSchedule,
    Schedule,
    SigmoidSchedule,
    as_schedule,
)
from sparselab.dst.schedules.when import AtSteps, EverySteps, UpdateSchedule, as_update_schedule
from sparselab.dst.view import LayerUpdate, LayerView, UpdateReport
from sparselab.nn.follow.state_move import Young

__all__ = [
    "DSR",
    "GMP",
    "GSE",
    "MEST",
    "SET",
    "SNFS",
    "AtSteps",
    "Budget",
    "ByMagnitude",
    "ByMomentum",
    "ByRemaining",
    "ByWeight",
    "CHTs",
    "CHTss",
    "ConstantSchedule",
    "CosineSchedule",
    "CyclingSchedule",
    "DeepR",
    "DropScore",
    "DynamicSparsityAlgorithm",
    "EverySteps",
    "Exchange",
    "ExponentialSchedule",
    "FanInUniform",
    "GraNet",
    "GradientGrowth",
    "Group",
    "Growth",
    "KeepCount",
    "LayerSelection",
    "LayerUpdate",
    "LayerView",
    "LinearSchedule",
    "Magnitude",
    "MagnitudeAndGradient",
    "MomentumGrowth",
    "Monitor",
    "NetworkSelection",
    "Normal",
    "Part",
    "PathGrowth",
    "PolynomialSchedule",
    "Prune",
    "RandomGrowth",
    "Ranks",
    "Redistribution",
    "RelativeImportance",
    "Replicas",
    "RigL",
    "RowBudget",
    "RowSelection",
    "SRigL",
    "SampledGradientGrowth",
    "Schedule",
    "Selection",
    "SigmoidSchedule",
    "SignedMagnitude",
    "Soft",
    "SparsityAlgorithm",
    "Static",
    "TopKAST",
    "UpdateContext",
    "UpdateReport",
    "UpdateSchedule",
    "Young",
    "allocate",
    "apportion",
    "as_schedule",
    "as_update_schedule",
    "er",
    "erk",
    "prune",
    "random_free",
    "train_prune_finetune",
    "uniform",
]
