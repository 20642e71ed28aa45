from collections.abc import Sequence
from typing import Any

from llvmlite import ir

def get_or_insert_function(module: Any, function_type: ir.FunctionType, name: str) -> Any: ...
def pack_array(builder: Any, values: Sequence[Any]) -> Any: ...
