"""The programs of single connections: see `sparselab.nn.ops.cpu.programs.base`."""

from __future__ import annotations

import torch

from sparselab.kernels.cpu.csr.order import add_order
from sparselab.kernels.cpu.csr.plan import gradient_plan, product_plan, slots_in_order, transpose_plan
from sparselab.kernels.cpu.csr.sddmm_dw import add_sample, cut_gradient
from sparselab.kernels.cpu.csr.skinny import add_skinny
from sparselab.kernels.cpu.csr.skinny_dw import add_sample_skinny
from sparselab.kernels.cpu.csr.spmm import add_multiply, cut_product
from sparselab.kernels.cpu.runtime.program import Place, Program
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.cpu.programs.base import BIAS, DBIAS, DVALUES, DX, DY, VALUES, Job, Programs, X, Y
from sparselab.nn.ops.cpu.variants import SINGLE, choose_name

#: Up to so many tokens bringing weights into the order of the transpose takes a good part of the time, and it
#: is worth 4 or 8 bytes for each connection to do that by a list.
_FEW_TOKENS = 256


class RowPrograms(Programs):
    """Of a topology of compressed rows."""

    def __init__(self, topology: RowTopology) -> None:
        super().__init__(topology.shape, torch.Size((topology.nnz, 1, 1)))
        self._topology, self._density = topology, topology.density

    def make(self, job: Job) -> Program | None:
        """The program, unless something is computed by dense blocks."""
        names = {name: choose_name(name, job.n_tokens, self._density, SINGLE) for name in job.operations}
        if "dense blocks" in names.values():
            return None
        if names.get("values_grad") == "skinny" and job.x_strides is not None and job.x_strides[1] != 1:
            return None
        program = Program()
        for operation, add in (
            ("forward", self._add_product),
            ("input_grad", self._add_input_grad),
            ("values_grad", self._add_values_grad),
        ):
            if operation in names:
                add(program, job, names[operation])
        return program.ready()

    def _add_product(self, program: Program, job: Job, name: str) -> None:
        rows, (n_rows, n_columns) = self._topology.rows, self.shape
        x, y, like = job.matrix(X, n_columns), job.matrix(Y, n_rows), job.like
        bias = BIAS if job.bias else program.zeros(n_rows, like.dtype).at
        if name == "skinny":
            begin, end = rows.indptr[:-1], rows.indptr[1:]
            add_skinny(
                program, (VALUES, like, None), rows.indices, begin, end, bias, like, x, y, job.n_threads
            )
            return
        plan = product_plan(self._topology)
        cut = cut_product(plan, self.shape, job.n_tokens, like.itemsize)
        add_multiply(program, VALUES, like, rows.indices, plan, x, y, bias, like.dtype, cut)

    def _add_input_grad(self, program: Program, job: Job, name: str) -> None:
        n_rows, n_columns = self.shape
        dy, dx, like = job.matrix(DY, n_rows), job.matrix(DX, n_columns), job.like
        plan = transpose_plan(self._topology)
        rows = self._topology.rows
        slots = slots_in_order(self._topology, plan) if job.n_tokens <= _FEW_TOKENS else None
        values = add_order(program, VALUES, like, rows, plan.order, like, slots).at
        bias = program.zeros(n_columns, like.dtype).at
        if name == "skinny":
            begin, end = plan.indptr[:-1], plan.indptr[1:]
            add_skinny(
                program, (values, like, None), plan.indices, begin, end, bias, like, dy, dx, job.n_threads
            )
            return
        cut = cut_product(plan.segments, (n_columns, n_rows), job.n_tokens, like.itemsize)
        add_multiply(program, values, like, plan.indices, plan.segments, dy, dx, bias, like.dtype, cut)

    def _add_values_grad(self, program: Program, job: Job, name: str) -> None:
        rows, (n_rows, n_columns) = self._topology.rows, self.shape
        dy, x, like = job.matrix(DY, n_rows), job.matrix(X, n_columns), job.like
        sums: Place = DBIAS if job.bias else 0
        if name == "skinny":
            add_sample_skinny(
                program, rows.indices, rows.indptr[:-1], rows.indptr[1:], dy, x, DVALUES, sums, like,
                job.n_threads,
            )  # fmt: skip
            return
        plan = gradient_plan(self._topology)
        cut = cut_gradient(plan, self.shape, job.n_tokens, like.itemsize)
        out = job.array(DVALUES, self._topology.nnz)
        add_sample(program, rows.indices, plan, dy, x, out, sums, cut)
