"""What follows from the vector width. The products' tests run at every width by ``make test-all``."""

from __future__ import annotations

import pytest

from tests.kernels.process import run_python

SIZES = """
from sparselab.kernels.cpu.runtime import target
print(target.VECTOR_BYTES, target.TILE_BYTES, target.TARGET.block_columns)
"""


@pytest.mark.parametrize("width", [16, 32, 64])
def test_tiles_fit_the_registers_and_a_near_cache(width: int) -> None:
    """Two rows of sums take half of the registers at most, and a block of X some part of a near cache."""
    output = run_python("-c", SIZES, SPARSELAB_VECTOR_BYTES=str(width))
    vector, tile, columns = map(int, output.split())
    assert vector == width
    assert tile % width == 0
    assert 2 * tile // width <= (8 if width == 32 else 16)  # AVX2 has half as many as NEON and AVX-512
    assert 16 * 1024 <= tile * columns <= 64 * 1024
