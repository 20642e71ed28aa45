"""The page that draws the house draws this house: its folders and files are there, its examples run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from benchmarks.source import ROOT
from tests.kernels.process import run_python

PAGES = {name: (ROOT / name).read_text() for name in ("docs/architecture.md", "CONTRIBUTING.md")}


def drawn_folders(page: str) -> set[str]:
    """Paths of the folders in a tree drawn by indentation."""
    found, path = set(), list[str]()
    for line in re.findall(r"^ {4,}[\w/]+/(?: .*)?$", page, re.MULTILINE):
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        path[depth:] = [line.split()[0].rstrip("/")]
        found.add("/".join(path))
    return found


def named_paths(page: str) -> set[str]:
    """Files and folders between backticks, as they are named."""
    return {name for name in re.findall(r"`([\w./-]+)`", page) if re.search(r"/|\.(py|md)$", name)}


def missing(page: str) -> set[str]:
    """What a page names that is nowhere in the repository or the package."""
    return {
        name
        for name in named_paths(page)
        if not any((ROOT / place / name).exists() for place in ("", "sparselab", "tests", "benchmarks"))
    }


def examples(page: str) -> Iterator[str]:
    yield from re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_every_folder_of_the_package_is_drawn() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "sparselab").rglob("__init__.py")}
    assert drawn_folders(PAGES["docs/architecture.md"]) == folders


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_is_there(name: str) -> None:
    assert missing(PAGES[name]) == set()


def test_examples_on_the_page_run() -> None:
    """One after the other in one process, as what they register has names of its own."""
    codes = list(examples(PAGES["docs/architecture.md"]))
    assert len(codes) > 3
    run_python(
        "-c", "import json, sys\nfor code in json.loads(sys.argv[1]): exec(code, {})", json.dumps(codes)
    )


def test_a_page_that_is_wrong_is_seen() -> None:
    tree = "text\n\n    a/       what\n      b/    b c\n        c/\n    d/      d\n"
    assert drawn_folders(tree) == {"a", "a/b", "a/b/c", "d"}
    assert missing("`nn/layers/linear.py`, `sparselab/dst`, `spmm`, `nn/nothing.py` and `docs`") == {
        "nn/nothing.py"
    }
    assert list(examples("```python\nx = 1\n```\n\n```text\ny\n```\n")) == ["x = 1\n"]
