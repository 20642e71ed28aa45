from typing import Any

class Type:
    name: str
    bitwidth: int
    def __init__(self, name: str) -> None: ...
    def __call__(self, *args: Any) -> Any: ...

class Integer(Type): ...

class Array(Type):
    dtype: Type
    ndim: int
    layout: str
    def __init__(self, dtype: Type, ndim: int, layout: str) -> None: ...

class UniTuple(Type):
    dtype: Type
    count: int
    def __init__(self, dtype: Type, count: int) -> None: ...

boolean: Type
int64: Type
float32: Type
int8: Type
uint16: Type
float64: Type
intp: Type
void: Type
