"""Gradients of which each process sends only the largest entries, for slow networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparselab.nn.follow.reducer import sparse_layers
from sparselab.nn.follow.replaced import sources

#: Parameters of at most so many entries are sent whole by default: biases and norms, next to nothing.
WHOLE = 1024


@dataclass
class _Held:
    """What has not been sent of the gradient of a Parameter, and where its connections were then."""

    entries: Tensor
    stamp: Any = None
    positions: Tensor | None = None


class _Place(NamedTuple):
    """A Parameter, its name, and the sparse layer whose weights it holds, if it does."""

    parameter: Tensor
    name: str
    layer: Any


class TopKCompression:
    """Top-k gradients with error feedback, as the communication hook of a `DistributedDataParallel` model.

    In each step every process adds what it held back so far to its gradient, sends the largest entries of the
    sum, and holds back the rest. What all receive is the mean of what was sent, 0 elsewhere. Nothing is lost,
    but for connections that are dropped; those that are grown begin with nothing held back.

    Parameters
    ----------
    model : DistributedDataParallel
        Without a communication hook; this becomes it.
    density : float in (0, 1]
        The share of the entries of a Parameter that a process sends.
    whole_below : int
        Parameters of at most so many entries are sent whole.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If the model is not wrapped (so), the numbers are out of range, or it has a hook already.

    Notes
    -----
    A process sends 8 bytes for each chosen float32 entry to each other one: ``8 d n (R - 1)`` for n entries
    and R processes, where an all-reduce sends ``8 n (R - 1) / R``. So it pays for ``d < 1 / R``. It holds as
    many numbers as there are weights. All processes get the same bits.

    `state_dict` holds what all processes have held back, so all of them call `consolidate` before one of them
    saves it. Loaded into as many processes, each goes on exactly; into others, each takes the mean.

    References
    ----------
    Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, algorithm 1; Karimireddy et al.,
    "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019; Lin et al., "Deep
    Gradient Compression", ICLR 2018 (the layer-wise choice, section 3.1; without its momentum correction).

    Examples
    --------
    In each process that ``torchrun`` has started::

        model = DistributedDataParallel(model)
        compression = sparselab.TopKCompression(model, density=0.01)
    """

    def __init__(
        self, model: DistributedDataParallel, density: float = 0.01, *, whole_below: int = WHOLE
    ) -> None:
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise ValueError(f"density must be a number in (0, 1], got {density!r}")
        if isinstance(whole_below, bool) or not isinstance(whole_below, int) or whole_below < 0:
            raise ValueError(f"whole_below must be an int of at least 0, got {whole_below!r}")
        self.density, self.whole_below = density, whole_below
        self._module, self._group = model.module, model.process_group
        self._held: dict[str, _Held] = {}
        #: By the `id` of a Parameter, which is held here as long as that is used.
        self._places: dict[int, _Place] = {}
        #: What all processes hold back, (processes, ...), if that was asked for since the last step.
        self._of_all: dict[str, Tensor] | None = None
        model.register_comm_hook(self, _exchange)

    def begin(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Send what is to be sent of the gradients of a bucket; the future holds their means."""
        self._of_all = None
        whole: Tensor = bucket.buffer()
        places, entries = [], []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            chosen, sent = self._choose(parameter, gradient)
            start = (gradient.data_ptr() - whole.data_ptr()) // whole.itemsize
            places.append((chosen + start).to(torch.int32))
            entries.append(sent)
        waited = [self._gather(torch.cat(places)), self._gather(torch.cat(entries))]

        def mean(_: Any) -> Tensor:
            whole.zero_()
            for indices, values in zip(waited[0][0], waited[1][0], strict=True):
                whole.index_add_(0, indices.long(), values)
            return whole.div_(dist.get_world_size(self._group))

        futures: Any = torch.futures.collect_all([each[1] for each in waited])
        return futures.then(mean)  # type: ignore[no-any-return]

    def _choose(self, parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and entries to send of a gradient; the others are held back."""
        n = gradient.numel()
        if self._is_whole(parameter):
            return torch.arange(n), gradient.reshape(-1).clone()
        held = self._held_of(parameter).entries.view(-1)
        held += gradient.reshape(-1)
        chosen = held.abs().topk(math.ceil(self.density * n), sorted=False).indices
        sent = held[chosen]
        held[chosen] = 0
        return chosen, sent

    def _is_whole(self, parameter: Tensor) -> bool:
        """Whether all of a gradient is sent, and nothing is ever held back."""
        return parameter.numel() <= self.whole_below or self.density == 1

    def _gather(self, ours: Tensor) -> tuple[list[Tensor], torch.futures.Future[Any]]:
        theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size(self._group))]
        work: Any = dist.all_gather(theirs, ours, self._group, async_op=True)
        return theirs, work.get_future()

    def _held_of(self, parameter: Tensor) -> _Held:
        """What is held back of a Parameter, entry for entry as it is now."""
        if id(parameter) not in self._places:  # none at first, and others where a number has changed
            self._places = {id(each.parameter): each for each in _find_places(self._module)}
        _, name, layer = self._places[id(parameter)]
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = _Held(torch.zeros_like(parameter))
            _note(held, layer)
        elif layer is not None and held.stamp != layer.storage.stamp(layer):
            self._follow(held, layer)
        return held

    def _follow(self, held: _Held, layer: Any) -> None:
        assert held.positions is not None
        source = sources(held.positions, layer.positions())
        if source is not None:
            held.entries = layer.moved(held.entries, source)
        _note(held, layer)

    def consolidate(self) -> None:
        """Bring together what the processes hold back; all must call it, before one saves `state_dict`."""
        found = {}
        for parameter in self._module.parameters():
            if parameter.requires_grad and not self._is_whole(parameter):
                entries = self._held_of(parameter).entries
                theirs = [torch.empty_like(entries) for _ in range(dist.get_world_size(self._group))]
                dist.all_gather(theirs, entries, self._group)
                found[self._places[id(parameter)].name] = torch.stack(theirs)
        self._of_all = found

    def state_dict(self) -> dict[str, Any]:
        """What all processes have held back, by names of Parameters, and where it belongs.

        Raises
        ------
        RuntimeError
            If not all processes have called `consolidate` since the last step.
        """
        if self._of_all is None:
            raise RuntimeError(
                "what a TopKCompression holds back differs from process to process: all of them must call "
                "consolidate() after the last step, before one saves state_dict()"
            )
        positions = {name: self._held[name].positions for name in self._of_all}
        return {"held": dict(self._of_all), "positions": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, in a model of any topology; all processes must call it.

        Parameters
        ----------
        state : dict
            Of `state_dict`. Of other connections than the model has, entries follow by position.

        Raises
        ------
        ValueError
            If it is of a model with other names or shapes. Nothing has been changed then.
        """
        places = {each.name: each for each in _find_places(self._module)}
        world, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        loaded = {}
        for name, of_all in state["held"].items():
            if name not in places:
                raise ValueError(f"state must be of this model, got {name!r}, which it has not")
            parameter, _, layer = places[name]
            entries = of_all[rank].clone() if len(of_all) == world else of_all.mean(0)
            held = _Held(entries.to(parameter.dtype), positions=state["positions"][name])
            if layer is not None and held.positions is not None:
                self._follow(held, layer)
            if held.entries.shape != parameter.shape:
                shapes = f"{tuple(held.entries.shape)} instead of {tuple(parameter.shape)}"
                raise ValueError(f"state must be of this model, got {name!r} of shape {shapes}")
            loaded[name] = held
        self._held, self._of_all = loaded, None


def _exchange(compression, bucket):  # type: ignore[no-untyped-def]
    """The hook, as torch calls it, which refuses annotations that it does not expect."""
    return compression.begin(bucket)


def _find_places(module: nn.Module) -> list[_Place]:
    layers = {
        id(layer._parameters.get(layer.storage.parameter)): layer for layer in sparse_layers(module).values()
    }
    return [_Place(each, name, layers.get(id(each))) for name, each in module.named_parameters()]


def _note(held: _Held, layer: Any) -> None:
    """Take note of the connections that a layer has now."""
    if layer is not None:
        held.stamp, held.positions = layer.storage.stamp(layer), layer.positions()
