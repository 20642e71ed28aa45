"""What one RigL update of a large layer allocates, counted in a process of its own."""

from __future__ import annotations

from tests.kernels.process import run_python

BOUND = 80 << 20

#: tracemalloc counts NumPy's arrays exactly; the resident set would depend on what the process did before.
#: (Torch adds 4 MiB of gradient in the backward pass, and |w| while the drop is selected: 17 MiB, not at the
#: peak.) The second update wastes what the first does not: it lists the live positions as 64-bit numbers.
SCRIPT = """
import tracemalloc
import numpy as np, torch
from sparselab.dst import RigL
from sparselab.dst import view as update
from sparselab.nn import SparseLinear

def peak(layer, algorithm, optimizer, x):
    optimizer.zero_grad()
    loss = layer(x).square().mean()
    tracemalloc.start()
    before = layer.weight_values.grad is None
    loss.backward()
    optimizer.step()
    algorithm.step()
    bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert before and algorithm.last_update[0].grown == int(0.3 * layer.nnz)
    return bytes

def start(n_in, n_out):
    layer = SparseLinear(n_in, n_out, sparsity=0.9)
    layer.apply(algorithm := RigL(update_freq=1, drop_fraction=0.3))
    return layer, algorithm, torch.optim.AdamW(layer.parameters()), torch.randn(64, n_in)

peak(*start(64, 64))  # compiles, which takes memory of its own
large = start(11008, 4096)
peak(*large)
first = peak(*large)
as_matrix = update.as_matrix
wasted = []
update.as_matrix = lambda layer: wasted.append(as_matrix(layer).positions()) or as_matrix(layer)
print(first, peak(*large))
"""


def test_a_rigl_update_of_a_large_layer_takes_less_than_half_its_dense_gradient() -> None:
    honest, wasteful = (int(n_bytes) for n_bytes in run_python("-c", SCRIPT).split())
    assert honest < BOUND, f"{honest / 2**20:.1f} MiB"
    assert wasteful > BOUND, "a waste of 34 MiB was not seen"
