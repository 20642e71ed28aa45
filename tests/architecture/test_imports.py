"""Who imports whom: every import points to a lower floor, none runs in a circle, and private things stay."""

from __future__ import annotations

import ast

import pytest

from benchmarks.source import Source, cycles, graph, imports, read_sources
from tests.kernels.process import run_python

SOURCES = read_sources("sparselab")

#: The rooms of the house from the ground up. A module imports what is in its own room, in another room of its
#: floor, or on a lower floor. Rooms of one floor are alternatives or halves of one thing.
FLOORS = (
    ("sparselab._names", "sparselab._table"),
    ("sparselab.kernels.arrays",),
    ("sparselab.kernels.cpu.runtime",),
    ("sparselab.kernels.cpu.simd", "sparselab.kernels.cpu.partition"),
    ("sparselab.kernels.rewiring",),
    ("sparselab.kernels.layouts",),
    ("sparselab.kernels.checks",),
    ("sparselab.kernels.cpu.tiles",),
    ("sparselab.kernels.cpu", "sparselab.kernels.reference"),
    ("sparselab.kernels.backends",),
    ("sparselab.kernels.api",),
    ("sparselab.kernels",),
    ("sparselab.nn.ops",),
    ("sparselab.nn.storage",),
    ("sparselab.nn.follow",),
    ("sparselab.nn.weight",),
    ("sparselab.nn.layers",),
    ("sparselab.nn.models",),
    ("sparselab.nn",),
    (
        "sparselab.dst.checks",
        "sparselab.dst.optimizers",
        "sparselab.dst.replicas",
        "sparselab.dst.view",
        "sparselab.dst.part",
    ),
    ("sparselab.dst.schedules",),
    ("sparselab.dst.budget",),
    ("sparselab.dst.parts",),
    ("sparselab.dst.engine",),
    ("sparselab.dst.algorithms",),
    ("sparselab.dst.monitor",),
    ("sparselab.dst",),
    ("sparselab._warmup",),
    ("sparselab",),
    ("sparselab.bench", "sparselab.integrations"),
    ("sparselab.__main__",),
)
FLOOR_OF = {room: at for at, rooms in enumerate(FLOORS) for room in rooms}

#: What is imported against the rule today, by file. It only ever gets shorter: an entry that nothing needs
#: fails.
UPWARDS: dict[str, set[str]] = {}
#: Modules in a circle today, by their first name. As above.
CIRCLES: set[str] = set()
#: Private things that another package imports today. As above.
PRIVATE: dict[str, set[str]] = {}

#: What files below a folder must not import, whatever their floor.
FORBIDDEN = {
    "sparselab": {"tests", "examples", "benchmarks"},
    "sparselab/kernels": {"torch"},
    "sparselab/nn": {"sparselab.kernels.reference"},
    "sparselab/dst": {"sparselab.nn"},
    "sparselab/bench": {"sparselab.dst", "sparselab.integrations"},
    "sparselab/integrations": {"sparselab.bench"},
}
#: The doors through which algorithms reach layers, their gradients and their replicas in other processes,
#: and keep torch's compiler out of hooks; the one by which pruning makes layers, and the list of dense layers
#: that budgets are shared out to.
DOORS = {
    "sparselab/dst": {
        "sparselab.nn.follow.checksums",
        "sparselab.nn.follow.optimizers",
        "sparselab.nn.follow.reducer",
        "sparselab.nn.follow.replicas",
        "sparselab.nn.follow.state_move",
        "sparselab.nn.storage.entries",
        "sparselab.nn.layers.base",
        "sparselab.nn.ops.operands",
        "sparselab.nn.ops.tracing",
    },
    "sparselab/dst/budget/prune.py": {"sparselab.nn.models.convert"},
    "sparselab/dst/budget/allocate.py": {"sparselab.nn.models.dense", "sparselab.nn.layers.dense"},
}


def room(module: str) -> str:
    """The innermost room that a module lies in."""
    while module not in FLOOR_OF:
        module = module.rpartition(".")[0]
    return module


def upward_imports(source: Source) -> set[str]:
    """Modules of the package on a higher floor that a module imports."""
    own = FLOOR_OF[room(source.module)]
    wanted = (str(each) for each in imports(source) if is_within(str(each), {"sparselab"}))
    return {each for each in wanted if FLOOR_OF[room(each)] > own}


def is_within(module: str, packages: set[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def forbidden_imports(source: Source) -> set[str]:
    return {
        str(each)
        for folder, forbidden in FORBIDDEN.items()
        if source.path.startswith(f"{folder}/")
        for each in imports(source)
        if is_within(str(each), forbidden)
        and not any(is_within(str(each), DOORS[at]) for at in DOORS if f"{source.path}/".startswith(f"{at}/"))
    }


def private_imports(source: Source) -> set[str]:
    """Private modules and names that are imported from outside the package which they are private to."""
    found, modules = set(), {}
    for each in imports(source):
        parts = str(each).split(".")
        private = [at for at, part in enumerate(parts) if part.startswith("_") and not part.endswith("__")]
        if parts[0] == "sparselab" and private:
            # A name is private to the package of its module, a module to the package it lies in.
            is_name = each.name is not None and private[0] == len(parts) - 1 and not _is_module(str(each))
            owner = ".".join(parts[: private[0] - is_name])
            if not is_within(source.module, {owner}):
                found.add(str(each))
        if parts[0] == "sparselab":
            modules[parts[-1]] = str(each)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            imported = modules[node.value.id]
            # A class is private to the package of its module, as the module is.
            owner = imported.rpartition(".")[0]
            owner = owner if _is_module(imported) else owner.rpartition(".")[0]
            if node.attr.startswith("_") and node.attr[1] != "_" and not is_within(source.module, {owner}):
                found.add(f"{modules[node.value.id]}.{node.attr}")
    return found


def _is_module(name: str) -> bool:
    return any(source.module == name for source in SOURCES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_imports_point_down(source: Source) -> None:
    assert upward_imports(source) == UPWARDS.get(source.path, set())
    assert forbidden_imports(source) == set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_private_things_stay_in_their_package(source: Source) -> None:
    assert private_imports(source) == PRIVATE.get(source.path, set())


def test_nothing_imports_in_a_circle() -> None:
    assert {group[0] for group in cycles(graph(SOURCES))} == CIRCLES, cycles(graph(SOURCES))


def test_every_exception_names_a_file_that_is_there() -> None:
    assert {*UPWARDS, *PRIVATE} <= {source.path for source in SOURCES}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sparselab/kernels/arrays.py", "from sparselab.kernels import api"),
        ("sparselab/kernels/arrays.py", "def f():\n    from sparselab.kernels.cpu.runtime.jit import launch"),
        ("sparselab/kernels/rewiring/x.py", "from sparselab.kernels.layouts.padded_csr import PaddedCSR"),
        ("sparselab/kernels/layouts/x.py", "TABLE = {'csr': 'sparselab.kernels.cpu.csr.products'}"),
        ("sparselab/kernels/api.py", "import sparselab.nn.ops.linear"),
        ("sparselab/nn/ops/x.py", "if TYPE_CHECKING:\n    from sparselab.nn.storage.blocks import cut"),
        ("sparselab/nn/layers/x.py", "from sparselab.nn.models.convert import sparsify"),
        ("sparselab/dst/parts/x.py", "from sparselab.dst.engine.base import SparsityAlgorithm"),
        ("sparselab/dst/x.py", "import importlib\nimportlib.import_module('sparselab.integrations')"),
        ("sparselab/nn/x.py", "from sparselab import dst"),
        ("sparselab/nn/x.py", "import sparselab"),
        ("sparselab/dst/x.py", "from sparselab.integrations import lightning"),
        ("sparselab/__init__.py", "from sparselab import integrations"),
    ],
)
def test_an_import_that_points_up_is_seen(path: str, text: str) -> None:
    assert upward_imports(Source(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sparselab/kernels/x.py", "import torch"),
        ("sparselab/kernels/x.py", "def f():\n    from torch.nn import Linear"),
        ("sparselab/dst/x.py", "from sparselab.nn import SparseLinear"),
        ("sparselab/dst/parts/x.py", "from sparselab.nn.models.convert import keep_positions"),
        ("sparselab/bench/x.py", "from sparselab import dst"),
        ("sparselab/bench/x.py", "import sparselab.integrations.transformers"),
        ("sparselab/integrations/x.py", "from sparselab.bench import run"),
        ("sparselab/x.py", "if True:\n    import tests.oracle"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, text: str) -> None:
    assert forbidden_imports(Source(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sparselab/kernels/cpu/csr/spmm.py", "from sparselab.kernels.cpu.simd.vectors import get"),
        ("sparselab/kernels/backends.py", "TABLE = {'csr': 'sparselab.kernels.cpu.csr.products'}"),
        ("sparselab/kernels/cpu/conv/x.py", "from sparselab.kernels.cpu.csr.plan import plan"),
        ("sparselab/dst/parts/x.py", "from sparselab.nn.layers.base import SparseLayer"),
        ("sparselab/dst/budget/prune.py", "from sparselab.nn.models.convert import keep_positions"),
        ("sparselab/integrations/x.py", "from sparselab.integrations._driver import Driver"),
        ("sparselab/kernels/x.py", "import torchlike"),
        ("sparselab/bench/x.py", "import torch, sparselab.nn"),
    ],
)
def test_a_right_import_is_not(path: str, text: str) -> None:
    assert upward_imports(Source(path, text)) == forbidden_imports(Source(path, text)) == set()


@pytest.mark.parametrize(
    ("path", "text", "private"),
    [
        ("sparselab/nn/x.py", "from sparselab.kernels.arrays import _count", True),
        ("sparselab/nn/x.py", "from sparselab.kernels import arrays\narrays._count(1)", True),
        ("sparselab/nn/x.py", "import sparselab.integrations._driver", True),
        ("sparselab/nn/x.py", "from sparselab.integrations import _driver", True),
        ("sparselab/kernels/x.py", "from sparselab.kernels.arrays import _count", False),
        ("sparselab/nn/x.py", "from sparselab import _names", False),
        ("sparselab/nn/x.py", "from sparselab import __version__", False),
        ("sparselab/nn/x.py", "from torch import _C", False),
    ],
)
def test_what_is_private_is_told(path: str, text: str, private: bool) -> None:
    assert bool(private_imports(Source(path, text))) == private


def test_circles_are_found_through_lazy_imports_too() -> None:
    sources = [
        Source("sparselab/a.py", "from sparselab import b"),
        Source("sparselab/b.py", "def f():\n    import sparselab.c"),
        Source("sparselab/c.py", "if TYPE_CHECKING:\n    from sparselab.a import A"),
        Source("sparselab/d.py", "from sparselab import a"),
    ]
    assert cycles(graph(sources)) == [["sparselab.a", "sparselab.b", "sparselab.c"]]
    assert cycles(graph([sources[0], sources[3]])) == []


def test_imports_load_only_what_they_need() -> None:
    """One after the other, each more than the last; after each, what is still absent."""
    steps = {
        "import sparselab; dir(sparselab)": ["numpy", "numba", "torch"],
        "import sparselab.__main__": ["numpy", "numba", "torch"],
        "import sparselab.kernels": ["torch"],
        "from sparselab import PaddedCSR, kernels": ["torch"],
        "import sparselab.nn; sparselab.save_model": [
            "safetensors",
            "matplotlib",
            "lightning",
            "transformers",
        ],
        "from sparselab import Monitor; import sparselab.integrations": [
            "matplotlib",
            "lightning",
            "transformers",
        ],
    }
    program = ["import sys"]
    for statement, absent in steps.items():
        look = f"[name for name in {absent!r} if name in sys.modules]"
        program += [statement, f"print({statement!r}, *{look})"]
    assert run_python("-c", "\n".join(program)).splitlines() == list(steps)
