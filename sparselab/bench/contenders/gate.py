"""A contender is timed only if it computes the right thing: the layer's output and every gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparselab.nn import SparseLayer, find_sparse
from sparselab.nn.ops.cutting import cut


class WrongResultError(Exception):
    """A contender's result is not that of the layer; the text says which and by how much."""


class Gate:
    """The exact results of one layer on one batch, dense in float64, and the judgement of others.

    Parameters
    ----------
    layer : SparseLayer
    x : (tokens, in_features)
    dy : (tokens, out_features)
        Gradient of the output.
    """

    def __init__(self, layer: SparseLayer, x: Tensor, dy: Tensor) -> None:
        self._x, self._dy = x, dy
        self._layer = layer
        exact = layer.to_dense().double()
        x = x.double().requires_grad_()
        y = exact(x)
        y.backward(dy.double())
        self._output = y.detach()
        self._gradients = self._collect(exact, x)

    def check(self, module: nn.Module, tolerance: float, gradients: bool) -> None:
        """Refuse a module whose results differ by more than `tolerance` of the largest entry.

        Parameters
        ----------
        module : nn.Module
            Its parameters are a bias, named so, and a weight: dense, sparse CSR, or that of a sparse layer.
        tolerance : float
        gradients : bool
            Also judge the gradients of the input, the live weights and the bias.

        Raises
        ------
        WrongResultError
            If a result has another shape, is too far off, or is not finite.
        """
        if not gradients:
            with torch.no_grad():
                _compare(module, "output", module(self._x), self._output, tolerance)
            return
        x = self._x.clone().requires_grad_()
        y = module(x)
        _compare(module, "output", y.detach(), self._output, tolerance)
        module.zero_grad()
        y.backward(self._dy)
        actual = self._collect(module, x)
        module.zero_grad()
        for name, expected in self._gradients.items():
            _compare(module, f"gradient of the {name}", actual.get(name), expected, tolerance)

    def _collect(self, module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        found = {"input": x.grad}
        own = {id(layer.stored) for _, layer in find_sparse(module)}
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] == "bias":
                found["bias"] = parameter.grad
            else:
                found["live weights"] = self._live(parameter.grad, id(parameter) in own)
        return found

    def _live(self, gradient: Tensor | None, packed: bool) -> Tensor | None:
        """The gradient of the weights that exist, connection by connection, from a packed one or all of W."""
        if gradient is None:
            return None
        if gradient.layout == torch.sparse_csr:
            return gradient.values()
        if not packed:
            gradient = cut(gradient, self._layer.block_shape)[self._layer.positions()]
        return gradient.reshape(-1)


def _compare(
    module: nn.Module, what: str, actual: Tensor | None, expected: Tensor | None, tolerance: float
) -> None:
    name = type(module).__name__
    if expected is None:
        return
    if actual is None or actual.shape != expected.shape:
        got = "nothing" if actual is None else f"shape {tuple(actual.shape)}"
        raise WrongResultError(f"{what} of {name} must have shape {tuple(expected.shape)}, got {got}")
    if expected.numel() == 0:
        return
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    error = float((actual.double() - expected).abs().max()) / scale
    if not error <= tolerance:
        raise WrongResultError(
            f"{what} of {name} is off by {error:.1e} of the largest, {tolerance:.0e} allowed"
        )
