"""How many connections each layer gets: one budget for a whole model, shared out exactly."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from torch import nn

from sparselab._names import Keys, first_keys, listed, literal, match
from sparselab.dst.checks import require_count, require_finite
from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.dense import DenseLayer
from sparselab.nn.models.dense import select

Shape: TypeAlias = Sequence[int]
#: Counts of connections from the shapes of all layers and the sparsity of the whole.
Method: TypeAlias = Callable[[Sequence[Shape], float], Sequence[int]]


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[int]:
    """The same density everywhere, but exact over the whole.

    Parameters
    ----------
    shapes : sequence of shapes
        Weights of the layers, of any number of dimensions.
    sparsity : float
        Of all layers together, in [0, 1].

    Returns
    -------
    list of int
        Connections of each layer: ``n_connections`` of the whole in sum, none above the layer's size, and at
        least 1 in each layer that has positions, if there are that many. What rounding leaves goes to the
        largest fractions, among equals to the first.

    Raises
    ------
    TypeError, ValueError
        If sparsity is not a number in [0, 1], or a shape does not consist of non-negative integers.

    Examples
    --------
    >>> uniform([(10, 10), (5, 5)], 0.9)
    [10, 2]
    """
    return _distribute(shapes, sparsity, lambda shape: Fraction(1))


def er(shapes: Sequence[Shape], sparsity: float) -> list[int]:
    """Erdos-Renyi: density in proportion to ``(n_out + n_in) / (n_out * n_in)``, so small layers are denser.

    Layers that would get more connections than positions are dense, and the others share the rest.

    Parameters
    ----------
    shapes : sequence of shapes
        Weights of the layers: ``(n_out, n_in, ...)``, where kernel sizes that may follow do not count.
    sparsity : float
        Of all layers together, in [0, 1].

    Returns
    -------
    list of int
        As of `uniform`.

    Raises
    ------
    TypeError, ValueError
        As of `uniform`.

    References
    ----------
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 9:2383 (2018), equation 1; as scaled to one sparsity of the
    whole by Evci et al., "Rigging the Lottery", ICML 2020, section 3.
    """
    return _distribute(shapes, sparsity, lambda shape: _sum_over_product(shape[:2]))


def erk(shapes: Sequence[Shape], sparsity: float, power: float = 1.0) -> list[int]:
    """Erdos-Renyi-Kernel: density in proportion to ``(sum(shape) / prod(shape)) ** power``.

    Layers that would get more connections than positions are dense, and the others share the rest.

    Parameters
    ----------
    shapes : sequence of shapes
        Weights of the layers, of any number of dimensions; with two and power 1 this is `er`.
    sparsity : float
        Of all layers together, in [0, 1].
    power : float
        At least 0; the larger, the denser the small layers. 0 is `uniform`.

    Returns
    -------
    list of int
        As of `uniform`.

    Raises
    ------
    TypeError, ValueError
        As of `uniform`, or if power is not a finite number of at least 0.

    References
    ----------
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3 and appendix.

    Examples
    --------
    LeNet-300-100 at 90%: the last layer is dense.

    >>> erk([(300, 784), (100, 300), (10, 100)], 0.9)
    [18714, 6906, 1000]
    """
    require_finite("power", power)
    if power < 0:
        raise ValueError(f"power must be at least 0, got {power!r}")
    return _distribute(shapes, sparsity, lambda shape: _sum_over_product(shape) ** Fraction(float(power)))


def apportion(
    total: int,
    weights: Sequence[float | Fraction],
    caps: Sequence[int],
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Split a number into integers in proportion to weights, within bounds.

    Whoever would get more than its cap gets the cap, whoever less than its floor the floor, and the others
    share the rest in proportion. Shares are rounded down, and what that leaves goes to those that lost the
    most, among equals to the first. Computed in exact fractions, so the result is the same everywhere.

    Parameters
    ----------
    total : int
        The sum of the result.
    weights : sequence of float or Fraction
        At least 0. Where all that are not yet at a bound are 0, they share equally.
    caps, floors : sequence of int
        Bounds of each part; floors are 0 if None.

    Returns
    -------
    list of int

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, the lengths differ, a floor exceeds its cap, or total lies
        outside the sums of floors and caps.

    Examples
    --------
    >>> apportion(10, [1, 1, 2], caps=[9, 9, 9])
    [3, 2, 5]
    >>> apportion(10, [1, 1, 2], caps=[9, 9, 2])
    [4, 4, 2]
    """
    total = require_count("total", total)
    caps = [require_count(f"caps[{i}]", cap) for i, cap in enumerate(caps)]
    floors = [0] * len(caps) if floors is None else [*floors]
    floors = [require_count(f"floors[{i}]", floor) for i, floor in enumerate(floors)]
    if not len(weights) == len(caps) == len(floors):
        raise ValueError(
            f"weights, caps and floors must be equally long, got {len(weights)}, {len(caps)}, {len(floors)}"
        )
    for i, weight in enumerate(weights):
        require_finite(f"weights[{i}]", weight)
        if weight < 0:
            raise ValueError(f"weights[{i}] must be at least 0, got {weight!r}")
        if floors[i] > caps[i]:
            raise ValueError(f"floors[{i}] must not exceed caps[{i}], got {floors[i]} and {caps[i]}")
    if not sum(floors) <= total <= sum(caps):
        raise ValueError(
            f"total must lie between the sums of floors and caps, {sum(floors)} and {sum(caps)}, got {total}"
        )
    exact = [weight if isinstance(weight, Fraction) else Fraction(float(weight)) for weight in weights]
    shares = _bounded_shares(total, exact, caps, floors)
    counts = [math.floor(share) for share in shares]
    by_fraction = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    for i in by_fraction[: total - sum(counts)]:
        counts[i] += 1
    return counts


def allocate(
    model: nn.Module,
    sparsity: float,
    method: Literal["uniform", "er", "erk"] | Method | Mapping[Any, float] = "erk",
    *,
    include: Keys = "*",
    exempt: Keys = (),
    exempt_types: type[nn.Module] | Collection[type[nn.Module]] = (),
    first: Literal["sparse", "dense"] = "sparse",
    last: Literal["sparse", "dense"] = "sparse",
) -> dict[str, float]:
    """Share one budget of connections out to the layers of a dense model.

    Parameters
    ----------
    model : torch.nn.Module
        Read only, and may be on the meta device. Its layers are those that `sparselab.sparsify` can
        swap, linear ones and convolutions, in the order of ``named_modules``.
    sparsity : float
        Of the chosen layers together, in [0, 1]. Layers that stay dense are not counted.
    method : {"uniform", "er", "erk"}, callable or mapping
        `uniform`, `er` or `erk`; or a function of the shapes and the sparsity that returns the counts, as
        ``functools.partial(erk, power=0.5)`` does; or a mapping from keys to sparsity: each layer gets that
        of the first key that matches it, and `sparsity` if none does.
    include, exempt : str, re.Pattern, type or callable, or iterable of them
        Keys as `sparselab.sparsify` takes them: which layers to choose from, and which of them stay dense.
    exempt_types : type or collection of types
        Modules of these types keep all layers inside them dense, at any depth; a type in `exempt` only
        what modules of that type hold themselves.
    first, last : {"sparse", "dense"}
        Whether the first and the last of the layers left by then stay dense.

    Returns
    -------
    dict of str to float
        The chosen layers and their sparsity, for ``sparselab.sparsify(model, rules)``, which gives each
        exactly its count of connections. Names are escaped, so that each matches its own layer only. A layer
        whose share is all of its positions has sparsity 0; delete the entry to leave it a dense layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, the model is itself such a layer, a key or type matches no
        layer, a layer that cannot be swapped is named outright, no layer is left, or a function returns what
        is no count for each layer.

    Warns
    -----
    UserWarning
        As `sparselab.sparsify`: if layers that match must stay dense, such as tied ones. They do not count.

    Examples
    --------
    >>> import sparselab
    >>> sizes = [(784, 300), (300, 100), (100, 10)]
    >>> model = nn.Sequential(*[nn.Linear(*size) for size in sizes])
    >>> sparse = sparselab.sparsify(model, allocate(model, 0.9, last="dense"))
    >>> [getattr(layer, "nnz", "dense") for layer in sparse]
    [19372, 7148, 'dense']
    """
    for name, given in (("first", first), ("last", last)):
        if given not in ("sparse", "dense"):
            raise ValueError(f'{name} must be "sparse" or "dense", got {given!r}')
    choice = select(model, include, exempt)
    choice.warn("allocate", "A key of exempt")
    layers = _outside(model, {name: layer for name, (layer, _) in choice.layers.items()}, exempt_types)
    names = list(layers)[first == "dense" : len(layers) - (last == "dense")]
    if not names:
        raise ValueError(
            f"model must have a layer that is to be sparse; include, exempt, first and last left none of "
            f"{listed([*choice.layers, *(each.name for each in choice.dense)])}"
        )
    shapes = [tuple(layers[name].linear.weight.shape) for name in names]
    sizes = [math.prod(shape) for shape in shapes]
    counts = _counts(method, {name: layers[name].owner for name in names}, shapes, sparsity)
    # (size - count) / size and what n_connections makes of it are off by less than size * 2**-52 connections.
    return {
        literal(name): (size - count) / size if size else 0.0
        for name, size, count in zip(names, sizes, counts, strict=True)
    }


def _distribute(
    shapes: Sequence[Shape], sparsity: float, density: Callable[[Shape], Fraction | float]
) -> list[int]:
    """Counts in proportion to the density times the size, exact in sum; see `uniform`."""
    for i, shape in enumerate(shapes):
        for j, length in enumerate(shape):
            require_count(f"shapes[{i}][{j}]", length)
    sizes = [math.prod(map(int, shape)) for shape in shapes]
    total = n_connections((sum(sizes), 1), sparsity)
    weights = [density(shape) * size if size else 0 for shape, size in zip(shapes, sizes, strict=True)]
    floors = [min(size, 1) for size in sizes]
    return apportion(total, weights, sizes, floors if sum(floors) <= total else None)


def _sum_over_product(shape: Shape) -> Fraction:
    return Fraction(sum(map(int, shape)), math.prod(map(int, shape)))


def _bounded_shares(
    total: int, weights: list[Fraction], caps: list[int], floors: list[int]
) -> list[Fraction]:
    """``clip(scale * weight, floor, cap)`` at the one scale where they sum to total.

    If clipping the proportional shares takes off at least as much as it puts on, the final scale is not
    below the present one, so whoever exceeds its cap now will then; otherwise, whoever is below its floor.
    """
    shares = [Fraction(0)] * len(weights)
    free, rest = list(range(len(weights))), Fraction(total)
    while free:
        if not any(weights[i] for i in free):
            weights = [Fraction(1)] * len(weights)
        scale = rest / sum(weights[i] for i in free)
        for i in free:
            shares[i] = scale * weights[i]
        excess = {i: shares[i] - caps[i] for i in free if shares[i] > caps[i]}
        lack = {i: floors[i] - shares[i] for i in free if shares[i] < floors[i]}
        if not excess and not lack:
            break
        settled, bounds = (excess, caps) if sum(excess.values()) >= sum(lack.values()) else (lack, floors)
        for i in settled:
            shares[i] = Fraction(bounds[i])
            rest -= bounds[i]
        free = [i for i in free if i not in settled]
    return shares


def _counts(
    method: str | Method | Mapping[Any, float],
    owners: Mapping[str, nn.Module],
    shapes: list[tuple[int, ...]],
    sparsity: float,
) -> list[int]:
    n_connections((1, 1), sparsity)
    if isinstance(method, Mapping):
        first = first_keys(match("method", method, owners))
        of_layer = [method[first[name]] if name in first else sparsity for name in owners]
        return [
            n_connections((1, math.prod(shape)), each) for shape, each in zip(shapes, of_layer, strict=True)
        ]
    function = {"uniform": uniform, "er": er, "erk": erk}.get(method) if isinstance(method, str) else method
    if not callable(function):
        raise ValueError(
            f'method must be "uniform", "er", "erk", a function of shapes and sparsity, or a mapping from '
            f"keys to sparsity, got {method!r}"
        )
    counts = [require_count("a count from method", count) for count in function(shapes, sparsity)]
    sizes = [math.prod(shape) for shape in shapes]
    if len(counts) != len(sizes) or any(map(operator.gt, counts, sizes)):
        raise ValueError(
            f"method must return a count for each layer, at most its size, got {counts} for the sizes {sizes}"
        )
    return counts


def _outside(
    model: nn.Module,
    layers: Mapping[str, DenseLayer],
    exempt_types: type[nn.Module] | Collection[type[nn.Module]],
) -> dict[str, DenseLayer]:
    """The layers that do not lie inside a module of the types."""
    dense: set[nn.Module] = set()
    for kind in [exempt_types] if isinstance(exempt_types, type) else exempt_types:
        inside = {each for owner in model.modules() if isinstance(owner, kind) for each in owner.modules()}
        if inside.isdisjoint(layer.owner for layer in layers.values()):
            raise ValueError(
                f"exempt_types must hold types with linear layers inside, got {kind.__name__}, which has none"
            )
        dense |= inside
    return {name: layer for name, layer in layers.items() if layer.owner not in dense}
