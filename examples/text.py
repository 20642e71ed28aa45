"""Where the text of the character-level example comes from.

In this order: the file asked for; Tiny Shakespeare on this computer (``../shared/data`` beside the
repository, then ``$SPARSELAB_DATA``, then the user's cache); Tiny Shakespeare downloaded into that cache; and
where none of these works, the English text that Python's own ``help()`` carries.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
N_BYTES = 1_115_394
SOCKET_TIMEOUT_S = 10
DOWNLOAD_LIMIT_S = 60

REPOSITORY = Path(__file__).resolve().parents[1]
DATA_FILE = Path("tinyshakespeare", "input.txt")


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
    local = find_local()
    if local is not None:
        return read_text_file(local, min_chars, what="Tiny Shakespeare, ")
    data = cached_or_downloaded()
    if data is not None:
        return Text(data.decode("utf-8"), f"Tiny Shakespeare, {cache_file()}")
    return python_help_text(min_chars)


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


def find_local() -> Path | None:
    """Tiny Shakespeare in a data folder of this computer, or None."""
    folders = [REPOSITORY.parent / "shared" / "data"]
    if os.environ.get("SPARSELAB_DATA"):
        folders.append(Path(os.environ["SPARSELAB_DATA"]))
    for folder in folders:
        if (folder / DATA_FILE).is_file():
            return folder / DATA_FILE
    if len(folders) > 1:
        print(f"$SPARSELAB_DATA ({folders[1]}) has no file {DATA_FILE}; looking elsewhere.")
    return None


def cache_file() -> Path:
    """The user's own copy of Tiny Shakespeare, where the platform keeps such files."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches").expanduser()
    else:
        base = Path("~/.cache").expanduser()
    return base / "sparselab" / "tinyshakespeare.txt"


def cached_or_downloaded() -> bytes | None:
    """Tiny Shakespeare from the cache, else from its public address; None, saying so, without either.

    A cached file with the wrong checksum is fetched again. A cache that cannot be written only costs a later
    download.
    """
    try:
        target = cache_file()
        data = target.read_bytes() if target.is_file() else None
        if data is not None and is_tiny_shakespeare(data):
            return data
        data = download()
        if not is_tiny_shakespeare(data):
            raise ValueError(f"{len(data):,} bytes with another checksum than the {N_BYTES:,} expected")
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        print(f"Tiny Shakespeare could not be downloaded ({error}).")
        return None
    try:
        write_atomically(target, data)
    except OSError as error:
        print(f"Tiny Shakespeare was downloaded but not kept ({error}).")
    return data


def is_tiny_shakespeare(data: bytes) -> bool:
    """Whether these are the bytes the example was tuned on."""
    return hashlib.sha256(data).hexdigest() == SHA256


def download() -> bytes:
    """Fetch `URL` with a progress bar; slow, over-long and stalled answers end in an OSError."""
    deadline = time.monotonic() + DOWNLOAD_LIMIT_S
    received = bytearray()
    bar = tqdm(total=N_BYTES, desc="download", unit="B", unit_scale=True)
    with bar, urllib.request.urlopen(URL, timeout=SOCKET_TIMEOUT_S) as answer:
        while chunk := answer.read(1 << 16):
            received += chunk
            bar.update(len(chunk))
            if len(received) > N_BYTES:
                raise OSError(f"the answer is longer than {N_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {DOWNLOAD_LIMIT_S} seconds")
    return bytes(received)


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` so that other processes see either the whole file or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
