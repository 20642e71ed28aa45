from collections.abc import Callable
from typing import Any, TypeVar

from numba.types import Type

_Model = TypeVar("_Model", bound=type)

# An intrinsic is called without the typing context that its definition takes first.
def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]: ...
def register_model(numba_type: type[Type]) -> Callable[[_Model], _Model]: ...
