import os
from pathlib import Path

import gpt_data
import numpy as np
import pytest
import torch
from gpt_data import load_tokens
from text import TextError

CONTEXT = 8


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparselab" / "tokens"


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


def load(path, by_character=False, out=Path()):
    return load_tokens(path, by_character, CONTEXT, out)


def test_bytes_are_tokens_and_the_last_tenth_validates(tmp_path):
    tokens = load(put(tmp_path / "a.txt", "a" * 900 + "b" * 100))
    assert isinstance(tokens.train, np.memmap)
    assert tokens.size == 256
    assert set(tokens.train.tolist()) == {ord("a")}
    assert set(tokens.validation.tolist()) == {ord("b")}
    assert tokens.text([104, 105, 0xC3]) == "hi\ufffd"
    assert tokens.line_break() == 10


def test_characters_are_numbered_in_order_and_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt_data, "CHUNK_BYTES", 3)  # within characters
    text = "é😀a\n" * 30
    tokens = load(put(tmp_path / "a.txt", text), by_character=True)
    assert tokens.vocabulary == "\naé😀"
    assert tokens.train.dtype == np.uint8
    assert tokens.text([*tokens.train.tolist(), *tokens.validation.tolist()]) == text
    assert tokens.line_break() == 0


def test_many_characters_take_two_bytes(tmp_path):
    tokens = load(put(tmp_path / "a.txt", "".join(map(chr, range(1000, 1400)))), by_character=True)
    assert tokens.train.dtype == np.uint16
    assert len(tokens.vocabulary) == 400


def test_a_folder_is_its_files_in_order_without_hidden_ones(tmp_path):
    for name, letter in (("b/2", "c"), ("a", "a"), ("b/1", "b"), (".git/x", "z"), ("b/.y", "z")):
        put(tmp_path / "corpus" / name, letter * 40)
    tokens = load(tmp_path / "corpus")
    assert bytes([*tokens.train, *tokens.validation]).decode() == "a" * 40 + "b" * 40 + "c" * 40


def test_the_file_is_made_once_and_anew_when_the_text_changes(tmp_path):
    path = put(tmp_path / "a.txt", "a" * 100)
    first = load(path)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / ".tokens").iterdir()}
    assert {file.suffix for file in made} == {".bin", ".json"}
    assert load(path).sha256 == first.sha256
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / ".tokens").iterdir()} == made
    os.utime(path, ns=(1, 1))  # as where it was copied: the same tokens in another file
    assert load(path).sha256 == first.sha256
    assert len(list((tmp_path / ".tokens").iterdir())) == 4
    put(path, "b" * 100)
    assert load(path).sha256 != first.sha256


def test_a_file_that_is_cut_short_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    path = put(tmp_path / "a.txt", "a" * 100)

    def fail(files):
        yield b"half"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpt_data, "_chunks", fail)
        with pytest.raises(KeyboardInterrupt):
            load(path)
    assert not list((tmp_path / ".tokens").iterdir())
    assert len(load(path).train) == 90


def test_where_the_folder_cannot_be_written_the_cache_takes_it(tmp_path, monkeypatch, cache):
    path, real = put(tmp_path / "read-only" / "a.txt", "a" * 100), gpt_data._write

    def write(files, by_character, tokens, about):
        if "read-only" in str(tokens):
            raise PermissionError
        real(files, by_character, tokens, about)

    monkeypatch.setattr(gpt_data, "_write", write)
    assert len(load(path).train) == 90
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "by_character", "message"),
    [
        (b"ab\xff" * 40, True, "is not UTF-8"),
        ("é".encode()[:1] * 1 + b"a" * 40, True, "is not UTF-8"),
        (b"a" * 40 + "é".encode()[:1], True, "is not UTF-8"),
        (b"a" * 17, False, "holds only 17 tokens; expected at least 18"),
        (b"", False, "holds only 0 tokens"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(tmp_path, content, by_character, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        load(path, by_character)
    assert len(load(put(path, "a" * 18)).train) == 9


def test_a_path_without_files_is_named(tmp_path):
    with pytest.raises(TextError, match="no such file or folder"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="is a folder without files"):
        load(tmp_path / "empty")


def test_without_a_path_it_is_tiny_shakespeare(tmp_path, monkeypatch):
    class Found:
        characters = "First Citizen:\n" * 10

    monkeypatch.setattr(gpt_data, "load_text", Found)
    out = tmp_path / "out"
    out.mkdir()
    assert load(None, out=out).text(load(None, out=out).train[:13].tolist()) == "First Citizen"
    assert len(list((out / ".tokens").iterdir())) == 2


def test_batches_depend_on_their_numbers_alone(tmp_path):
    tokens = load(put(tmp_path / "a.txt", "".join(chr(97 + n % 26) for n in range(2000))))
    (x, y), (again, _), (other, _) = (tokens.batch(CONTEXT, 5, *draw) for draw in ((1, 2), (1, 2), (1, 3)))
    assert x.shape == y.shape == (5, CONTEXT)
    assert x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_every_token_to_train_on_may_come_and_no_other(tmp_path):
    tokens = load(put(tmp_path / "a.txt", "".join(map(chr, range(1, 28)))))
    parts = [part for step in range(80) for part in tokens.batch(CONTEXT, 4, step)]
    assert set(torch.cat(parts).flatten().tolist()) == set(tokens.train.tolist())


def test_validation_windows_are_spread_over_the_end(tmp_path):
    tokens = load(put(tmp_path / "a.txt", "".join(chr(33 + n % 90) for n in range(1000))))
    x, y = tokens.validation_windows(CONTEXT, 4)
    assert x.shape == (4, CONTEXT)
    assert x[0].tolist() == tokens.validation[:CONTEXT].tolist()
    assert y[-1].tolist() == tokens.validation[-CONTEXT:].tolist()
    assert len(tokens.validation_windows(CONTEXT, 1000)[0]) == (100 - 1) // CONTEXT
