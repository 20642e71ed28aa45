"""Sizes of the block kernels: how many rows and columns of sums stay in registers.

Four rows of sums must stay there beside a row of operands and a weight: with three registers each in the 16
that AVX2 has, with four in the 32 of AVX-512 and NEON.
"""

from __future__ import annotations

from sparselab.kernels.cpu.runtime.target import VECTOR_BYTES
from sparselab.kernels.cpu.simd.vectors import zero_registers

#: Rows of a micro-panel, which share their columns: a loaded row of tokens serves as many multiply-adds.
MR = 4

#: Vector registers of one row of tokens.
NR = 3 if VECTOR_BYTES == 32 else 4

#: Columns of a micro-panel whose dots are formed together.
DOT_COLUMNS = 3

#: ``wide_row(array)``: a row of zeros of the array's dtype in `NR` registers.
wide_row = zero_registers(NR)
