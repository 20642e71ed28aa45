"""The programs of single connections: see `sparselab.nn.ops.cpu.programs`."""

from __future__ import annotations

import torch

from sparselab.kernels.arrays import NONE_OF
from sparselab.kernels.cpu.csr.order import add_order
from sparselab.kernels.cpu.csr.plan import gradient_plan, product_plan, transpose_plan
from sparselab.kernels.cpu.csr.sddmm_dw import add_sample, cut_gradient
from sparselab.kernels.cpu.csr.skinny import add_skinny
from sparselab.kernels.cpu.csr.skinny_dw import add_sample_skinny
from sparselab.kernels.cpu.csr.spmm import add_multiply, cut_product
from sparselab.kernels.cpu.runtime.program import Place, Program
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.ops.cpu.programs import BIAS, DBIAS, DVALUES, DX, DY, VALUES, X, Y, Job, Programs
from sparselab.nn.ops.cpu.variants import SINGLE, choose_name


class RowPrograms(Programs):
    """Of a topology of compressed rows."""

    def __init__(self, topology: RowTopology) -> None:
        super().__init__(topology.shape, torch.Size((topology.nnz, 1, 1)))
        self._topology, self._density = topology, topology.density

    def make(self, job: Job) -> Program | None:
        """The program, unless something is computed by dense blocks."""
        wanted = {"forward": job.forward, "input_grad": job.input_grad, "values_grad": job.values_grad}
        names = {
            name: choose_name(name, job.n_tokens, self._density, SINGLE)
            for name, is_wanted in wanted.items()
            if is_wanted
        }
        if not names or "dense blocks" in names.values():
            return None
        program = Program()
        if job.forward:
            self._add_product(program, job, names["forward"])
        if job.input_grad:
            self._add_input_grad(program, job, names["input_grad"])
        if job.values_grad:
            self._add_values_grad(program, job, names["values_grad"])
        return program.ready()

    def _add_product(self, program: Program, job: Job, name: str) -> None:
        rows, (n_rows, n_columns) = self._topology.rows, self.shape
        x, y, like = job.matrix(X, n_columns), job.matrix(Y, n_rows), job.like
        bias = BIAS if job.bias else program.zeros(n_rows, like.dtype).at
        if name == "skinny":
            begin, end = rows.indptr[:-1], rows.indptr[1:]
            add_skinny(program, (VALUES, like, None), rows.indices, begin, end, bias, like, x, y, job.n_threads)
            return
        plan = product_plan(self._topology)
        cut = cut_product(plan, self.shape, job.n_tokens, like.itemsize)
        add_multiply(program, VALUES, like, rows.indices, plan, x, y, bias, like.dtype, cut)

    def _add_input_grad(self, program: Program, job: Job, name: str) -> None:
        n_rows, n_columns = self.shape
        dy, dx, like = job.matrix(DY, n_rows), job.matrix(DX, n_columns), job.like
        plan = transpose_plan(self._topology)
        values = add_order(program, VALUES, like, self._topology.rows, plan.order, like).at
        bias = program.zeros(n_columns, like.dtype).at
        if name == "skinny":
            begin, end = plan.indptr[:-1], plan.indptr[1:]
            add_skinny(program, (values, like, None), plan.indices, begin, end, bias, like, dy, dx, job.n_threads)
            return
        cut = cut_product(plan.segments, (n_columns, n_rows), job.n_tokens, like.itemsize)
        add_multiply(program, values, like, plan.indices, plan.segments, dy, dx, bias, like.dtype, cut)

    def _add_values_grad(self, program: Program, job: Job, name: str) -> None:
        rows, (n_rows, n_columns) = self._topology.rows, self.shape
        dy, x, like = job.matrix(DY, n_rows), job.matrix(X, n_columns), job.like
        sums: Place = DBIAS if job.bias else 0
        if name == "skinny":
            add_sample_skinny(
                program, rows.indices, rows.indptr[:-1], rows.indptr[1:], dy, x, DVALUES, sums, NONE_OF[like.dtype],
                job.n_threads,
            )  # fmt: skip
            return
        plan = gradient_plan(self._topology)
        cut = cut_gradient(plan, self.shape, job.n_tokens, like.itemsize)
        out = job.array(DVALUES, self._topology.nnz)
        add_sample(program, rows.indices, plan, dy, x, out, sums, cut)
