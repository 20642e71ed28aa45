"""Lightning's Trainer drives algorithms, saves them and resumes them."""

import copy
import importlib

import pytest
import torch
from torch import nn

import sparselab
from sparselab import SparseLinear
from sparselab.dst import SET, Group, RigL, Static
from tests.dst.harness import assert_same_state

pytest.importorskip("lightning")

import lightning

from sparselab.integrations.lightning import SparsityCallback, by_position

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # Lightning 2.6 beside torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

N_BATCHES, ACCUMULATE = 5, 2
#: Two micro-batches make a step, but the last step of an epoch has one.
STEPS_PER_EPOCH = 3


def batch(epoch, index):
    generator = torch.Generator().manual_seed(100 * epoch + index)
    x = torch.randn(8, 20, generator=generator)
    return x, x[:, :3].sin()


def make_module(base=lightning.LightningModule, seed=0, manual=False, split=None):
    class Module(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                SparseLinear(20, 30, sparsity=0.8),
                nn.Tanh(),
                SparseLinear(30, 10, sparsity=0.7),
                nn.Linear(10, 3),
            )
            self.automatic_optimization = not manual

        def loss(self, index):
            x, y = batch(self.current_epoch, index)
            return nn.functional.mse_loss(self.net(x), y)

        def training_step(self, _, index):
            if not manual:
                return self.loss(index)
            for optimizer in self.optimizers() if split else [self.optimizers()]:
                optimizer.zero_grad()
                for _ in range(ACCUMULATE):
                    self.manual_backward(self.loss(index))
                optimizer.step()
            return None

        def configure_optimizers(self):
            parts = [self.net] if split is None else [self.net[:split], self.net[split:]]
            return [torch.optim.AdamW(part.parameters(), lr=0.01) for part in parts]

    return Module()


def fit(folder, callback, module, epochs, package=lightning, resume=None, **settings):
    trainer = package.Trainer(
        **{
            "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": folder,
            "max_epochs": epochs, "callbacks": [callback], "enable_checkpointing": False,
            "log_every_n_steps": 1, **settings,
        }
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(N_BATCHES)), ckpt_path=resume)
    return trainer


def rigl(**settings):
    return RigL(update_freq=2, drop_fraction=0.5, **settings)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(epochs, module, resume=None):
        callback = SparsityCallback(rigl(), monitor=True)
        trainer = fit(
            tmp_path, callback, module, epochs, resume=resume, accumulate_grad_batches=ACCUMULATE,
            gradient_clip_val=0.1,
        )  # fmt: skip
        return trainer, callback

    first, callback = run(1, make_module())
    assert callback._driver.algorithm.steps_done == STEPS_PER_EPOCH
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = make_module()
    born = module.net[0].positions().clone()
    straight, straight_callback = run(3, module)
    resumed, resumed_callback = run(3, make_module(seed=1), tmp_path / "half.ckpt")
    ours, theirs = straight.lightning_module, resumed.lightning_module
    assert_same_state(ours, straight.optimizers[0], theirs, resumed.optimizers[0])
    assert not torch.equal(ours.net[0].positions(), born)
    assert resumed_callback.monitor.history == straight_callback.monitor.history
    assert [record["step"] for record in resumed_callback.monitor.history] == [0, 2, 4, 6, 8]
    assert resumed_callback._driver.algorithm.steps_done == 3 * STEPS_PER_EPOCH


def test_it_equals_a_loop_by_hand(tmp_path):
    module, by_hand = make_module(), make_module().net
    fit(
        tmp_path,
        SparsityCallback(RigL(update_freq=1, drop_fraction=0.5)),
        module,
        1,
        accumulate_grad_batches=ACCUMULATE,
    )
    algorithm = RigL(update_freq=1, drop_fraction=0.5)
    algorithm.attach(by_hand)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01)
    for indices in ([0, 1], [2, 3], [4]):
        optimizer.zero_grad()
        algorithm.expect_passes(len(indices))
        for index in indices:
            x, y = batch(0, index)
            (nn.functional.mse_loss(by_hand(x), y) / ACCUMULATE).backward()
        optimizer.step()
        algorithm.step()
    trained = module.net.state_dict()
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_the_accumulation_may_change(tmp_path):
    scheduler = lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 5})
    algorithm = RigL(update_freq=1)
    fit(tmp_path, None, make_module(), 3, callbacks=[SparsityCallback(algorithm), scheduler])
    assert algorithm.steps_done == 5 + 3 + 1
    assert not algorithm.last_update[0].skipped


def test_manual_optimization(tmp_path):
    algorithm = rigl(grad_accumulation=ACCUMULATE)
    fit(tmp_path, SparsityCallback(algorithm), make_module(manual=True), 2)
    assert algorithm.steps_done == 2 * N_BATCHES
    assert algorithm.last_update[0].grown > 0


def test_an_optimizer_of_dense_layers_does_not_count(tmp_path):
    algorithm = SET(update_freq=2)
    fit(tmp_path, SparsityCallback(algorithm), make_module(manual=True, split=3), 1)
    assert algorithm.steps_done == N_BATCHES
    other = SET()
    with pytest.raises(ValueError, match=r"exactly one optimizer .* but 2 do"):
        fit(tmp_path, SparsityCallback(other), make_module(manual=True, split=2), 1)
    assert other.layers == ()


def test_a_group_is_driven_and_training_again_goes_on(tmp_path):
    group = Group({"net.0": rigl(), "*": SET(update_freq=3)})
    callback, module = SparsityCallback(group, monitor=True), make_module()
    for fits in (1, 2):
        fit(tmp_path, callback, module, 1, precision="bf16-mixed")
        assert [algorithm.steps_done for algorithm in group] == [fits * N_BATCHES] * 2
    assert [record["step"] for record in callback.monitor.history] == [0, 2, 3, 4, 6, 8, 9, 10]


def test_another_model_begins_anew(tmp_path):
    algorithm = SET(update_freq=2, stop=4)
    callback = SparsityCallback(algorithm, monitor=True)
    for _ in range(2):
        module = make_module()
        born = module.net[0].positions().clone()
        fit(tmp_path, callback, module, 1)
        assert algorithm.steps_done == N_BATCHES
        assert not torch.equal(module.net[0].positions(), born)
        assert [record["step"] for record in callback.monitor.history] == [0, 2]


def test_the_monitor_is_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    from tests.integrations.events import scalars

    logger = TensorBoardLogger(tmp_path)
    callback = SparsityCallback(SET(update_freq=2), monitor=True)
    fit(tmp_path, callback, make_module(), 1, logger=logger)
    assert list(scalars(logger.log_dir)["net.0/explored"]) == [0, 2, 4]
    assert scalars(logger.log_dir)["total/nnz"][4] == callback.monitor.latest["total/nnz"]


def test_another_accumulation_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"told grad_accumulation=4, but the trainer sums over 2"):
        fit(
            tmp_path,
            SparsityCallback(RigL(grad_accumulation=4)),
            make_module(),
            1,
            accumulate_grad_batches=ACCUMULATE,
        )


def test_the_other_package_of_lightning(tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    algorithm = rigl()
    trainer = fit(tmp_path, SparsityCallback(algorithm), make_module(other.LightningModule), 1, package=other)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert algorithm.steps_done == N_BATCHES
    again = rigl()
    module = make_module(other.LightningModule, seed=1)
    fit(tmp_path, SparsityCallback(again), module, 2, package=other, resume=tmp_path / "half.ckpt")
    assert again.steps_done == 2 * N_BATCHES


def test_what_is_missing_is_named(monkeypatch):
    import sys

    for name, extra in (("lightning", "lightning"), ("transformers", "transformers")):
        for module in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks", "transformers"):
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, f"sparselab.integrations.{name}", raising=False)
        with pytest.raises(ModuleNotFoundError, match=rf"needs {name}, .*'{extra}' extra"):
            importlib.import_module(f"sparselab.integrations.{name}")


def averaging(**settings):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    return callbacks.EMAWeightAveraging(decay=0.7, **settings)


class Validated:
    """Adds a validation, in which Lightning puts the average in the model's place."""

    def validation_step(self, _, index):
        self.seen.append((self.net[0].positions(), self.net(batch(7, index)[0]).detach()))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(range(1))


def average_by_hand(epochs):
    """The same average of dense weights, with 0 where the newest model has no connection."""
    module = make_module()
    net, averaged = module.net, None
    optimizer, algorithm = torch.optim.AdamW(net.parameters(), lr=0.01), rigl()
    algorithm.attach(net, optimizer)
    for epoch in range(epochs):
        for index in range(N_BATCHES):
            x, y = batch(epoch, index)
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
            dense = [sparselab.densify(copy.deepcopy(net))[at].weight.detach() for at in (0, 2)]
            masks = [torch.zeros_like(weight, dtype=torch.bool) for weight in dense]
            for at, mask in zip((0, 2), masks, strict=True):
                mask.view(-1)[net[at].positions()] = True
            others = [net[at].bias.detach().clone() for at in (0, 2, 3)] + [net[3].weight.detach().clone()]
            old = averaged or (dense, others)
            mixed = [torch.where(m, a.lerp(b, 0.3), 0) for a, b, m in zip(old[0], dense, masks, strict=True)]
            averaged = mixed, [a.lerp(b, 0.3) for a, b in zip(old[1], others, strict=True)]
    return averaged


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("resumed", [False, True])
def test_an_average_goes_by_position(tmp_path, resumed):
    def run(epochs, resume=None):
        base = type("Base", (Validated, lightning.LightningModule), {})
        module = make_module(base, seed=0 if resume is None else 1)
        module.seen = []
        average = by_position(averaging())
        assert by_position(average) is average
        # In the middle of the run: at its end Lightning leaves the average in the model's place.
        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path / str(resume is None), filename="{epoch}", save_top_k=-1
        )
        fit(
            tmp_path, None, module, epochs, resume=resume, num_sanity_val_steps=0,
            callbacks=[SparsityCallback(rigl()), average, keep], enable_checkpointing=True,
        )  # fmt: skip
        return module

    if resumed:
        run(2)
    module = run(3, next(tmp_path.rglob("epoch=0.ckpt")) if resumed else None)
    weights, others = average_by_hand(3)
    positions, output = module.seen[-1]
    net = sparselab.densify(copy.deepcopy(module.net))
    found = [net[0].weight, net[2].weight, net[0].bias, net[2].bias, net[3].bias, net[3].weight]
    for ours, expected in zip(found, (*weights, *others), strict=True):
        torch.testing.assert_close(ours, expected)
    assert torch.equal(positions, module.net[0].positions())
    torch.testing.assert_close(output, module.net(batch(7, 0)[0]).detach())


def test_an_average_by_slots_is_refused(tmp_path):
    swa = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01)
    for callback in (averaging(), swa):
        with pytest.raises(TypeError, match=r"slot by slot while connections move, got .*by_position\("):
            fit(tmp_path, None, make_module(), 1, callbacks=[SparsityCallback(rigl()), callback])
    with pytest.raises(TypeError, match="callback must be a WeightAveraging of Lightning, got Stochastic"):
        by_position(swa)
    fit(tmp_path, None, make_module(), 1, callbacks=[SparsityCallback(Static()), averaging()])
