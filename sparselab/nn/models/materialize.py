"""Models that are built on the meta device, sparse there, and only then given memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def materialize(model: Model, device: torch.device | str | int = "cpu") -> Model:
    """Give memory and first values to whatever of a model is on the meta device, in place.

    A model too big to exist dense is built on the meta device, made sparse there, and materialised: sparse
    layers draw connections and weights without a dense weight in between, and what is still dense is
    initialised by its own ``reset_parameters``.

    Parameters
    ----------
    model : torch.nn.Module
    device : torch.device

    Returns
    -------
    torch.nn.Module
        The model itself. Parameters are new objects: make the optimizer afterwards. Tied ones stay tied.

    Raises
    ------
    ValueError
        If a module that itself holds parameters or buffers on the meta device has no ``reset_parameters`` to
        fill them. Nothing has been changed then. Fill those first (``module.to_empty(device="cpu",
        recurse=False)`` and then its values); modules without meta tensors are left alone.

    Notes
    -----
    ``model.to_empty(device="cpu")`` and ``reset_parameters()`` of each sparse layer do the same for a model
    of sparse layers only.

    Examples
    --------
    >>> import sparselab
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(400_000, 400_000), nn.ReLU(), nn.Linear(400_000, 10))
    >>> materialize(sparselab.sparsify(model, {"0": 1 - 1e-6}))[0].nnz
    160000
    """
    modules = {name: each for name, each in model.named_modules() if any(t.is_meta for t in _own(each))}
    resets = {name: _find_reset(module) for name, module in modules.items()}
    if stuck := [f"{name!r} ({type(each).__name__})" for name, each in modules.items() if not resets[name]]:
        raise ValueError(
            "model must know how to fill its tensors on the meta device, but there is no reset_parameters() "
            f"of {', '.join(stuck)}; fill their own tensors first, or give them one"
        )
    made: dict[Tensor, Tensor] = {}
    for module in modules.values():
        for tensors in (module._parameters, module._buffers):
            _allocate(tensors, made, device)
    # Parts come before what contains them, as when modules are made.
    for reset in filter(None, reversed(resets.values())):
        reset()
    return model


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _find_reset(module: nn.Module) -> Callable[[], None] | None:
    # The second is what torch.nn.MultiheadAttention calls it.
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))


def _allocate(tensors: dict[str, Any], made: dict[Tensor, Tensor], device: torch.device | str | int) -> None:
    """Put memory in the place of meta tensors; what was one tensor in `made` stays one."""
    for name, tensor in tensors.items():
        if tensor is None or not tensor.is_meta:
            continue
        if tensor not in made:
            new = torch.empty_like(tensor, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        tensors[name] = made[tensor]
