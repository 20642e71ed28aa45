"""One thread unless a test asks for more, and a count that does not leak."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    ours, theirs = numba.get_num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(theirs)
    numba.set_num_threads(ours)
