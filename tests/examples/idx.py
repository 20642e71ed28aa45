"""IDX files made in tests."""

import gzip
import struct
from pathlib import Path

import mnist_data
import numpy as np


def idx(array: np.ndarray) -> bytes:
    """A gzipped IDX file of unsigned bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def write_digits(folder: Path, n_train: int = 200, n_test: int = 50) -> Path:
    """Four files of images that tell their class: a bright block in another place for each, in noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = iter(mnist_data.FILES)
    for n in (n_train, n_test):
        labels = np.arange(n) % 10
        images = rng.integers(0, 60, (n, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4, 8:20] += 150
        (folder / next(names)).write_bytes(idx(images))
        (folder / next(names)).write_bytes(idx(labels))
    return folder
