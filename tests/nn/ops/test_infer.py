"""The shortcut for few tokens: it computes what the general way does, and knows when it does not apply."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparselab import BlockSparseLinear, FanInLinear, SparseLinear
from sparselab.nn.ops import block_linear as _block_functional
from sparselab.nn.ops import linear as functional
from tests.nn.layers.test_linear import CountOperators

Kind = Callable[..., SparseLinear]

BLOCKS = partial(BlockSparseLinear, sparsity=0.5, block_shape=(4, 8))
KINDS = [SparseLinear, FanInLinear, BLOCKS]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["single", "fan-in", "blocks"])


def ready(kind: Kind = SparseLinear, **settings: Any) -> SparseLinear:
    """A layer that has computed something, so that its plans are there."""
    layer = kind(20, 10, **settings)
    layer(torch.zeros(1, 20, dtype=layer.weight_values.dtype))
    return layer


def infer(layer: SparseLinear, x: Tensor) -> Tensor | None:
    return layer._shortcut(x)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (1, 1, 20), (2, 20), (16, 20), (2, 4, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@every_kind
def test_the_shortcut_computes_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, bias: bool, dtype: torch.dtype, shape: Any
) -> None:
    layer = ready(kind, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = layer(x)
    assert expected.requires_grad
    monkeypatch.setattr(functional, "sparse_linear", None)
    monkeypatch.setattr(_block_functional, "sparse_block_linear", None)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert layer(x.clone()).is_inference()
    assert torch.equal(layer.freeze()(x), expected)


def test_it_follows_weights_and_topology() -> None:
    layer = ready()
    x = torch.randn(3, 20)
    changes: list[Callable[[], object]] = [
        lambda: layer.weight_values.mul_(2),
        lambda: setattr(layer.weight_values, "data", torch.randn(layer.nnz)),
        lambda: layer.rewrite(torch.arange(3), torch.empty(0, dtype=torch.int64)),
        layer.reset_parameters,
        lambda: layer.load_state_dict(SparseLinear(20, 10, sparsity=0.5).state_dict()),
        lambda: layer.double(),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            x = x.to(layer.weight_values.dtype)
            for _ in range(2):  # the second time there is a plan
                torch.testing.assert_close(layer(x), layer.to_dense()(x))
            assert infer(layer, x) is not None


class Mine(Tensor):
    pass


X = torch.ones(2, 20)
INPUTS = {
    "too many": torch.ones(65, 20),
    "none": torch.ones(0, 20),
    "strided": torch.ones(20, 2).T,
    "another dtype": X.double(),
    "integers": X.long(),
    "bfloat16": X.bfloat16(),
    "another width": torch.ones(4, 10),
    "another device": X.to("meta"),
    "a subclass": X.as_subclass(Mine),
    "a sign to be turned": (1j * torch.ones(2, 20)).conj().imag,
    "zeros without memory": torch._efficientzerotensor(2, 20),
    "to differentiate": torch.ones(2, 20, requires_grad=True),
}


@every_kind
@pytest.mark.parametrize("what", INPUTS)
def test_other_inputs_go_the_general_way(kind: Kind, what: str) -> None:
    layer = ready(kind).requires_grad_(False)
    assert infer(layer, X) is not None
    assert infer(layer, INPUTS[what]) is None


def swap(name: str, tensor: Callable[[Tensor], Any]) -> Callable[[SparseLinear], None]:
    def change(layer: SparseLinear) -> None:
        place = layer._parameters if name in layer._parameters else layer._buffers
        place[name] = tensor(place[name])

    return change


LAYERS: dict[str, Callable[[SparseLinear], object]] = {
    "a forward mask": lambda layer: setattr(layer, "forward_mask", layer.weight_values > 0),
    "computed values": lambda layer: layer._parameters.pop("values"),
    "values of a subclass": swap("values", lambda t: t.as_subclass(Mine)),
    "values of another dtype": swap("values", lambda t: t.double()),
    "trained values": lambda layer: layer.weight_values.requires_grad_(),
    "a trained bias": lambda layer: layer.bias.requires_grad_(),
    "other columns": swap("indices", lambda t: t.clone()),
    "edited columns": lambda layer: layer.indices.copy_(layer.indices.clone()),
    "other rows": swap("indptr", lambda t: t.clone()),
    "no plans": lambda layer: setattr(layer._plans, "current", None),
}


@every_kind
@pytest.mark.parametrize("what", LAYERS)
def test_other_layers_go_the_general_way(kind: Kind, what: str) -> None:
    layer = ready(kind).requires_grad_(False)
    assert infer(layer, X) is not None
    LAYERS[what](layer)
    assert infer(layer, X) is None


@pytest.mark.parametrize(("name", "length"), [("values", 5), ("bias", 9)])
def test_parts_that_do_not_fit_are_refused(name: str, length: int) -> None:
    layer = ready().requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"{name} must be torch.float32 of shape .*\({length},\)"):
        torch.func.functional_call(layer, {name: torch.zeros(length)}, (X,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_is_traced_or_transformed_goes_the_general_way() -> None:
    layer = ready().requires_grad_(False)
    with CountOperators() as operators:
        layer(X)
    assert operators.called == ["linear"]
    torch.testing.assert_close(torch.func.vmap(layer)(X), layer(X))
    with forward_ad.dual_level():
        assert infer(layer, X) is None
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer(forward_ad.make_dual(X, X))
