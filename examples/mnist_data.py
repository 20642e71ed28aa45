"""The handwritten digits: 60,000 images to train on and 10,000 to test with, in four IDX files.

They are looked for in the folder asked for, in ``mnist`` of the data folders of this computer
(``../shared/data`` beside the repository, then ``$SPARSELAB_DATA``), and in the user's cache, into which they
are downloaded. Other images in the same format may be put into a folder of their own.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from downloads import DownloadError, Remote, cache_folder, cached_or_downloaded, find_local
from torch import Tensor

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {
    "train-images-idx3-ubyte.gz": (
        "db8f937d487057fb14a9f0fbe97f0bc8d311ab41b750d41e1ff37c43b9e55e19",
        9_630_634,
    ),
    "train-labels-idx1-ubyte.gz": (
        "51fc562b6747b666fbf6e84ce29d43c3cb5f9c388c664d43b33f02095313405a",
        28_902,
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cfeddb84311ecf044fc6a5b0f6ee8a24d265d4e83e388400186eb114082f4209",
        1_602_073,
    ),
    "t10k-labels-idx1-ubyte.gz": ("e41c74e484045d39b462a7790a4af51301bd9b0b24f0154798d713ec68c45920", 4_540),
}
SIDE, CLASSES = 28, 10
UNSIGNED_BYTES = 8  # IDX's code of the element type


class DataError(Exception):
    """The images cannot be used; the message names the file and what was expected of it."""


@dataclass(frozen=True)
class Digits:
    """Images as rows of `SIDE` * `SIDE` float32 values, and their classes."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    source: str
    digest: str  # of the four files


def load_digits(folder: str | os.PathLike[str] | None = None, mean: float = 0.0, std: float = 1.0) -> Digits:
    """Find the four files and read them.

    Parameters
    ----------
    folder : path or None
        Where they are. None looks for them as the module's docstring says.
    mean, std : float
        Pixels, from 0 to 1 in the files, become ``(pixel - mean) / std``.

    Raises
    ------
    DataError
        A file is missing, damaged, or not what it should be, or could not be downloaded.
    """
    place = Path(folder) if folder is not None else find_local(Path("mnist"))
    digest = hashlib.sha256()
    arrays = []
    for name in FILES:
        packed = fetch(name) if place is None else read(place / name)
        digest.update(packed)
        arrays.append(parse(packed, f"{MIRROR if place is None else f'{place}{os.sep}'}{name}"))
    tensors = []
    for images, labels in ((arrays[0], arrays[1]), (arrays[2], arrays[3])):
        check_pair(images, labels)
        pixels = torch.from_numpy(images.array.reshape(len(images.array), SIDE * SIDE).astype(np.float32))
        tensors += [pixels.div_(255).sub_(mean).div_(std), torch.from_numpy(labels.array.astype(np.int64))]
    return Digits(*tensors, str(place or cache_folder() / "mnist"), digest.hexdigest())


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected the four files {', '.join(FILES)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a gzipped IDX file") from None


def fetch(name: str) -> bytes:
    remote = Remote(MIRROR + name, *FILES[name])
    try:
        return cached_or_downloaded(remote, str(Path("mnist", name)))
    except DownloadError as error:
        raise DataError(
            f"{remote.url}: could not be downloaded ({error}); "
            f"pass --data DIR, a folder with {', '.join(FILES)}"
        ) from None


@dataclass(frozen=True)
class Named:
    """What a file held, with its name for messages."""

    array: np.ndarray
    name: str


def parse(packed: bytes, name: str) -> Named:
    """The array of unsigned bytes in a gzipped IDX file.

    Two zero bytes, one for the type of the elements, one for the number of dimensions, the dimensions as
    big-endian 32-bit numbers, then the elements in row-major order.
    """
    try:
        data = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: is not a whole gzip file ({error})") from None
    if len(data) < 4 or data[:3] != bytes((0, 0, UNSIGNED_BYTES)):
        expected = bytes((0, 0, UNSIGNED_BYTES)).hex(" ")
        raise DataError(
            f"{name}: begins with {data[:3].hex(' ')}; expected {expected}, an IDX file of unsigned bytes"
        )
    begin = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:begin], dtype=">u4").tolist()) if len(data) >= begin else ()
    if len(shape) != data[3] or len(data) - begin != math.prod(shape):
        raise DataError(
            f"{name}: holds {max(0, len(data) - begin):,} bytes after its header; "
            f"expected {math.prod(shape):,}, the product of the dimensions {shape}"
        )
    return Named(np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(shape), name)


def check_pair(images: Named, labels: Named) -> None:
    """Raise DataError unless these are images of `SIDE` x `SIDE` pixels with one class each."""
    if images.array.ndim != 3 or images.array.shape[1:] != (SIDE, SIDE) or not len(images.array):
        raise DataError(
            f"{images.name}: holds an array of shape {images.array.shape}; expected (images, {SIDE}, {SIDE})"
        )
    if labels.array.shape != images.array.shape[:1]:
        raise DataError(
            f"{labels.name}: holds an array of shape {labels.array.shape}; "
            f"expected ({len(images.array)},), one class for each of the images in {images.name}"
        )
    if labels.array.max() >= CLASSES:
        raise DataError(f"{labels.name}: holds the class {labels.array.max()}; expected 0 to {CLASSES - 1}")
