"""Whole models: swapping dense layers for sparse ones, and saying what that would change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from sparselab._names import Keys, listed
from sparselab.nn.layers.base import SparseLayer, find_sparse
from sparselab.nn.layers.kinds import find_kind
from sparselab.nn.models.dense import choose, select
from sparselab.nn.models.plan import SparsifyPlan, draw_plan
from sparselab.nn.models.rules import Rules
from sparselab.nn.models.swap import swap
from sparselab.nn.models.weights import find_dense
from sparselab.nn.storage.checks import check_dtype

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    rules: Rules,
    *,
    init: Literal["random", "magnitude"] = "random",
    layer: str = "sparse",
) -> Model:
    """Swap layers of a model for sparse ones, in place.

    Parameters
    ----------
    model : torch.nn.Module
        On the meta device, too: its layers then become sparse ones there, which `materialize` gives memory,
        connections and weights, and no dense weight ever exists.
    rules : float, or mapping of str, re.Pattern, type or callable to float, mapping or None
        A number, a sparsity in [0, 1], is that of all that can be sparse, as ``{"*": number}``. Of the keys
        of a mapping that match a layer, the first one counts, whatever its sort:

        - A str is a glob of qualified layer names: ``*`` matches any characters, dots included, ``?`` one
          character, ``[...]`` a set; upper and lower case differ. After ``"re:"`` it is a regular expression.
        - A regular expression must match the whole name.
        - A class matches the layers of modules that are instances of it, as ``isinstance`` has them.
        - A function returns a bool for each layer: ``function(module, name)``, of the module that holds its
          weights and its qualified name. It is also asked of what must stay dense.

        They map to what the layers become. A number is a sparsity in [0, 1]. A mapping says ``"layer"``, the
        kind, which may be left out; exactly one of ``"sparsity"``, ``"density"`` (1 minus the sparsity) and,
        of the kind "fan_in", ``"fan_in"``; and of the kind "block" the ``"block_shape"``, (32, 32) by
        default. None leaves layers dense.
    init : {"random", "magnitude"}
        "random": a new random topology and new weights, to train from scratch. "magnitude": the largest
        weights of the dense layer stay.
    layer : {"sparse", "masked", "fan_in", "block"}, or another registered kind
        The kind of layer where a rule does not say one; see `sparselab.nn.LayerKind`. "sparse":
        `SparseLinear`, `SparseConv2d` and its likes. "masked": `MaskedLinear`, `MaskedConv2d` and its likes,
        which simulate the same model at the cost of the dense one; with the same seed of torch's generator
        both get the same topology and weights. "fan_in": `FanInLinear`, and convolutions with a constant
        fan-in, but no transposed ones. "block": `BlockSparseLinear`, of linear layers only.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError, ValueError
        If the model is itself such a layer, a key is none of those above or matches nothing, a function
        returns no bool, a rule says too much, too little or what a layer cannot be, init or layer is none of
        its choices, init is "magnitude" and a layer on the meta device, a layer that must stay dense (see
        Notes) is named outright, or rules ask for sparse layers and none can be. Nothing has been changed
        then.

    Warns
    -----
    UserWarning
        If a rule that is not None matches what must stay dense, but by another key than its very name; it is
        named with the reason. Embeddings and Parameters of one row, which are looked up or added and not
        multiplied, are not named if the same key makes something else sparse.

    Notes
    -----
    A layer stays dense that shares a parameter with another module, computes its weight (as under
    `torch.nn.utils.parametrize` or ``spectral_norm``), has hooks, or parameters, buffers or modules beside
    those of its class: a sparse layer in its place would lose them. So does every other Parameter of two or
    more dimensions, for which there is no sparse kind: it goes by the name of its module if its own begins
    with ``weight``, and by its own name if not. `plan_sparsify` lists all of them without a change.

    An embedding is only made sparse by a key that matches embeddings alone: ``"wte"``, ``"*.wte"`` or
    ``torch.nn.Embedding``, but neither a number for the whole model nor ``"*"``. Likewise where an embedding
    and linear layers have one weight, as in a language model with a tied head: a key for any of them and no
    other layer makes all of them sparse, the embedding a `SparseEmbedding` and the head a `TiedLinear` with
    its weight. Rules for several of them must say the same.

    The layers are those whose class is one of these, or was registered with `sparselab.nn.register_dense`; a
    subclass counts as its base if it redefines nothing but ``__init__``, ``reset_parameters`` and
    ``extra_repr``, and adds no member to its class (`sparselab.densify` then gives the base). Another one may
    compute or be read by its owner in ways of its own, and stays dense likewise.

    - `torch.nn.Linear`.
    - `torch.nn.Conv1d`, ``Conv2d``, ``Conv3d``, and their transposed ``ConvTranspose1d``, ``ConvTranspose2d``
      and ``ConvTranspose3d``.
    - `torch.nn.Embedding`, unless its gradients are sparse tensors.
    - ``transformers.pytorch_utils.Conv1D``, a linear layer with a transposed weight, as GPT-2 has it, and the
      ``FalconLinear`` of Falcon.
    - The projections of `torch.nn.MultiheadAttention`, which go by ``q_proj``, ``k_proj``, ``v_proj`` and
      ``out_proj`` below the name of the attention, and by its class; where any matches, the attention becomes
      a `SparseMultiheadAttention`.
    - The weights of `torch.nn.GRU`, `LSTM` and `RNN` without projections, which go by their names
      (``"gru.weight_hh_l0"``) and by the class; the network becomes a `SparseGRU`, `SparseLSTM` or
      `SparseRNN`.

    A class as a key takes its subclasses along, so that none is passed over in silence: those that must stay
    dense are named. A key for the subclass alone goes before it.

    Torch's Transformer encoders leave the fused path of evaluation where a layer in them was swapped.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> sparsify(model, {"0": 0.9, "2": {"layer": "masked", "density": 0.5}})
    Sequential(
      (0): SparseLinear(in_features=64, out_features=256, bias=True, sparsity=0.9, nnz=1638)
      (1): ReLU()
      (2): MaskedLinear(in_features=256, out_features=10, bias=True, sparsity=0.5, nnz=1280)
    )

    By class, but for what a function picks:

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> rules = {lambda module, name: module.out_features < 16: None, torch.nn.Linear: 0.9}
    >>> [type(layer).__name__ for layer in sparsify(model, rules)]
    ['SparseLinear', 'ReLU', 'Linear']
    """
    if init not in ("random", "magnitude"):
        raise ValueError(f'init must be "random" or "magnitude", got {init!r}')
    choice = choose(model, rules, layer)
    if init == "magnitude":
        for name, (each, _) in choice.layers.items():
            if each.linear.weight.is_meta:
                raise ValueError(f'init must be "random" on the meta device, where {name!r} has no weights')
    choice.warn("sparsify", 'A rule of None, such as {"name": None},')
    swap(model, [(each, rule.make(each.linear, init)) for each, rule in choice.layers.values()])
    return model


def plan_sparsify(model: nn.Module, rules: Rules, *, layer: str = "sparse") -> SparsifyPlan:
    """List what ``sparsify(model, rules, layer=layer)`` would change, and change nothing.

    Parameters
    ----------
    model : torch.nn.Module
    rules, layer
        As of `sparsify`.

    Returns
    -------
    SparsifyPlan
        Its ``layers`` have a name, the class they are and the one they become, shape, sparsity, number of
        connections, and bytes before and after (weights, topology, bias). Its ``left`` is what rules match
        and what would stay dense all the same, each with its name, class, reason and size. Its totals say how
        much of the model's Parameters lies in either, and elsewhere.

    Raises
    ------
    TypeError, ValueError
        Where `sparsify` would.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> print(plan_sparsify(model, {"0": 0.9}))
    layer  kind    becomes          shape  sparsity  connections  bytes before  bytes after
    0      Linear  SparseLinear  256 x 64       0.9        1,638        66,560       12,908
    total                                                  1,638        66,560       12,908
    parameters of the model: 16,640 in layers that become sparse, 0 in layers left dense, 2,570 elsewhere
    bytes of the model: 76,840 before, 23,188 after
    """
    return draw_plan(model, choose(model, rules, layer))


def find_linear(model: nn.Module, include: Keys = "*", exempt: Keys = ()) -> dict[str, Any]:
    """The layers that can be swapped for ones with single connections, by qualified name, in the order of the
    model.

    Linear ones of another class than `torch.nn.Linear` are given as one with their weights, in their memory.

    Parameters
    ----------
    model : torch.nn.Module
    include, exempt : key or iterable of keys
        Keys as in `sparsify`: layers that match one of `include` and none of `exempt`.

    Raises
    ------
    TypeError, ValueError
        As `sparsify` does for its keys and layers; `exempt` must match too. And if no layer is left.
    """
    sparse = [name for name, _ in find_sparse(model)]
    if sparse and not find_dense(model):
        raise ValueError(
            f"model must have dense layers, got sparse ones only: {listed(sparse)}. sparselab.GMP prunes "
            f"them further while they train, and sparselab.densify(model) makes them dense again"
        )
    choice = select(model, include, exempt)
    if not choice.layers:
        left = "; ".join(map(str, choice.left))
        raise ValueError(
            f"include must match a layer that exempt does not, got {include!r} and {exempt!r}"
            + (f"; {left}" if left else "")
        )
    choice.warn("prune", "A key of exempt")
    for layer, _ in choice.layers.values():
        check_dtype("dtype", layer.linear.weight.dtype)
    return {name: layer.linear for name, (layer, _) in choice.layers.items()}


def keep_positions(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Swap layers of `find_linear` for sparse ones with the weights at int64 positions, ascending."""
    layers = find_dense(model)
    new = {name: _keep(layers[name].linear, at) for name, at in kept.items()}
    swap(model, [(layers[name], layer) for name, layer in new.items()])


def _keep(dense: nn.Module, at: Tensor) -> SparseLayer:
    kind = find_kind("sparse", dense)
    assert kind is not None, "find_linear gives layers that have a sparse kind"
    cls: Any = kind.cls
    new: SparseLayer = cls.from_positions(dense, at)
    return new


def measure_sparsity(model: nn.Module) -> float:
    """Fraction of a model's weight positions that do not exist.

    Counts sparse layers and, as fully live, every other parameter of two or more dimensions, once where
    modules share it; biases and norms are left out. 0 for a model without weights.

    Examples
    --------
    >>> from sparselab import SparseLinear
    >>> measure_sparsity(SparseLinear(100, 10, sparsity=0.75))
    0.75
    """
    sparse = [layer for _, layer in find_sparse(model)]
    positions = sum(math.prod(layer.shape) for layer in sparse)
    live = sum(round(math.prod(layer.shape) * layer.density) for layer in sparse)
    counted = {id(parameter) for layer in sparse for parameter in layer.parameters()}
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in counted:
            positions += parameter.numel()
            live += parameter.numel()
    return 1 - live / positions if positions else 0.0
