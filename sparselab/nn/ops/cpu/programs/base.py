"""Products that a layer computes again and again, kept with its topology as programs.

For tokens of the dtype of the weights everything but addresses follows from the topology, the number of
tokens, their strides and the number of threads, so it is worked out once. A topology never changes, and a
layer with other connections has another one: a program cannot be that of other connections.
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
Key = tuple[
    int, int, torch.dtype, tuple[int, ...] | None, tuple[int, ...] | None, tuple[int, ...] | None, bool
]

#: By x, the values and the bias; None for what is not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# The operands of programs.
X, VALUES, BIAS, Y, DY, DX, DVALUES, DBIAS = (Given(operand) for operand in range(1, 9))


class Job(NamedTuple):
    """What is computed: a product of so many tokens, or gradients.

    Attributes
    ----------
    n_tokens, n_threads : int
    dtype : torch.dtype
    x_strides : (int, int), or None
        Of the tokens, if the product is wanted, or the gradient by the values.
    dy_strides : (int, int), or None
        Of the outputs' gradient; None in a forward pass.
    values_strides : tuple of int, or None
        Of the weights, if the product is wanted, or the gradient by x.
    bias : bool
        Whether there is a bias in the forward product, or its gradient is wanted.
    """

    n_tokens: int
    n_threads: int
    dtype: torch.dtype
    x_strides: tuple[int, int] | None
    dy_strides: tuple[int, int] | None
    values_strides: tuple[int, ...] | None
    bias: bool

    @property
    def operations(self) -> tuple[str, ...]:
        """What is wanted, by the names of `sparselab.nn.ops.cpu.variants`."""
        if self.dy_strides is None:
            return ("forward",)
        wanted = {"input_grad": self.values_strides, "values_grad": self.x_strides}
        return tuple(name for name, strides in wanted.items() if strides is not None)

    @property
    def like(self) -> Array:
        """An array that tells a kernel the dtype."""
        return LIKE[self.dtype]

    def matrix(self, at: Given, n_features: int) -> Matrix:
        """Tokens at a place, as a matrix with a column for each; those that a program makes lie in order."""
        strides = {X: self.x_strides, DY: self.dy_strides}.get(at) or (n_features, 1)
        return at, (strides[1], strides[0]), (n_features, self.n_tokens), self.like

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
        _, height, width = values_shape
        self._in_order = height * width, width, 1
        self._known: dict[Key, Program | None] = {}

    @abc.abstractmethod
    def make(self, job: Job) -> Program | None:
        """The program of a job of at least one token, or None if it is computed in another way."""

    def product(self, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """``x W^T + b``; None if that is no job for a program."""
        n_tokens, dtype = x.shape[0], x.dtype
        key = n_tokens, use_torch_threads(), dtype, x.stride(), None, values.stride(), bias is not None
        program = self._known.get(key) or self._make(key)
        if program is None or values.dtype is not dtype:
            return None
        bias_at = 0
        if bias is not None:
            if bias.dtype is not dtype or not bias.is_contiguous():
                return None
            bias_at = bias.data_ptr()
        y = torch.empty((n_tokens, self.shape[0]), dtype=dtype)
        program.run(x.data_ptr(), values.data_ptr(), bias_at, y.data_ptr(), 0, 0, 0, 0)
        return y

    def gradients(
        self, values: Tensor | None, grad: Tensor, x: Tensor | None, with_bias: bool
    ) -> Gradients | None:
        """``dy W`` if there are values, the gradient of the values if there is an x, and of the bias.

        None if that is no job for a program.
        """
        dtype = grad.dtype
        key = (
            grad.shape[0], use_torch_threads(), dtype, None if x is None else x.stride(), grad.stride(),
            None if values is None else values.stride(), with_bias,
        )  # fmt: skip
        program = self._known.get(key) or self._make(key)
        if program is None or not (
            (values is None or values.dtype is dtype) and (x is None or x.dtype is dtype)
        ):
            return None
        # `empty_like` takes a third of the time of `empty`.
        dx = dvalues = dbias = None
        x_at = values_at = dx_at = dvalues_at = dbias_at = 0
        if values is not None:
            if x is not None and x.is_contiguous():
                dx = torch.empty_like(x)
            else:
                dx = torch.empty((grad.shape[0], self.shape[1]), dtype=dtype)
            values_at, dx_at = values.data_ptr(), dx.data_ptr()
        if x is not None:
            dvalues = (
                torch.empty(self.values_shape, dtype=dtype) if values is None else torch.empty_like(values)
            )
            x_at, dvalues_at = x.data_ptr(), dvalues.data_ptr()
        if with_bias:
            dbias = torch.empty(self.shape[0], dtype=dtype)
            dbias_at = dbias.data_ptr()
        program.run(x_at, values_at, 0, 0, grad.data_ptr(), dx_at, dvalues_at, dbias_at)
        return dx, dvalues, dbias

    def forget_gradients(self) -> None:
        """Let go of the programs of backward passes."""
        self._known = {key: program for key, program in list(self._known.items()) if key[4] is None}

    def _make(self, key: Key) -> Program | None:
        if key in self._known:
            return None
        job = Job(*key)  # type: ignore[arg-type]
        program = None
        if (
            job.dtype in _DTYPES
            and job.operations
            and 0 not in (job.n_tokens, *self.shape, *self.values_shape)
            and job.values_strides in (None, self._in_order)
        ):
            program = self.make(job)
        if len(self._known) >= _MOST_PROGRAMS:
            for oldest in list(self._known)[:1]:
                self._known.pop(oldest, None)
        self._known[key] = program
        return program
