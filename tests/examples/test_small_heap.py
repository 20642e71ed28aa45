import sys
from pathlib import Path

import pytest

from tests.kernels.process import run_python

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
{first}
import torch
from resident import resident_bytes

# As after a while: the C library has seen large blocks go, and keeps the next ones.
for _ in range(3):
    torch.ones(4096, 1024)
before = resident_bytes()
blocks = [(torch.ones(512, 1024), torch.ones(4000)) for _ in range(100)]
kept = [small for _, small in blocks]
del blocks
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux")
def test_freed_blocks_go_back_to_the_system():
    grown, usually = (
        int(run_python("-c", SCRIPT.format(first=first), str(EXAMPLES), OMP_NUM_THREADS="1"))
        for first in ("import small_heap", "")
    )
    assert grown < 20 << 20
    assert grown < usually / 4
