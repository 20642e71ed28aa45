"""A compiled model trains as an uncompiled one under every algorithm, and is compiled once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparselab import GMP, GSE, SNFS, LinearSchedule, RigL, SparseLinear, sparsify
from tests.dst.contract_rows import ROWS
from tests.dst.harness import OPTIMIZERS, assert_same_state, build, train
from tests.dst.memory_reuse import poisoning
from tests.shared import usual

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


class Images(nn.Module):
    """Convolutions with an activation whose memory the compiler uses again."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)
        )
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.head(torch.relu(self.convolutions(x)).flatten(1))


class Tokens(nn.Module):
    """An embedding, layers of blocks, and a weight that is shared."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.relu(self.down(torch.relu(self.up(self.embedding(x))))))


def dense_of(name):
    if name == "images":
        return Images(), torch.randn(4, 2, 8, 8), 0.6
    if name == "tokens":
        return Tokens(), torch.randint(0, 30, (40,)), {"embedding": 0.6, "head": 0.6, "*": 0.6}
    return nn.Sequential(
        nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10)
    ), torch.randn(32, 20), 0.6  # fmt: skip


@pytest.mark.parametrize("algorithm", [RigL, usual(False, SNFS), usual(False, GSE)])
@pytest.mark.parametrize("kind", ["sparse", "block", "masked"])
@pytest.mark.parametrize("name", ["layers", "images", "tokens"])
def test_growth_sees_what_was_there_though_the_compiler_uses_its_memory_again(name, kind, algorithm):
    if kind == "block" and (name == "images" or algorithm is not RigL):
        pytest.skip("there are no such layers, or they are refused")
    if kind == "masked" and name == "tokens":
        pytest.skip("there are no masked embeddings")
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        dense, x, sparsity = dense_of(name)
        if kind == "block":
            blocks = {"sparsity": 0.6, "block_shape": (4, 4)}
            sparsity = {"up": blocks, "down": blocks} if name == "tokens" else {"*": blocks}
        model = sparsify(dense, sparsity, layer=kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        algorithm(update_freq=2, drop_fraction=0.5).attach(model, optimizer)
        if compiled:
            model.compile(backend=poisoning)
        for _ in range(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        runs.append([layer.positions() for layer in model.modules() if hasattr(layer, "positions")])
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


def test_the_backend_uses_memory_again():
    kept = []

    @torch.library.custom_op("tests::keep", mutates_args=())
    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x.clone()

    keep.register_fake(torch.empty_like)
    torch.compile(lambda x: keep(x.sin()).cos(), backend=poisoning)(torch.ones(3))
    assert kept[0].isnan().all()


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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 40), nn.Linear(40, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiled_autograd_rewires_alike():
    """Torch's compiler looks into hooks then, into those of a process and those of a Parameter."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = sparsify(Net(), 0.8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        RigL(update_freq=2).attach(model, optimizer)

        def train(x, model=model):
            model(x).square().sum().backward()

        with torch._dynamo.config.patch(compiled_autograd=compiled):
            run = torch.compile(train, backend="aot_eager") if compiled else train
            for _ in range(6):
                optimizer.zero_grad()
                run(torch.randn(8, 20))
                optimizer.step()
        found.append([model.first.positions(), model.second.positions()])
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_a_compiled_layer_takes_sparse_inputs():
    layer, x = SparseLinear(24, 32, sparsity=0.7), torch.relu(torch.randn(12, 24))
    for given in (x.to_sparse_csr(), x.to_sparse()):
        y = torch.compile(layer, backend="aot_eager")(given)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
