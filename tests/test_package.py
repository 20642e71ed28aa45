"""The package as a whole: who imports whom, what loads when, and docstrings that tell the truth."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sparselab
from tests.kernels.process import ROOT, run_python

#: What the files below a folder must not import. Dependencies point one way: kernels <- nn <- dst, bench,
#: and dst <- integrations.
FORBIDDEN = {
    "sparselab": {"tests", "examples", "benchmarks", "sparselab.integrations"},
    "sparselab/kernels": {"torch", "sparselab.nn", "sparselab.dst", "sparselab.bench"},
    "sparselab/nn": {"sparselab.dst", "sparselab.bench"},
    "sparselab/dst": {"sparselab.nn", "sparselab.bench"},
    "sparselab/bench": {"sparselab.dst"},
    "sparselab/integrations": {"sparselab.bench"},
}
#: Exceptions: the doors through which algorithms reach layers and their gradients, the one by which pruning
#: makes them, and the list of dense layers that budgets are shared out to.
ALLOWED = {
    "sparselab/dst": {
        "sparselab.nn.layers.base",
        "sparselab.nn.storage.entries",
        "sparselab.nn.ops.operands",
    },
    "sparselab/dst/budget/prune.py": {"sparselab.nn.models.convert"},
    "sparselab/dst/budget/allocate.py": {"sparselab.nn.models.dense"},
    "sparselab/integrations": {"sparselab.integrations"},
}
#: Packages that only these modules need, and that may be absent.
OPTIONAL = {
    "sparselab.integrations.lightning": "lightning",
    "sparselab.integrations.transformers": "transformers",
}

FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "sparselab").rglob("*.py"))
MODULES = [
    name
    for name in (
        "sparselab",
        *(info.name for info in pkgutil.walk_packages(sparselab.__path__, "sparselab.")),
    )
    if importlib.util.find_spec(OPTIONAL.get(name, name))
]


def imports(source: str) -> Iterator[str]:
    """Every module that the source imports, at whatever depth; ``from a import b`` counts as ``a.b`` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield ast.unparse(node.args[0]).strip("'\"")


def is_within(module: str, packages: set[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def violations(path: str, source: str) -> list[str]:
    return [
        f"{path} imports {module}"
        for folder in FORBIDDEN
        if path.startswith(f"{folder}/")
        for module in imports(source)
        if is_within(module, FORBIDDEN[folder])
        and not any(is_within(module, ALLOWED[each]) for each in ALLOWED if f"{path}/".startswith(f"{each}/"))
    ]


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sparselab/kernels/x.py", "import torch"),
        ("sparselab/kernels/x.py", "def f():\n    from torch.nn import Linear"),
        ("sparselab/kernels/x.py", "from sparselab import nn"),
        ("sparselab/kernels/x.py", "import importlib\nimportlib.import_module('torch')"),
        ("sparselab/nn/deep/x.py", "import numpy, sparselab.dst.algorithms.rigl"),
        ("sparselab/dst/x.py", "from sparselab.nn.layers.linear import SparseLinear"),
        ("sparselab/dst/x.py", "from sparselab.nn.models.convert import keep_positions"),
        ("sparselab/nn/x.py", "from sparselab import bench"),
        ("sparselab/x.py", "if True:\n    import tests.oracle"),
        ("sparselab/dst/x.py", "from sparselab.integrations import lightning"),
        ("sparselab/bench/x.py", "import sparselab.integrations.transformers"),
        ("sparselab/integrations/x.py", "from sparselab.bench import run"),
    ],
)
def test_imports_that_point_the_other_way_are_seen(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sparselab/kernels/x.py", "import torchlike\nfrom sparselab.kernels import spmm"),
        ("sparselab/nn/x.py", "import torch\nfrom sparselab import kernels"),
        ("sparselab/dst/x.py", "from sparselab.nn.layers.base import find_sparse"),
        ("sparselab/dst/budget/prune.py", "from sparselab.nn.models.convert import keep_positions"),
        ("sparselab/integrations/x.py", "from sparselab.integrations._driver import Driver"),
        ("sparselab/integrations/x.py", "from sparselab.dst import Monitor"),
    ],
)
def test_imports_that_point_the_right_way_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sparselab; dir(sparselab)", ["numpy", "numba", "torch"]),
        ("import sparselab.__main__", ["numpy", "numba", "torch"]),
        ("import sparselab.kernels", ["torch"]),
        ("from sparselab import PaddedCSR, kernels", ["torch"]),
        ("import sparselab.nn; sparselab.save_model", ["safetensors"]),
        (
            "from sparselab import Monitor; import sparselab.integrations",
            ["matplotlib", "lightning", "transformers"],
        ),
    ],
)
def test_imports_load_only_what_they_need(statement: str, absent: list[str]) -> None:
    output = run_python(
        "-c", f"import sys\n{statement}\nprint(*[name for name in {absent!r} if name in sys.modules])"
    )
    assert output.strip() == ""


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'sparselab' has no attribute 'nothing'"):
        sparselab.nothing  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_resolves(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert set(exported) <= set(dir(module))
    for each in exported:
        assert getattr(module, each) is not None


def public_objects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes that a module defines or exports under public names, and the classes' methods."""
    for name, thing in vars(module).items():
        own = getattr(thing, "__module__", None) == module.__name__ or name in getattr(module, "__all__", [])
        if name.startswith("_") or not own or not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        yield f"{thing.__module__}.{name}", thing
        if inspect.isclass(thing):
            for attribute, member in vars(thing).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if not attribute.startswith("_") and inspect.isfunction(function):
                    yield f"{thing.__module__}.{name}.{attribute}", function


PUBLIC_MODULES = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]
PUBLIC = sorted(
    dict(pair for name in PUBLIC_MODULES for pair in public_objects(importlib.import_module(name))).items()
)


def documented_parameters(docstring: str) -> list[str] | None:
    """Names in the Parameters section, in order; None if there is no such section."""
    section = re.search(
        r"^Parameters\n-{10}\n(.*?)(?=^\w[^\n]*\n-{3,}\n|\Z)", docstring, re.MULTILINE | re.DOTALL
    )
    if section is None:
        return None
    names = re.findall(r"^([*\w]+(?:, [*\w]+)*)(?= : |$)", section[1], re.MULTILINE)
    return [name.lstrip("*") for line in names for name in line.split(", ")]


def real_parameters(thing: Any) -> list[str]:
    parameters = inspect.signature(thing).parameters
    return [name for name in parameters if name not in ("self", "cls")]


def problem(thing: Any) -> str | None:
    """What is wrong with the docstring of a public function or class, if anything."""
    docstring = thing.__doc__ if inspect.isclass(thing) else inspect.getdoc(thing)
    if not docstring:
        return "has no docstring"
    documented = documented_parameters(inspect.cleandoc(docstring)) if thing.__doc__ else None
    if documented is not None and documented != real_parameters(thing):
        return f"documents {documented}, takes {real_parameters(thing)}"
    return None


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_docstrings_exist_and_name_the_arguments(name: str, thing: Any) -> None:
    assert problem(thing) is None


def test_the_public_functions_of_the_kernels_document_their_parameters() -> None:
    from sparselab import kernels

    for name in ("spmm", "spmm_t", "sddmm_dw", "rewrite", "PaddedCSR", "sample_distinct"):
        assert documented_parameters(inspect.getdoc(getattr(kernels, name)) or ""), name


def test_wrong_docstrings_are_seen() -> None:
    def undocumented(a: int) -> None:
        pass

    def good(a: int, b: int, c: int = 0) -> None:
        """Say it.

        Parameters
        ----------
        a, b : int
            Text : with a colon.
        c : int
        Returns
        -------
        nothing
        """

    def renamed(a: int, c: int) -> None:
        """Say it.

        Parameters
        ----------
        a : int
        b : int
        """

    def missing(a: int, b: int) -> None:
        """Say it.

        Parameters
        ----------
        a : int
        """

    assert problem(undocumented) == "has no docstring"
    assert problem(good) is None
    assert problem(renamed) == "documents ['a', 'b'], takes ['a', 'c']"
    assert problem(missing) == "documents ['a'], takes ['a', 'b']"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, raise_on_error=False, verbose=False)
    assert failed == 0


def test_there_are_examples_to_run() -> None:
    from sparselab import kernels
    from sparselab.kernels.layouts import padded_csr as layout

    assert sum(doctest.testmod(module).attempted for module in (kernels, layout)) >= 4


def test_no_file_is_too_long() -> None:
    files = [*(ROOT / "sparselab").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lengths = {path.relative_to(ROOT): len(Path(path).read_text().splitlines()) for path in files}
    assert {path: n for path, n in lengths.items() if n > 400} == {}
