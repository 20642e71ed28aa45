"""The autoencoders run, the masked one as the sparse one, and a stroke is where its ends say."""

import autoencoder
import pytest
import torch
from arms import ARMS
from autoencoder import QUICK, SIDE, Images, make_images, make_model, strokes, train
from mnist_data import DataError
from options import changed

from tests.examples.twins import assert_compared, assert_twins, float64

CFG = changed(QUICK, ["n_train=400", "n_test=100", "width=32", "code=16", "batch=50"])


def test_the_quick_run_compares_all_autoencoders(capsys):
    results = autoencoder.main(["--quick", "--set", "n_train=1000", "--set", "n_test=100"])
    assert_compared(results, capsys.readouterr().out)
    assert all(0 < each.scores[0] < 0.1 for each in results)


def test_the_masked_autoencoder_learns_as_the_sparse_one():
    with float64():
        images = make_images(CFG)
        images = Images(images.train.double(), images.test.double(), images.source)
        masked, sparse = (train(name, images, CFG) for name in ("masked, RigL", "sparse, RigL"))
        assert_twins(masked, sparse, make_model(ARMS["sparse, RigL"], CFG))
    assert masked.scores == pytest.approx(sparse.scores, rel=1e-9)


def test_a_weight_is_listed_once():
    for arm in ARMS.values():
        names = [name for name, _ in make_model(arm, CFG).named_parameters()]
        assert len(names) == 6
        assert [name for name in names if name.startswith("decoder")] == ["decoder.0.bias", "decoder.1.bias"]


def test_a_stroke_is_where_its_ends_say():
    (image,) = strokes(torch.tensor([[[4.0, 3.0]]]), torch.tensor([[[4.0, 9.0]]])).view(1, SIDE, SIDE)
    assert (image == 1).nonzero().tolist() == [[4, column] for column in range(3, 10)]
    assert image[6, 5] == pytest.approx(torch.tensor(-2.0).exp().item())
    assert image[4, 11] == image[6, 5]


def test_strokes_are_drawn_where_there_is_no_mnist(monkeypatch, capsys):
    def fail():
        raise DataError("no network")

    monkeypatch.setattr(autoencoder, "load_digits", fail)
    images = make_images(changed(CFG, ["images=mnist"]))
    assert "no network" in capsys.readouterr().out
    assert images.train.shape == (400, SIDE * SIDE)
    assert torch.equal(images.test, make_images(CFG).test)
    with pytest.raises(SystemExit, match="expected mnist or strokes"):
        make_images(changed(CFG, ["images=cats"]))
