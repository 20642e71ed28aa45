"""Recurrent networks whose input and recurrent weights can be sparse."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from sparselab.nn.layers.composed import steps
from sparselab.nn.layers.composed.parts import as_dense, copy_linear
from sparselab.nn.layers.composed.steps import State, Step
from sparselab.nn.layers.dense import DenseLayer, DenseType, LinearView, register_dense
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.linear import SparseLinear
from sparselab.nn.ops.tools.nodes import is_node, node_of

Network = TypeVar("Network", bound="Recurrent")

#: Layers of which `sparsify` knows the parameters by name.
_MOST_LAYERS = 64


class Recurrent(nn.Module):
    """What recurrent networks have in common; see `SparseGRU`.

    Parameters
    ----------
    dense : torch.nn.RNNBase
        What has the settings; it may be on the device "meta".
    layers : mapping of str to torch.nn.Module
        A linear layer for each weight of the dense network, by its name.
    """

    #: What `to_dense` makes.
    dense_class: type[nn.Module]
    #: How many tensors are carried from step to step.
    n_states: ClassVar[int] = 1

    def __init__(self, dense: Any, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.mode, self.input_size, self.hidden_size = dense.mode, dense.input_size, dense.hidden_size
        self.num_layers, self.bias, self.batch_first = dense.num_layers, dense.bias, dense.batch_first
        self.dropout, self.bidirectional = dense.dropout, dense.bidirectional
        self.proj_size = 0
        for name in weight_names(self):
            self.add_module(name, layers[name])

    def _begin(self, dense: Any, amount: Mapping[str, float | None], device: Any, dtype: Any) -> None:
        """Draw all layers, sparse, for the settings of a dense network."""
        if dense.proj_size:
            raise ValueError(
                f"proj_size must be 0, which is what sparse networks have, got {dense.proj_size}"
            )
        layers = {
            part.part: SparseLinear(
                part.linear.in_features, part.linear.out_features, dense.bias, device=device, dtype=dtype,
                **amount,
            )
            for part in recurrent_parts(dense)
        }  # fmt: skip
        Recurrent.__init__(self, dense, layers)

    @classmethod
    def from_dense(
        cls: type[Network], network: Any, sparsity: float | None = None, *, density: float | None = None
    ) -> Network:
        """The largest weights of each layer of a dense network, by magnitude."""
        cls._require(network)
        return cls.of_layers(
            network,
            {
                part.part: SparseLinear.from_dense(part.linear, sparsity, density=density)
                for part in recurrent_parts(network)
            },
        )

    @classmethod
    def of_layers(cls: type[Network], network: Any, layers: Mapping[str, nn.Module] | None = None) -> Network:
        """A dense network's settings and weights, with layers in the place of some of its weights.

        Parameters
        ----------
        network : torch.nn.RNNBase
        layers : mapping of str to torch.nn.Module, optional
            By the names of the weights (``"weight_ih_l0"``), with the bias that goes with them. The others
            become `torch.nn.Linear`.

        Raises
        ------
        TypeError
            If network is not of the dense class.
        ValueError
            If a name in layers is no weight of it, or it has projections (``proj_size``).
        """
        cls._require(network)
        own = {part.part: part for part in recurrent_parts(network)}
        layers = layers or {}
        if unknown := sorted(set(layers) - set(own)):
            raise ValueError(f"layers must be named {', '.join(own)}, got {unknown[0]!r}")
        new = cls.__new__(cls)
        Recurrent.__init__(
            new, network,
            {name: layers[name] if name in layers else copy_linear(own[name].linear) for name in own},
        )  # fmt: skip
        return new.train(network.training)

    @classmethod
    def _require(cls, network: Any) -> None:
        if not isinstance(network, cls.dense_class):
            name = cls.dense_class.__name__
            raise TypeError(f"network must be a torch.nn.{name}, got {type(network).__name__}")
        if network.proj_size:
            raise ValueError(
                f"network must have a proj_size of 0, which is what sparse networks have, got "
                f"{network.proj_size}"
            )

    @torch.no_grad()
    def to_dense(self) -> Any:
        """The dense network with the same outputs, mode and trainability."""
        names = weight_names(self)
        refuse_to_lose(self, "to_dense", names)
        dense = {name: as_dense(getattr(self, name)) for name in names}
        weight = dense[names[0]].weight
        make: Any = self.dense_class
        nonlinearity = {"nonlinearity": self.mode[4:].lower()} if self.mode.startswith("RNN") else {}
        new = make(
            self.input_size, self.hidden_size, self.num_layers, bias=self.bias, batch_first=self.batch_first,
            dropout=self.dropout, bidirectional=self.bidirectional, device="meta", dtype=weight.dtype,
            **nonlinearity,
        )  # fmt: skip
        for name, layer in dense.items():
            setattr(new, name, layer.weight)
            if self.bias:
                setattr(new, name.replace("weight", "bias"), layer.bias)
        return new.train(self.training)

    def flatten_parameters(self) -> None:
        """Nothing, for programs that call it: each layer has memory of its own."""

    @property
    def _step(self) -> Step:
        found: Step = getattr(steps, self.mode.lower())
        return found

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As the dense network.

        Parameters
        ----------
        input : (time, batch, input_size), (batch, time, input_size) if ``batch_first``, (time, input_size), \
or PackedSequence
        hx : (layers * directions, batch, hidden_size), without batch if the input has none, optional
            Of an LSTM two of them, for h and c; zeros if it is None.

        Returns
        -------
        output : as the input, with directions * hidden_size features
        hx : as hx, after the last step of each sequence

        Raises
        ------
        RuntimeError
            If a shape or dtype does not fit.
        """
        if is_node(input):
            return node_of(self, input, hx)  # type: ignore[no-any-return]
        if hx is not None and isinstance(hx, Tensor) == (self.n_states > 1):
            expected = "a tuple of two tensors" if self.n_states > 1 else "one tensor"
            raise RuntimeError(f"hx must be {expected}, got a {type(hx).__name__}")
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes.tolist()
            states = self._states(hx, input.data, sizes[0], input.sorted_indices)
            data, states = self._run(input.data, sizes, states)
            order = input.unsorted_indices
            states = states if order is None else tuple(each.index_select(1, order) for each in states)
            packed = PackedSequence(data, input.batch_sizes, input.sorted_indices, order)
            return packed, states if self.n_states > 1 else states[0]
        if input.ndim not in (2, 3):
            raise RuntimeError(f"input must have 2 or 3 dimensions, got {input.ndim}")
        batched, swapped = input.ndim == 3, input.ndim == 3 and self.batch_first
        x = input.transpose(0, 1) if swapped else input if batched else input.unsqueeze(1)
        n_steps, n = x.shape[:2]
        if not n_steps:
            raise RuntimeError("input must have at least one step, got none")
        if not batched and hx is not None:
            hx = tuple(each.unsqueeze(1) for each in hx) if self.n_states > 1 else hx.unsqueeze(1)
        states = self._states(hx, x, n, None)
        data, states = self._run(x.reshape(n_steps * n, x.shape[2]), [n] * n_steps, states)
        y = data.reshape(n_steps, n, data.shape[1])
        y = y.transpose(0, 1) if swapped else y if batched else y.squeeze(1)
        states = states if batched else tuple(each.squeeze(1) for each in states)
        return y, states if self.n_states > 1 else states[0]

    def _states(self, hx: Any, x: Tensor, n: int, order: Tensor | None) -> State:
        """The state to begin with, checked, in the order of the sequences."""
        shape = self.num_layers * (2 if self.bidirectional else 1), n, self.hidden_size
        if hx is None:
            return (x.new_zeros(shape),) * self.n_states
        states: State = tuple(hx) if self.n_states > 1 else (hx,)
        if len(states) != self.n_states or any(each.shape != shape for each in states):
            got = ", ".join(str(tuple(each.shape)) for each in states)
            raise RuntimeError(f"hx must be {self.n_states} of shape {shape}, got {got}")
        return states if order is None else tuple(each.index_select(1, order) for each in states)

    def _run(self, data: Tensor, sizes: list[int], states: State) -> tuple[Tensor, State]:
        """All layers, of steps that are laid out one after the other: outputs, and states at the end."""
        finals: list[State] = []
        directions = [("", steps.forwards), ("_reverse", steps.backwards)][: 2 if self.bidirectional else 1]
        for layer in range(self.num_layers):
            outputs = []
            for suffix, walk in directions:
                ih, hh = (getattr(self, f"weight_{each}_l{layer}{suffix}") for each in ("ih", "hh"))
                first = tuple(each[len(finals)] for each in states)
                *reached, final = walk(self._step, ih(data), sizes, hh, first)
                outputs.append(torch.cat([state[0] for state in reached]))
                finals.append(final)
            data = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                data = F.dropout(data, self.dropout, self.training)
        return data, tuple(torch.stack(each) for each in zip(*finals, strict=True))

    def extra_repr(self) -> str:
        said = [f"{self.input_size}, {self.hidden_size}"]
        usual = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        said += [
            f"{name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value
        ]
        return ", ".join(said)


class SparseGRU(Recurrent):
    """`torch.nn.GRU` with sparse weights for the input and the hidden state of each layer and direction.

    Takes the same arguments and computes the same function. `sparselab.sparsify` makes it from a dense one,
    whose weights go by the names that they have there (``"gru.weight_ih_l0"``), and by its class.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        As of `torch.nn.GRU`.
    sparsity : float in [0, 1], optional
        Of each weight; 0.9 if density is not given either.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.

    Attributes
    ----------
    weight_ih_l0, weight_hh_l0, ... : torch.nn.Module
        A layer for each weight of the dense network, dense or sparse, with the bias that goes with it; gates
        are stacked as rows, as torch stacks them.

    Raises
    ------
    TypeError, ValueError
        As `torch.nn.GRU` and `SparseLinear`.

    Notes
    -----
    The product with the input is made once for all steps; the steps follow each other in Python, one product
    with the hidden state each.

    Examples
    --------
    >>> import torch
    >>> gru = SparseGRU(40, 64, batch_first=True, sparsity=0.9)
    >>> y, h = gru(torch.randn(8, 20, 40))
    >>> y.shape, h.shape, gru.weight_hh_l0.nnz
    (torch.Size([8, 20, 64]), torch.Size([1, 8, 64]), 1229)
    """

    dense_class = nn.GRU

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        sparsity: float | None = None, density: float | None = None,
    ) -> None:  # fmt: skip
        dense = nn.GRU(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device="meta"
        )
        self._begin(dense, {"sparsity": sparsity, "density": density}, device, dtype)


class SparseLSTM(Recurrent):
    """`torch.nn.LSTM` with sparse weights for the input and the hidden state of each layer and direction.

    As `SparseGRU`.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        As of `torch.nn.LSTM`.
    proj_size : int
        Must be 0: the hidden state is not projected.
    device, dtype
        As of `torch.nn.LSTM`.
    sparsity, density : float in [0, 1], optional
        As of `SparseGRU`.

    Examples
    --------
    >>> import torch
    >>> lstm = SparseLSTM(40, 64, num_layers=2, sparsity=0.9)
    >>> y, (h, c) = lstm(torch.randn(20, 8, 40))
    >>> y.shape, h.shape, c.shape
    (torch.Size([20, 8, 64]), torch.Size([2, 8, 64]), torch.Size([2, 8, 64]))
    """

    dense_class = nn.LSTM
    n_states = 2

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        sparsity: float | None = None, density: float | None = None,
    ) -> None:  # fmt: skip
        dense = nn.LSTM(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device="meta",
        )  # fmt: skip
        self._begin(dense, {"sparsity": sparsity, "density": density}, device, dtype)


class SparseRNN(Recurrent):
    """`torch.nn.RNN` with sparse weights for the input and the hidden state of each layer and direction.

    As `SparseGRU`.

    Parameters
    ----------
    input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional
        As of `torch.nn.RNN`.
    device, dtype
        As of `torch.nn.RNN`.
    sparsity, density : float in [0, 1], optional
        As of `SparseGRU`.
    """

    dense_class = nn.RNN

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        sparsity: float | None = None, density: float | None = None,
    ) -> None:  # fmt: skip
        dense = nn.RNN(
            input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional,
            device="meta",
        )  # fmt: skip
        self._begin(dense, {"sparsity": sparsity, "density": density}, device, dtype)


def weight_names(network: Any) -> list[str]:
    """The names of the weights of a network, dense or sparse, layer by layer."""
    return [*_names(network.num_layers, network.bidirectional)]


def _names(num_layers: int, bidirectional: bool) -> Iterator[str]:
    for layer in range(num_layers):
        for suffix in ("", "_reverse")[: 2 if bidirectional else 1]:
            yield f"weight_ih_l{layer}{suffix}"
            yield f"weight_hh_l{layer}{suffix}"


def recurrent_parts(network: Any) -> Sequence[DenseLayer]:
    """The weights of a dense network as linear layers, unless it has projections."""
    if network.proj_size:
        return ()
    found = []
    for name in weight_names(network):
        weight = getattr(network, name)
        bias = getattr(network, name.replace("weight", "bias")) if network.bias else None
        sources = (weight,) if bias is None else (weight, bias)
        found.append(DenseLayer(network, name, LinearView(weight, bias, network.training), sources))
    return tuple(found)


_KNOWN = tuple(
    name.replace("weight", kind) for name in _names(_MOST_LAYERS, True) for kind in ("weight", "bias")
)


def _join(cls: type[Recurrent], network: Any, layers: Mapping[str, nn.Module]) -> nn.Module:
    return cls.of_layers(network, layers)


for _cls in (SparseGRU, SparseLSTM, SparseRNN):
    register_dense(
        DenseType(_cls.dense_class, recurrent_parts, known=_KNOWN, join=functools.partial(_join, _cls))
    )
