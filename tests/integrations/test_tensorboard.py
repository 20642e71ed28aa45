"""A monitor's numbers arrive in TensorBoard's event files."""

import pytest

from sparselab.dst import SET, Monitor
from tests.dst.harness import build

pytest.importorskip("tensorboard")

from torch.utils.tensorboard import SummaryWriter

from tests.integrations.events import scalars


def test_event_files_hold_the_history(tmp_path):
    algorithm = SET(0.8, drop_fraction=0.5, update_freq=2)
    algorithm.attach(build("fake"))
    monitor = Monitor(algorithm)
    with SummaryWriter(str(tmp_path)) as writer:
        for _ in range(6):
            algorithm.step()
            monitor.write(writer)
    read = scalars(tmp_path)
    assert read.keys() == monitor.latest.keys()
    for record in monitor.history:
        for group, numbers in {**record["layers"], "total": record["total"]}.items():
            for name, number in numbers.items():
                assert read[f"{group}/{name}"][record["step"]] == pytest.approx(number, rel=1e-6)
    assert list(read["total/nnz"]) == [0, 2, 4, 6]
