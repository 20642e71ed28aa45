"""A run saved after 300 RigL steps goes on in a new process as if it had never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparselab import SET, Cosine, RigL, SparseLinear

SAVED_AFTER, THEN = 300, 45


class Run:
    """A small regression task: all that training changes; the batches depend on the step only."""

    def __init__(self, algorithm: str, seed: int) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.model = nn.Sequential(
            SparseLinear(40, 60, sparsity=0.8),
            nn.Tanh(),
            SparseLinear(60, 30, sparsity=0.9),
            nn.Linear(30, 3),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        kind = {"RigL": RigL, "SET": SET}[algorithm]
        self.algorithm = kind(drop_fraction=Cosine(0.3, half_period=400), update=10, seed=3)
        self.model.apply(self.algorithm)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.algorithm.steps_done)
            x = torch.randn(16, 40, generator=generator)
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :3].sin()).square().mean().backward()
            self.optimizer.step()
            self.algorithm.step()

    def state(self) -> dict[str, object]:
        parts = {"model": self.model, "optimizer": self.optimizer, "algorithm": self.algorithm}
        return {name: part.state_dict() for name, part in parts.items()}

    def save(self, path: Path) -> None:
        x = torch.linspace(-1, 1, 80).view(2, 40)
        torch.save({**self.state(), "outputs": self.model(x).detach()}, path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])
        x = torch.linspace(-1, 1, 80).view(2, 40)
        assert torch.equal(self.model(x), state["outputs"])


def assert_same(left: object, right: object, where: str = "state") -> None:
    """Equal to the bit, all the way down."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert left == right, where


@pytest.mark.parametrize("algorithm", ["RigL", "SET"])
def test_resume_in_a_new_process_is_exact(algorithm: str, tmp_path: Path) -> None:
    run = Run(algorithm, seed=0)
    born = run.model[0].positions().clone()
    run.train(SAVED_AFTER)
    run.save(tmp_path / "at 300.pt")
    assert not torch.equal(run.model[0].positions(), born)
    run.train(THEN)
    run.save(tmp_path / "straight.pt")
    code = (
        "import sys; from pathlib import Path; from tests.test_resume import Run, THEN; "
        "run = Run(sys.argv[1], seed=99); "
        "run.resume(Path(sys.argv[2])); run.train(THEN); run.save(Path(sys.argv[3]))"
    )
    paths = [str(tmp_path / "at 300.pt"), str(tmp_path / "resumed.pt")]
    subprocess.run([sys.executable, "-c", code, algorithm, *paths], check=True, cwd=Path(__file__).parents[1])
    straight, resumed = (
        torch.load(tmp_path / name, weights_only=True) for name in ("straight.pt", "resumed.pt")
    )
    assert_same(straight, resumed)


def test_the_comparison_refuses_a_last_bit() -> None:
    run = Run("SET", seed=0)
    state, other = run.state(), Run("SET", seed=0).state()
    assert_same(state, other)
    other["model"]["0.weight_values"][0] = torch.nextafter(
        other["model"]["0.weight_values"][0], torch.tensor(9.0)
    )
    with pytest.raises(AssertionError, match=r"state\['model'\]\['0.weight_values'\]"):
        assert_same(state, other)
