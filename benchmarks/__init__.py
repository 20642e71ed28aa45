"""Speed and memory of sparselab beside dense PyTorch, on this machine: ``python -m benchmarks --help``."""
