"""A graph convolutional network on citations and words: dense, masked and sparse, side by side.

    python examples/gcn.py                    # four networks, a table
    python examples/gcn.py --quick            # a few seconds each: too short to learn much
    python examples/gcn.py --set nodes=10000 --set sparsity=0.98

Everything large is sparse: the words of the documents, which `SparseLinear` takes as a ``torch.sparse_csr``
tensor, the citations, and the weights of the first layer. Few documents have a label; the words of the others
reach the loss through citations.

Kipf, Welling, "Semi-supervised classification with graph convolutional networks", ICLR 2017. The graph is
drawn from a stochastic block model (Holland, Laskey, Leinhardt, Social Networks 1983) in which each class has
words of its own.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from arms import ARMS, Arm, Result, attach, live_weights, print_results
from options import configured
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from tqdm import tqdm

import sparselab


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    nodes: int = 2_000
    classes: int = 6
    degree: float = 4.0  # citations of a document, on average
    homophily: float = 0.7  # share of citations within the class
    words: int = 1_500
    length: int = 20  # words drawn for a document
    topical: float = 0.15  # share of them that are the class' own
    labels: int = 20  # of each class
    width: int = 256
    sparsity: float = 0.95
    dropout: float = 0.5
    epochs: int = 200
    lr: float = 1e-2
    weight_decay: float = 5e-4
    update_freq: int = 10  # optimizer steps between two changes of the connections
    drop_fraction: float = 0.3
    seed: int = 0


QUICK = Config(nodes=600, words=400, width=64, epochs=30, update_freq=5)


class Graph(NamedTuple):
    """Documents, their words and citations."""

    words: Tensor  # CSR (nodes, words), rows sum to 1
    links: Tensor  # CSR (nodes, nodes), normalized
    labels: Tensor
    train: Tensor  # nodes whose label is known
    test: Tensor


def ones_at(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix with 1 at some positions, each of which counts once."""
    row, column = np.divmod(np.unique(rows * shape[1] + columns), shape[1])
    indptr = np.searchsorted(row, np.arange(shape[0] + 1))
    return make_csr(torch.from_numpy(indptr), torch.from_numpy(column), torch.ones(len(row)), shape)


def make_csr(indptr: Tensor, indices: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The matrix, without torch's warning of what its CSR tensors cannot do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=True)


def normalized(adjacency: Tensor) -> Tensor:
    """``D^-1/2 A D^-1/2`` of a CSR matrix A with row sums D."""
    indptr, indices = adjacency.crow_indices(), adjacency.col_indices()
    degree = indptr.diff()
    scale = degree.to(adjacency.values()).rsqrt()
    values = scale.repeat_interleave(degree) * scale[indices]
    return make_csr(indptr, indices, values, adjacency.shape)


def make_graph(cfg: Config) -> Graph:
    rng = np.random.default_rng(cfg.seed)
    labels = rng.integers(0, cfg.classes, cfg.nodes)
    # Of all pairs, 1 / classes are within a class: so many are kept that `homophily` of those kept are.
    n = round(cfg.nodes * cfg.degree * cfg.classes)
    start, end = rng.integers(0, cfg.nodes, (2, n))
    across = (1 - cfg.homophily) / (cfg.classes - 1)
    kept = rng.random(n) < np.where(labels[start] == labels[end], cfg.homophily, across)
    start, end, own = start[kept], end[kept], np.arange(cfg.nodes)
    links = ones_at(np.r_[start, end, own], np.r_[end, start, own], (cfg.nodes, cfg.nodes))
    # Frequencies fall as 1 / rank; the words of a class are every `classes`-th one.
    frequency = 1 / np.arange(1, cfg.words + 1)
    common = rng.choice(cfg.words, (cfg.nodes, cfg.length), p=frequency / frequency.sum())
    topical = rng.integers(0, cfg.words // cfg.classes, common.shape) * cfg.classes + labels[:, None]
    drawn = np.where(rng.random(common.shape) < cfg.topical, topical, common)
    words = ones_at(own.repeat(cfg.length), drawn.ravel(), (cfg.nodes, cfg.words))
    counts = words.crow_indices().diff()
    shares = (1 / counts.to(words.values())).repeat_interleave(counts)
    words = make_csr(words.crow_indices(), words.col_indices(), shares, words.shape)
    order = rng.permutation(cfg.nodes)
    train = np.concatenate([order[labels[order] == each][: cfg.labels] for each in range(cfg.classes)])
    test = np.setdiff1d(own, train)
    return Graph(words, links, *(torch.from_numpy(each) for each in (labels, train, test)))


class GCN(nn.Module):
    """Two layers, each of which mixes the features of a node with those of its neighbours."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.first = nn.Linear(cfg.words, cfg.width)
        self.second = nn.Linear(cfg.width, cfg.classes)
        self.dropout = cfg.dropout

    def forward(self, graph: Graph) -> Tensor:
        words = graph.words
        values = dropout(words.values(), self.dropout, self.training)
        words = make_csr(words.crow_indices(), words.col_indices(), values, words.shape)
        hidden = dropout((graph.links @ self.first(words)).relu(), self.dropout, self.training)
        return graph.links @ self.second(hidden)


def make_model(arm: Arm, cfg: Config) -> GCN:
    torch.manual_seed(cfg.seed)
    model = GCN(cfg)
    if arm.layer is not None:
        sparselab.sparsify(model, {"first": {"layer": arm.layer, "sparsity": cfg.sparsity}})
    return model


def train(name: str, graph: Graph, cfg: Config) -> Result:
    arm, start, losses = ARMS[name], time.perf_counter(), []
    model = make_model(arm, cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    attach(arm, model, optimizer, cfg, stop=cfg.epochs * 3 // 4)
    for _ in tqdm(range(cfg.epochs), desc=name, leave=False):
        optimizer.zero_grad()
        loss = cross_entropy(model(graph)[graph.train], graph.labels[graph.train])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model.eval()(graph).argmax(1) == graph.labels
    accuracy = 100 * right[graph.test].float().mean().item()
    return Result(name, live_weights(model), (accuracy,), seconds, losses, model)


def main(options: Sequence[str] | None = None) -> list[Result]:
    cfg = configured(__doc__, Config(), QUICK, options)
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    graph = make_graph(cfg)
    results = [train(name, graph, cfg) for name in ARMS]
    title = f"{cfg.nodes:,} documents, {cfg.words:,} words, {len(graph.train)} labels, {cfg.epochs} epochs"
    print_results(title, results, {"test accuracy, %": ".2f"})
    return results


if __name__ == "__main__":
    main()
