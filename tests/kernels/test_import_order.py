"""Within the kernels, too, imports point one way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.process import ROOT
from tests.test_package import imports

#: Parts in the order in which they build on each other; a part imports from itself and from those before it.
ORDER = (
    ("arrays",),
    ("cpu.runtime.target",),
    ("cpu.runtime.jit", "cpu.runtime.team", "cpu.runtime.memory"),
    ("cpu.runtime.launch",),
    ("cpu.simd",),
    ("cpu.partition", "cpu.tiles"),
    ("rewiring",),
    ("layouts",),
    ("cpu.csr", "reference", "checks"),
    ("cpu.bsr", "cpu.conv"),
    ("backends",),
    ("api",),
    ("",),
)
KERNELS = ROOT / "sparselab" / "kernels"
FILES = sorted(path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.py"))


def place(module: str) -> int:
    """Number of the part that a module of the kernels belongs to."""
    return next(
        number
        for number, parts in enumerate(ORDER)
        if any(not part or f"{module}.".startswith(f"{part}.") for part in parts)
    )


def backward(path: str, source: str) -> list[str]:
    """Imports of a file from parts that come after its own."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    own = place("" if module == "__init__" else module)
    prefix = "sparselab.kernels."
    inner = {name.removeprefix(prefix) for name in imports(source) if name.startswith(prefix)}
    # ``from sparselab.kernels.a import b`` is counted as a.b; `b` may be a name in the module a.
    return sorted(name for name in inner if place(name) > own and (KERNELS / path).name != "__init__.py")


@pytest.mark.parametrize("path", FILES)
def test_no_part_imports_from_a_later_one(path: str) -> None:
    assert backward(path, (KERNELS / path).read_text()) == []


def test_every_part_exists() -> None:
    for part in (part for parts in ORDER for part in parts if part):
        path = KERNELS / Path(*part.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), part


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("arrays.py", "from sparselab.kernels.cpu.runtime.target import TARGET"),
        ("cpu/simd/x.py", "def f():\n    from sparselab.kernels.rewiring.select import select"),
        ("rewiring/x.py", "import sparselab.kernels.layouts.topology"),
        ("layouts/x.py", "from sparselab.kernels import backends"),
        ("reference/x.py", "import importlib\nimportlib.import_module('sparselab.kernels.api')"),
    ],
)
def test_imports_that_point_the_other_way_are_seen(path: str, source: str) -> None:
    assert len(backward(path, source)) == 1
