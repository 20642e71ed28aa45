"""The table of losses, and that it tells of connections that differ."""

from __future__ import annotations

import pytest

from tests.dst import losses


def test_the_table_of_losses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(losses, "LOOPS", losses.LOOPS[:1])
    assert losses.main(20) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[0] == "gan"
    assert row.split()[1] == row.split()[2] == row.split()[3]
    train = losses.train

    def astray(loop: object, steps: int) -> list[losses.Run]:
        runs = train(loop, steps)
        runs[1].layers[0].reset_parameters()
        return runs

    monkeypatch.setattr(losses, "train", astray)
    assert losses.main(20) == 1
