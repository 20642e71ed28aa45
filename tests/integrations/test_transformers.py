"""The Trainer of Hugging Face drives algorithms, saves them and resumes them."""

import shutil

import pytest
import torch

from sparselab import SparseLinear, sparsify
from sparselab.dst import SET, ConstantSchedule, Group, RigL
from sparselab.nn.layers.base import find_sparse
from tests.dst.harness import assert_same_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sparselab.integrations.transformers import FILE, SparsityCallback, from_pretrained  # noqa: E402

N_BATCHES, BATCH = 5, 2
#: Two micro-batches make a step, but the last step of an epoch has one: 3 steps in an epoch.
ACCUMULATE, STEPS = 2, 9


def language_model(seed=0, tied=False):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    sparsify(model, {"*.mlp.*": 0.7, "*.self_attn.*": 0.5})
    return model


def data():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (N_BATCHES * BATCH, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder, callback, model=None, **arguments):
    settings = {
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATE, "max_steps": STEPS,
        "save_strategy": "steps", "save_steps": 5, "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "learning_rate": 1e-2,
        "optim": "adamw_torch",
    }  # fmt: skip
    return transformers.Trainer(
        model=language_model() if model is None else model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings | arguments),
        train_dataset=data(),
        callbacks=[callback],
    )


def rigl(**settings):
    return RigL(update_freq=2, drop_fraction=0.5, **settings)


def raw(trainer):
    return trainer.optimizer.optimizer


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    straight_callback = SparsityCallback(rigl(), monitor=True)
    straight = trainer(tmp_path / "straight", straight_callback)
    born = {name: layer.positions().clone() for name, layer in find_sparse(straight.model)}
    straight.train()
    algorithm = straight_callback._driver.algorithm
    assert algorithm.steps_done == STEPS
    assert [record["step"] for record in straight_callback.monitor.history] == [0, 2, 4, 6, 8]
    assert not any(report.skipped for report in algorithm.last_update)
    for name, layer in find_sparse(straight.model):
        assert not torch.equal(layer.positions(), born[name])

    callback = SparsityCallback(rigl(), monitor=True)
    resumed = trainer(tmp_path / "straight", callback, language_model(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-5"))
    assert_same_state(straight.model, raw(straight), resumed.model, raw(resumed))
    assert callback.monitor.history == straight_callback.monitor.history
    assert callback._driver.algorithm.steps_done == STEPS


def test_the_gradient_is_the_sum_over_the_micro_batches(tmp_path):
    """As by hand, also where the last step of an epoch has fewer."""
    callback = SparsityCallback(RigL(update_freq=1, drop_fraction=0.5))
    ours = trainer(tmp_path, callback, max_grad_norm=0.0, save_strategy="no", max_steps=3)
    model = language_model()
    algorithm = RigL(update_freq=1, drop_fraction=0.5)
    algorithm.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    order = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            assert len(train_dataloader) == N_BATCHES

    ours.add_callback(Watch())
    forward = ours.model.forward
    ours.model.forward = lambda input_ids, **more: (
        order.append(input_ids.clone()) or forward(input_ids, **more)
    )
    ours.train()
    assert len(order) == N_BATCHES
    steps = [order[0:2], order[2:4], order[4:5]]
    for step, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 3)
        optimizer.zero_grad()
        algorithm.expect_passes(len(batches))
        for batch in batches:
            (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
        optimizer.step()
        algorithm.step()
    for (name, layer), (_, other) in zip(find_sparse(ours.model), find_sparse(model), strict=True):
        assert torch.equal(layer.positions(), other.positions()), name
        torch.testing.assert_close(layer.stored, other.stored, rtol=1e-4, atol=1e-6)


def test_the_checkpoint_may_be_elsewhere(tmp_path):
    trainer(tmp_path / "first", SparsityCallback(SET(update_freq=1))).train()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "first" / "checkpoint-5", moved)
    callback = SparsityCallback(SET(update_freq=1), resume_from=moved)
    trainer(tmp_path / "second", callback).train(resume_from_checkpoint=str(moved))
    assert callback._driver.algorithm.steps_done == STEPS
    with pytest.raises(FileNotFoundError, match=r"resumes after step 5, .*resume_from=<its folder>"):
        trainer(tmp_path / "third", SparsityCallback(SET(update_freq=1))).train(
            resume_from_checkpoint=str(moved)
        )


def test_the_file_must_belong_to_the_weights(tmp_path):
    trainer(tmp_path, SparsityCallback(SET(update_freq=1)), max_steps=5).train()
    saved = torch.load(tmp_path / "checkpoint-5" / FILE, weights_only=True)
    torch.save({**saved, "fingerprint": 1}, tmp_path / "checkpoint-5" / FILE)
    with pytest.raises(FileNotFoundError, match="with the weights it has loaded"):
        trainer(tmp_path, SparsityCallback(SET(update_freq=1))).train(resume_from_checkpoint=True)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_group_is_driven(tmp_path):
    group = Group({"*.mlp.*": rigl(grad_accumulation=ACCUMULATE), "*": SET(update_freq=3)})
    callback = SparsityCallback(group)
    ours = trainer(tmp_path, callback, max_steps=4, save_strategy="no")
    ours.train()
    assert [algorithm.steps_done for algorithm in group] == [4, 4]
    # Training again goes on, and steps once per step.
    ours.train()
    assert [algorithm.steps_done for algorithm in group] == [8, 8]


def test_another_accumulation_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"told grad_accumulation=4, but the trainer sums over 2"):
        trainer(tmp_path, SparsityCallback(RigL(grad_accumulation=4))).train()


def test_save_pretrained_and_load(tmp_path):
    """`save_pretrained` writes the topology; weights load into a sparsified model of any other topology."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = language_model(), language_model(seed=1)
    algorithm = SET(update_freq=1)
    algorithm.attach(model)
    algorithm.step()
    model.save_pretrained(tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert saved["model.layers.0.mlp.up_proj.indices"].dtype == torch.uint16
    other.load_state_dict(saved)
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert isinstance(other.model.layers[0].mlp.up_proj, SparseLinear)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_from_pretrained(tmp_path, tied, shard):
    model = language_model(tied=tied).eval()
    algorithm = SET(ConstantSchedule(0.9), update_freq=1)
    algorithm.attach(model)
    algorithm.step()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    other = from_pretrained(tmp_path)
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert not other.training
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    for (name, layer), (_, twin) in zip(find_sparse(model), find_sparse(other), strict=True):
        assert torch.equal(layer.positions(), twin.positions()), name
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )
    with pytest.raises(ValueError, match=r"no \['model\.layers\.1\."):
        from_pretrained(tmp_path)


def test_what_is_no_algorithm():
    with pytest.raises(TypeError, match="algorithm must be a sparsity algorithm or a Group, got type"):
        SparsityCallback(SET)
