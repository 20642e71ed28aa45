"""Handwritten digits with small sparse networks: every algorithm, several sparsities, several seeds.

    python examples/mnist.py --quick     # a first look, about two minutes
    python examples/mnist.py             # the whole study; stop and restart it freely
    python examples/mnist.py --network lenet --arms static rigl --sparsity 0.9 0.98 --seeds 1
    python examples/mnist.py --report    # the tables and pictures of what is there

Each finished run is a line of ``runs.jsonl``, known by its network, sparsity, arm, seed and a digest of all
its settings and of the images, so a study goes on where it stopped and never mixes settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from mnist_data import CLASSES, SIDE, DataError, Digits, load_digits
from options import at_least_one, changed
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """Everything one may want to change; ``--set name=value`` changes it for all runs."""

    # which run; options of their own choose these
    network: str = "lenet"
    sparsity: float = 0.9
    seed: int = 1
    # topology
    allocation: str = ""  # of the connections to the layers, where not the network's own
    output: str = "dense"  # the last layer: "dense", within the same total, or "sparse", as allocated
    drop_fraction: float = 0.3
    update_every: int = 100
    last_update: float = 0.75  # as a fraction of the steps; the last quarter trains a settled topology
    gamma_sal: float = 0.95  # of SRigL: share of its connections that an output must have salient to stay
    # training
    epochs: int = 10
    batch: int = 100
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # pixels
    mean: float = 0.1307
    std: float = 0.3081


CHOSEN = {"network": "--network", "sparsity": "--sparsity", "seed": "--seeds"}


@dataclass(frozen=True)
class Network:
    """Widths of a multilayer perceptron, how its sparsity is shared out, and the sparsities of the study."""

    hidden: tuple[int, ...]
    bias: bool
    allocation: str  # "erk", or "uniform" over the layers that are sparse
    sparsities: tuple[float, ...]


NETWORKS = {
    "lenet": Network((300, 100), True, "erk", (0.9, 0.95, 0.98, 0.99)),
    "wide": Network((512,), False, "uniform", (0.9, 0.99)),
}


# Arms


@dataclass(frozen=True)
class Arm:
    """One way to train.

    ``build(cfg, steps)`` makes the algorithm; without it the network is dense, and stays so unless it
    ``prunes``, half-way. ``start`` gives the sparsity to begin with from that to end with, for algorithms
    that get there on the way; ``prepare`` is done to the model first; ``layer`` is the kind of layers, as
    `sparselab.sparsify` takes it, ``settings`` what its rules say of them beside the sparsity; ``changes``
    are settings of this arm alone.
    """

    build: Callable[[Config, int], sparselab.dst.SparsityAlgorithm] | None
    start: Callable[[float], float] = lambda sparsity: sparsity
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    layer: str = "sparse"
    settings: dict[str, Any] = field(default_factory=dict)
    prunes: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


def last_update(cfg: Config, steps: int) -> int:
    return max(1, round(cfg.last_update * steps))


def timing(cfg: Config, steps: int) -> dict[str, Any]:
    """When algorithms rewire."""
    return {"update_freq": cfg.update_every, "stop": last_update(cfg, steps), "seed": cfg.seed}


def rewiring(cfg: Config, steps: int) -> dict[str, Any]:
    """When and how much they rewire."""
    fraction = sparselab.CosineSchedule(cfg.drop_fraction, stop=last_update(cfg, steps))
    return {"drop_fraction": fraction, **timing(cfg, steps)}


def pruning(cfg: Config, steps: int, start: float) -> dict[str, Any]:
    """The same, with a cubic rise of the sparsity of all sparse layers together over the first half."""
    end = sparse_layers_sparsity(cfg, cfg.sparsity)
    schedule = sparselab.PolynomialSchedule(sparse_layers_sparsity(cfg, start), end, steps // 2)
    return {"sparsity": schedule, "scope": "network", **timing(cfg, steps)}


def mest(cfg: Config, steps: int, soft_bound: bool) -> sparselab.MEST:
    """The released scripts' surplus, as a share of the connections: half of them, a quarter, none."""
    surplus = (1 - sparse_layers_sparsity(cfg, cfg.sparsity)) * (0.5 if soft_bound else 0.2)
    bounds = steps * 9 // 16, steps * 3 // 4

    def delta(step: int) -> float:
        return surplus / 2 ** sum(step >= bound for bound in bounds[:1]) if step < bounds[1] else 0.0

    end = sparse_layers_sparsity(cfg, cfg.sparsity) if soft_bound else None
    timed = {"update_freq": cfg.update_every, "seed": cfg.seed}
    return sparselab.MEST(
        end, delta=delta, **timed, soft_bound=soft_bound, scope="network" if soft_bound else "layer"
    )


def chtss(cfg: Config, steps: int) -> sparselab.CHTss:
    end = sparse_layers_sparsity(cfg, cfg.sparsity)
    return sparselab.CHTss(end, sparsity_stop=steps // 2, temperature=rising(steps), **rewiring(cfg, steps))


def rising(steps: int) -> sparselab.LinearSchedule:
    """The temperature of CHTs' removal: nearly at random at first, nearly by magnitude in the end."""
    return sparselab.LinearSchedule(1, 9, stop=steps)


def srigl(cfg: Config, steps: int, ablate: bool) -> sparselab.SRigL:
    # The output is dense (or exempt itself): the last layer attached is a hidden one.
    exempt = cfg.output != "dense"
    return sparselab.SRigL(gamma_sal=cfg.gamma_sal, ablate=ablate, exempt_last=exempt, **rewiring(cfg, steps))


ARMS = {
    "dense": Arm(None),
    "train, prune, fine-tune": Arm(None, prunes=True),
    "static": Arm(lambda cfg, steps: sparselab.Static()),
    "set": Arm(lambda cfg, steps: sparselab.SET(**rewiring(cfg, steps))),
    "rigl": Arm(lambda cfg, steps: sparselab.RigL(**rewiring(cfg, steps))),
    "srigl": Arm(lambda cfg, steps: srigl(cfg, steps, ablate=True), prepare=sparselab.nn.constant_fan_in_),
    "srigl, no ablation": Arm(
        lambda cfg, steps: srigl(cfg, steps, ablate=False), prepare=sparselab.nn.constant_fan_in_
    ),
    "snfs": Arm(lambda cfg, steps: sparselab.SNFS(**rewiring(cfg, steps)), changes={"drop_fraction": 0.5}),
    "dsr": Arm(lambda cfg, steps: sparselab.DSR(**timing(cfg, steps))),
    "deepr": Arm(
        lambda cfg, steps: sparselab.DeepR(l1=1e-4, **timing(cfg, steps)), changes={"update_every": 10}
    ),
    "gmp": Arm(lambda cfg, steps: sparselab.GMP(**pruning(cfg, steps, 0.0)), start=lambda sparsity: 0.0),
    "granet": Arm(
        lambda cfg, steps: sparselab.GraNet(
            **pruning(cfg, steps, min(0.5, cfg.sparsity)),
            drop_fraction=sparselab.CosineSchedule(0.5, last_update(cfg, steps), minimum=0.005),
        ),
        start=lambda sparsity: min(0.5, sparsity),
    ),
    "mest em": Arm(lambda cfg, steps: mest(cfg, steps, soft_bound=False)),
    "mest em&s": Arm(
        lambda cfg, steps: mest(cfg, steps, soft_bound=True), start=lambda sparsity: 1 - 1.5 * (1 - sparsity)
    ),
    "topkast": Arm(
        lambda cfg, steps: sparselab.TopKAST(
            forward_sparsity=sparse_layers_sparsity(cfg, cfg.sparsity), **timing(cfg, steps)
        ),
        start=lambda sparsity: 1 - 1.5 * (1 - sparsity),
        changes={"allocation": "uniform"},
    ),
    "gse": Arm(lambda cfg, steps: sparselab.GSE(**rewiring(cfg, steps))),
    "chts": Arm(lambda cfg, steps: sparselab.CHTs(temperature=rising(steps), **rewiring(cfg, steps))),
    "chtss": Arm(chtss, start=lambda sparsity: 0.5),
}
ARMS |= {
    f"{name}, {rows} x {columns} blocks": dataclasses.replace(
        ARMS[name], layer="block", settings={"block_shape": (rows, columns)}
    )
    for rows, columns in ((4, 1), (4, 4))
    for name in ("static", "rigl")
}
QUICK = {"epochs": 4, "arms": ("dense", "static", "set", "rigl"), "sparsity": (0.9, 0.98)}


# Models


def make_model(
    cfg: Config, sparsity: float | None, layer: str = "sparse", settings: dict[str, Any] | None = None
) -> nn.Sequential:
    """The network, sparse unless `sparsity` is None; equal seeds give equal weights and connections."""
    network = NETWORKS[cfg.network]
    torch.manual_seed(cfg.seed)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise((SIDE * SIDE, *network.hidden, CLASSES)):
        layers += [nn.Linear(n_in, n_out, network.bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if sparsity is None:
        return model
    sparsity = sparse_layers_sparsity(cfg, sparsity)
    rules = sparselab.dst.allocate(model, sparsity, cfg.allocation or network.allocation, last=cfg.output)
    return sparselab.sparsify(
        model, {name: {"sparsity": each, **(settings or {})} for name, each in rules.items()}, layer=layer
    )


def sparse_layers_sparsity(cfg: Config, sparsity: float) -> float:
    """The sparsity of the sparse layers that makes `sparsity` of the whole with a dense output.

    Only the network that follows the papers counts its output; the peer's figure is that of its sparse layer.
    """
    network = NETWORKS[cfg.network]
    if network.allocation != "erk" or cfg.output != "dense":
        return sparsity
    sizes = [n_in * n_out for n_in, n_out in pairwise((SIDE * SIDE, *network.hidden, CLASSES))]
    live = (1 - sparsity) * sum(sizes) - sizes[-1]
    if live <= 0:
        raise SystemExit(f"sparsity {sparsity}: the dense output alone has more weights than that leaves")
    return max(0.0, 1 - live / sum(sizes[:-1]))


# One run


def lr_factor(progress: float) -> float:
    """Share of the peak rate after a share of the steps: half a cosine down to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def train(
    cfg: Config, digits: Digits, model: nn.Module, algo: sparselab.dst.SparsityAlgorithm | None, name: str
) -> tuple[int, float]:
    """Train; return steps and seconds."""
    shuffle = torch.Generator().manual_seed(cfg.seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        cfg.lr,
        momentum=cfg.momentum,
        nesterov=cfg.momentum > 0,
        weight_decay=cfg.weight_decay,
    )
    steps = total_steps(cfg, digits)
    done = 0
    start = time.perf_counter()
    with tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True, leave=False) as bar:
        for _ in range(cfg.epochs):
            order = torch.randperm(len(digits.train_x), generator=shuffle)
            for rows in order.split(cfg.batch):
                for group in optimizer.param_groups:
                    group["lr"] = cfg.lr * lr_factor(done / steps)
                optimizer.zero_grad()
                F.cross_entropy(model(digits.train_x.index_select(0, rows)), digits.train_y[rows]).backward()
                optimizer.step()
                if algo is not None:
                    algo.step()
                done += 1
                bar.update()
    return done, time.perf_counter() - start


def train_and_prune(cfg: Config, digits: Digits, model: nn.Sequential, name: str) -> tuple[int, float]:
    """Train dense for the first half of the epochs, prune, train on; return steps and seconds."""
    halves = iter((cfg.epochs - cfg.epochs // 2, cfg.epochs // 2))
    spent: list[tuple[int, float]] = []

    def half(model: nn.Module) -> None:
        spent.append(train(dataclasses.replace(cfg, epochs=next(halves)), digits, model, None, name))

    sparsity = sparse_layers_sparsity(cfg, cfg.sparsity)
    exempt = str(len(model) - 1) if cfg.output == "dense" else ()
    sparselab.dst.train_prune_finetune(model, half, sparsity, "network", exempt=exempt)
    return sum(steps for steps, _ in spent), sum(seconds for _, seconds in spent)


def total_steps(cfg: Config, digits: Digits) -> int:
    return cfg.epochs * math.ceil(len(digits.train_x) / cfg.batch)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images whose class gets the highest score."""
    return (model(x).argmax(1) == y).double().mean().item()


def run(cfg: Config, arm: str, digits: Digits) -> dict[str, Any]:
    """Train one network of one arm and test it once, at the end."""
    cfg, algo = prepare(cfg, arm, digits)
    row = ARMS[arm]
    model = row.prepare(
        make_model(cfg, None if algo is None else row.start(cfg.sparsity), row.layer, row.settings)
    )
    if algo is not None:
        model.apply(algo)
    name = f"{cfg.network} {arm} {cfg.sparsity:g} seed {cfg.seed}"
    if row.prunes:
        steps, seconds = train_and_prune(cfg, digits, model, name)
    else:
        steps, seconds = train(cfg, digits, model, algo, name)
    if isinstance(algo, sparselab.TopKAST):
        algo.finish()
    return {
        **identity(cfg, arm, digits),
        "accuracy": accuracy(model, digits.test_x, digits.test_y),
        "final_sparsity": sparselab.measure_sparsity(model),
        "steps": steps,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "config": dataclasses.asdict(cfg),
    }


def prepare(cfg: Config, arm: str, digits: Digits) -> tuple[Config, sparselab.dst.SparsityAlgorithm | None]:
    """The settings of an arm and its algorithm. A dense network is the same at every sparsity."""
    row = ARMS[arm]
    cfg = dataclasses.replace(cfg, **row.changes)
    if row.build is None:
        return cfg if row.prunes else dataclasses.replace(cfg, sparsity=0.0), None
    return cfg, row.build(cfg, total_steps(cfg, digits))


def identity(cfg: Config, arm: str, digits: Digits) -> dict[str, Any]:
    """What tells a run from all others."""
    cfg, algo = prepare(cfg, arm, digits)
    state = {} if algo is None else algo.state_dict()
    algorithm = [state.get("algorithm"), state.get("config")]
    row = [ARMS[arm].start(cfg.sparsity), ARMS[arm].layer, ARMS[arm].prunes, *ARMS[arm].settings.values()]
    settings = [
        dataclasses.asdict(cfg),
        dataclasses.asdict(NETWORKS[cfg.network]),
        row,
        algorithm,
        digits.digest,
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return {"network": cfg.network, "sparsity": cfg.sparsity, "arm": arm, "seed": cfg.seed, "digest": digest}


# The study


Key = tuple[Any, ...]


def key_of(record: dict[str, Any]) -> Key:
    return tuple(record[name] for name in ("network", "sparsity", "arm", "seed", "digest"))


def load_runs(path: Path) -> dict[Key, dict[str, Any]]:
    """The finished runs of a file; none where there is no file."""
    runs = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            runs[key_of(record)] = record
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{path}, line {number}: not a finished run; delete this line") from None
    return runs


def study(
    cfgs: Sequence[Config], arms: Sequence[str], digits: Digits, path: Path, train_missing: bool
) -> list[dict[str, Any]]:
    """The runs asked for, in order, each once; what `path` lacks is trained and appended, or left out."""
    runs = load_runs(path)
    found: dict[Key, dict[str, Any]] = {}
    warm = False
    for cfg in cfgs:
        for arm in arms:
            key = key_of(identity(cfg, arm, digits))
            if key not in runs and train_missing:
                if not warm:
                    sparselab.warmup()
                    warm = True
                runs[key] = run(cfg, arm, digits)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[key]) + "\n")
            if key in runs:
                found[key] = runs[key]
    return list(found.values())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train small networks on MNIST, dense and sparse, and compare."
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=NETWORKS, help="default: all")
    add("--arms", nargs="+", choices=ARMS, help="ways to train (default: all)")
    add("--sparsity", nargs="+", type=float, help="total sparsities (default: those of the network)")
    add("--seeds", nargs="+", type=int, help="of weights, batches and topology (default: 1 2 3)")
    add("--epochs", type=at_least_one, help=f"default: {Config.epochs}")
    add("--quick", action="store_true", help="few epochs, arms and sparsities of one network")
    add("--report", action="store_true", help="train nothing, show the finished runs of these settings")
    add("--data", metavar="DIR", help="folder with the four gzipped IDX files (default: MNIST)")
    add("--out", type=Path, default=Path("results/mnist"), help="folder for runs and pictures")
    add("--threads", type=at_least_one, default=1, help="CPU threads; the layers are small (default: 1)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="change one line of the Config")
    return parser


def plan(args: argparse.Namespace) -> list[Config]:
    """The settings of all runs, seed by seed, so that a study cut short has all of its first seeds."""
    for setting in args.set:
        name = setting.partition("=")[0]
        if name in CHOSEN:
            raise SystemExit(f"--set {setting}: differs between runs; choose it with {CHOSEN[name]}")
    cfg = changed(Config(epochs=QUICK["epochs"]) if args.quick else Config(), args.set)
    seeds = args.seeds or ([1] if args.quick else [1, 2, 3])
    networks = args.network or (["lenet"] if args.quick else list(NETWORKS))
    cfgs = [
        dataclasses.replace(
            cfg, network=network, sparsity=sparsity, seed=seed, epochs=args.epochs or cfg.epochs
        )
        for seed in seeds
        for network in networks
        for sparsity in (args.sparsity or (QUICK["sparsity"] if args.quick else NETWORKS[network].sparsities))
    ]
    if cfg.output not in ("dense", "sparse"):
        raise SystemExit(f"--set output={cfg.output}: expected dense or sparse")
    for cfg in cfgs:
        if not 0 < cfg.sparsity < 1:
            raise SystemExit(f"--sparsity {cfg.sparsity}: expected a number between 0 and 1")
    return cfgs


def main(options: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(sys.argv[1:] if options is None else options)
    torch.set_num_threads(args.threads)
    cfgs = plan(args)
    arms = args.arms or (QUICK["arms"] if args.quick else list(ARMS))
    try:
        digits = load_digits(args.data, cfgs[0].mean, cfgs[0].std)
        args.out.mkdir(parents=True, exist_ok=True)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: --out {args.out}: cannot be made ({error.strerror})") from None
    runs = study(cfgs, arms, digits, args.out / "runs.jsonl", train_missing=not args.report)
    if not runs:
        raise SystemExit(
            f"{args.out / 'runs.jsonl'}: no finished run of these settings; run without --report"
        )
    from mnist_report import show  # torch alone while training

    show(runs, args.out)


if __name__ == "__main__":
    main()
