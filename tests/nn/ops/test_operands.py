"""Every operator checks every operand before a kernel sees it, and names what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparselab import BlockSparseLinear, SparseConv2d, SparseLinear

OPS = torch.ops.sparselab
ERRORS = (RuntimeError, TypeError, ValueError, NotImplementedError)


def layer_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "blocks":
        return BlockSparseLinear(20, 10, sparsity=0.5, block_shape=(4, 4))
    return SparseLinear(20, 10, sparsity=0.5)


def arguments(kind: str, operator: str) -> dict[str, Any]:
    """Right arguments, by name, in order."""
    layer = layer_of(kind)
    indptr, indices, sizes, layout = layer.topology_arguments()
    topology = {"indptr": indptr, "indices": indices, "sizes": sizes, "layout": layout}
    x, grad, values = torch.randn(6, 20), torch.randn(6, 10), layer.weight_values.detach()
    return {
        "linear": {"x": x, "values": values, "bias": layer.bias.detach(), **topology},
        "linear_input_grad": {"grad": grad, "values": values, **topology},
        "linear_values_grad": {"grad": grad, "x": x, **topology, "with_bias": True},
    }[operator]


OPERATORS = ["linear", "linear_input_grad", "linear_values_grad"]
SPOILT: dict[str, Any] = {
    "narrow": lambda t: t[..., :3] if t.ndim < 3 else t[:, :, :-1],
    "short": lambda t: t[:-1],
    "float64": lambda t: t.double(),
    "integer": lambda t: t.long(),
    "half": lambda t: t.half(),
    "scalar": lambda t: t.sum(),
    "one more dimension": lambda t: t.unsqueeze(0),
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("kind", ["single", "blocks"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_right_arguments_are_accepted_in_any_strides(operator: str, kind: str) -> None:
    given = arguments(kind, operator)
    expected = getattr(OPS, operator)(*given.values())
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.ndim >= 2:
            strided = torch.stack([tensor, tensor], -1)[..., 0]
            found = getattr(OPS, operator)(*{**given, name: strided}.values())
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["single", "blocks"])
@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("linear", "x"), ("linear", "values"), ("linear", "bias"), ("linear_input_grad", "grad"),
        ("linear_input_grad", "values"), ("linear_values_grad", "grad"), ("linear_values_grad", "x"),
    ],
)  # fmt: skip
def test_an_operand_that_does_not_fit_is_refused(operator: str, name: str, how: str, kind: str) -> None:
    given = arguments(kind, operator)
    spoilt = SPOILT[how](given[name])
    if name in ("x", "grad") and how == "short" and operator != "linear_values_grad":
        return  # fewer tokens are right
    with pytest.raises(ERRORS):
        getattr(OPS, operator)(*{**given, name: spoilt}.values())


WRONG_TOPOLOGY: dict[str, Any] = {
    "sizes": [[10, 20, 1], [10, -20, 1, 1], [11, 20, 1, 1], [10, 7, 1, 1], [10, 20, 0, 1], [10, 20, 2, 2]],
    "layout": ["coo", "", "bsr "],
    "indptr": [
        lambda t: t[:-1],
        lambda t: t.int(),
        lambda t: t + 1,
        lambda t: t.float(),
        lambda t: t.flip(0),
    ],
    "indices": [lambda t: t[:-1], lambda t: t.long() + 20, lambda t: t.long() - 1, lambda t: t.float()],
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", WRONG_TOPOLOGY)
def test_a_topology_that_is_none_is_refused(operator: str, name: str) -> None:
    given = arguments("single", operator)
    for wrong in WRONG_TOPOLOGY[name]:
        spoilt = wrong(given[name]) if callable(wrong) else wrong
        with pytest.raises(ERRORS):
            getattr(OPS, operator)(*{**given, name: spoilt}.values())


def test_the_messages_name_the_argument() -> None:
    given = arguments("single", "linear_values_grad")
    with pytest.raises(
        RuntimeError, match=r"grad must be torch.float32 of shape \(tokens, 10\), got .* \(6, 3\)"
    ):
        OPS.linear_values_grad(*{**given, "grad": torch.randn(6, 3)}.values())
    with pytest.raises(RuntimeError, match=r"x must be torch.float64 of shape .*, got torch.float32"):
        OPS.linear_values_grad(*{**given, "grad": torch.randn(6, 10).double()}.values())
    given = arguments("single", "linear")
    with pytest.raises(RuntimeError, match=r"values must be torch.float32 of shape \(100, 1, 1\), got"):
        OPS.linear(*{**given, "values": given["values"][:3]}.values())
    with pytest.raises(ValueError, match=r"layout must be one of csr, bsr.*, got 'coo'"):
        OPS.linear(*{**given, "layout": "coo"}.values())


def test_the_inputs_of_the_review() -> None:
    """A foreign token count, a narrow gradient, few values: each once read memory that was not its own."""
    layer = SparseLinear(512, 256, sparsity=0.9)
    topology = layer.topology_arguments()
    values = layer.weight_values.detach()
    with pytest.raises(RuntimeError, match=r"x must be .* \(9000, 512\)"):
        OPS.linear_values_grad(torch.randn(9000, 256), torch.randn(40, 512), *topology, False)
    with pytest.raises(RuntimeError, match="grad must be"):
        OPS.linear_values_grad(torch.randn(40, 3), torch.randn(40, 512), *topology, False)
    with pytest.raises(RuntimeError, match="values must be"):
        OPS.linear_input_grad(torch.randn(40, 256), values[:3], *topology)
    conv = SparseConv2d(4, 6, 3)
    with pytest.raises(RuntimeError, match=r"x must be torch.float32 of shape \(tokens, 4, 8, 8\)"):
        OPS.conv2d(
            torch.randn(2, 3, 8, 8), conv.weight_values.detach(), None, *conv.topology_arguments(),
            conv.geometry.numbers,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["single", "blocks"])
def test_what_autograd_hands_back_is_checked_too(kind: str) -> None:
    layer = layer_of(kind)
    for spoil in (lambda t: t[:-1].clone(), lambda t: t[..., :0].clone(), lambda t: t.double()):
        x = torch.randn(6, 20, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spoil):
            y = layer(x)
        with pytest.raises(RuntimeError, match="must be torch"):
            y.sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spoil):
            y = OPS.linear(x, layer.weight_values, layer.bias, *layer.topology_arguments())
        with pytest.raises(ERRORS):
            y.sum().backward()


GEOMETRIES: list[Any] = [
    [4, 1, 3, 3, 1, 1, 0, 0, 1], [4, 0, 3, 3, 1, 1, 0, 0, 1, 1], [4, 3, 3, 3, 1, 1, 0, 0, 1, 1],
    [4, 1, 3, 3, 0, 1, 0, 0, 1, 1], [4, 1, 3, 3, 1, 1, -1, 0, 1, 1], [4, 1, 3, 3, 1, 1, 0, 0, 0, 1],
    [4, 1, 2, 3, 1, 1, 0, 0, 1, 1], [8, 1, 3, 3, 1, 1, 0, 0, 1, 1], [4, 1, 3, 3, 1, 1, 0, 0, 9, 9],
]  # fmt: skip


def convolution(operator: str) -> dict[str, Any]:
    layer = SparseConv2d(4, 6, 3, sparsity=0.5)
    indptr, indices, sizes, layout = layer.topology_arguments()
    topology = {"indptr": indptr, "indices": indices, "sizes": sizes, "layout": layout}
    geometry = {"geometry": layer.geometry.numbers}
    x, grad, values = torch.randn(2, 4, 8, 7), torch.randn(2, 6, 6, 5), layer.weight_values.detach()
    return {
        "conv2d": {"x": x, "values": values, "bias": layer.bias.detach(), **topology, **geometry},
        "conv2d_input_grad": {
            "grad": grad, "values": values, **topology, **geometry, "height": 8, "width": 7
        },
        "conv2d_values_grad": {"grad": grad, "x": x, **topology, **geometry},
    }[operator]  # fmt: skip


@pytest.mark.parametrize("operator", ["conv2d", "conv2d_input_grad", "conv2d_values_grad"])
def test_operands_of_convolutions_are_checked(operator: str) -> None:
    given = convolution(operator)
    call = getattr(OPS, operator)
    call(*given.values())
    wrong: list[tuple[str, Any]] = [("geometry", numbers) for numbers in GEOMETRIES]
    wrong += [("height", 9), ("height", 0), ("width", -1)] if "height" in given else []
    wrong += [("layout", "bsr"), ("sizes", [6, 18, 1, 1]), ("sizes", [6, 36, 2, 2])]
    for name in ("x", "grad", "values", "bias"):
        if name in given:
            right = given[name]
            wrong += [(name, right.double()), (name, right.long()), (name, right.unsqueeze(0))]
            wrong += [(name, right[:, :-1]) if right.ndim > 1 and name != "values" else (name, right[:-1])]
    for name, value in wrong:
        with pytest.raises(ERRORS):
            call(*{**given, name: value}.values())


def freed(tensor: Tensor) -> Tensor:
    kept = tensor.detach().clone()
    kept.untyped_storage().resize_(0)
    return kept


def shrunk(tensor: Tensor) -> Tensor:
    kept = tensor.detach().clone()
    kept.untyped_storage().resize_(kept.nbytes - 4)
    return kept


def shrunk_below_a_view(tensor: Tensor) -> Tensor:
    kept = torch.stack([tensor.detach(), tensor.detach()], -1)
    kept.untyped_storage().resize_(kept.nbytes - 8)
    return kept[..., 0]


@pytest.mark.parametrize("how", [freed, shrunk, shrunk_below_a_view])
@pytest.mark.parametrize("kind", ["single", "blocks"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_tensor_whose_memory_is_gone_is_refused(operator: str, kind: str, how: Any) -> None:
    given = arguments(kind, operator)
    for name in ("x", "grad", "values", "bias"):
        if name in given:
            with pytest.raises(RuntimeError, match=r"must have memory for all of its entries|out of bounds"):
                getattr(OPS, operator)(*{**given, name: how(given[name])}.values())


def test_memory_that_is_gone_is_refused_of_layers_too() -> None:
    conv, images = SparseConv2d(3, 4, 3, sparsity=0.5), torch.randn(2, 3, 8, 8)
    for layer, x in ((layer_of("single"), torch.randn(6, 20)), (conv, images)):
        y = layer(x)
        with pytest.raises(RuntimeError, match="must have memory for all of its entries"):
            layer(freed(x))
        expanded = torch.zeros(()).expand(y.shape)
        y.backward(expanded)  # holds less than its entries would take, and is right


@pytest.mark.parametrize("name", ["indices", "indptr"])
@pytest.mark.parametrize("make", [layer_of, lambda kind: SparseConv2d(3, 4, 3, sparsity=0.5)])
def test_connections_without_memory_are_refused(make: Any, name: str) -> None:
    layer = make("single")
    getattr(layer, name).untyped_storage().resize_(4)
    x = torch.randn(2, 3, 8, 8) if isinstance(layer, SparseConv2d) else torch.randn(6, 20)
    with pytest.raises(RuntimeError, match=f"{name} must have memory for all of its entries"):
        layer(x)


def test_numbers_that_no_convolution_has_are_refused() -> None:
    layer, x = SparseConv2d(3, 4, 3, sparsity=0.5), torch.randn(2, 3, 8, 8)
    numbers = [3, 1, 3, 3, 1, 1, 1 << 62, 1, 1, 1]
    with pytest.raises(ValueError, match=r"geometry must be numbers below 2\*\*31"):
        OPS.conv2d(x, layer.weight_values, None, *layer.topology_arguments(), numbers)
