"""The networks run, the masked one as the sparse one, and the graph is what its settings say."""

import numpy as np
import pytest
import torch
from arms import ARMS
from gcn import QUICK, Graph, main, make_csr, make_graph, make_model, normalized, ones_at, train
from options import changed

from tests.examples.twins import assert_compared, assert_twins, float64

CFG = changed(QUICK, ["nodes=200", "words=120", "width=32", "epochs=16", "sparsity=0.9", "labels=10"])


def test_the_quick_run_compares_all_networks(capsys):
    results = main(["--quick"])
    assert_compared(results, capsys.readouterr().out)
    assert results[0].scores[0] > 80
    assert all(each.losses[-1] < each.losses[0] for each in results)


def test_the_masked_network_learns_as_the_sparse_one():
    with float64():
        graph = make_graph(CFG)
        masked, sparse = (train(name, graph, CFG) for name in ("masked, RigL", "sparse, RigL"))
        assert_twins(masked, sparse, make_model(ARMS["sparse, RigL"], CFG))
    assert masked.scores == sparse.scores


def test_positions_count_once():
    matrix = ones_at(np.array([1, 0, 1, 1]), np.array([2, 1, 2, 0]), (3, 3))
    assert matrix.layout == torch.sparse_csr
    assert matrix.to_dense().tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_links_are_shared_out_by_the_roots_of_degrees():
    path = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]])  # three nodes in a row, each linked to itself
    expected = path / torch.tensor([2.0, 3, 2]).sqrt() / torch.tensor([2.0, 3, 2]).sqrt()[:, None]
    csr = ones_at(*path.nonzero().T.numpy(), (3, 3))
    torch.testing.assert_close(normalized(csr).to_dense(), expected)


@pytest.mark.parametrize("homophily", [0.3, 0.8])
def test_a_graph_is_what_its_settings_say(homophily):
    cfg = changed(QUICK, ["nodes=3000", f"homophily={homophily}"])
    words, links, labels, known, test = make_graph(cfg)
    torch.testing.assert_close(words.to_dense().sum(1), torch.ones(cfg.nodes))
    assert [int((labels[known] == each).sum()) for each in range(cfg.classes)] == [cfg.labels] * cfg.classes
    assert torch.equal(torch.cat([known, test]).sort().values, torch.arange(cfg.nodes))
    links = links.to_dense()
    assert torch.equal(links, links.T)
    start, end = links.fill_diagonal_(0).nonzero().T
    assert len(start) / (2 * cfg.nodes) == pytest.approx(cfg.degree, rel=0.05)
    assert (labels[start] == labels[end]).float().mean().item() == pytest.approx(homophily, abs=0.03)
    again = make_graph(cfg)
    assert torch.equal(again.words.col_indices(), words.col_indices())


def test_a_network_sees_two_links_far():
    path = ones_at(*np.array([(0, 0, 1, 1, 1, 2, 2, 2, 3, 3), (0, 1, 0, 1, 2, 1, 2, 3, 2, 3)]), (4, 4))
    model = make_model(ARMS["sparse, RigL"], CFG).eval()
    words = torch.rand(4, CFG.words) * (torch.rand(4, CFG.words) < 0.5)
    other = torch.cat([words[:3], words[3:] * 2])
    found = []
    for each in (words, other):
        at = each.to_sparse_coo().coalesce().indices()
        pattern = ones_at(*at.numpy(), tuple(each.shape))
        values = each[tuple(at)]
        csr = make_csr(pattern.crow_indices(), pattern.col_indices(), values, each.shape)
        found.append(model(Graph(csr, normalized(path), *torch.zeros(3, 4))))
    same = (found[0] == found[1]).all(1)
    assert same.tolist() == [True, False, False, False]
