"""A compiled model trains as an uncompiled one under every algorithm, and is compiled once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparselab import GMP, LinearSchedule, sparsify
from tests.dst.contract_rows import ROWS
from tests.dst.harness import OPTIMIZERS, assert_same_state, build, train

pytestmark = [
    pytest.mark.skipif(
        not getattr(torch.compiler.config, "dynamic_sources", ""),
        reason="this version of torch compiles anew for other sizes",
    ),
    # Of the compiler, where it looks at what a block before has computed.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Whole(nn.Module):
    """Torch compiles the parts of an `nn.Sequential` one by one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


#: One that keeps the count, one that changes it, one with a forward mask.
FIRST = "rigl", "gmp", "topkast"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in ROWS]
)
def test_one_graph_lasts_through_all_updates(name):
    """Also where an update changes the number of connections."""
    row, runs, counter = ROWS[name], [], CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model = Whole(row.prepare(build("real", dtype=torch.float64, sparsity=row.start)))
        algorithm = row.make()
        model.apply(algorithm)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        if compiled:
            model.compile(backend=counter, fullgraph=True)
        train(model, optimizer, algorithm, 1, 12)
        assert algorithm.steps_done == 12
        runs += [model, optimizer]
    assert counter.frame_count == 1
    assert_same_state(*runs)


def test_equal_blocks_are_compiled_once():
    """Twice: with a batch that needs no gradient, and with those of the blocks before."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            return x + self.fc2(torch.relu(self.fc1(x)))

    torch.manual_seed(0)
    model = sparsify(nn.Sequential(*(Block() for _ in range(12))), 0.5)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters())
    GMP(LinearSchedule(0.5, 0.9, 8), update_freq=2).attach(model, optimizer)
    counts = set()
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        counts.add(model[0].fc1.nnz)
    assert len(counts) > 2
    assert counter.frame_count == 2
