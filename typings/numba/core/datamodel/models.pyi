from typing import Any

from llvmlite import ir
from numba.types import Type

class PrimitiveModel:
    def __init__(self, manager: Any, numba_type: Type, llvm_type: ir.Type) -> None: ...
