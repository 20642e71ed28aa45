"""Dynamic sparse training: algorithms that rewire sparse layers while a model trains.

Attach one with ``model.apply(algorithm)``, and call ``algorithm.step()`` after every ``optimizer.step()``.
"""

from sparselab.dst.base import DynamicSparsityAlgorithm, SparsityAlgorithm, UpdateReport, Vacancy
from sparselab.dst.one_shot import prune, train_prune_finetune
from sparselab.dst.rigl import RigL
from sparselab.dst.schedule import Constant, Cosine, Schedule, as_schedule
from sparselab.dst.set import SET
from sparselab.dst.static import Static

__all__ = [
    "SET",
    "Constant",
    "Cosine",
    "DynamicSparsityAlgorithm",
    "RigL",
    "Schedule",
    "SparsityAlgorithm",
    "Static",
    "UpdateReport",
    "Vacancy",
    "as_schedule",
    "prune",
    "train_prune_finetune",
]
