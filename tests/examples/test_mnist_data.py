import gzip
import hashlib
import io
import urllib.error

import downloads
import mnist_data
import numpy as np
import pytest
import torch
from mnist_data import DataError, load_digits

from tests.examples.idx import idx, write_digits

NAMES = list(mnist_data.FILES)


@pytest.fixture
def folder(tmp_path):
    return write_digits(tmp_path / "images")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A computer without a copy of the images."""
    monkeypatch.setattr(downloads, "REPOSITORY", tmp_path / "work" / "repository")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSELAB_DATA", raising=False)


def test_images_are_read_in_order_and_scaled(tmp_path):
    folder = write_digits(tmp_path, n_train=3, n_test=2)
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    (folder / NAMES[0]).write_bytes(idx(images))
    (folder / NAMES[1]).write_bytes(idx(np.array([7, 0, 9])))
    digits = load_digits(folder, mean=0.5, std=0.25)
    expected = (torch.from_numpy(images).reshape(3, 784) / 255 - 0.5) / 0.25
    torch.testing.assert_close(digits.train_x, expected.float())
    assert digits.train_y.tolist() == [7, 0, 9]
    assert digits.train_y.dtype == torch.int64
    assert digits.test_x.shape == (2, 784)
    assert digits.source == str(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (0, b"no gzip", "is not a whole gzip file"),
        (0, idx(np.zeros((2, 28, 28)))[:-9], "is not a whole gzip file"),
        (1, gzip.compress(b"\0\0\x0d\x01\0\0\0\0"), "begins with 00 00 0d; expected 00 00 08"),
        (1, gzip.compress(b""), "begins with ; expected 00 00 08"),
        (1, gzip.compress(b"\0\0\x08\x02\0\0"), "holds 0 bytes after its header"),
        (
            0,
            gzip.compress(gzip.decompress(idx(np.zeros((2, 28, 28)))) + b"!"),
            "holds 1,569 .* expected 1,568",
        ),
        (0, idx(np.zeros((2, 32, 32))), r"shape \(2, 32, 32\); expected \(images, 28, 28\)"),
        (0, idx(np.zeros((0, 28, 28))), r"shape \(0, 28, 28\); expected"),
        (
            3,
            idx(np.zeros(49)),
            r"shape \(49,\); expected \(50,\), one class for each of the images in .*t10k",
        ),
        (3, idx(np.full(50, 10)), "holds the class 10; expected 0 to 9"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_wrong_file_is_named_with_what_was_expected(folder, file, content, message):
    (folder / NAMES[file]).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_digits(folder)
    assert str(caught.value).startswith(f"{folder / NAMES[file]}: ")


def test_a_missing_or_unreadable_file_is_named(folder):
    (folder / NAMES[2]).unlink()
    with pytest.raises(DataError, match=rf"{NAMES[2]}: no such file; expected the four files {NAMES[0]}, "):
        load_digits(folder)
    (folder / NAMES[2]).mkdir()
    with pytest.raises(DataError, match=rf"{NAMES[2]}: cannot be read"):
        load_digits(folder)


def test_data_folders_come_before_the_network(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "download", None)
    monkeypatch.setenv("SPARSELAB_DATA", str(tmp_path / "data"))
    write_digits(tmp_path / "data" / "mnist", n_train=20)
    assert len(load_digits().train_x) == 20
    write_digits(tmp_path / "work" / "shared" / "data" / "mnist", n_train=30)
    assert len(load_digits().train_x) == 30


def test_downloads_are_checked_kept_and_not_repeated(elsewhere, folder, tmp_path, monkeypatch):
    contents = {name: (folder / name).read_bytes() for name in NAMES}
    known = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items()}
    monkeypatch.setattr(mnist_data, "FILES", known)
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(contents[url.removeprefix(mnist_data.MIRROR)])

    monkeypatch.setattr(downloads.urllib.request, "urlopen", answer)
    digits = load_digits()
    assert torch.equal(digits.train_x, load_digits(folder).train_x)
    assert asked == [mnist_data.MIRROR + name for name in NAMES]
    kept = tmp_path / "cache" / "sparselab" / "mnist"
    assert digits.source == str(kept)
    (kept / NAMES[0]).write_bytes(b"damaged")
    assert load_digits().digest == digits.digest
    assert asked[4:] == [mnist_data.MIRROR + NAMES[0]]

    contents[NAMES[1]] = contents[NAMES[3]]
    (kept / NAMES[1]).unlink()
    with pytest.raises(
        DataError, match=rf"{NAMES[1]}: could not be downloaded .*another checksum.*--data DIR"
    ):
        load_digits()


def test_without_a_network_the_address_is_named(elsewhere, monkeypatch):
    def fail(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", fail)
    with pytest.raises(
        DataError, match=rf"{mnist_data.MIRROR}{NAMES[0]}: could not be downloaded .*no route"
    ):
        load_digits()


def test_the_checksums_are_those_of_the_known_files():
    folder = downloads.find_local(mnist_data.Path("mnist"))
    if folder is None:
        pytest.skip("no copy of MNIST on this computer ($SPARSELAB_DATA/mnist or ../shared/data/mnist)")
    for name, (digest, size) in mnist_data.FILES.items():
        remote = downloads.Remote("", digest, size)
        data = (folder / name).read_bytes()
        assert len(data) == size
        assert remote.matches(data)
        assert not remote.matches(data[:-1])
