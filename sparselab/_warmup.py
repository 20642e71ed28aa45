"""Compiling, or loading from the disk cache, ahead of the first use."""

from __future__ import annotations

import time

import torch

from sparselab.dst import SET, DynamicSparsityAlgorithm, RigL
from sparselab.nn import SparseLinear

#: Tokens that bring every variant of a product into play, and a layer large enough to be worth threads.
_TOKENS = (1, 8, 16, 32, 48, 128)
_SHAPE = 256, 160
_SPARSITY = 0.4


def warmup(dtype: torch.dtype = torch.float32, *, training: bool = True) -> float:
    """Compile the kernels, or load them from the disk cache, before the first batch waits for them.

    Parameters
    ----------
    dtype : torch.dtype
        float32, float64, bfloat16 or float16: kernels are compiled for each dtype of the weights. int8: of
        layers that are frozen in it, in the forward pass.
    training : bool
        Also those of the backward passes and, for float32 and float64, of topology updates as `SET` and
        `RigL` make them; what else some algorithms use is compiled at their first update.

    Returns
    -------
    float
        Seconds it took.

    Notes
    -----
    Linear layers of up to 65,536 inputs are covered; wider ones have 32-bit columns and compile at their
    first use, and so do convolutions and layers of dense blocks.
    Random generators are left as they were found.

    Examples
    --------
    >>> import sparselab
    >>> seconds = sparselab.warmup()
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        frozen = torch.int8 if dtype is torch.int8 else None
        dtype = torch.float32 if frozen else dtype
        layer = SparseLinear(*_SHAPE, sparsity=_SPARSITY, dtype=dtype)
        if frozen:
            layer.freeze(weights=frozen)
            training = False
        for tokens in _TOKENS:
            x = torch.zeros(tokens, _SHAPE[0], dtype=dtype, requires_grad=training)
            y = layer(x)
            if training:
                y.sum().backward()
        if training and dtype.itemsize >= 4:
            for algorithm in (SET, RigL):
                _update(algorithm(update_freq=1), dtype)
    return time.perf_counter() - start


def _update(algorithm: DynamicSparsityAlgorithm, dtype: torch.dtype) -> None:
    layer = SparseLinear(64, 64, dtype=dtype)
    layer.apply(algorithm)
    for _ in range(2):
        layer(torch.randn(32, 64, dtype=dtype)).square().sum().backward()
        algorithm.step()
