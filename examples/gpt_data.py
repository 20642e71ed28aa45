"""Text as a file of tokens that is mapped into memory: a byte is a token, or a character.

The file is made once for a text, beside it (or in the user's cache where that cannot be written), and made
anew when the text's files, their sizes or their times of change are others.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from downloads import cache_folder, whole_file, write_atomically
from text import TextError, load_text
from torch import Tensor

#: Part of the name of a file of tokens; another one where what is written changes.
FORMAT = 1
CHUNK_BYTES = 1 << 24
#: Of the text, at its end, to validate with.
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Tokens:
    """A text as tokens: the first part to train on, the last to validate with.

    `vocabulary` has the character of each token; it is None where a token is a byte.
    """

    train: np.ndarray
    validation: np.ndarray
    vocabulary: str | None
    source: str
    sha256: str

    @property
    def size(self) -> int:
        """How many different tokens there may be."""
        return 256 if self.vocabulary is None else len(self.vocabulary)

    def text(self, tokens: list[int]) -> str:
        """The text that tokens stand for."""
        if self.vocabulary is None:
            return bytes(tokens).decode("utf-8", "replace")
        return "".join(self.vocabulary[token] for token in tokens)

    def line_break(self) -> int:
        """The token to write on after."""
        return ord("\n") if self.vocabulary is None else max(0, self.vocabulary.find("\n"))

    def batch(
        self, context: int, rows: int, *draw: int, part: int = 0, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Windows at random places of the training text, and the tokens one place further on.

        They depend on the numbers of `draw` alone: seed, step and so on. So a run that is resumed needs to
        know no more than its step. Of `parts` times so many rows, passes and processes take a part each.
        """
        starts = np.random.default_rng(draw).integers(len(self.train) - context, size=(parts, rows))
        return windows(self.train, starts[part], context)

    def validation_windows(self, context: int, most: int) -> tuple[Tensor, Tensor]:
        """At most so many windows, evenly spread over the text to validate with."""
        last = len(self.validation) - context - 1
        return windows(
            self.validation, np.linspace(0, last, min(most, last // context + 1)).astype(int), context
        )


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """The tokens from each start, and those one place further on."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1], both[:, 1:]


def load_tokens(path: Path | None, by_character: bool, context: int, out: Path) -> Tokens:
    """Map the tokens of a text file, or of all files of a folder; of Tiny Shakespeare if there is no path.

    Raises
    ------
    TextError
        There is no such file, a file is not UTF-8 where characters are asked for, or there is too little.
    """
    if path is None:
        path = _tiny_shakespeare(out)
    elif not path.exists():
        raise TextError(f"{path}: no such file or folder; expected UTF-8 text")
    file, about = _prepared(path, by_character)
    n_tokens = file.stat().st_size // np.dtype(about["dtype"]).itemsize
    n_validation = max(int(n_tokens * VALIDATION_SHARE), context + 1)
    if n_tokens < n_validation + context + 1:
        raise TextError(
            f"{path}: holds only {n_tokens:,} tokens; expected at least {2 * context + 2:,} "
            f"for windows of {context}"
        )
    tokens = np.memmap(file, about["dtype"], "r")
    parts = tokens[:-n_validation], tokens[-n_validation:]
    return Tokens(*parts, about["vocabulary"], str(path), about["sha256"])


def _tiny_shakespeare(out: Path) -> Path:
    text = load_text().characters.encode("utf-8")
    place = out / "text.txt"
    if not (place.exists() and place.read_bytes() == text):
        write_atomically(place, text)
    return place


def _prepared(path: Path, by_character: bool) -> tuple[Path, dict]:
    """The file of tokens, and what is said of it; made if it is not there."""
    files = _files(path)
    if not files:
        raise TextError(f"{path}: is a folder without files; expected text files")
    stats = [(str(each.resolve()), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    key = hashlib.sha256(json.dumps([FORMAT, by_character, stats]).encode()).hexdigest()[:20]
    for folder in (path.parent / ".tokens", cache_folder() / "tokens"):
        tokens, about = folder / f"{path.name}.{key}.bin", folder / f"{path.name}.{key}.json"
        try:
            if not tokens.exists():  # it comes last, so it is there only if both are
                _write(files, by_character, tokens, about)
            return tokens, json.loads(about.read_text(encoding="utf-8"))
        except PermissionError:
            continue
        except OSError as error:
            if not os.access(path.parent, os.W_OK):
                continue  # a read-only file system
            raise TextError(f"{tokens}: cannot be written ({error.strerror})") from None
    raise TextError(f"{path}: neither {path.parent} nor {cache_folder()} can be written")


def _files(path: Path) -> list[Path]:
    """The file, or all files of a folder that are not hidden, in the order of their names."""
    if path.is_file():
        return [path]
    inside = sorted(each.relative_to(path) for each in path.rglob("*") if each.is_file())
    return [path / each for each in inside if not any(part.startswith(".") for part in each.parts)]


def _write(files: list[Path], by_character: bool, tokens: Path, about: Path) -> None:
    vocabulary, dtype = None, np.dtype(np.uint8)
    if by_character:
        codes = np.unique(np.concatenate([np.unique(each) for each in _characters(files)]))
        vocabulary = "".join(map(chr, codes))
        dtype = np.min_scalar_type(max(0, len(codes) - 1))
    checksum = hashlib.sha256()
    with whole_file(tokens) as file:
        for chunk in _encoded(files, codes, dtype) if by_character else _chunks(files):
            checksum.update(chunk)
            file.write(chunk)
        said = {"vocabulary": vocabulary, "dtype": dtype.name, "sha256": checksum.hexdigest()}
        write_atomically(about, json.dumps(said).encode())


def _encoded(files: list[Path], codes: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """Characters as places in `codes`."""
    for characters in _characters(files):
        yield np.searchsorted(codes, characters).astype(dtype).tobytes()


def _chunks(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def _characters(files: list[Path]) -> Iterator[np.ndarray]:
    """Code points, some at a time."""
    for path in files:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for chunk in _chunks([path]):
                yield np.frombuffer(decoder.decode(chunk).encode("utf-32-le"), np.uint32)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise TextError(f"{path}: is not UTF-8 ({error.reason}); expected UTF-8 text") from None
