"""What stays small: files, functions, argument lists, folders, and choices between kinds."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.source import Function, Source, functions, imports, read_sources

PACKAGE = read_sources("sparselab")
EVERYTHING = [*PACKAGE, *read_sources("tests", "benchmarks", "examples")]

FILE_LINES, FUNCTION_LINES, PARAMETERS, FILES = 400, 60, 10, 13
#: Constructors may take so many, if those beyond `PARAMETERS` are settings that a call must name.
SETTINGS = 14

#: What breaks a rule today, by ``path::name``. They only ever get shorter: an entry that nothing needs fails.
LONG_FILES = {"examples/mnist.py"}
LONG_FUNCTIONS: set[str] = set()
LADDERS = {
    "sparselab/dst/algorithms/mest.py::ElasticMutation.__init__",
    "sparselab/dst/monitor/monitor.py::Monitor.__init__",
    "sparselab/integrations/_driver.py::Driver.__init__",
    # Types of Numba, not kinds of layers or layouts.
    "sparselab/kernels/cpu/simd/vectors.py::_is_row",
}
CROWDED: set[str] = set()
#: Drop-in replacements take what the layer of torch takes, in its order, and how sparse they are.
MANY_PARAMETERS = {
    "sparselab/nn/layers/composed/attention.py::SparseMultiheadAttention.__init__",
    "sparselab/dst/algorithms/chts.py::CHTss.__init__",
}


def long_files(sources: list[Source]) -> set[str]:
    return {source.path for source in sources if len(source.text.splitlines()) > FILE_LINES}


def long_functions(source: Source) -> set[str]:
    return {f"{source.path}::{each.name}" for each in functions(source) if each.lines > FUNCTION_LINES}


def many_parameters(source: Source) -> set[str]:
    return {
        f"{source.path}::{each.name}"
        for each in functions(source)
        if not each.compiled and len(each.parameters) > _most_parameters(each)
    }


def _most_parameters(function: Function) -> int:
    settings = len(function.node.args.kwonlyargs)
    few = len(function.parameters) - settings <= PARAMETERS
    return SETTINGS if function.name.endswith(".__init__") and few else PARAMETERS


def crowded(sources: list[Source]) -> set[str]:
    """Folders with too many files beside their ``__init__.py``."""
    counts = Counter(source.package for source in sources if not source.path.endswith("__init__.py"))
    return {package for package, count in counts.items() if count > FILES}


def ladders(source: Source) -> set[str]:
    """Functions that ask more than once of which class of the package something is.

    ``isinstance``, ``issubclass`` and ``type(x) is`` count, a tuple of classes as often as it is long; what
    an ``assert`` says does not.
    """
    own = {node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}
    own |= {each.name for each in imports(source) if each.name and each.module.startswith("sparselab")}
    return {
        f"{source.path}::{each.name}"
        for each in functions(source)
        if sum(name in own for name in _asked_for(each)) > 1
    }


def _asked_for(function: Function) -> Iterator[str]:
    """Names of the classes that a function asks for."""
    for node in _walk_without_asserts(function.node):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            yield from _names(node.args[1])
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            for other in node.comparators:
                yield from _names(other)


def _walk_without_asserts(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.Assert, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
            yield from _walk_without_asserts(child)


def _names(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr


def test_no_file_is_too_long() -> None:
    assert long_files(EVERYTHING) == LONG_FILES


def test_no_function_is_too_long() -> None:
    assert {name for source in PACKAGE for name in long_functions(source)} == LONG_FUNCTIONS


def test_no_function_takes_too_much() -> None:
    assert {name for source in PACKAGE for name in many_parameters(source)} == MANY_PARAMETERS


def test_no_folder_is_crowded() -> None:
    assert crowded(PACKAGE) == CROWDED


def test_kinds_are_not_told_apart_by_their_classes() -> None:
    assert {name for source in PACKAGE for name in ladders(source)} == LADDERS


def source_of(text: str) -> Source:
    return Source(
        "sparselab/x.py", f"from sparselab.nn.layers.linear import A, B\nclass C:\n    pass\n{text}"
    )


def test_what_is_too_long_is_seen() -> None:
    assert long_files([Source("x.py", "\n" * (FILE_LINES + 1)), Source("y.py", "\n" * FILE_LINES)]) == {
        "x.py"
    }
    lines = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    docstring = '        """' + "\n" * FUNCTION_LINES + '        """\n'
    assert long_functions(source_of(f"def f():\n{lines}\n")) == {"sparselab/x.py::f"}
    assert long_functions(source_of(f"class K:\n    def f(self):\n{docstring}        return 1\n")) == set()


def test_what_takes_too_much_is_seen() -> None:
    names = ", ".join(f"a{i}" for i in range(PARAMETERS))
    assert many_parameters(source_of(f"def f(self, {names}):\n    pass")) == set()
    assert many_parameters(source_of(f"def f({names}, *, b):\n    pass")) == {"sparselab/x.py::f"}
    assert many_parameters(source_of(f"class K:\n    def f(self, {names}, **b):\n        pass")) == {
        "sparselab/x.py::K.f"
    }
    start = f"class K:\n    def __init__(self, {names}, "
    assert many_parameters(source_of(f"{start}*, b, c):\n        pass")) == set()
    assert many_parameters(source_of(f"{start}*, b, c, d, e, f):\n        pass")) == {
        "sparselab/x.py::K.__init__"
    }
    assert many_parameters(source_of(f"{start}b):\n        pass")) == {"sparselab/x.py::K.__init__"}
    assert many_parameters(source_of(f"@jit(error_model='numpy')\ndef f({names}, b):\n    pass")) == set()


def test_a_crowded_folder_is_seen() -> None:
    files = [Source(f"sparselab/nn/a{i}.py", "") for i in range(FILES)]
    assert (
        crowded([*files, Source("sparselab/nn/__init__.py", ""), Source("sparselab/nn/b/c.py", "")]) == set()
    )
    assert crowded([*files, Source("sparselab/nn/more.py", "")]) == {"sparselab.nn"}


@pytest.mark.parametrize(
    ("body", "ladder"),
    [
        ("if isinstance(x, A): return 1\n    elif isinstance(x, B): return 2", True),
        ("return isinstance(x, (A, C))", True),
        ("return type(x) is A or issubclass(type(x), B)", True),
        ("return [type(y) in (A, B) for y in x]", True),
        ("return isinstance(x, A) or isinstance(x, int) or isinstance(x, str)", False),
        ("assert isinstance(x, A)\n    assert isinstance(x, B)\n    return isinstance(x, C)", False),
    ],
)
def test_a_ladder_is_seen(body: str, ladder: bool) -> None:
    assert ladders(source_of(f"def f(x):\n    {body}")) == ({"sparselab/x.py::f"} if ladder else set())
