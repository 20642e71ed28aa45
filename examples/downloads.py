"""Where the examples' data lies: folders of this computer, the user's cache, checked downloads."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

SOCKET_TIMEOUT_S = 10
DOWNLOAD_LIMIT_S = 60

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Remote:
    """A public file whose bytes are known."""

    url: str
    sha256: str
    n_bytes: int

    def matches(self, data: bytes) -> bool:
        """Whether these are the file's bytes."""
        return hashlib.sha256(data).hexdigest() == self.sha256


class DownloadError(Exception):
    """A file could not be fetched; the message says why."""


def find_local(name: Path) -> Path | None:
    """A file or folder in ``../shared/data`` beside the repository or in ``$SPARSELAB_DATA``, or None."""
    folders = [REPOSITORY.parent / "shared" / "data"]
    if os.environ.get("SPARSELAB_DATA"):
        folders.append(Path(os.environ["SPARSELAB_DATA"]))
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    if len(folders) > 1:
        print(f"$SPARSELAB_DATA ({folders[1]}) has no {name}; looking elsewhere.")
    return None


def cache_folder() -> Path:
    """Where the platform keeps files that can be fetched again."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches").expanduser()
    else:
        base = Path("~/.cache").expanduser()
    return base / "sparselab"


def cached_or_downloaded(remote: Remote, name: str) -> bytes:
    """The bytes of a public file, from ``name`` in the cache folder, else from its address and kept there.

    A cached file with the wrong checksum is fetched again. A cache that cannot be written only costs a later
    download.

    Raises
    ------
    DownloadError
        If the answer is missing, slow, or not the expected file.
    """
    try:
        target = cache_folder() / name
        data = target.read_bytes() if target.is_file() else None
        if data is not None and remote.matches(data):
            return data
        data = download(remote)
        if not remote.matches(data):
            expected = f"the {remote.n_bytes:,} expected"
            raise ValueError(f"{len(data):,} bytes with another checksum than {expected}")
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(str(error) or type(error).__name__) from None
    try:
        write_atomically(target, data)
    except OSError as error:
        print(f"{name} was downloaded but not kept ({error}).")
    return data


def download(remote: Remote) -> bytes:
    """Fetch a file with a progress bar; slow, over-long and stalled answers end in an OSError."""
    deadline = time.monotonic() + DOWNLOAD_LIMIT_S
    received = bytearray()
    bar = tqdm(total=remote.n_bytes, desc="download", unit="B", unit_scale=True)
    with bar, urllib.request.urlopen(remote.url, timeout=SOCKET_TIMEOUT_S) as answer:
        while chunk := answer.read(1 << 16):
            received += chunk
            bar.update(len(chunk))
            if len(received) > remote.n_bytes:
                raise OSError(f"the answer is longer than {remote.n_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {DOWNLOAD_LIMIT_S} seconds")
    return bytes(received)


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` so that other processes see either the whole file or none."""
    with whole_file(target) as file:
        file.write(data)


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at `target` once the block has ended without an error, and not before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
