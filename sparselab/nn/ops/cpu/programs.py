"""Products that a layer computes again and again, kept with its topology as programs.

For contiguous tokens of the dtype of the weights everything but addresses follows from the topology, the number
of tokens and the number of threads, so it is worked out once. A topology never changes, and a layer with other
connections has another one: a program cannot be that of other connections.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from sparselab.kernels.arrays import Array
from sparselab.kernels.cpu.csr.skinny import Matrix
from sparselab.kernels.cpu.runtime.program import Given, Lent, Program
from sparselab.nn.ops.cpu.memory import LIKE
from sparselab.nn.ops.cpu.threads import use_torch_threads

#: Programs that a topology keeps; the oldest ones are let go.
_MOST_PROGRAMS = 32

_DTYPES = (torch.float32, torch.float64)

#: The fields of a `Job`.
Key = tuple[int, int, torch.dtype, bool, bool, bool, bool]

#: By x, the values and the bias; None for what is not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# The operands of programs.
X, VALUES, BIAS, Y, DY, DX, DVALUES, DBIAS = (Given(operand) for operand in range(1, 9))


class Job(NamedTuple):
    """What is computed: a product of so many tokens, or gradients.

    Attributes
    ----------
    n_tokens : int
    n_threads : int
    dtype : torch.dtype
    forward, input_grad, values_grad : bool
        Whether that is wanted.
    bias : bool
        Whether there is a bias in the forward product, or its gradient is wanted.
    """

    n_tokens: int
    n_threads: int
    dtype: torch.dtype
    forward: bool
    input_grad: bool
    values_grad: bool
    bias: bool

    @property
    def like(self) -> Array:
        """An array that tells a kernel the dtype."""
        return LIKE[self.dtype]

    def matrix(self, at: Given, n_features: int) -> Matrix:
        """Contiguous tokens at a place, as a matrix with a column for each."""
        return at, (1, n_features), (n_features, self.n_tokens), self.like

    def array(self, at: Given, n_items: int) -> Lent:
        """Contiguous numbers at a place."""
        return Lent(at, (n_items,), self.like.dtype)


class Programs(abc.ABC):
    """The programs of one topology.

    Parameters
    ----------
    shape : (int, int)
        Of W.
    values_shape : torch.Size
    """

    def __init__(self, shape: tuple[int, int], values_shape: torch.Size) -> None:
        self.shape, self.values_shape = shape, values_shape
        self._known: dict[Key, Program | None] = {}

    @abc.abstractmethod
    def make(self, job: Job) -> Program | None:
        """The program of a job of at least one token, or None if it is computed in another way."""

    def product(self, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """``x W^T + b``; None if that is no job for a program."""
        n_tokens, dtype = len(x), x.dtype
        program = self._find((n_tokens, use_torch_threads(), dtype, True, False, False, bias is not None))
        if (
            program is None
            or not (x.is_contiguous() and values.is_contiguous())
            or values.dtype is not dtype
            or not (bias is None or (bias.is_contiguous() and bias.dtype is dtype))
        ):
            return None
        y = torch.empty((n_tokens, self.shape[0]), dtype=dtype)
        bias_at = 0 if bias is None else bias.data_ptr()
        program.run(x.data_ptr(), values.data_ptr(), bias_at, y.data_ptr(), 0, 0, 0, 0)
        return y

    def gradients(
        self, values: Tensor | None, grad: Tensor, x: Tensor | None, with_bias: bool
    ) -> Gradients | None:
        """``dy W`` if there are values, the gradient of the values if there is an x, and of the bias.

        None if that is no job for a program.
        """
        n_tokens, dtype = len(grad), grad.dtype
        program = self._find(
            (n_tokens, use_torch_threads(), dtype, False, values is not None, x is not None, with_bias)
        )
        if program is None or not grad.is_contiguous():
            return None
        values_at = x_at = dx_at = dvalues_at = dbias_at = 0
        dx = dvalues = dbias = None
        if values is not None:
            if values.dtype is not dtype or not values.is_contiguous():
                return None
            dx = torch.empty((n_tokens, self.shape[1]), dtype=dtype)
            values_at, dx_at = values.data_ptr(), dx.data_ptr()
        if x is not None:
            if x.dtype is not dtype or not x.is_contiguous():
                return None
            dvalues = torch.empty(self.values_shape, dtype=dtype)
            x_at, dvalues_at = x.data_ptr(), dvalues.data_ptr()
        if with_bias:
            dbias = torch.empty(self.shape[0], dtype=dtype)
            dbias_at = dbias.data_ptr()
        program.run(x_at, values_at, 0, 0, grad.data_ptr(), dx_at, dvalues_at, dbias_at)
        return dx, dvalues, dbias

    def forget_gradients(self) -> None:
        """Let go of the programs of backward passes."""
        self._known = {key: program for key, program in self._known.items() if Job(*key).forward}

    def _find(self, key: Key) -> Program | None:
        try:
            return self._known[key]
        except KeyError:
            pass
        job = Job(*key)
        if job.n_tokens == 0 or job.dtype not in _DTYPES or 0 in self.shape or self.values_shape[0] == 0:
            return None
        program = self.make(job)
        if len(self._known) >= _MOST_PROGRAMS:
            self._known.pop(next(iter(self._known)), None)
        self._known[key] = program
        return program
