"""One contender in a process of its own, which answers each line of JSON with one line of JSON.

    python driver.py CONTENDER

`benchmarks.turns` copies this file out of the repository and starts it, also with the Python of another
environment or for another revision of the repository. So it imports only torch, NumPy and the contender.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Calls before the timed ones of a turn go on for so long: the workers of the process whose turn it was may
#: still be spinning.
WARM_UP_S = 0.05

#: Characters of the transformer's text.
VOCABULARY = 65

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


def this_sparselab(weight: Tensor, bias: Tensor, block_shape: tuple[int, int] | None = None) -> Built:
    """A layer of this project, of whatever revision: single connections, or the blocks that are not 0."""
    package = importlib.import_module("sparselab")
    kind = package.SparseLinear if block_shape is None else package.BlockSparseLinear
    settings = {} if block_shape is None else {"block_shape": block_shape}
    layer = kind.from_dense(dense(weight, bias)[0], sparsity=sparsity_of(weight), **settings)
    return layer, lambda: layer.stored.grad


def rigl(package: Any) -> Any:
    """An algorithm that updates every 100 steps; the argument has had two names."""
    try:
        return package.RigL(update_freq=100)
    except TypeError:
        return package.RigL(update=100)


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


CONTENDERS: dict[str, tuple[str, Callable[..., Built]]] = {
    "dense": ("torch", dense),
    "this_sparselab": ("sparselab", this_sparselab),
    "other_sparselab": ("sparselab", other_sparselab),
    "sparseprop": ("sparseprop", sparseprop),
}


def calls_within(run: Callable[[], object], folder: Path) -> list[str]:
    """Python functions called while something runs in this thread whose source is below a folder.

    Returns
    -------
    list of str
        ``file:function`` for each call, in order. Kernels are one each.
    """
    found: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(f"{folder}{os.sep}"):
            found.append(f"{Path(name).relative_to(folder).as_posix()}:{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def _difference_from_dense(package: Any, model: nn.Module, tokens: Tensor) -> float:
    """Largest difference of the logits from those of dense layers with the same weights."""
    twin = copy.deepcopy(model)
    for name, layer in package.nn.find_sparse(model):
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer.to_dense())
    with torch.no_grad():
        actual, expected = model(tokens), twin(tokens)
    return float((actual - expected).abs().max() / expected.abs().max())


class Session:
    """The requests, one method each; what they return is sent back."""

    def __init__(self, contender: str) -> None:
        self.package, self.build = CONTENDERS[contender]
        self.calls: dict[str, Callable[[], object]] = {}

    def begin(self, threads: int) -> dict[str, Any]:
        """Import the contender; say from where."""
        torch.set_num_threads(threads)
        return {"file": importlib.import_module(self.package).__file__, "torch": torch.__version__}

    def load(self, case: str, answers: str, block_shape: list[int] | None = None) -> dict[str, Any]:
        """Build the layer of a case; leave its output and its gradients as files, for the parent to judge."""
        weight, bias, x, dy = (torch.from_numpy(np.load(Path(case, f"{name}.npy"))) for name in "wbxd")
        settings = {} if block_shape is None else {"block_shape": tuple(block_shape)}
        module, weight_gradient = self.build(weight, bias, **settings)
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
        results = {"y": forward(), "dx": leaf.grad, "dw": weight_gradient().reshape(-1)}
        for name, tensor in results.items():
            np.save(Path(answers, f"{name}.npy"), tensor.numpy())
        return {}

    def load_model(self, source: str, size: dict[str, int], rules: dict[str, float]) -> dict[str, Any]:
        """Build a transformer from a file of Python, sparse, and its training step.

        Its logits must be those of its own weights in dense layers.
        """
        package = importlib.import_module("sparselab")
        code = importlib.util.spec_from_file_location("gpt", source)
        assert code is not None
        assert code.loader is not None
        module = importlib.util.module_from_spec(code)
        code.loader.exec_module(module)
        torch.manual_seed(0)
        shape = (size["batch"], size["context"])
        sizes = (size[name] for name in ("context", "n_layer", "d_model", "d_ff", "n_head"))
        model = package.sparsify(module.GPT(VOCABULARY, *sizes, bias=False), rules)
        tokens, targets = torch.randint(VOCABULARY, (2, *shape))
        error = _difference_from_dense(package, model, tokens)
        algorithm = rigl(package)
        model.apply(algorithm)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> None:
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            algorithm.step()
            optimizer.zero_grad()

        self.calls = {"training step": step}
        return {"error": f"logits are off by {error:.1e} of the largest"} if not error <= 1e-4 else {}

    def count(self) -> dict[str, Any]:
        """Python calls inside the package in one forward pass with gradients, and in its backward pass.

        Of a 64 -> 64 `SparseLinear` and 64 tokens, after passes that made plans and compiled.
        """
        package = importlib.import_module("sparselab")
        folder = Path(package.__file__).parent
        layer = package.SparseLinear(64, 64, sparsity=0.9)
        x = torch.randn(64, 64, requires_grad=True)
        dy = torch.ones(64, 64)
        for _ in range(3):
            layer(x).backward(dy)
        counts = {}
        y: list[Tensor] = []
        for name, run in (("forward", lambda: y.append(layer(x))), ("backward", lambda: y[0].backward(dy))):
            counts[name] = len(calls_within(run, folder))
        return {"calls": counts}

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
