from collections.abc import Callable, Sequence
from typing import Any, ClassVar

class UserProvidedCacheLocator: ...

# Its name before numba 0.67.
_UserProvidedCacheLocator = UserProvidedCacheLocator

class CompileResultCacheImpl:
    _locator_classes: ClassVar[Sequence[type]]

class FunctionCache:
    _impl_class: ClassVar[type[CompileResultCacheImpl]]
    def __init__(self, function: Callable[..., Any]) -> None: ...
    def load_overload(self, sig: Any, target_context: Any) -> Any: ...
    def save_overload(self, sig: Any, data: Any) -> None: ...
    def flush(self) -> None: ...
