"""`torch.fx` draws a sparse layer as one node, as it does torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import sparselab
from tests.nn.layers.test_module_cases import REPLACED

INPUTS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (torch.randn(5, 8),),
    nn.Conv1d: (torch.randn(2, 8, 9),),
    nn.Conv2d: (torch.randn(2, 8, 9, 9),),
    nn.Conv3d: (torch.randn(2, 8, 5, 5, 5),),
    nn.ConvTranspose1d: (torch.randn(2, 8, 9),),
    nn.ConvTranspose2d: (torch.randn(2, 8, 9, 9),),
    nn.ConvTranspose3d: (torch.randn(2, 8, 5, 5, 5),),
    nn.MultiheadAttention: (torch.randn(3, 2, 8),) * 3,
    nn.Embedding: (torch.tensor([[1, 2], [0, 3]]),),
    nn.RNN: (torch.randn(3, 2, 8),),
    nn.GRU: (torch.randn(3, 2, 8), torch.randn(1, 2, 4)),
    nn.LSTM: (torch.randn(3, 2, 8),),
}


class Model(nn.Module):
    """One layer, and arithmetic around it."""

    def __init__(self, layer: nn.Module, n: int) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})
        self.n = n

    def forward(self, first: Any, second: Any = None, third: Any = None) -> Any:
        given = (first, second, third)[: self.n]
        return self.inner["layer"](*given)


def make(dense: type[nn.Module], sparse: Any) -> nn.Module:
    sizes = {"kernel_size": 3} if "Conv" in dense.__name__ else {}
    settings = {"fan_in": 2} if sparse is sparselab.FanInLinear else {"sparsity": 0.5}
    if sparse is sparselab.BlockSparseLinear:
        settings["block_shape"] = (2, 2)  # type: ignore[assignment]
    return sparse(8, 4, **sizes, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dense", "sparse"), dict.fromkeys(REPLACED))
def test_a_layer_is_one_node(dense: Any, sparse: Any) -> None:
    inputs = INPUTS[dense]
    model = Model(make(dense, sparse), len(inputs))
    graph = symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["inner.layer"]
    for ours, theirs in zip(flat(graph(*inputs)), flat(model(*inputs)), strict=True):
        assert torch.equal(ours, theirs)
    if dense is nn.Linear:
        flat(graph(*inputs))[0].sum().backward()
        assert model.inner["layer"].stored.grad is not None


def flat(outputs: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def test_keywords_and_sizes_are_kept() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = sparselab.SparseConvTranspose2d(8, 4, 3, stride=2, sparsity=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(input=x, output_size=[20, 20])  # type: ignore[no-any-return]

    model = Up()
    x = INPUTS[nn.ConvTranspose2d][0]
    assert torch.equal(symbolic_trace(model)(x), model(x))
    assert model(x).shape[2:] == (20, 20)


def test_tied_layers_are_nodes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = sparselab.SparseLinear(8, 4, sparsity=0.5)
            self.decode = sparselab.TransposedLinear(self.encode)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x).relu())  # type: ignore[no-any-return]

    model = Tied()
    graph = symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["encode", "decode"]
    x = INPUTS[nn.Linear][0]
    assert torch.equal(graph(x), model(x))


def test_a_layer_that_is_traced_itself_tells_the_way() -> None:
    with pytest.raises(TypeError, match=r"got a SparseLinear itself.*nn.Sequential\(layer\)"):
        symbolic_trace(sparselab.SparseLinear(8, 4, sparsity=0.5))
