"""Training in miniature, and the judges that the algorithm tests share."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import nn

import sparselab
from sparselab.nn import BlockSparseLinear, FanInLinear, MaskedLinear, SparseLinear
from sparselab.nn.follow.bias_correction import AGE
from sparselab.nn.layers.base import find_sparse
from tests.dst.fake import FakeSparse

#: The fake offers the protocol and nothing else, so it proves that algorithms need nothing else.
LAYERS = ["fake", "real", "masked"]

KINDS = {
    "real": SparseLinear,
    "masked": MaskedLinear,
    "block": partial(BlockSparseLinear, block_shape=(3, 4)),
    "fan-in": FanInLinear,
    "masked fan-in": lambda *sizes, **settings: MaskedLinear.from_sparse(FanInLinear(*sizes, **settings)),
}

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


#: A class, the shape of an input of 20 numbers, kernel and settings of two layers, and how much comes out.
CONVOLUTIONS = {
    "conv": ("Conv2d", (5, 2, 2), (2, {"padding": 1}), (3, {}), 10),
    "conv 1d": ("Conv1d", (5, 4), (2, {"padding": 1}), (3, {"stride": 2}), 20),
    "conv 3d": ("Conv3d", (5, 1, 2, 2), (2, {"padding": 1}), ((2, 3, 2), {}), 20),
    "transposed 1d": ("ConvTranspose1d", (5, 4), (2, {"stride": 2}), (3, {"padding": 3}), 40),
    "transposed": ("ConvTranspose2d", (5, 2, 2), (2, {"stride": 2}), (3, {"padding": 2}), 40),
    "transposed 3d": ("ConvTranspose3d", (5, 1, 2, 2), (2, {}), ((2, 3, 3), {"padding": 1}), 90),
}


def build_convolutions(kind, dtype, sparsity):
    """Two of them, and a dense layer."""
    name, shape, *layers, width = CONVOLUTIONS[kind.removeprefix("masked ")]
    make = getattr(sparselab, ("Masked" if kind.startswith("masked") else "Sparse") + name)
    (first, options), (second, others) = layers
    return nn.Sequential(
        nn.Unflatten(1, shape), make(5, 12, first, **options, sparsity=sparsity, dtype=dtype), nn.ReLU(),
        make(12, 10, second, groups=2, **others, sparsity=sparsity, dtype=dtype), nn.Flatten(),
        nn.Linear(width, 3, dtype=dtype),
    )  # fmt: skip


def build(kind, dtype=torch.float32, seed=0, sparsity=0.8):
    """A small model of two sparse layers, one dense layer and biases where the layer has them."""
    torch.manual_seed(seed)
    if kind.removeprefix("masked ") in CONVOLUTIONS:
        return build_convolutions(kind, dtype, sparsity)
    if kind == "fake":
        first = FakeSparse(20, 31, sparsity, seed=seed, dtype=dtype)
        second = FakeSparse(31, 10, sparsity, seed=seed + 1, dtype=dtype)
    else:
        # A sparsity of 0.8 is a whole fan-in of 20 and 30 inputs.
        width = 30 if "fan-in" in kind else 31
        first = KINDS[kind](20, width, sparsity=sparsity, dtype=dtype)
        second = KINDS[kind](width, 10, sparsity=sparsity, dtype=dtype)
    return nn.Sequential(first, nn.ReLU(), second, nn.Linear(10, 3, dtype=dtype))


def backward(model, step, n_tokens=16):
    """Gradients of step number `step`, whose batch depends on nothing else."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n_tokens, 20, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (n_tokens,), generator=generator)
    nn.functional.cross_entropy(model(x), y).backward()


def train(model, optimizer, algorithm, first, last):
    """Steps number `first` to `last`, both included."""
    for step in range(first, last + 1):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        algorithm.step()


def sparse_layers(model):
    return [layer for _, layer in find_sparse(model)]


def by_position(layer, optimizer):
    """``{name: {position: number}}`` for the weights, their gradient and each of their moments."""
    positions = layer.positions().tolist()
    tensors = {"value": layer.stored.detach()}
    if layer.stored.grad is not None:
        tensors["gradient"] = layer.stored.grad
    for name, entry in optimizer.state[layer.stored].items():
        if isinstance(entry, torch.Tensor) and entry.dim() > 0:
            tensors[name] = entry
    return {
        name: dict(zip(positions, layer.per_connection(tensor).tolist(), strict=True))
        for name, tensor in tensors.items()
    }


def assert_followed(before, after, grown_with_weight=False):
    """Survivors carry the same numbers, grown connections zeros (or no weight of zero) and the age of 1."""
    assert before.keys() - {AGE} == after.keys() - {AGE}
    known = next(iter(before.values()))
    for position, age in after.get(AGE, {}).items():
        survivor = position in known
        expected = before.get(AGE, {}).get(position, np.zeros_like(age)) if survivor else np.ones_like(age)
        assert np.array_equal(age, expected), f"age at position {position}: {age}, not {expected}"
    for name in before.keys() - {AGE}:
        for position, number in after[name].items():
            if position in before[name]:
                expected = before[name][position]
                assert number == expected, f"{name} at position {position}: {number}, not {expected}"
            elif name == "value" and grown_with_weight:
                assert np.all(number)
            else:
                assert not np.any(number), f"{name} at position {position}: {number}, not 0"


def assert_topology(layer, nnz):
    """Exactly `nnz` connections, at distinct positions inside the matrix, in order."""
    positions = layer.positions()
    assert positions.shape == layer.per_connection(layer.stored).shape[:1] == (nnz,)
    assert layer.stored.count_nonzero() <= nnz * math.prod(layer.block_shape)
    assert layer.nnz == nnz
    assert bool((positions[1:] > positions[:-1]).all())
    assert positions[0] >= 0
    assert positions[-1] < math.prod(layer.grid)


def assert_same_state(model, optimizer, other_model, other_optimizer):
    """Two runs are in the same state, bit for bit."""
    for (name, a), (_, b) in zip(model.state_dict().items(), other_model.state_dict().items(), strict=True):
        assert torch.equal(a, b), f"{name} differs"
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        ours, theirs = optimizer.state[a], other_optimizer.state[b]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])), f"{key} differs"
