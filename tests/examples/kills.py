"""``python -m tests.examples.kills 20``: ``gpt.py``, killed at random moments, ends as if it had not been.

One process imports everything and forks the script, kills it, looks at what it left, and forks it again with
``--resume``. The script notes what it is at in memory that both see.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparselab import load_checkpoint
from sparselab.dst.engine.dynamic import DynamicSparsityAlgorithm

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import gpt

STEPS_PER_KILL, LONGEST_S = 40, 0.25
#: Of the kills, so many come before the run has got any further.
EARLY = 0.2
SETTINGS = {
    "layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 4, "update-every": 3, "evaluate-every": 5,
    "save-every": 4, "validation-windows": 8, "sample": 1, "algorithm": "granet",
}  # fmt: skip
PLACES = ("loading", "passes", "updates", "evaluations", "saves")


class Script:
    """A run of ``gpt.py`` in a folder, in a process of its own at a time.

    Parameters
    ----------
    folder : Path
    n_steps : int
    """

    def __init__(self, folder: Path, n_steps: int) -> None:
        folder.mkdir()
        text = folder / "text.txt"
        text.write_text("".join(f"{n}: To be, or not to be: that is the question.\n" for n in range(60)))
        self.out = folder / "out"
        settings = {"text": text, "out": self.out, "steps": n_steps, **SETTINGS}
        self._options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self._place = mmap.mmap(-1, 1)  # shared with children

    def start(self) -> int:
        """Fork the script, from its newest checkpoint on if there is one; returns the process."""
        self._place[0] = PLACES.index("loading")
        child = os.fork()
        if child:
            return child
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            self._watch()
            gpt.main(["--resume", str(self.out)] if self.saved() else self._options)
            os._exit(0)
        finally:
            os._exit(1)

    def _watch(self) -> None:
        """Note what this process is at."""
        for owner, name, place in (
            (gpt.Run, "train", "passes"),
            (gpt.Run, "note", "evaluations"),
            (gpt.Run, "save", "saves"),
            (DynamicSparsityAlgorithm, "_update", "updates"),
        ):
            setattr(owner, name, self._noted(getattr(owner, name), PLACES.index(place)))

    def _noted(self, method: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            before, self._place[0] = self._place[0], place
            try:
                return method(*arguments)
            finally:
                self._place[0] = before

        return call

    def kill(self, after: float, early: bool) -> str:
        """Start the script, kill it so many seconds after its next checkpoint (or its start); says where."""
        before, child = self.saved()[:1], self.start()
        while not early and self.saved()[:1] == before:
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
            assert not ended, f"the script ended by itself, with status {status}"
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        place = PLACES[self._place[0]]
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the script ended before it was killed"
        return place

    def finish(self) -> None:
        """Start the script, and let it come to its end."""
        assert os.waitpid(self.start(), 0)[1] == 0, "the script failed"

    def saved(self) -> list[Path]:
        """The checkpoints that are there, the newest first."""
        return sorted(self.out.glob("checkpoints/step-*.checkpoint"), reverse=True)

    def curve(self) -> list[dict[str, Any]]:
        """What was told on the way, without what depends on the machine."""
        told = map(json.loads, (self.out / "log.jsonl").read_text().splitlines())
        return [
            {name: each[name] for name in ("step", "loss", "validation_loss", "sparsity")} for each in told
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        """What the newest checkpoint holds of the model."""
        taken = Taken()
        load_checkpoint(self.saved()[0], model=taken)
        return taken.state


class Taken:
    """Takes a state as it is."""

    state: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state


def main(kills: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    draw, n_steps = random.Random(seed), STEPS_PER_KILL * kills
    with tempfile.TemporaryDirectory() as name:
        whole, killed = (Script(Path(name) / each, n_steps) for each in ("whole", "killed"))
        whole.finish()
        places, done = Counter[str](), 0
        for _ in range(kills):
            places[killed.kill(draw.uniform(0, LONGEST_S), draw.random() < EARLY)] += 1
            for path in killed.saved():  # each one that is there is whole
                step = load_checkpoint(path)["progress"]["step"]
                assert path.name == f"step-{step:08}.checkpoint", path
                done, before = max(done, step), done
                assert done >= before, "a step that had been saved is gone"
        killed.finish()
        assert killed.curve() == whole.curve(), "the curve is another one"
        ours, theirs = killed.weights(), whole.weights()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[each], theirs[each]) for each in ours), "the weights are others"
    where = ", ".join(f"{count} in {place}" for place, count in places.most_common())
    print(
        f"{kills} kills of gpt.py ({where}), the last after step {done} of {n_steps}: same curve and weights"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
