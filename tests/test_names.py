"""Keys: what each sort matches, which of them counts, and what is said of one that matches nothing."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparselab._names import as_keys, first_keys, listed, literal, match, told

LAYERS: dict[str, Any] = {
    "stem": nn.Conv2d(1, 1, 1), "mlp.0.fc": nn.Linear(2, 2), "mlp.1.fc": nn.Linear(2, 2),
    "attn.q_proj": nn.MultiheadAttention(2, 1), "head": nn.Bilinear(2, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("*", list(LAYERS)),
        ("mlp.*", ["mlp.0.fc", "mlp.1.fc"]),
        ("mlp.?.f[bc]", ["mlp.0.fc", "mlp.1.fc"]),
        ("head", ["head"]),
        (r"re:mlp\.\d\.fc", ["mlp.0.fc", "mlp.1.fc"]),
        (r"re:.*(c|d)", ["mlp.0.fc", "mlp.1.fc", "head"]),
        (re.compile("HEAD", re.IGNORECASE), ["head"]),
        (nn.Linear, ["mlp.0.fc", "mlp.1.fc"]),
        (nn.modules.conv._ConvNd, ["stem"]),
        (nn.Module, list(LAYERS)),
        (lambda module, name: isinstance(module, nn.Linear) and name.startswith("mlp.1"), ["mlp.1.fc"]),
    ],
)
def test_each_sort_of_key_matches_its_layers(key: Any, expected: list[str]) -> None:
    assert match("keys", [key], LAYERS) == {key: expected}


def test_the_first_key_counts_whatever_its_sort() -> None:
    def is_second(module: nn.Module, name: str) -> bool:
        return "1" in name

    keys = [re.compile("s.*"), is_second, nn.Linear, "*"]
    assert first_keys(match("keys", keys, LAYERS)) == {
        "stem": keys[0], "mlp.1.fc": is_second, "mlp.0.fc": nn.Linear, "attn.q_proj": "*", "head": "*"
    }  # fmt: skip


def test_a_function_is_called_once_with_each_module_and_its_name() -> None:
    calls = []

    def seen(module: nn.Module, name: str) -> bool:
        calls.append((name, module))
        return True

    match("keys", [seen], LAYERS)
    assert calls == list(LAYERS.items())


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("nothing", ValueError, r"^keys must .* got 'nothing' without one; the layers are: stem, mlp"),
        ("mlp", ValueError, r"got 'mlp' without one; what lies below it is 'mlp\.\*'; the layers"),
        ("q_proj", ValueError, r"got 'q_proj' without one; what ends so is '\*\.q_proj'; the layers"),
        (
            r".*\.(q|k)_proj$",
            ValueError,
            r"it is read as a glob, and only as a regular expression would match attn\.q_proj: write "
            r"re\.compile\('\.\*\\\\\.\(q\|k\)_proj\$'\) or 're:\.\*",
        ),
        ("re:mlp", ValueError, "got 're:mlp' without one; the layers are"),
        (re.compile("mlp"), ValueError, r"got re\.compile\('mlp'\) without one; the layers are"),
        ("(", ValueError, r"got '\(' without one; the layers are"),
        ("re:(", ValueError, r"a regular expression after 're:', got 're:\(': missing \)"),
        (nn.GRU, ValueError, "got GRU without one; the layers are"),
        (lambda module, name: False, ValueError, "got .*<lambda> without one"),
        (lambda module, name: None, TypeError, "functions that return a bool, got None for 'stem'"),
        (lambda module, name: 1, TypeError, "functions that return a bool, got 1 for 'stem'"),
        (3, TypeError, "keys must choose layers by a str, a regular expression, a class, .* got 3"),
        (None, TypeError, "got None"),
        (LAYERS["head"], TypeError, "keys must choose layers by a str, .* got Bilinear"),
    ],
)
def test_a_key_without_a_meaning_is_refused(key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        match("keys", [key], LAYERS)


def test_one_key_or_several() -> None:
    assert as_keys("keys", "abc") == ["abc"]
    assert as_keys("keys", nn.Linear) == [nn.Linear]
    assert as_keys("keys", ("a", nn.Linear)) == ["a", nn.Linear]
    with pytest.raises(TypeError, match=r"keys must be a str, .* or several of them, got 3"):
        as_keys("keys", 3)  # type: ignore[arg-type]


@given(st.text("re:[]*?!a.", min_size=1), st.text("re:[]*?!a.", min_size=1))
def test_a_literal_matches_its_own_name_only(name: str, other: str) -> None:
    key = literal(name)
    assert match("keys", [key], {name: None, other: None})[key] == [name]
    assert fnmatch.fnmatchcase(name, key)


def test_what_messages_call_keys_and_names() -> None:
    assert [told(key) for key in ("a*", re.compile("b"), nn.Linear, fnmatch.filter)] == [
        "'a*'", "re.compile('b')", "Linear", "filter"
    ]  # fmt: skip
    assert listed([]) == "none"
    assert listed([*"abcdefghij"]) == "a, b, c, d, e, f, g, h, ..."
