"""Products of a layer that are kept as programs of kernels, and run by addresses alone."""
