"""The examples are scripts beside each other, not a package; tests import them as a running script would."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
