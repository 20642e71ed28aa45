"""One contender in a process of its own, which answers each line of JSON with one line of JSON.

    python driver.py CONTENDER

`benchmarks.turns` copies this file out of the repository and starts it, also with the Python of another
environment or for another revision of the repository. So it imports only torch, NumPy and the contender.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Calls before the timed ones of a turn go on for so long: the workers of the process whose turn it was may
#: still be spinning.
WARM_UP_S = 0.05

#: A layer, and the gradient of its live weights, row by row, columns ascending.
Built = tuple[nn.Module, Callable[[], Any]]


def dense(weight: Tensor, bias: Tensor) -> Built:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)

    def weight_gradient() -> Tensor:
        assert linear.weight.grad is not None
        return linear.weight.grad[weight != 0]

    return linear, weight_gradient


def sparsity_of(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


def this_sparselab(weight: Tensor, bias: Tensor) -> Built:
    package = importlib.import_module("sparselab")
    layer = package.SparseLinear.from_dense(dense(weight, bias)[0], sparsity_of(weight))
    return layer, lambda: layer.values.grad


def other_sparselab(weight: Tensor, bias: Tensor) -> Built:
    """The other project of the same name; its layers draw their weights themselves, so they are replaced."""
    package = importlib.import_module("sparselab")
    layer = package.SparseLinear(weight.shape[1], weight.shape[0], sparsity=sparsity_of(weight))
    matrix = package.PaddedCSR.from_dense(weight)
    layer._csr = matrix
    layer._values = nn.Parameter(torch.from_numpy(np.asarray(matrix.values)))
    with torch.no_grad():
        layer.bias.copy_(bias)
    starts, lengths = np.asarray(matrix.row_start), np.asarray(matrix.row_nnz)
    live = np.concatenate([np.arange(n) + start for start, n in zip(starts, lengths, strict=False)])
    return layer, lambda: layer._values.grad[torch.from_numpy(live).long()]


def sparseprop(weight: Tensor, bias: Tensor) -> Built:
    layer = importlib.import_module("sparseprop.modules").SparseLinear.from_dense(dense(weight, bias)[0])
    return layer, lambda: layer.W_val.grad


CONTENDERS: dict[str, tuple[str, Callable[[Tensor, Tensor], Built]]] = {
    "dense": ("torch", dense),
    "this_sparselab": ("sparselab", this_sparselab),
    "other_sparselab": ("sparselab", other_sparselab),
    "sparseprop": ("sparseprop", sparseprop),
}


class Session:
    """The requests, one method each; what they return is sent back."""

    def __init__(self, contender: str) -> None:
        self.package, self.build = CONTENDERS[contender]
        self.calls: dict[str, Callable[[], object]] = {}

    def begin(self, threads: int) -> dict[str, Any]:
        """Import the contender; say from where."""
        torch.set_num_threads(threads)
        return {"file": importlib.import_module(self.package).__file__, "torch": torch.__version__}

    def load(self, case: str, answers: str) -> dict[str, Any]:
        """Build the layer of a case; leave its output and its gradients as files, for the parent to judge."""
        weight, bias, x, dy = (torch.from_numpy(np.load(Path(case, f"{name}.npy"))) for name in "wbxd")
        module, weight_gradient = self.build(weight, bias)
        leaf = x.clone().requires_grad_()

        def forward() -> Tensor:
            with torch.no_grad():
                y: Tensor = module(x)
            return y

        def forward_backward() -> None:
            module.zero_grad()
            leaf.grad = None
            module(leaf).backward(dy)

        self.calls = {"forward": forward, "forward + backward": forward_backward}
        forward_backward()
        results = {"y": forward(), "dx": leaf.grad, "dw": weight_gradient()}
        for name, tensor in results.items():
            np.save(Path(answers, f"{name}.npy"), tensor.numpy())
        return {}

    def time(self, operation: str, calls: int) -> dict[str, Any]:
        """Seconds of each of so many calls, after some that are not counted."""
        call = self.calls[operation]
        begin = time.perf_counter()
        call()
        while time.perf_counter() - begin < WARM_UP_S:
            call()
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


def main() -> None:
    # Whatever a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(session, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
