"""The programs of dense blocks: see `sparselab.nn.ops.cpu.programs.base`."""

from __future__ import annotations

import torch

from sparselab.kernels.arrays import NONE_OF
from sparselab.kernels.cpu.bsr import direct, direct_dw, sddmm_dw, spmm
from sparselab.kernels.cpu.bsr.panels import MR
from sparselab.kernels.cpu.bsr.plan import add_clear_outside, block_plan, panel_plan
from sparselab.kernels.cpu.bsr.skinny import add_skinny_blocks
from sparselab.kernels.cpu.csr.skinny import Matrix
from sparselab.kernels.cpu.runtime.program import Given, Lent, Program
from sparselab.kernels.layouts.block_csr import BlockTopology
from sparselab.nn.ops.cpu.programs.base import BIAS, DBIAS, DVALUES, DX, DY, VALUES, Job, Programs, X, Y
from sparselab.nn.ops.cpu.variants import BLOCKS, choose_name


class BlockPrograms(Programs):
    """Of a topology of blocks.

    Parameters
    ----------
    topology : BlockTopology
    density : float
        Live fraction of the weights.
    """

    def __init__(self, topology: BlockTopology, density: float) -> None:
        super().__init__(topology.shape, torch.Size((topology.nnz, *topology.block_shape)))
        self._topology, self._density = topology, density

    def make(self, job: Job) -> Program | None:
        """The program, unless something is computed by dense blocks, or a bias must be spread over panels."""
        names = [choose_name(name, job.n_tokens, self._density, BLOCKS) for name in job.operations]
        if "dense blocks" in names:
            return None
        program = Program()
        n_rows, n_columns = self.shape
        weights = job.array(VALUES, self.values_shape.numel())
        is_done = True
        for operation in job.operations:
            if operation == "forward":
                bias = BIAS if job.bias else None
                x, y = job.matrix(X, n_columns), job.matrix(Y, n_rows)
                is_done = self._add_product(program, weights, False, x, y, bias, names[0] == "skinny", job)
            elif operation == "input_grad":
                dy, dx = job.matrix(DY, n_rows), job.matrix(DX, n_columns)
                is_done = self._add_product(program, weights, True, dy, dx, None, False, job)
            else:
                is_done = is_done and self._add_values_grad(program, job)
        return program.ready() if is_done else None

    def _add_product(
        self, program: Program, weights: Lent, transposed: bool, x: Matrix, y: Matrix, bias: Given | None,
        is_skinny: bool, job: Job,
    ) -> bool:  # fmt: skip
        own, like = self._topology, job.like
        n_outputs, height = y[2][0], own.block_shape[int(transposed)]
        # An entry for each row of the blocks, of which the last may reach beyond W.
        padded = -(-n_outputs // height) * height
        if bias is None or (padded > n_outputs and not is_skinny):
            offsets = program.zeros(padded, like.dtype)
            if bias is not None:
                program.copy(bias, offsets.at, n_outputs * like.itemsize)
        else:
            offsets = job.array(bias, n_outputs)
        if is_skinny:
            rows = own.blocks.rows
            add_skinny_blocks(
                program, (weights.at, like, None), rows.indices, rows.indptr, own.block_shape, offsets.at,
                like, x, y, job.n_threads,
            )  # fmt: skip
            return True
        if direct.serves(height, like.itemsize, job.n_tokens) and x[1][0] == 1:
            direct.add_direct(program, weights, block_plan(own, transposed), x, y, offsets.at)
            return True
        plan = panel_plan(own, transposed)
        if spmm.gathers(plan, transposed) and plan.height % MR:
            if bias is not None:
                return False
            offsets = program.zeros((len(plan.indptr) - 1) * plan.panels_per_row * MR, like.dtype)
        spmm.add_multiply(program, weights, plan, transposed, x, y, offsets)
        return True

    def _add_values_grad(self, program: Program, job: Job) -> bool:
        own, (n_rows, n_columns), like = self._topology, self.shape, job.like
        dy, x = job.matrix(DY, n_rows), job.matrix(X, n_columns)
        out = job.array(DVALUES, self.values_shape.numel())
        sums = job.array(DBIAS, n_rows) if job.bias else None
        if direct_dw.serves(own.block_shape, like.itemsize) and dy[1][0] == x[1][0] == 1:
            direct_dw.add_sample_direct(program, block_plan(own, False), dy, x, out, sums)
        else:
            plan = panel_plan(own, False)
            if plan.transposed:
                if job.bias:
                    return False
                dy, x = x, dy
            rows, columns = (sddmm_dw.Factor(each[0], each[3], each[1], 0) for each in (dy, x))
            sums_or_none = NONE_OF[like.dtype] if sums is None else sums
            sddmm_dw.add_sample(program, plan, rows, columns, job.n_tokens, out, sums_or_none)
        add_clear_outside(program, own, out)
        return True
