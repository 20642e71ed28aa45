"""Sparse layers for PyTorch, and tools for whole models."""

import sparselab.nn.ops.tools.flops  # noqa: F401 - what it registers with torch
from sparselab.nn.follow import replicas as _replicas  # noqa: F401 - what it registers with torch
from sparselab.nn.follow.compression import TopKCompression
from sparselab.nn.layers.base import SparseLayer, find_sparse
from sparselab.nn.layers.block import BlockSparseLinear
from sparselab.nn.layers.composed.attention import SparseMultiheadAttention
from sparselab.nn.layers.composed.mlp import SparseMLP, feed_forward
from sparselab.nn.layers.composed.recurrent import SparseGRU, SparseLSTM, SparseRNN
from sparselab.nn.layers.composed.tied import TiedLinear, TransposedLinear
from sparselab.nn.layers.conv.masked import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from sparselab.nn.layers.conv.sparse import SparseConv1d, SparseConv2d, SparseConv3d
from sparselab.nn.layers.conv.transposed import (
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
)
from sparselab.nn.layers.dense import DenseLayer, DenseType, LinearView, register_dense, whole
from sparselab.nn.layers.embedding import SparseEmbedding
from sparselab.nn.layers.fan_in import FanInLinear
from sparselab.nn.layers.kinds import LayerKind, register_kind
from sparselab.nn.layers.linear import SparseLinear
from sparselab.nn.layers.masked import MaskedLinear
from sparselab.nn.layers.starts.brf import brf_
from sparselab.nn.layers.starts.constant_fan_in import constant_fan_in_
from sparselab.nn.models.average import (
    AveragedModel,
    average,
    average_over_ranks,
    copy_topology,
    soft_update,
)
from sparselab.nn.models.condense import CondensedLayer, condense
from sparselab.nn.models.convert import measure_sparsity, plan_sparsify, sparsify
from sparselab.nn.models.densify import densify
from sparselab.nn.models.groups import parameter_groups
from sparselab.nn.models.inference.freeze import freeze
from sparselab.nn.models.materialize import materialize
from sparselab.nn.models.memory import MemoryReport, memory_report
from sparselab.nn.models.plan import SparsifyPlan
from sparselab.nn.models.saved.checkpoint import (
    CheckpointError,
    RandomState,
    load_checkpoint,
    save_checkpoint,
)
from sparselab.nn.models.saved.files import load_model, save_model
from sparselab.nn.models.tune import TuneReport, tune
from sparselab.nn.ops.operands import GradientOperands
from sparselab.nn.ops.products import register_products
from sparselab.nn.ops.topologies import GradientHook, register_layout
from sparselab.nn.storage.init import fan_in_uniform_
from sparselab.nn.weight.view import SparseWeight

__all__ = [
    "AveragedModel",
    "BlockSparseLinear",
    "CheckpointError",
    "CondensedLayer",
    "DenseLayer",
    "DenseType",
    "FanInLinear",
    "GradientHook",
    "GradientOperands",
    "LayerKind",
    "LinearView",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedLinear",
    "MemoryReport",
    "RandomState",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseEmbedding",
    "SparseGRU",
    "SparseLSTM",
    "SparseLayer",
    "SparseLinear",
    "SparseMLP",
    "SparseMultiheadAttention",
    "SparseRNN",
    "SparseWeight",
    "SparsifyPlan",
    "TiedLinear",
    "TopKCompression",
    "TransposedLinear",
    "TuneReport",
    "average",
    "average_over_ranks",
    "brf_",
    "condense",
    "constant_fan_in_",
    "copy_topology",
    "densify",
    "fan_in_uniform_",
    "feed_forward",
    "find_sparse",
    "freeze",
    "load_checkpoint",
    "load_model",
    "materialize",
    "measure_sparsity",
    "memory_report",
    "parameter_groups",
    "plan_sparsify",
    "register_dense",
    "register_kind",
    "register_layout",
    "register_products",
    "save_checkpoint",
    "save_model",
    "soft_update",
    "sparsify",
    "tune",
    "whole",
]
