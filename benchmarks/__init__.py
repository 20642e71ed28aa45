"""What developers measure beside ``python -m sparselab bench``: ``python -m benchmarks --help``."""
