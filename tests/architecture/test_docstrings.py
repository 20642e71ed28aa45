"""Public names resolve, and their docstrings tell the truth: every parameter is named, every example runs."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import sparselab

#: Packages that only these modules need, and that may be absent.
OPTIONAL = {
    "sparselab.integrations._pretrained": "transformers",
    "sparselab.integrations.lightning": "lightning",
    "sparselab.integrations.peft": "peft",
    "sparselab.integrations.transformers": "transformers",
}
MODULES = [
    name
    for name in (
        "sparselab",
        *(info.name for info in pkgutil.walk_packages(sparselab.__path__, "sparselab.")),
    )
    if importlib.util.find_spec(OPTIONAL.get(name, name))
]


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


#: Modules with public functions that lack a docstring today. It only ever gets shorter: an entry that nothing
#: needs fails.
UNDOCUMENTED: set[str] = set()


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


def test_docstrings_exist_and_name_the_arguments() -> None:
    problems = {name: found for name, thing in PUBLIC if (found := problem(thing))}
    assert {name: why for name, why in problems.items() if not name.startswith(tuple(UNDOCUMENTED))} == {}
    assert {each for each in UNDOCUMENTED if not any(name.startswith(each) for name in problems)} == set()


def test_the_public_functions_of_the_kernels_document_their_parameters() -> None:
    from sparselab import kernels

    for name in ("spmm", "spmm_t", "sddmm_dw", "rewrite", "PaddedCSR"):
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
    from sparselab.kernels import api
    from sparselab.kernels.layouts import padded_csr as layout

    assert sum(doctest.testmod(module).attempted for module in (api, layout)) >= 4
