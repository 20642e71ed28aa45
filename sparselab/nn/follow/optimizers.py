"""The optimizers of the process that have stepped: whose state has to follow when connections are replaced.

Torch calls a hook after every optimizer step. It notes the optimizer, weakly, and whether its state was
loaded since: a state that was just loaded is of the connections that are loaded with it, and stays.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sparselab.nn.follow.state_move import group_of

#: Whether each has stepped since its state was loaded.
_stepped: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def note_step(optimizer: Any, *_: Any) -> None:
    """Take note that an optimizer has stepped: its state is of the connections as they are."""
    if optimizer not in _stepped and is_reported(optimizer):
        optimizer.register_load_state_dict_post_hook(_note_loading)
    _stepped[optimizer] = True


def is_reported(optimizer: Any) -> bool:
    """Whether torch says when an optimizer steps; else whoever knows calls `note_step`."""
    return isinstance(optimizer, Optimizer)


def _note_loading(optimizer: Optimizer) -> None:
    _stepped[optimizer] = False


def optimizers_of(parameter: Tensor) -> list[Any]:
    """The optimizers that have a state for a Parameter, made by steps and not loaded since."""
    return [
        optimizer
        for optimizer, is_stepped in list(_stepped.items())
        if is_stepped and parameter in optimizer.state
    ]


def is_stepped(parameter: Tensor) -> bool:
    """Whether an optimizer that has stepped has the Parameter, be it with a state or without."""
    return any(group_of(optimizer, parameter) is not None for optimizer in list(_stepped))


register_optimizer_step_post_hook(note_step)
