"""What source says, read without importing it: modules, what they import, functions and their sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).resolve().parents[1]

#: What compiles a function; its parameters are operands of a kernel.
COMPILERS = ("jit", "njit", "worker", "intrinsic", "overload")


@dataclass(frozen=True)
class Source:
    """One file of Python, by its path below the root of the repository."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """Its dotted name."""
        return ".".join(Path(self.path).with_suffix("").parts).removesuffix(".__init__")

    @property
    def package(self) -> str:
        """Dotted name of the folder it lies in."""
        return ".".join(Path(self.path).parts[:-1])


@dataclass(frozen=True)
class Import:
    """One thing that a module imports: ``from module import name``, or ``import module`` without a name."""

    module: str
    name: str | None = None

    def __str__(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Function:
    """One function: lines without decorators, docstring and blank lines; parameters without self and cls."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef = field(repr=False)

    @property
    def lines(self) -> int:
        body = self.node.body
        docstring = 0
        if ast.get_docstring(self.node, clean=False) is not None:
            docstring = (body[0].end_lineno or 0) - body[0].lineno + 1
        return (self.node.end_lineno or 0) - self.node.lineno + 1 - docstring

    @property
    def parameters(self) -> list[str]:
        arguments = self.node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        extra = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        return [each.arg for each in (*named, *extra) if each.arg not in ("self", "cls")]

    @property
    def compiled(self) -> bool:
        """Whether Numba or LLVM compiles it."""
        return any(
            compiler in ast.unparse(decorator).split("(")[0].lower()
            for decorator in self.node.decorator_list
            for compiler in COMPILERS
        )


def read_sources(*folders: str, root: Path = ROOT) -> list[Source]:
    """All files of Python below some folders of the repository."""
    return [
        Source(path.relative_to(root).as_posix(), path.read_text())
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
    ]


def imports(source: Source) -> Iterator[Import]:
    """What a module imports, at whatever depth: at its top, in functions, for types only, by name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"imports are absolute, got a relative one in {source.path}"
            yield from (Import(node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0]
            if isinstance(first, ast.Constant):
                yield Import(str(first.value))
        elif isinstance(node, ast.Constant) and _is_module_name(node.value):
            # Modules that are imported when they are needed stand in tables by their names.
            yield Import(node.value)


def _is_module_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith("sparselab.") and value.replace(".", "").isidentifier()


def graph(sources: list[Source]) -> Mapping[str, set[str]]:
    """Which modules of these import which others of them."""
    modules = {source.module for source in sources}
    edges: dict[str, set[str]] = {}
    for source in sources:
        found = {str(each) if str(each) in modules else each.module for each in imports(source)}
        edges[source.module] = (found & modules) - {source.module}
    return edges


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, directly or not, every other one of its group (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges.get(module, ()):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return sorted(found)


def n_floors(edges: Mapping[str, set[str]]) -> int:
    """Modules on the longest way down from one import to the next; those of a circle stand on one floor."""
    group_of = {module: group[0] for group in cycles(edges) for module in group}
    below: dict[str, set[str]] = {}
    for module, others in edges.items():
        name = group_of.get(module, module)
        below.setdefault(name, set()).update({group_of.get(other, other) for other in others} - {name})
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max((height(other) for other in below.get(name, ())), default=0)
        return heights[name]

    return max((height(name) for name in below), default=0)


def functions(source: Source) -> Iterator[Function]:
    """Every function and method of a file, with its qualified name; those inside functions too."""

    def below(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}" if prefix else child.name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield Function(name, child)
            yield from below(child, name)

    yield from below(source.tree, "")
