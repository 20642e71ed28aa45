"""Training in miniature, and the judges that the algorithm tests share."""

from __future__ import annotations

import torch
from torch import nn

from sparselab.dst import GMP, MEST, SET, Cosine, GraNet, Linear, Polynomial, RigL, SRigL, Static, TopKAST
from sparselab.kernels import n_connections
from sparselab.nn import MaskedLinear, SparseLinear, constant_fan_in_
from sparselab.nn.topology import find_sparse
from tests.dst.fake import FakeSparse

#: The fake offers the protocol and nothing else, so it proves that algorithms need nothing else.
LAYERS = ["fake", "real", "masked"]

ALGORITHMS = {
    "static": lambda **kw: Static(0.8),
    "set": lambda **kw: SET(0.8, drop_fraction=0.3, update=7, seed=3, **kw),
    "rigl": lambda **kw: RigL(0.8, drop_fraction=0.3, update=7, seed=3, **kw),
    "set by row": lambda **kw: SET(0.8, drop_fraction=0.3, update=7, seed=3, scope="row", **kw),
    "rigl by row": lambda **kw: RigL(0.8, drop_fraction=0.3, update=7, seed=3, scope="row", **kw),
    "srigl": lambda **kw: SRigL(drop_fraction=0.3, update=7, seed=3, gamma_sal=0.95, exempt_last=False, **kw),
}

#: What is done to a model before the algorithm is attached.
PREPARE = {"srigl": constant_fan_in_}

#: Connections that a layer must have now, given those it was born with, where these are not the same.
EXPECTED_NNZ = {"srigl": lambda layer, born: born // live_rows(layer) * live_rows(layer)}
    "gmp": lambda **kw: GMP(Polynomial(0.0, 0.9, 50), update=7, **kw),
    "gmp-network": lambda **kw: GMP(Polynomial(0.0, 0.9, 50), update=7, scope="network", **kw),
    "granet": lambda **kw: GraNet(Polynomial(0.5, 0.9, 50), Cosine(0.5, 250, 0.005), update=7, **kw),
    "mest-em": lambda **kw: MEST(0.8, 0.05, update=7, seed=3, soft_bound=False, lam=0.5, **kw),
    "mest-em&s": lambda **kw: MEST(0.8, Linear(0.1, 0.02, 50), update=7, seed=3, **kw),
    "topkast": lambda **kw: TopKAST(0.9, 0.8, update=7, seed=3, **kw),
    "topkast-sampled": lambda **kw: TopKAST(0.9, 0.8, update=7, seed=3, master_bytes=0, **kw),
}

#: Sparsity of the layers at first, where it is not 0.8.
START = {"gmp": 0.0, "gmp-network": 0.0, "granet": 0.5, "mest-em&s": 0.7}

#: Sparsity after an update at a step: of each layer, and of the network as a whole.
LAYER_SPARSITY = {
    "gmp": Polynomial(0.0, 0.9, 50),
    "mest-em&s": lambda step: 0.8 - Linear(0.1, 0.02, 50)(step),
}
NETWORK_SPARSITY = {"gmp-network": Polynomial(0.0, 0.9, 50), "granet": Polynomial(0.5, 0.9, 50)}

#: Those whose new connections bring a weight along.
GROWN_WITH_WEIGHT = {"topkast", "topkast-sampled"}

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def build(kind, dtype=torch.float32, seed=0, sparsity=0.8):
    """A small model of two sparse layers, one dense layer and biases where the layer has them."""
    torch.manual_seed(seed)
    if kind == "fake":
        first = FakeSparse(20, 31, sparsity, seed=seed, dtype=dtype)
        second = FakeSparse(31, 10, sparsity, seed=seed + 1, dtype=dtype)
    else:
        make = SparseLinear if kind == "real" else MaskedLinear
        first = make(20, 31, sparsity=sparsity, dtype=dtype)
        second = make(31, 10, sparsity=sparsity, dtype=dtype)
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


def live_rows(layer):
    """Rows that have a connection."""
    return len((layer.positions() // layer.shape[1]).unique())


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
    """Survivors carry the same numbers, grown connections carry zeros (or no weight of zero)."""
    assert before.keys() == after.keys()
    for name in before:
        for position, number in after[name].items():
            expected = before[name].get(position, 0.0)
            if name == "value" and grown_with_weight and position not in before[name]:
                assert number != 0
                continue
            assert number == expected, f"{name} at position {position}: {number}, not {expected}"


def assert_counts(name, layers, born, step):
    """The algorithm of that name has left as many connections as it should after an update at `step`."""
    counts = [layer.nnz for layer in layers]
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    if name in NETWORK_SPARSITY:
        assert sum(counts) == n_connections((1, sum(sizes)), NETWORK_SPARSITY[name](step))
    elif name in LAYER_SPARSITY:
        assert counts == [n_connections((1, size), LAYER_SPARSITY[name](step)) for size in sizes]
    else:
        assert counts == born


def assert_topology(layer, nnz):
    """Exactly `nnz` connections, at distinct positions inside the matrix, in order."""
    positions = layer.positions()
    assert positions.shape == layer.per_connection(layer.stored).shape == (nnz,)
    assert layer.stored.count_nonzero() <= nnz
    assert layer.nnz == nnz
    assert bool((positions[1:] > positions[:-1]).all())
    assert positions[0] >= 0
    assert positions[-1] < layer.shape[0] * layer.shape[1]


def assert_same_state(model, optimizer, other_model, other_optimizer):
    """Two runs are in the same state, bit for bit."""
    for (name, a), (_, b) in zip(model.state_dict().items(), other_model.state_dict().items(), strict=True):
        assert torch.equal(a, b), f"{name} differs"
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        ours, theirs = optimizer.state[a], other_optimizer.state[b]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])), f"{key} differs"
