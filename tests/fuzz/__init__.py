"""A fuzzer of the kernels, the torch operators and the layers: ``python -m tests.fuzz --help``."""
