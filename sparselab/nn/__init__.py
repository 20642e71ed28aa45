"""Sparse layers for PyTorch, and tools for whole models."""

from sparselab.nn._condense import CondensedLayer, condense
from sparselab.nn._tune import TuneReport, tune
from sparselab.nn.attention import SparseMultiheadAttention
from sparselab.nn.block import BlockSparseLinear
from sparselab.nn.brf import brf_
from sparselab.nn.conv import SparseConv2d
from sparselab.nn.convert import SparsifyPlan, densify, measure_sparsity, plan_sparsify, sparsify
from sparselab.nn.factors import GradientFactors
from sparselab.nn.fan_in import FanInLinear
from sparselab.nn.files import load_model, save_model
from sparselab.nn.functional import GradientWatcher
from sparselab.nn.init import constant_fan_in_, fan_in_uniform_
from sparselab.nn.linear import SparseLinear
from sparselab.nn.masked import MaskedConv2d, MaskedLinear
from sparselab.nn.meta import materialize
from sparselab.nn.report import MemoryReport, memory_report
from sparselab.nn.topology import SparseTopology, find_sparse

__all__ = [
    "BlockSparseLinear",
    "CondensedLayer",
    "FanInLinear",
    "GradientFactors",
    "GradientWatcher",
    "MaskedConv2d",
    "MaskedLinear",
    "MemoryReport",
    "SparseConv2d",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparseTopology",
    "SparsifyPlan",
    "TuneReport",
    "brf_",
    "condense",
    "constant_fan_in_",
    "densify",
    "fan_in_uniform_",
    "find_sparse",
    "load_model",
    "materialize",
    "measure_sparsity",
    "memory_report",
    "plan_sparsify",
    "save_model",
    "sparsify",
    "tune",
]
