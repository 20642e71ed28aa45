"""What this machine gains: the commands ``python -m sparselab bench`` and ``python -m sparselab info``."""
