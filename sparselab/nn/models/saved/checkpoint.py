"""Checkpoints: everything that a run goes on from, in one file that is whole or not there.

A file is a line that says what it is; sections, one for each part, each what `torch.save` writes; a table of
them in JSON, with a checksum for each; and a trailer that says how long the table is, and its checksum.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sparselab.nn.models.saved.files import whole_file

_HEAD = b"sparselab checkpoint 1\n"
#: Bytes of the table, and its checksum.
_TRAILER = struct.Struct("<Q32s")
_CHUNK_BYTES = 4 << 20
#: What a file may hold beside tensors and containers of these: `torch.load` makes nothing else of one that
#: could have been written by anybody.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


class CheckpointError(ValueError):
    """A file is no checkpoint, or not a whole and unaltered one."""


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write the states of a model, an optimizer, an algorithm and whatever else a run needs into one file.

    The file is complete or not there: it is written beside its place, flushed to the disk, and then moved, so
    that a crash, at any moment, leaves a file that was there before as it was.

    Parameters
    ----------
    path : path
    **parts
        By names of your choice: what has ``state_dict()`` and ``load_state_dict()`` (a model, an optimizer, a
        schedule, an algorithm or a `Group`, `RandomState`), or plain values: numbers, str, None, tensors, and
        dicts, lists, tuples and sets of them.

    Raises
    ------
    TypeError
        If a state or a value holds something else, which `load_checkpoint` would not read.
    ValueError
        If part of a model is on the device "meta".

    Notes
    -----
    Tensors go from where they are to the file, and no second copy of them is made. Where several processes
    train one model, one of them writes.

    Examples
    --------
    >>> import tempfile, torch, sparselab
    >>> model, other = (sparselab.SparseLinear(64, 32, sparsity=each) for each in (0.9, 0.5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/last", model=model, progress={"step": 7})
    ...     load_checkpoint(f"{folder}/last", model=other)
    {'progress': {'step': 7}}
    >>> torch.equal(other.positions(), model.positions())
    True
    """
    states = {name: part.state_dict() if _is_stateful(part) else part for name, part in parts.items()}
    for name, state in states.items():
        _check(state, name)
    with whole_file(path) as unfinished, open(unfinished, "wb") as file:
        file.write(_HEAD)
        table = {}
        for name, state in states.items():
            section = _Writer(file)
            torch.save(state, section)  # type: ignore[arg-type]
            table[name] = section.entry(stateful=_is_stateful(parts[name]))
        text = json.dumps({name: entry._asdict() for name, entry in table.items()}).encode()
        file.write(text + _TRAILER.pack(len(text), hashlib.sha256(text).digest()))


def load_checkpoint(path: str | os.PathLike[str], **parts: Any) -> dict[str, Any]:
    """Take back, in place, the states that `save_checkpoint` wrote, and return the plain values.

    Models come first, then optimizers, then the rest, as a run resumes exactly: the algorithm's state belongs
    to the topology of the model's. Sparse layers take the topologies of the file, whatever theirs are. Parts
    that are not asked for are not read.

    Parameters
    ----------
    path : path
    **parts
        Some of those saved that have ``load_state_dict()``, by their names: the same ones or others that are
        made alike, with an algorithm attached to the model.

    Returns
    -------
    dict
        The plain values that were saved, by name.

    Raises
    ------
    CheckpointError
        If the file is not one of `save_checkpoint`, was cut short, or altered; nothing has been changed then.
    OSError
        If the file cannot be read.
    KeyError
        If it has no part of some name; nothing has been changed then.
    TypeError, ValueError, RuntimeError
        As `load_state_dict` of the parts, if a state does not fit. What came before it has been loaded.

    Notes
    -----
    What is read is checked first, at about a second for a gigabyte. One part is in memory beside the model at
    a time; an optimizer keeps the tensors that were read, without a copy.
    """
    with open(path, "rb") as file:
        table = _read_table(file, path)
        if missing := [name for name in parts if name not in table or not table[name].stateful]:
            states = [name for name, entry in table.items() if entry.stateful]
            raise KeyError(f"no states of {missing} in {os.fspath(path)!r}, which has those of {states}")
        wanted = {n: entry for n, entry in table.items() if n in parts or not entry.stateful}
        for name, entry in wanted.items():
            if _checksum(file, entry) != entry.sha256:
                raise CheckpointError(_refusal(path, f"the checksum of its part {name!r} is another one"))
        for name in sorted(parts, key=lambda name: _turn(parts[name])):
            parts[name].load_state_dict(_read_section(file, wanted[name]))
        return {name: _read_section(file, entry) for name, entry in wanted.items() if name not in parts}


class RandomState:
    """The state of the generators that draw for the whole process: those of torch (CPU), NumPy and Python.

    For `save_checkpoint` and `load_checkpoint`, as ``random=RandomState()``.
    """

    def state_dict(self) -> dict[str, Any]:
        """The states now, as plain values."""
        kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
        return {
            "torch": torch.get_rng_state(),
            "numpy": (str(kind), [int(key) for key in keys], *rest),
            "python": random.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the generators draw what they would have drawn next.

        Parameters
        ----------
        state : mapping
            What `state_dict` returned.
        """
        torch.set_rng_state(state["torch"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
        random.setstate(state["python"])


class _Entry(NamedTuple):
    """A section: where it lies, its checksum, and whether it is the state of something."""

    offset: int
    n_bytes: int
    sha256: str
    stateful: bool


class _Writer:
    """What `torch.save` writes a section to."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start, self._hash = file, file.tell(), hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write some bytes; returns how many."""
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Nothing: the whole file is flushed at its end."""

    def entry(self, stateful: bool) -> _Entry:
        """What the table says of the section, which ends here."""
        return _Entry(self._start, self._file.tell() - self._start, self._hash.hexdigest(), stateful)


class _Reader(io.RawIOBase):
    """A section as a file of its own."""

    def __init__(self, file: BinaryIO, entry: _Entry) -> None:
        self._file, self._entry, self._at = file, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.n_bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._entry.offset + self._at)
        wanted = memoryview(buffer)[: max(0, self._entry.n_bytes - self._at)]
        count = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return int(count)


def _is_stateful(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _turn(part: Any) -> int:
    """When a part is loaded; those of the same turn in their order."""
    return 0 if isinstance(part, nn.Module) else 1 if isinstance(part, Optimizer) else 2


def _check(value: Any, name: str) -> None:
    """Raise unless a file may hold a value and `torch.load` will read it."""
    if type(value) in (dict, OrderedDict):
        for key, each in value.items():
            _check(key, f"a key of {name}")
            _check(each, f"{name}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for each in value:
            _check(each, f"an entry of {name}")
    elif type(value) in (Tensor, nn.Parameter):
        if value.is_meta:
            raise ValueError(
                f"{name} must hold data, got a tensor on the device meta; see sparselab.materialize"
            )
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{name} must be a tensor, a number, a str, None or a dict, list, tuple or set of these, got "
            f"{type(value).__module__}.{type(value).__qualname__}, which no checkpoint can hold"
        )


def _read_table(file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, _Entry]:
    """What is in a file; CheckpointError unless its beginning and its end are those of a checkpoint."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(_HEAD)) != _HEAD:
        raise CheckpointError(_refusal(path, "it does not begin as one"))
    file.seek(max(len(_HEAD), size - _TRAILER.size))
    trailer = file.read()
    length, digest = _TRAILER.unpack(trailer) if len(trailer) == _TRAILER.size else (size, b"")
    if length > size - len(_HEAD) - _TRAILER.size:
        raise CheckpointError(_refusal(path, "it was cut short, or its end was altered"))
    file.seek(size - _TRAILER.size - length)
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise CheckpointError(_refusal(path, "it was cut short, or its end was altered"))
    table = {name: _Entry(**entry) for name, entry in json.loads(text).items()}
    expected = len(_HEAD) + sum(entry.n_bytes for entry in table.values()) + length + _TRAILER.size
    if size != expected:
        raise CheckpointError(_refusal(path, f"it has {size:,} bytes, not {expected:,}"))
    return table


def _checksum(file: BinaryIO, entry: _Entry) -> str:
    section, found = _Reader(file, entry), hashlib.sha256()
    while chunk := section.read(_CHUNK_BYTES):
        found.update(chunk)
    return found.hexdigest()


def _read_section(file: BinaryIO, entry: _Entry) -> Any:
    return torch.load(_Reader(file, entry), map_location="cpu", weights_only=True)  # type: ignore[arg-type]


def _refusal(path: str | os.PathLike[str], why: str) -> str:
    return f"path must be a whole file of save_checkpoint, got {Path(path).as_posix()!r}: {why}"
