import pytest
import resnet
import torch

from sparselab import MaskedConv2d, SparseConv2d


def test_the_quick_run_tells_sizes_times_and_losses(capsys):
    resnet.main(["--width", "4", "--batch", "4", "--steps", "6", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "sparse and simulated, float64", "sparse and simulated, float32", "dense", "sparse", "forward",
        "forward + backward", "6 steps with RigL",
    ]  # fmt: skip
    assert float(lines[0].split()[-1]) < 1e-10


@pytest.mark.parametrize("method", ["erk", "uniform"])
def test_all_convolutions_but_the_stem_are_sparse(method):
    dense = resnet.ResNet18(8)
    size = sum(p.numel() for name, p in dense.named_parameters() if "stages" in name and p.ndim == 4)
    for layer, kind in (("sparse", SparseConv2d), ("masked", MaskedConv2d)):
        layers = [
            each for each in resnet.make_sparse(dense, 0.9, method, layer).modules() if type(each) is kind
        ]
        assert len(layers) == 19
        assert sum(each.nnz for each in layers) == round(size / 10)
    assert sum(p.numel() for p in resnet.ResNet18().parameters()) == 11_173_962


def test_a_difference_is_found():
    dense = resnet.ResNet18(4).double()
    twins = [resnet.make_sparse(dense, 0.9, "erk", layer) for layer in ("sparse", "masked")]
    batch = resnet.draw(4, 0)
    batch = resnet.Batch(batch.images.double(), batch.labels)
    assert max(resnet.difference(*twins, batch)) < 1e-10
    with torch.no_grad():
        twins[0].stages[1][0].conv1.weight_values[0] += 1e-3
    assert min(resnet.difference(*twins, batch)) > 1e-8
