"""A callback for the Trainer of Hugging Face, and sparse models read. Needs transformers and accelerate."""

from __future__ import annotations

import copy
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from sparselab.dst import Group, Monitor, Replicas, SparsityAlgorithm
from sparselab.dst.monitor.monitor import ScalarWriter
from sparselab.dst.replicas import ALL_REPLICAS
from sparselab.integrations._driver import Driver
from sparselab.nn.layers.base import find_sparse

try:
    import transformers
    from transformers import AutoConfig, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    from sparselab.integrations._pretrained import read
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
    not attach the algorithm or call its ``step()`` yourself. Training the same model again goes on, training
    another begins anew, as each trial of a hyperparameter search does.

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
    replicas : Replicas or None
        Of several processes, as of `SparsityAlgorithm.attach`; by default those among which the Trainer
        shares its batches out.

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
        replicas: Replicas | None = ALL_REPLICAS,
    ) -> None:
        self._driver = Driver(algorithm, monitor or writer is not None, replicas)
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
        if state.is_hyper_param_search:
            return
        self._driver.consolidate()
        if not state.is_world_process_zero:
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


def from_pretrained(folder: str | os.PathLike[str], model_class: Any = None, **settings: Any) -> Any:
    """A model as ``save_pretrained`` wrote it, its sparse layers included.

    ``from_pretrained`` of transformers' own classes refuses such a folder (a quantization config without
    ``quant_method``): they would make dense layers and leave them random.

    Parameters
    ----------
    folder : path or str
        With ``config.json`` and the weights as safetensors, in one file or several; or whatever else
        ``from_pretrained`` of transformers takes.
    model_class : type, optional
        Another class than the one that was saved, which the configuration names: a ``PreTrainedModel``, or
        one of the ``AutoModel`` classes.
    settings
        As of ``from_pretrained`` of transformers: ``dtype``, ``device_map``, ``attn_implementation``,
        ``config``, ``num_labels``, ...

    Returns
    -------
    PreTrainedModel
        In evaluation mode, with the topology that was saved; with ``output_loading_info=True`` a tuple of it
        and of what transformers says of missing and unexpected names.

    Raises
    ------
    TypeError
        If the folder is none.
    ValueError
        If a sparse layer is not valid, or fits no layer of the model; if the configuration names no class of
        transformers and `model_class` is not given; if weights are missing or left over, unless another
        class than the saved one is asked for: transformers then reports them.

    Examples
    --------
    >>> from sparselab.integrations.transformers import from_pretrained  # doctest: +SKIP
    >>> model.save_pretrained("sparse-gpt2")  # doctest: +SKIP
    >>> model = from_pretrained("sparse-gpt2", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(
            f"folder must be a path, and comes before model_class, got {getattr(folder, '__name__', folder)}"
        )
    told, config = settings.pop("output_loading_info", False), settings.pop("config", None)
    if config is None:
        # As AutoModel does: what the configuration takes of the settings are not those of the model.
        own: dict[str, Any] = {
            name: settings.pop(name) for name in ("dtype", "torch_dtype") if name in settings
        }
        config, settings = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **settings)
        settings.update(own)
    saved = _saved_class(config)
    if (model_class := model_class or saved) is None:
        raise ValueError(
            f"model_class must be given where the configuration names no class of transformers, got "
            f"{config.architectures} in {os.fspath(folder)}"
        )
    model, info = read(model_class, folder, copy.deepcopy(config), settings)
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if type(model) is saved and (missing or left):
        raise ValueError(
            f"folder must hold the weights of a {saved.__name__}, but in {os.fspath(folder)} there are no "
            f"{missing}, and {left} are left over"
        )
    return (model, info) if told else model


def _saved_class(config: Any) -> Any:
    """The class of transformers that was saved, if it is one of them."""
    return getattr(transformers, (config.architectures or [""])[0], None)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _fingerprint(model: torch.nn.Module) -> int:
    """Tells one state of the sparse layers' weights from another."""
    checksum = 0
    for _, layer in find_sparse(model):
        weights = layer.stored.detach().cpu().reshape(-1)
        checksum = zlib.crc32(weights.view(torch.uint8).numpy().tobytes(), checksum)
    return checksum
