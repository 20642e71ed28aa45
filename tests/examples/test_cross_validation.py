"""Folds are apart, the algorithm begins anew with each, and best states come back in the middle of a run."""

import cross_validation
import pytest
import torch
from cross_validation import LAYERS, QUICK, main, make_data, make_model, split, train
from options import changed
from torch import nn

import sparselab


def test_the_quick_run_compares_all_networks(capsys):
    results = main(["--quick"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in LAYERS)
    assert all(len(folds) == QUICK.folds for folds in results.values())
    for masked, sparse in zip(results["masked, RigL"], results["sparse, RigL"], strict=True):
        assert abs(masked.accuracy - sparse.accuracy) < 3


def test_every_point_is_tested_once_and_is_then_unknown():
    folds = split(QUICK)
    assert sorted(torch.cat([test for *_, test in folds]).tolist()) == list(range(QUICK.points))
    for parts in folds:
        assert sorted(torch.cat(parts).tolist()) == list(range(QUICK.points))


@pytest.mark.parametrize("layer", ["sparse", "masked"])
def test_each_fold_is_rewired_and_goes_back_to_its_best_state(layer, monkeypatch):
    cfg = changed(QUICK, ["lr=0.05", "epochs=12", "width=32"])  # which overshoots
    loaded = []
    original = nn.Module.load_state_dict
    monkeypatch.setattr(
        nn.Module,
        "load_state_dict",
        lambda self, *args, **kw: loaded.append(1) or original(self, *args, **kw),
    )
    algorithm, data = sparselab.RigL(cfg.sparsity, update_freq=cfg.update_freq), make_data(cfg)
    for fold, parts in enumerate(split(cfg)):
        model = make_model(layer, cfg, fold)
        born = model[0].positions().clone()
        loaded.clear()
        train(model, algorithm, data, parts, cfg)
        assert len(loaded) > 1
        assert not torch.equal(model[0].positions(), born)
        assert algorithm.last_update[0].grown


def test_labels_depend_on_few_features():
    cfg = changed(QUICK, ["noise=0.0"])
    x, y = make_data(cfg)
    assert x.shape == (cfg.points, cfg.features)
    assert set(y.tolist()) == set(range(cfg.classes))
    assert cross_validation.Config().points > cfg.points
