"""What a monitor records, against counts made by hand and by sets of positions."""

import json
import sys

import numpy as np
import pytest
import torch

from sparselab.dst import (
    SET,
    ByRemaining,
    DynamicSparsityAlgorithm,
    Exchange,
    Group,
    Growth,
    Monitor,
    PolynomialSchedule,
    RigL,
    Static,
)
from sparselab.dst.monitor import monitor
from sparselab.dst.monitor.position_set import PositionSet
from tests.dst.contract_rows import ROWS, Row, together_keep
from tests.dst.fake import FakeSparse
from tests.dst.harness import OPTIMIZERS, build, sparse_layers, train


class Scripted(Growth):
    """Grows where it is told."""

    def __init__(self, *growths):
        self.growths = growths

    def choose(self, update):
        return np.array(self.growths[update.view.step - 1])


def fake(live, weights, shape=(3, 4)):
    layer = FakeSparse(shape[1], shape[0], 0.5)
    layer.live = torch.tensor(live)
    layer.weight_values = torch.nn.Parameter(torch.tensor(weights))
    return torch.nn.ModuleDict({"layer": layer})


def test_numbers_by_hand():
    # Rows of four: row 0 has columns 0 and 1, row 1 has 1 and 2, row 2 has none. Column 3 is unused.
    model = fake([0, 1, 5, 6], [9.0, 0.1, 8.0, 0.2])
    algorithm = DynamicSparsityAlgorithm(Exchange(None, 0.5), update_freq=1, grow=Scripted([1, 11], [2, 3]))
    algorithm.attach(model)
    monitor = Monitor(algorithm)
    born = {
        "sparsity": 1 - 4 / 12, "nnz": 4, "dropped": 0, "grown": 0, "regrown": 0, "dead_neurons": 1,
        "unused_inputs": 1, "ablated_rows": 1, "survived": 1.0, "overlap_with_first": 1.0, "explored": 4 / 12,
    }  # fmt: skip
    assert monitor.history == [{"step": 0, "total": born, "layers": {"layer": born}}]
    algorithm.step()  # 1 and 6 go, 1 comes back, 11 is new: 0, 1, 5, 11
    first = {
        "sparsity": 1 - 4 / 12, "nnz": 4, "dropped": 2, "grown": 2, "regrown": 1, "dead_neurons": 0,
        "unused_inputs": 1, "ablated_rows": 0, "survived": 3 / 4, "overlap_with_first": 3 / 4,
        "explored": 5 / 12,
    }  # fmt: skip
    assert monitor.history[1] == {"step": 1, "total": first, "layers": {"layer": first}}
    algorithm.step()  # 1 (0.1) and 11 (0.0) go: 0, 2, 3, 5
    assert model["layer"].live.tolist() == [0, 2, 3, 5]
    second = {
        "sparsity": 1 - 4 / 12, "nnz": 4, "dropped": 2, "grown": 2, "regrown": 0, "dead_neurons": 1,
        "unused_inputs": 0, "ablated_rows": 1, "survived": 2 / 4, "overlap_with_first": 2 / 4,
        "explored": 7 / 12,
    }  # fmt: skip
    assert monitor.history[2] == {"step": 2, "total": second, "layers": {"layer": second}}
    assert monitor.latest == {
        f"{group}/{name}": number for group in ("layer", "total") for name, number in second.items()
    }


CHANGING = {
    "schedule": Row(lambda: RigL(PolynomialSchedule(0.8, 0.95, stop=15), drop_fraction=0.3, update_freq=3)),
    "redistributed": Row(
        lambda: SET(drop_fraction=0.3, update_freq=3, scope="network", redistribute=ByRemaining()),
        counts=together_keep,
    ),
}


@pytest.mark.parametrize("name", [*ROWS, *CHANGING])
@pytest.mark.parametrize("kind", ["fake", "real", "masked"])
def test_every_algorithm_against_sets_of_positions(name, kind):
    row = (ROWS | CHANGING)[name]
    model = row.prepare(build(kind, sparsity=row.start))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    algorithm = row.make()
    model.apply(algorithm)
    monitor = Monitor(algorithm)
    layers = dict(zip(algorithm.names, sparse_layers(model), strict=True))
    live = {name: set(layer.positions().tolist()) for name, layer in layers.items()}
    born, ever = dict(live), {name: set(now) for name, now in live.items()}
    seen = 1
    for step in range(1, 22):
        train(model, optimizer, algorithm, step, step)
        before, live = live, {name: set(layer.positions().tolist()) for name, layer in layers.items()}
        assert live == before or len(monitor.history) == seen + 1
        if len(monitor.history) == seen:
            continue
        seen += 1
        for name, layer in layers.items():
            ever[name] |= live[name]
            rows, columns = layer.shape
            expected = {
                "nnz": len(live[name]),
                "sparsity": 1 - len(live[name]) / (rows * columns),
                "explored": len(ever[name]) / (rows * columns),
                "overlap_with_first": len(live[name] & born[name]) / len(born[name]),
                "survived": len(live[name] & before[name]) / len(before[name]),
                "dead_neurons": rows - len({position // columns for position in live[name]}),
                "unused_inputs": columns - len({position % columns for position in live[name]}),
            }
            recorded = monitor.history[-1]["layers"][name]
            assert expected.items() <= recorded.items()
            came, went = len(live[name] - before[name]), len(before[name] - live[name])
            assert (recorded["grown"] - recorded["regrown"], recorded["dropped"] - recorded["regrown"]) == (
                came,
                went,
            )
        total = monitor.history[-1]["total"]
        size = sum(rows * columns for rows, columns in (layer.shape for layer in layers.values()))
        assert total["nnz"] == sum(map(len, live.values()))
        assert total["explored"] == sum(map(len, ever.values())) / size
        assert monitor.history[-1]["step"] == step
    assert seen > 1 or name == "static"
    assert json.loads(json.dumps(monitor.history)) == monitor.history


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_the_target_is_that_of_the_schedule(scope):
    model = build("fake")
    schedule = PolynomialSchedule(0.8, 0.95, stop=4)
    algorithm = SET(schedule, update_freq=2, scope=scope)
    algorithm.attach(model)
    monitor = Monitor(algorithm)
    assert "total/target_sparsity" not in monitor.latest
    for _ in range(4):
        algorithm.step()
    for record in monitor.history[1:]:
        assert record["total"]["target_sparsity"] == pytest.approx(schedule(record["step"]), abs=1e-12)
        assert record["total"]["sparsity"] == pytest.approx(schedule(record["step"]), abs=0.002)
        for layer in record["layers"].values():
            assert ("target_sparsity" in layer) == (scope == "layer")
    assert monitor.history[1]["total"]["target_sparsity"] < 0.95


def test_a_group_is_recorded_once_a_step():
    model = build("fake")
    fast, slow = SET(0.8, drop_fraction=0.5, update_freq=1), SET(None, drop_fraction=0.25, update_freq=2)
    group = Group({"0": fast, "2": slow})
    group.attach(model)
    monitor = Monitor(group)
    for _ in range(3):
        group.step()
    assert [record["step"] for record in monitor.history] == [0, 1, 2, 3]
    n_fast, n_slow = (layer.nnz for layer in sparse_layers(model))
    assert [record["layers"]["2"]["dropped"] for record in monitor.history] == [
        0, 0, n_slow - (n_slow - int(0.25 * n_slow)), 0,
    ]  # fmt: skip
    assert [record["layers"]["2"]["survived"] < 1 for record in monitor.history] == [
        False,
        False,
        True,
        False,
    ]
    totals = [record["total"] for record in monitor.history]
    assert [total["nnz"] for total in totals] == [n_fast + n_slow] * 4
    assert totals[2]["dropped"] == int(0.5 * n_fast) + int(0.25 * n_slow)
    assert totals[3]["dropped"] == int(0.5 * n_fast)
    # Only one of the two was told a sparsity.
    assert monitor.latest["0/target_sparsity"] == 0.8
    assert "2/target_sparsity" not in monitor.latest
    assert "total/target_sparsity" not in monitor.latest


def test_an_algorithm_may_say_what_is_ablated():
    class Ablating(SET):
        def ablated_rows(self):
            return [np.array([0, 2])]

    model = fake([0, 1, 5, 6], [9.0, 0.1, 8.0, 0.2])
    algorithm = Ablating()
    algorithm.attach(model)
    assert Monitor(algorithm).latest["layer/ablated_rows"] == 2


def test_without_positions_nothing_is_remembered():
    model = build("fake")
    algorithm = SET(update_freq=1)
    algorithm.attach(model)
    full, lean = Monitor(algorithm), Monitor(algorithm, positions=False)
    algorithm.step()
    assert {name.split("/")[1] for name in full.latest.keys() - lean.latest.keys()} == {
        "explored",
        "overlap_with_first",
    }
    assert lean.latest.items() <= full.latest.items()
    assert all(each["first"]["bits"].numel() == 0 for each in lean.state_dict()["positions"].values())


def run_to(step, state=None):
    model = build("real")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    algorithm = RigL(0.8, update_freq=3)
    algorithm.attach(model)
    monitor = Monitor(algorithm)
    parts = {"model": model, "optimizer": optimizer, "algorithm": algorithm, "monitor": monitor}
    for name, part in parts.items():
        if state is not None:
            part.load_state_dict(state[name])
    train(model, optimizer, algorithm, algorithm.steps_done + 1, step)
    return parts


def test_a_resumed_run_records_the_same(tmp_path):
    straight = run_to(20)["monitor"]
    half = {name: part.state_dict() for name, part in run_to(10).items()}
    torch.save(half, tmp_path / "half.pt")
    resumed = run_to(20, torch.load(tmp_path / "half.pt", weights_only=True))["monitor"]
    assert resumed.history == straight.history
    assert resumed.history[-1]["total"]["overlap_with_first"] < 1
    ours, theirs = resumed.state_dict()["positions"], straight.state_dict()["positions"]
    for name in ours:
        for kind in ("first", "explored"):
            assert torch.equal(ours[name][kind]["bits"], theirs[name][kind]["bits"])
    assert ours["0"]["first"]["count"] == 124


def test_the_state_of_other_layers_is_refused():
    algorithm = SET()
    algorithm.attach(build("fake"))
    monitor = Monitor(algorithm)
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="same layers and the same `positions`"):
        monitor.load_state_dict(Monitor(algorithm, positions=False).state_dict())
    assert monitor.history == before["history"]


def test_a_copy_of_the_state_is_the_callers():
    algorithm = SET(update_freq=1)
    algorithm.attach(build("fake"))
    monitor = Monitor(algorithm)
    state = monitor.state_dict()
    bits = state["positions"]["0"]["explored"]["bits"].clone()
    algorithm.step()
    assert torch.equal(state["positions"]["0"]["explored"]["bits"], bits)
    assert len(state["history"]) == 1


class Listener:
    def __init__(self):
        self.heard = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.heard.append((tag, scalar_value, global_step))


def test_each_record_is_written_once():
    algorithm = SET(update_freq=2)
    algorithm.attach(build("fake"))
    monitor, writer = Monitor(algorithm), Listener()
    monitor.write(writer)
    n = len(writer.heard)
    assert n == len(monitor.latest)
    for _ in range(4):
        algorithm.step()
        monitor.write(writer)
    assert len(writer.heard) == 3 * n
    assert ("total/nnz", monitor.latest["total/nnz"], 4) in writer.heard
    assert [step for tag, _, step in writer.heard if tag == "0/dropped"] == [0, 2, 4]


def test_removed_it_records_no_more():
    algorithm = SET(update_freq=1)
    algorithm.attach(build("fake"))
    monitor = Monitor(algorithm)
    monitor.remove()
    algorithm.step()
    assert [record["step"] for record in monitor.history] == [0]


def test_a_static_model_is_recorded_as_it_is():
    algorithm = Static()
    algorithm.attach(build("fake"))
    monitor = Monitor(algorithm)
    algorithm.step()
    assert [record["step"] for record in monitor.history] == [0]
    assert monitor.latest["total/nnz"] == 186


@pytest.mark.parametrize("n_layers", [1, 13])
@pytest.mark.parametrize("positions", [True, False])
def test_plot(tmp_path, positions, n_layers):
    pytest.importorskip("matplotlib")
    model = torch.nn.Sequential(*(FakeSparse(6, 6, 0.5, seed) for seed in range(n_layers)))
    algorithm = SET(0.5, update_freq=1)
    algorithm.attach(model)
    monitor = Monitor(algorithm, positions=positions)
    monitor.plot(tmp_path / "born.png")
    algorithm.step()
    monitor.plot(tmp_path / "history.png")
    for name in ("born", "history"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_plot_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    algorithm = SET()
    algorithm.attach(build("fake"))
    with pytest.raises(ModuleNotFoundError, match=r"Monitor\.plot needs matplotlib.*'examples' extra"):
        Monitor(algorithm).plot(tmp_path / "never.png")


def test_layers_attached_later_are_not_watched():
    model = torch.nn.Sequential(FakeSparse(6, 6, 0.5), FakeSparse(6, 6, 0.5, seed=1))
    algorithm = SET(drop_fraction=0.5, update_freq=1, scope="network")
    model[0].apply(algorithm)
    monitor = Monitor(algorithm)
    algorithm.attach(model)
    algorithm.step()
    assert list(monitor.history[1]["layers"]) == ["layer 0"]
    assert monitor.latest["layer 0/nnz"] == model[0].nnz
    assert monitor.latest["total/dropped"] == algorithm.last_update[0].dropped > 0


def test_however_many_positions_are_looked_up_together(monkeypatch):
    def record():
        algorithm = SET(drop_fraction=0.5, update_freq=1)
        algorithm.attach(build("real"))
        history = Monitor(algorithm).history
        for _ in range(3):
            algorithm.step()
        return history

    expected = record()
    monkeypatch.setattr(monitor, "_AT_ONCE", 7)
    assert record() == expected
    assert len({each["total"]["explored"] for each in expected}) == 4


def test_what_cannot_be_watched():
    with pytest.raises(TypeError, match="got Sequential"):
        Monitor(build("fake"))
    with pytest.raises(ValueError, match=r"must have been attached .* got \[\]"):
        Monitor(SET())
    algorithms = {"a": SET(), "b": SET()}
    for algorithm in algorithms.values():
        build("fake").apply(algorithm)
    with pytest.raises(ValueError, match="different names"):
        Monitor(Group(algorithms))


def test_a_set_of_positions_is_a_set():
    rng = np.random.default_rng(0)
    ours, theirs = PositionSet(203), set()
    for n in (0, 1, 60, 203, 5):
        positions = np.sort(rng.choice(203, n, replace=False))
        assert ours.has(positions).tolist() == [position in theirs for position in positions.tolist()]
        ours.add(positions)
        theirs |= set(positions.tolist())
        assert ours.count == len(theirs) == np.unpackbits(ours.bits).sum()
