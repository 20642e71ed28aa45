import hashlib
import io
import os
import sys
import urllib.error
from pathlib import Path

import downloads
import pytest
import text

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


class Network:
    """Stands in for the network: counts the calls, answers with `content` or raises `error`."""

    def __init__(self):
        self.calls = 0
        self.content = CONTENT
        self.error = None

    def __call__(self, url, timeout):
        self.calls += 1
        assert url == text.REMOTE.url
        assert timeout == downloads.SOCKET_TIMEOUT_S
        if self.error is not None:
            raise self.error
        return io.BytesIO(self.content)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A computer without any copy of the text, where `CONTENT` counts as Tiny Shakespeare."""
    fake = Network()
    monkeypatch.setattr(downloads.urllib.request, "urlopen", fake)
    monkeypatch.setattr(downloads, "REPOSITORY", tmp_path / "work" / "repository")
    remote = downloads.Remote(text.REMOTE.url, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    monkeypatch.setattr(text, "REMOTE", remote)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSELAB_DATA", raising=False)
    return fake


def put(folder: Path, content: bytes) -> Path:
    file = folder / text.DATA_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def test_the_file_asked_for_comes_before_everything_else(network, tmp_path):
    put(tmp_path / "work" / "shared" / "data", b"something else")
    mine = tmp_path / "mine.txt"
    mine.write_bytes("Grüße,\r\nWelt".encode())
    found = text.load_text(mine)
    assert found == text.Text("Grüße,\r\nWelt", str(mine))
    assert network.calls == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"abc\xff\xfe", "byte 3 is not UTF-8"),
        (b"too short", "holds only 9 characters"),
    ],
)
def test_an_unusable_file_is_named_with_what_was_expected(network, tmp_path, content, message):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(text.TextError) as caught:
        text.load_text(file, min_chars=1290)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert str(caught.value).endswith("expected a UTF-8 text file of at least 1,290 characters")


def test_a_folder_or_an_unreadable_file_is_named(network, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(text.TextError, match=r"folder: (is a directory|cannot be read)"):
        text.load_text(folder)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(text.TextError, match=r"locked\.txt: cannot be read \(Permission denied\)"):
        text.load_text(tmp_path / "locked.txt")


def test_shared_data_beside_the_repository_comes_before_the_environment(network, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELAB_DATA", str(tmp_path / "data"))
    named = put(tmp_path / "data", b"from the environment")
    assert text.load_text() == text.Text("from the environment", f"Tiny Shakespeare, {named}")
    beside = put(tmp_path / "work" / "shared" / "data", b"from beside")
    assert text.load_text() == text.Text("from beside", f"Tiny Shakespeare, {beside}")
    assert network.calls == 0


def test_an_empty_local_copy_is_an_error_not_a_download(network, tmp_path):
    file = put(tmp_path / "work" / "shared" / "data", b"")
    with pytest.raises(text.TextError, match=r"input\.txt: is empty"):
        text.load_text()
    assert file.exists()
    assert network.calls == 0


def test_a_data_folder_without_the_text_is_mentioned_and_passed_over(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSELAB_DATA", str(tmp_path / "nothing"))
    assert text.load_text().characters == CONTENT.decode()
    assert f"$SPARSELAB_DATA ({tmp_path / 'nothing'}) has no {text.DATA_FILE};" in capsys.readouterr().out


def test_a_download_is_kept_and_not_repeated(network, tmp_path):
    first, second = text.load_text(), text.load_text()
    kept = tmp_path / "cache" / "sparselab" / "tinyshakespeare.txt"
    assert first == second == text.Text(CONTENT.decode(), f"Tiny Shakespeare, {kept}")
    assert network.calls == 1
    assert [file.read_bytes() for file in kept.parent.iterdir()] == [CONTENT]


def test_a_damaged_cached_file_is_fetched_again(network):
    kept = downloads.cache_folder() / text.CACHED
    kept.parent.mkdir(parents=True)
    kept.write_bytes(CONTENT[:-1])
    assert text.load_text().characters == CONTENT.decode()
    assert network.calls == 1
    assert kept.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"error": urllib.error.URLError("no route")}, "no route"),
        ({"error": downloads.http.client.IncompleteRead(b"half")}, "IncompleteRead"),
        ({"content": CONTENT[::-1]}, "another checksum"),
        ({"content": CONTENT + b"!"}, "longer than"),
    ],
)
def test_a_failed_download_falls_back_on_pythons_help_text(network, capsys, trouble, message):
    vars(network).update(trouble)
    found = text.load_text(min_chars=100_000)
    assert found.source == "Python's help(), pydoc_data.topics"
    assert "statement" in found.characters
    said = capsys.readouterr().out
    assert "could not be downloaded" in said
    assert message in said
    assert "instead of Tiny Shakespeare" in said
    assert not (downloads.cache_folder() / text.CACHED).exists()


def test_a_download_that_never_ends_is_given_up(network, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "DOWNLOAD_LIMIT_S", -1)
    assert text.load_text().source.startswith("Python's help()")
    assert "not finished after" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_costs_only_a_sentence(network, tmp_path, capsys):
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    assert text.load_text().characters == CONTENT.decode()
    assert "downloaded but not kept" in capsys.readouterr().out


def test_an_interrupted_write_leaves_no_file_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        downloads.write_atomically(tmp_path / "kept.txt", CONTENT)
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_help_text_asks_for_a_file(network, monkeypatch):
    network.error = urllib.error.URLError("no route")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(text.TextError, match="pass a UTF-8 text file with --text FILE"):
        text.load_text()


def test_help_text_shorter_than_needed_is_an_error(network):
    network.error = urllib.error.URLError("no route")
    with pytest.raises(text.TextError, match="expected at least 1,000,000,000"):
        text.load_text(min_chars=10**9)


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, "/home/someone/.cache"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere"),
        ("darwin", {}, "/home/someone/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_such_files(monkeypatch, platform, environment, folder):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(downloads.sys, "platform", platform)
    assert downloads.cache_folder() == Path(folder, "sparselab")


def test_the_checksum_is_that_of_the_known_file():
    file = downloads.find_local(text.DATA_FILE)
    if file is None:
        pytest.skip("no copy of Tiny Shakespeare on this computer")
    data = file.read_bytes()
    assert text.REMOTE.matches(data)
    assert len(data) == text.REMOTE.n_bytes
    assert not text.REMOTE.matches(data[:-1])
