"""Where the text of the character-level example comes from.

In this order: the file asked for; Tiny Shakespeare on this computer (``../shared/data`` beside the
repository, then ``$SPARSELAB_DATA``, then the user's cache); Tiny Shakespeare downloaded into that cache; and
where none of these works, the English text that Python's own ``help()`` carries.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from downloads import DownloadError, Remote, cache_folder, cached_or_downloaded, find_local

REMOTE = Remote(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    n_bytes=1_115_394,
)
DATA_FILE = Path("tinyshakespeare", "input.txt")
CACHED = "tinyshakespeare.txt"


class TextError(Exception):
    """The text asked for cannot be used; the message names the source and what was expected of it."""


@dataclass(frozen=True)
class Text:
    """A text and one sentence fragment saying where it was found."""

    characters: str
    source: str


def load_text(path: str | os.PathLike[str] | None = None, min_chars: int = 1) -> Text:
    """Find the text to train on.

    Parameters
    ----------
    path : path or None
        A UTF-8 text file. None looks for Tiny Shakespeare as the module's docstring says.
    min_chars : int
        The fewest characters the caller can use.

    Raises
    ------
    TextError
        A file was chosen and is missing, unreadable, empty, not UTF-8, or shorter than `min_chars`.
    """
    if path is not None:
        return read_text_file(Path(path), min_chars)
    try:
        return tiny_shakespeare(min_chars)
    except DownloadError as error:
        print(f"Tiny Shakespeare could not be downloaded ({error}).")
        return python_help_text(min_chars)


def tiny_shakespeare(min_chars: int = 1) -> Text:
    """Tiny Shakespeare, of this computer or downloaded.

    Raises
    ------
    TextError
        A copy on this computer is unreadable, empty, not UTF-8, or shorter than `min_chars`.
    DownloadError
        There is none on this computer, and it could not be downloaded.
    """
    local = find_local(DATA_FILE)
    if local is not None:
        return read_text_file(local, min_chars, what="Tiny Shakespeare, ")
    data = cached_or_downloaded(REMOTE, CACHED)
    return Text(data.decode("utf-8"), f"Tiny Shakespeare, {cache_folder() / CACHED}")


def read_text_file(path: Path, min_chars: int = 1, what: str = "") -> Text:
    """Read a UTF-8 file of at least `min_chars` characters, or say exactly what is wrong with it."""
    expected = f"expected a UTF-8 text file of at least {min_chars:,} characters"
    try:
        characters = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TextError(f"{path}: no such file; {expected}") from None
    except IsADirectoryError:
        raise TextError(f"{path}: is a directory; {expected}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: byte {error.start} is not UTF-8; {expected}") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}); {expected}") from None
    if not characters.strip():
        raise TextError(f"{path}: is empty; {expected}")
    if len(characters) < min_chars:
        raise TextError(f"{path}: holds only {len(characters):,} characters; {expected}")
    return Text(characters, f"{what}{path}")


def python_help_text(min_chars: int = 1) -> Text:
    """The English text behind Python's ``help()``, which needs neither a file nor a network."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError(
            "no text found: Tiny Shakespeare is not here, and this Python comes without pydoc_data; "
            "pass a UTF-8 text file with --text FILE"
        ) from None
    print("Using the English text of Python's help() (pydoc_data.topics) instead of Tiny Shakespeare.")
    characters = "\n\n".join(topics[name] for name in sorted(topics))
    if len(characters) < min_chars:
        raise TextError(
            f"pydoc_data.topics: holds only {len(characters):,} characters; expected at least {min_chars:,}; "
            "pass a longer text with --text FILE"
        )
    return Text(characters, "Python's help(), pydoc_data.topics")
