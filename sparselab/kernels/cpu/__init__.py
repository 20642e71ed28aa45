"""The products on a CPU: Numba, with vectors of the host's width."""
