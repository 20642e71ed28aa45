"""A callback for the Trainer of Hugging Face. Needs transformers and accelerate."""

from __future__ import annotations

import glob
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from sparselab._names import Pattern
from sparselab.dst import Group, Monitor, SparsityAlgorithm
from sparselab.dst.monitor.monitor import ScalarWriter
from sparselab.integrations._driver import Driver
from sparselab.nn import sparsify
from sparselab.nn.layers.base import find_sparse
from sparselab.nn.models.kinds import Given, rule_of_saved

try:
    from safetensors.torch import load_file
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "sparselab.integrations.transformers needs transformers, which is not installed; install it, or "
        "sparselab with its 'transformers' extra: pip install '.[transformers]'",
        name=error.name,
    ) from error

#: The file in a checkpoint's folder.
FILE = "sparsity.pt"


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Drives an algorithm from the Trainer of Hugging Face.

    Attaches to the model when training starts, steps after every step of the optimizer and before gradients
    are zeroed, writes `FILE` into each checkpoint, and goes on from it with ``resume_from_checkpoint``. Do
    not attach the algorithm or call its ``step()`` yourself.

    Parameters
    ----------
    algorithm : SparsityAlgorithm or Group
    monitor : bool
        Whether to watch the updates with a `Monitor`.
    writer : ScalarWriter, optional
        Where to write what the monitor records, such as a ``torch.utils.tensorboard.SummaryWriter``; implies
        `monitor`.
    resume_from : path, optional
        The checkpoint that ``Trainer.train`` is told to resume from, where it is not in the Trainer's
        ``output_dir``: callbacks are not told.

    Raises
    ------
    TypeError
        If `algorithm` is neither an algorithm nor a group.

    Notes
    -----
    The algorithm is told ``gradient_accumulation_steps``, also where the last step of an epoch sums over
    fewer. Trials of a hyperparameter search are driven, but their checkpoints lack the file.

    Examples
    --------
    >>> from sparselab.dst import RigL  # doctest: +SKIP
    >>> from sparselab.integrations.transformers import SparsityCallback  # doctest: +SKIP
    >>> callback = SparsityCallback(RigL())  # doctest: +SKIP
    >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        algorithm: SparsityAlgorithm | Group,
        *,
        monitor: bool = False,
        writer: ScalarWriter | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self._driver = Driver(algorithm, monitor or writer is not None)
        self._writer = writer
        self._resume_from = resume_from

    @property
    def monitor(self) -> Monitor | None:
        """What was recorded; None without one, or before training."""
        return self._driver.monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, now that model and optimizer are there and restored.

        Raises
        ------
        FileNotFoundError
            If the Trainer resumes, but no checkpoint with `FILE` holds the weights that it has loaded.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        saved = self._find_saved(args, state, model) if state.global_step else None
        # Accelerate wraps the optimizer in one that torch's hooks do not know.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._driver.start(model, [optimizer], args.gradient_accumulation_steps, saved)
        self._write()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a backward pass that no optimizer step follows."""
        self._driver.backward_seen()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a backward pass that the optimizer step follows."""
        self._driver.backward_seen()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the monitor has recorded."""
        self._write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state into the checkpoint's folder: all of it or nothing."""
        if state.is_hyper_param_search or not state.is_world_process_zero:
            return
        path = _folder(args, state) / FILE
        unfinished = path.with_suffix(".unfinished")
        torch.save({**self._driver.state_dict(), "fingerprint": _fingerprint(kwargs["model"])}, unfinished)
        unfinished.replace(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No longer step along."""
        self._driver.stop()

    def _write(self) -> None:
        if self._writer is not None and self.monitor is not None:
            self.monitor.write(self._writer)

    def _find_saved(self, args: Any, state: Any, model: torch.nn.Module) -> dict[str, Any]:
        """The saved state that belongs to the weights of the model."""
        told = (self._resume_from, args.resume_from_checkpoint, _folder(args, state))
        paths = [Path(folder) / FILE for folder in told if isinstance(folder, (str, os.PathLike))]
        weights = _fingerprint(model)
        for path in paths:
            if path.is_file():
                saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                if saved["fingerprint"] == weights:
                    return saved
        raise FileNotFoundError(
            f"the Trainer resumes after step {state.global_step}, but none of {list(map(str, paths))} is the "
            f"file of an algorithm that was saved with the weights it has loaded. If the checkpoint is "
            f"elsewhere, pass SparsityCallback(..., resume_from=<its folder>)"
        )


def from_pretrained(model_class: Any, folder: str | os.PathLike[str]) -> Any:
    """A model as ``save_pretrained`` wrote it, its sparse layers included.

    ``model_class.from_pretrained`` would make dense layers, find no weights for them, and leave them random.

    Parameters
    ----------
    model_class : type
        A ``PreTrainedModel`` whose linear layers were made sparse with `sparselab.sparsify`.
    folder : path
        With ``config.json`` and the weights as safetensors, in one file or several.

    Returns
    -------
    model_class
        In evaluation mode, with the topology that was saved.

    Raises
    ------
    ValueError
        If weights are missing or left over.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights.update(load_file(path))
    model = model_class(model_class.config_class.from_pretrained(folder))
    sparsify(model, _rules_of(weights))
    found = model.load_state_dict(weights, strict=False)
    # Tied weights are saved once.
    loaded = {parameter.data_ptr() for name, parameter in model.state_dict().items() if name in weights}
    missing = [name for name in found.missing_keys if model.state_dict()[name].data_ptr() not in loaded]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"folder must hold the weights of a {model_class.__name__}, but in {os.fspath(folder)} there "
            f"are no {missing}, and {found.unexpected_keys} are left over"
        )
    return model.eval()


def _rules_of(weights: dict[str, torch.Tensor]) -> dict[Pattern, Given]:
    """Rules for `sparsify` that make the sparse layers whose weights these are."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    rules = {layer: rule_of_saved(parts) for layer, parts in layers.items()}
    return {glob.escape(layer): rule for layer, rule in rules.items() if rule is not None}


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _fingerprint(model: torch.nn.Module) -> int:
    """Tells one state of the sparse layers' weights from another."""
    checksum = 0
    for _, layer in find_sparse(model):
        weights = layer.stored.detach().cpu().reshape(-1)
        checksum = zlib.crc32(weights.view(torch.uint8).numpy().tobytes(), checksum)
    return checksum
