"""How kernels are compiled, cached, launched and given memory."""
