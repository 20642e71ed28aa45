"""An autoencoder whose decoder is its encoder transposed: dense, masked and sparse, side by side.

    python examples/autoencoder.py                # MNIST, four autoencoders, a table
    python examples/autoencoder.py --quick        # a few seconds each: too short to learn much
    python examples/autoencoder.py --set images=strokes --set sparsity=0.95

Each weight is used twice, from inputs to code and back; it is held, trained, rewired and counted once. Growth
by gradient sees the sum of both uses. Where MNIST cannot be had, images of random strokes are drawn.

Hinton, Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 2006; tied weights
as Vincent et al., "Extracting and composing robust features with denoising autoencoders", ICML 2008.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from arms import ARMS, Arm, Result, attach, live_weights, print_results
from mnist_data import SIDE, DataError, load_digits
from options import configured
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    images: str = "mnist"  # or "strokes", which are drawn; of MNIST all of the test images are used
    n_train: int = 60_000
    n_test: int = 2_000  # strokes
    width: int = 512
    code: int = 32
    sparsity: float = 0.9
    epochs: int = 3
    batch: int = 128
    lr: float = 2e-3
    update_freq: int = 50  # optimizer steps between two changes of the connections
    drop_fraction: float = 0.3
    seed: int = 0


QUICK = Config(images="strokes", n_train=2_000, n_test=500, width=128, epochs=2, update_freq=5)


class Images(NamedTuple):
    """Rows of `SIDE` * `SIDE` pixels from 0 to 1."""

    train: Tensor
    test: Tensor
    source: str


def draw_strokes(n: int, seed: int) -> Tensor:
    """Images of two straight strokes with soft edges."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(n, 2, 2, 2, generator=generator) * (SIDE - 8) + 4
    return torch.cat([strokes(start, end) for start, end in (part.unbind(2) for part in ends.split(1_000))])


def strokes(start: Tensor, end: Tensor) -> Tensor:
    """Images (n, `SIDE` * `SIDE`) of strokes between points (n, strokes, 2)."""
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).to(start)
    along, offset = (end - start)[:, :, None], at - start[:, :, None]
    share = (offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    nearest = share.clamp(0, 1)[..., None] * along
    return (-(offset - nearest).square().sum(-1) / 2).exp().amax(1)


def make_images(cfg: Config) -> Images:
    if cfg.images == "mnist":
        try:
            digits = load_digits()
            return Images(digits.train_x[: cfg.n_train], digits.test_x, f"MNIST, {digits.source}")
        except DataError as error:
            print(f"MNIST could not be had ({error}); strokes are drawn.")
    elif cfg.images != "strokes":
        raise SystemExit(f"--set images={cfg.images}: expected mnist or strokes")
    train, test = draw_strokes(cfg.n_train + cfg.n_test, cfg.seed).split((cfg.n_train, cfg.n_test))
    return Images(train, test, "strokes")


class Autoencoder(nn.Module):
    """Two layers to the code, and the same two transposed back."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        sizes = SIDE * SIDE, cfg.width, cfg.code
        self.encoder = nn.ModuleList(nn.Linear(*size) for size in pairwise(sizes))
        self.decoder = nn.ModuleList(sparselab.TransposedLinear(layer) for layer in reversed(self.encoder))
        for layer in self.decoder:
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.encoder
        code = second(first(x).relu())
        second, first = self.decoder
        return first(second(code).relu())


def make_model(arm: Arm, cfg: Config) -> Autoencoder:
    torch.manual_seed(cfg.seed)
    model = Autoencoder(cfg)
    if arm.layer is not None:  # the decoder follows
        sparselab.sparsify(model, {"encoder.*": {"layer": arm.layer, "sparsity": cfg.sparsity}})
    return model


def train(name: str, images: Images, cfg: Config) -> Result:
    arm, start = ARMS[name], time.perf_counter()
    model = make_model(arm, cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    attach(arm, model, optimizer, cfg, stop=cfg.epochs * (len(images.train) // cfg.batch) * 3 // 4)
    generator, losses = torch.Generator().manual_seed(cfg.seed), []
    for _ in tqdm(range(cfg.epochs), desc=name, leave=False):
        for at in torch.randperm(len(images.train), generator=generator).split(cfg.batch):
            x = images.train[at]
            optimizer.zero_grad()
            loss = mse_loss(model(x), x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        error = mse_loss(model(images.test), images.test).item()
    return Result(name, live_weights(model), (error,), seconds, losses, model)


def main(options: Sequence[str] | None = None) -> list[Result]:
    cfg = configured(__doc__, Config(), QUICK, options)
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    images = make_images(cfg)
    results = [train(name, images, cfg) for name in ARMS]
    title = f"{images.source}: {len(images.train):,} images, {cfg.epochs} epochs, {cfg.code} code units"
    mean = mse_loss(images.train.mean(0).expand_as(images.test), images.test).item()
    caption = f"mean over the pixels of {len(images.test):,} test images; of the mean image: {mean:.5f}"
    print_results(title, results, {"squared error": ".5f"}, caption)
    return results


if __name__ == "__main__":
    main()
