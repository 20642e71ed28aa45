"""Averages of models by position: means, exponential averages, target networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import swa_utils

from sparselab.nn.follow.checksums import of_text
from sparselab.nn.follow.replaced import take_connections
from sparselab.nn.follow.replicas import gather_numbers, require_same_connections
from sparselab.nn.layers.base import SparseLayer, find_sparse

Model = TypeVar("Model", bound=nn.Module)
Connections = Literal["union", "newest"]


def copy_topology(target: nn.Module, model: nn.Module) -> None:
    """Give the sparse layers of a copy the connections of a model; weights stay with their positions.

    What the copy has no longer is lost, what is new starts at 0. From then on its entries are those of the
    model, slot by slot, until the model is rewired: so a tool that averages parameters one by one (timm's
    ``ModelEmaV3``, a loop over ``zip(target.parameters(), model.parameters())``) is right after this call.

    Parameters
    ----------
    target, model : torch.nn.Module
        Of the same structure: the sparse layers have the same names and shapes.

    Raises
    ------
    TypeError, ValueError
        If they have not, or a layer cannot be rewired. Nothing has been changed if names or shapes differ.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> online, target = SparseLinear(64, 32), SparseLinear(64, 32)
    >>> copy_topology(target, online)
    >>> torch.equal(target.positions(), online.positions())
    True
    """
    for own, other in _layer_pairs(target, model):
        take_connections(own, other.positions())
        mask = other.forward_mask
        own.forward_mask = None if mask is None else mask.to(own.stored.device, copy=True)


@torch.no_grad()
def soft_update(target: nn.Module, model: nn.Module, tau: float) -> None:
    """``target = (1 - tau) * target + tau * model``, by position: of target networks and running averages.

    Sparse layers of the target get the connections of the model first, as by `copy_topology`. Floating
    parameters and buffers of all layers are mixed; other buffers are copied.

    Parameters
    ----------
    target, model : torch.nn.Module
        Of the same structure.
    tau : float in [0, 1]
        1 makes the target a copy.

    Raises
    ------
    TypeError, ValueError
        If tau is out of range, or the structures differ. Nothing has been changed then.

    References
    ----------
    Lillicrap et al., "Continuous control with deep reinforcement learning", ICLR 2016, section 3.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> online, target = SparseLinear(64, 32), SparseLinear(64, 32)
    >>> soft_update(target, online, 1.0)
    >>> x = torch.randn(2, 64)
    >>> torch.equal(target(x), online(x))
    True
    """
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
        raise ValueError(f"tau must be a number in [0, 1], got {tau!r}")
    layers, ours, theirs = _layer_pairs(target, model), _others(target), _others(model)
    _check_same({n: t.shape for n, t in ours.items()}, {n: t.shape for n, t in theirs.items()}, "tensors")
    for layer, _ in layers:
        layer.storage.check_kin(layer)
    copy_topology(target, model)
    pairs: list[tuple[Tensor, Tensor]] = [(own, theirs[name]) for name, own in ours.items()]
    pairs += [(layer.stored, each.stored) for layer, each in layers]
    for own, other in pairs:
        if own.is_floating_point() or own.is_complex():
            own.lerp_(other.detach().to(own.device, own.dtype), tau)
        else:
            own.copy_(other)


@torch.no_grad()
def average(
    models: Sequence[Model],
    weights: Sequence[float] | None = None,
    *,
    topology: Connections = "union",
) -> Model:
    """A new model whose weights are the weighted means of those of some models, by position.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        Of the same structure; none is changed. The new one is a copy of the last.
    weights : sequence of float, optional
        How much each model counts, divided by their sum; equally by default.
    topology : {"union", "newest"}
        "union": every connection that one of the models has; a model without it counts as 0 there. "newest":
        the connections of the last model; of others' connections elsewhere nothing remains.

    Returns
    -------
    torch.nn.Module
        Floating parameters and buffers are means; other buffers are those of the last model. Its forward
        masks are gone.

    Raises
    ------
    TypeError, ValueError
        If there is no model, their structures differ, the weights do not fit, or a union cannot be had of a
        kind of layer (as of `FanInLinear`, whose outputs have equally many connections).

    References
    ----------
    Wortsman et al., "Model soups", ICML 2022; Izmailov et al., "Averaging Weights Leads to Wider Optima and
    Better Generalization", UAI 2018.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> a, b = SparseLinear(64, 32), SparseLinear(64, 32)
    >>> mean = average([a, b])
    >>> x = torch.randn(2, 64)
    >>> torch.testing.assert_close(mean(x), (a(x) + b(x)) / 2, rtol=1e-5, atol=1e-6)
    """
    models = list(models)
    if not models:
        raise ValueError("models must be at least one, got none")
    if topology not in get_args(Connections):
        raise ValueError(f"topology must be one of {get_args(Connections)}, got {topology!r}")
    shares = _shares(len(models), weights)
    *others, last = models
    for other in others:
        _layer_pairs(last, other)
    mean = _own_copy(last)
    _scale(mean, shares[-1])
    if topology == "union":
        for other in others:
            for own, each in _layer_pairs(mean, other):
                take_connections(own, torch.unique(torch.cat((own.positions(), each.positions().cpu()))))
    for other, share in zip(others, shares, strict=False):
        part = _own_copy(other)
        copy_topology(part, mean)
        for total, term in zip(_floating(mean), _floating(part), strict=True):
            total.add_(term.to(total.device, total.dtype), alpha=share)
    return mean


@torch.no_grad()
def average_over_ranks(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, process_group: Any = None
) -> None:
    """Give the replicas of a model in several processes the mean of their weights, in place.

    For training where each process makes several steps on its own, as on a slow network (local SGD): the
    model is not wrapped, and every so many steps all processes call this, before a step of the algorithm that
    updates. The algorithm is told of them: ``attach(model, replicas=Replicas(process_group))``.

    Parameters
    ----------
    model : torch.nn.Module
        Floating parameters and buffers are averaged; of sparse layers connection by connection.
    optimizer : torch.optim.Optimizer, optional
        Its state for each weight is averaged, too, and so are gradients: where an algorithm goes by them
        (`MEST`, `SNFS`), they must be the same in all processes.
    process_group : torch.distributed.ProcessGroup, optional
        All processes by default. With one process, or none, nothing happens.

    Raises
    ------
    RuntimeError
        In all processes, if connections, or what is to be averaged, are not the same in all of them. Nothing
        has been changed then.

    References
    ----------
    Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> average_over_ranks(SparseLinear(64, 32))  # alone
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    group = dist.group.WORLD if process_group is None else process_group
    if dist.get_world_size(group) < 2:
        return
    layers = dict(find_sparse(model))
    require_same_connections(layers, group, "to be averaged")
    tensors = [*_floating(model), *([] if optimizer is None else _trained_with(model, optimizer))]
    told = of_text(repr([(tuple(each.shape), each.dtype) for each in tensors]))
    table = gather_numbers([len(tensors), told], group)
    if (table != table[0]).any():
        raise RuntimeError(
            f"all processes must have the same tensors to be averaged, got {table[:, 0].tolist()} of them, "
            f"or of other shapes; state that is in shards over processes cannot be averaged"
        )
    for dtype in dict.fromkeys(each.dtype for each in tensors):
        ours = [each for each in tensors if each.dtype == dtype]
        # Sums of half the precision would lose what one process adds.
        flat = torch.cat([each.reshape(-1) for each in ours]).to(torch.promote_types(dtype, torch.float32))
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        means = torch.split(flat, [each.numel() for each in ours])
        for own, mean in zip(ours, means, strict=True):
            own.copy_(mean.view(own.shape))


class AveragedModel(swa_utils.AveragedModel):
    """`torch.optim.swa_utils.AveragedModel` of a model whose connections move: it averages by position.

    Everything is as of torch's class, ``avg_fn``, ``multi_avg_fn`` and ``use_buffers`` included. Before each
    update the average gets the connections of the model, as by `copy_topology`.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
    >>> model = nn.Sequential(SparseLinear(64, 32))
    >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    >>> averaged.update_parameters(model)
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with a model whose connections may be others than the last time."""
        copy_topology(self.module, model)
        if not self.use_buffers:
            super().update_parameters(model)
            return
        # Torch would average connections as if they were numbers.
        hidden = [*_topology(self.module), *_topology(model)]
        for layer, name, _ in hidden:
            layer._buffers[name] = None
        try:
            super().update_parameters(model)
        finally:
            for layer, name, buffer in hidden:
                layer._buffers[name] = buffer


def _own_copy(model: Model) -> Model:
    """A copy that is rewired, and no concern of the model."""
    new = copy.deepcopy(model)
    for _, layer in find_sparse(new):
        if layer.storage.kin is not None:
            layer.storage.kin.leave(layer)
    return new


def _topology(model: nn.Module) -> list[tuple[SparseLayer, str, Tensor]]:
    """The buffers that say where connections are and which are in use."""
    return [
        (layer, name, buffer)
        for _, layer in find_sparse(model)
        for name in (*layer.storage.pattern, "forward_mask")
        if (buffer := layer._buffers[name]) is not None
    ]


def _others(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers beside those that hold sparse weights."""
    sparse = {id(layer.stored) for _, layer in find_sparse(model)}
    sparse |= {id(buffer) for _, _, buffer in _topology(model)}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in named if id(tensor) not in sparse}


def _layer_pairs(target: nn.Module, model: nn.Module) -> list[tuple[SparseLayer, SparseLayer]]:
    """The sparse layers of both, in pairs; ValueError unless names and shapes are the same."""
    ours, theirs = dict(find_sparse(target)), dict(find_sparse(model))
    _check_same(
        {name: (layer.shape, layer.block_shape) for name, layer in ours.items()},
        {name: (layer.shape, layer.block_shape) for name, layer in theirs.items()},
        "sparse layers",
    )
    return [(ours[name], theirs[name]) for name in ours]


def _check_same(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    if ours != theirs:
        differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        raise ValueError(
            f"both models must have the same {what}, got {differ[0]!r} as {ours.get(differ[0])} and "
            f"{theirs.get(differ[0])}"
        )


def _shares(n: int, weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * n if weights is None else [float(weight) for weight in weights]
    total = sum(given)
    if len(given) != n or not math.isfinite(total) or total == 0:
        raise ValueError(f"weights must be {n} numbers whose sum is not 0, got {weights}")
    return [weight / total for weight in given]


def _floating(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            yield tensor.detach()


def _trained_with(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Gradients, and what an optimizer keeps for each weight."""
    kept = [
        (parameter, each)
        for parameter in model.parameters()
        for each in (parameter.grad, *optimizer.state.get(parameter, {}).values())
    ]
    return [
        each
        for parameter, each in kept
        if isinstance(each, Tensor) and each.shape == parameter.shape and each.is_floating_point()
    ]


def _scale(model: nn.Module, share: float) -> None:
    for _, layer in find_sparse(model):
        layer.forward_mask = None
    for tensor in _floating(model):
        tensor.mul_(share)
