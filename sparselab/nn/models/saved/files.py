"""Whole models in safetensors files. Needs safetensors, when it is used."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Version of what `save_model` writes, in the file's metadata.
FORMAT = "1"


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and buffers of a model, topologies included, into a safetensors file.

    The file is complete or not there: it is written beside its place, flushed to the disk, and then moved, so
    that a crash leaves a file that was there before as it was.

    Parameters
    ----------
    model : torch.nn.Module
        On any device; dense, sparse or mixed. What has been tied (one tensor under several names) is stored
        once.
    path : path

    Raises
    ------
    ModuleNotFoundError
        If safetensors is not installed.
    TypeError
        If the model's ``state_dict`` holds more than tensors, which such a file cannot.
    ValueError
        If part of the model is on the device "meta".

    Examples
    --------
    >>> import tempfile, sparselab
    >>> layer = sparselab.SparseLinear(64, 32, sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(sparselab.SparseLinear(64, 32, sparsity=0.9), f"{folder}/layer.safetensors")
    ...     load_model(layer, f"{folder}/layer.safetensors")
    >>> layer.nnz
    205
    """
    library = _safetensors()
    tensors, tied = _collect(model)
    metadata = {"format": "pt", "sparselab_format": FORMAT, "tied": json.dumps(tied)}
    with whole_file(path) as unfinished:
        library.torch.save_file(tensors, unfinished, metadata)


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read what `save_model` wrote into a model of the same kind, in place.

    Sparse layers take the topologies of the file, whatever theirs are. Gradients are dropped.

    Parameters
    ----------
    model : torch.nn.Module
        With the layers that the saved one had; devices and floating dtypes may be others.
    path : path

    Raises
    ------
    ModuleNotFoundError
        If safetensors is not installed.
    OSError
        If the file cannot be read.
    ValueError
        If it is not one of `save_model`, of this format, undamaged; or if part of the model is on the device
        "meta".
    RuntimeError
        If it does not fit the model, as by ``load_state_dict``, or a topology is not valid; layers are named.
        The model is then as it was.

    Notes
    -----
    Each topology is checked before a kernel may see it. Until the last layer has been loaded, a second copy
    of the model's tensors is kept, to go back to.
    """
    state = _read(path)
    before = model.state_dict()
    for name, entry in before.items():
        _refuse_meta(name, entry)
        before[name] = entry.clone() if isinstance(entry, Tensor) else entry
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        model.load_state_dict(state)
    except BaseException:
        model.load_state_dict(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what becomes the file at `path`, all at once, when the block ends without an error."""
    place = Path(path)
    unfinished = place.with_name(f"{place.name}.{uuid.uuid4().hex}.unfinished")
    try:
        yield unfinished
        _flush(unfinished, os.O_RDWR)
        os.replace(unfinished, place)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":
        _flush(place.parent, os.O_RDONLY)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "save_model and load_model need safetensors, which is not installed; install it, or "
            "sparselab with its 'safetensors' extra: pip install '.[safetensors]'",
            name=error.name,
        ) from error
    return safetensors


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, none of which overlaps another; and names of tied ones with the name they go by."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, entry in model.state_dict().items():
        if not isinstance(entry, Tensor) or entry.layout != torch.strided:
            what = entry.layout if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(f"model must have a state of dense tensors only, got {what} under {name!r}")
        _refuse_meta(name, entry)
        key = entry.data_ptr(), entry.dtype, entry.shape, entry.stride(), entry.device
        if entry.numel() and key in names:
            tied[name] = names[key]
            continue
        names[key] = name
        storage = entry.untyped_storage().data_ptr()
        # Files hold whole tensors only; views of one memory get memory of their own.
        tensors[name] = (entry.clone() if storage in storages else entry).cpu().contiguous()
        storages.add(storage)
    return tensors, tied


def _refuse_meta(name: str, entry: Any) -> None:
    if isinstance(entry, Tensor) and entry.is_meta:
        raise ValueError(
            f"model must hold data, got {name!r} on the device meta; see torch.nn.Module.to_empty"
        )


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    library = _safetensors()
    expected = f"path must be a file of save_model, format {FORMAT}, got {os.fspath(path)!r}"
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{expected}: {error}") from error
    if metadata.get("sparselab_format") != FORMAT:
        raise ValueError(f"{expected} of format {metadata.get('sparselab_format')}")
    try:
        return state | {name: state[kept] for name, kept in json.loads(metadata["tied"]).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{expected} with names of tied tensors that it lacks: {error!r}") from error


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
