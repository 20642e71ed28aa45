"""The part of llvmlite that sparselab uses, with types."""

from llvmlite import binding as binding
from llvmlite import ir as ir

__version__: str
