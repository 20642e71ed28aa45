"""A few architectures go all the way; `python -m tests.models` takes all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.models import judge as judges
from tests.models.case import CASES, Case
from tests.models.judge import Row, Wrong, compare_states, judge
from tests.models.libraries import LIBRARIES, missing
from tests.models.table import document, line

MISSING = missing()
#: One of each sort: an encoder with a tied head, transposed weights, renamed names, fused experts, an encoder
#: and decoder, convolutions, and one of each other library.
FEW = (
    "BERT", "GPT-2", "GPT-NeoX", "Mixtral", "T5", "ResNet", "timm vit_tiny_patch16_224",
    "torchvision resnet18",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FEW)
def test_it_goes_all_the_way(name: str) -> None:
    library = next((each for each in LIBRARIES if name.startswith(f"{each} ")), "transformers")
    if library in MISSING:
        pytest.skip(f"needs {library}: {MISSING[library]}")
    row = judge(CASES[name])
    assert row.parts == {
        "sparse": "ok",
        "trained": "ok",
        "saved and read": "ok",
        "generated": "-" if CASES[name].generate is None else "ok",
        "densified": "ok",
    }, line(row)
    assert row.swapped > 2
    assert row.after < row.before


def test_there_are_enough() -> None:
    of = [case.library for case in CASES.values()]
    assert "transformers" in MISSING or of.count("transformers") >= 40
    assert of.count("timm") + of.count("torchvision") >= 30


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


class Wrapped(nn.Module):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.net(x)}


CASE = Case("mine", "torch", Wrapped, lambda: {"x": torch.linspace(-1, 1, 64).view(4, 16)})


def test_a_row_says_how_it_went() -> None:
    row = judge(CASE)
    assert not row.failed
    assert line(row).startswith("| mine | 2 | none | 608 | ")
    assert line(row).endswith("| ok | ok | - | ok |")


def test_what_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(replace(CASE, rules={"*.3": 0.5})).failed == ["sparse"]
    assert judge(replace(CASE, inputs=lambda: {"x": torch.full((4, 16), torch.nan)})).failed
    still = replace(CASE, inputs=lambda: {"x": torch.zeros(4, 16)})
    assert not judge(still).failed  # the second layer moves, the first has no gradient
    with monkeypatch.context() as patch:
        patch.setattr(judges.RigL, "step", lambda self: None)
        row = judge(CASE)
    assert row.failed == ["trained"]
    assert "no connection of net.0, net.2 moved (2 of 2 layers)" in row.parts["trained"]
    with monkeypatch.context() as patch:
        patch.setattr(judges, "_through_torch", lambda case, model, folder: Wrapped())
        assert "names differ after reading" in judge(CASE).parts["saved and read"]
    with monkeypatch.context() as patch:
        patch.setattr(judges, "densify", lambda model: model)
        assert judge(CASE).parts["densified"] == "Wrong: layers are still sparse"
    with monkeypatch.context() as patch:
        patch.setattr(judges, "densify", lambda model: Wrapped())
        assert "differ by" in judge(CASE).parts["densified"]


def test_states_are_compared_to_the_bit() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}
    compare_states(one, {name: each.clone() for name, each in one.items()})
    with pytest.raises(Wrong, match="a differs"):
        compare_states(one, {**one, "a": one["a"] + 1e-6})
    with pytest.raises(Wrong, match="b differs"):
        compare_states(one, {**one, "b": one["b"].int()})
    with pytest.raises(Wrong, match="names differ"):
        compare_states(one, {"a": one["a"]})


def test_the_page_counts() -> None:
    good, bad = Row("good", "torch"), Row("bad", "torch", parts={"trained": "ValueError: no"})
    page = document([good, bad])
    assert "1 of 2 pass" in page
    assert "| ValueError: no |" in page
