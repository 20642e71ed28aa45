"""The pages for users: their code runs, what they link to and name is there."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

import sparselab
from benchmarks.source import ROOT
from tests.architecture.test_docs import examples, missing
from tests.kernels.process import run_python

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text()

#: A model with the names that pages use, and what a page takes for given beside it.
_MODEL = """
import torch, sparselab
from torch import nn
attn, mlp = nn.ModuleDict({"q": nn.Linear(64, 64)}), nn.ModuleDict({"fc1": nn.Linear(64, 64)})
block = nn.ModuleDict({"attn": attn, "mlp": mlp, "up_proj": nn.Linear(64, 64), "conv": nn.Conv2d(8, 8, 3)})
model = nn.ModuleDict({"h": nn.ModuleList([block]), "lm_head": nn.Linear(64, 9)})
"""
_GIVEN = {
    "docs/layers.md": _MODEL,
    "docs/processes.md": """
import torch, sparselab, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = sparselab.SparseLinear(64, 64)
optimizer, algo = torch.optim.AdamW(model.parameters()), sparselab.RigL()
""",
    "docs/trainers.md": "import lightning, sparselab",
    "docs/architecture.md": None,  # run by test_docs, each block alone
}  # fmt: skip


def code_of(name: str, page: str) -> list[str]:
    """The blocks of a page, after what it takes for given."""
    codes = list(examples(page))
    if name == "README.md":  # its second block is about another model
        codes.insert(1, _MODEL)
    return [_GIVEN.get(name) or "", *codes]


@pytest.mark.parametrize(
    "name", [name for name, page in PAGES.items() if _GIVEN.get(name, "") is not None and "```python" in page]
)
def test_the_code_of_a_page_runs(name: str) -> None:
    codes = code_of(name, PAGES[name])
    if name == "docs/trainers.md":
        pytest.importorskip("lightning")
    run_python(
        "-W", "ignore", "-c",
        "import json, sys\nspace = {}\nfor code in json.loads(sys.argv[1]): exec(code, space)",
        json.dumps(codes),
    )  # fmt: skip


def dead_links(name: str, page: str) -> set[str]:
    """Links to files that are not there, and to headings that a page has not."""
    found = set()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page):
        file, _, heading = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        anchors = [] if not path.is_file() or path.suffix != ".md" else headings(path)
        if not path.is_file() or (heading and heading not in anchors):
            found.add(target)
    return found


def headings(path: Path) -> list[str]:
    """Anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]


def unknown_names(page: str) -> set[str]:
    """Names behind ``sparselab.`` that there are none of."""
    found = set()
    for name in re.findall(r"`(?:python -m )?sparselab((?:\.[A-Za-z_]+)+)", page):
        at = sparselab
        for part in name.split(".")[1:]:
            if (ROOT / "sparselab" / part).is_dir() and not hasattr(at, part):
                break  # a package that has not been imported
            if not hasattr(at, part):
                found.add(name)
                break
            at = getattr(at, part)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_links_to_and_names_is_there(name: str) -> None:
    assert dead_links(name, PAGES[name]) == set()
    assert missing(PAGES[name]) == set()
    assert unknown_names(PAGES[name]) == set()


def test_wrong_pages_are_seen() -> None:
    assert dead_links("README.md", "[a](docs/index.md) [b](nowhere.md) [c](docs/scaling.md#no-such)") == {
        "nowhere.md", "docs/scaling.md#no-such",
    }  # fmt: skip
    assert unknown_names("`sparselab.SparseLinear` and `sparselab.nn.SparseNothing`") == {".nn.SparseNothing"}


def test_the_first_page_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120


@pytest.mark.parametrize("name", ["nn", "dst", "kernels"])
def test_the_reference_lists_all_that_is_public(name: str) -> None:
    module = getattr(sparselab, name)
    offered = {each: getattr(module, each) for each in module.__all__}
    wanted = {
        f"{each.__module__}.{each.__qualname__}"
        for each in offered.values()
        if inspect.isclass(each) or inspect.isfunction(each)
    }
    listed = re.findall(r"^::: (\S+)$", (ROOT / f"docs/reference/{name}.md").read_text(), re.MULTILINE)
    assert set(listed) == wanted
