"""What layers have in common that keep their live connections, and only those, in compressed rows."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import n_connections
from sparselab.nn.follow.origin import relate
from sparselab.nn.follow.replaced import connections_replaced
from sparselab.nn.layers.base import SparseLayer, is_sparse, weight_of
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.ops.cpu.variants import Measured
from sparselab.nn.ops.topologies import TensorTopology
from sparselab.nn.storage.base import draw_seed
from sparselab.nn.storage.checks import check_dtype, warn_if_none
from sparselab.nn.storage.compressed import Compressed
from sparselab.nn.storage.entries import largest_positions
from sparselab.nn.storage.narrow import check_state, find_narrow
from sparselab.nn.weight.view import SparseWeight, is_weight_of, weight_view
from sparselab.nn.weight.writing import refuse_to_write

Layer = TypeVar("Layer", bound="CompressedLayer")


#: All that are alive, to tell whose state is loaded.
_living: weakref.WeakSet[CompressedLayer] = weakref.WeakSet()


class CompressedLayer(SparseLayer):
    """A sparse layer that keeps compressed rows; subclasses say what is computed with W.

    Parameters
    ----------
    storage : Compressed
    nnz : int
        Connections.
    bias : bool
    device, dtype
        As of `sparselab.SparseLinear`.
    n_outputs : int, optional
        Biases, if there are some; as many as W has rows by default.
    """

    storage: Compressed
    weight_values: nn.Parameter
    indptr: Tensor
    indices: Tensor
    is_shareable = True

    def __init__(
        self,
        storage: Compressed,
        nnz: int,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        n_outputs: int | None = None,
    ) -> None:
        super().__init__(storage)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_dtype("dtype", dtype)
        storage.register(self, nnz, device, dtype)
        _living.add(self)
        place = self.weight_values.device
        n_outputs = self.out_features if n_outputs is None else n_outputs
        self.bias = nn.Parameter(torch.empty(n_outputs, device=place, dtype=dtype)) if bias else None

    def _draw_if_there(self, sparsity: float, stacklevel: int = 4) -> None:
        """First values, unless the layer is on the device "meta"; warn if that sparsity leaves none."""
        if not self.weight_values.is_meta:
            warn_if_none(self.nnz, self.grid, sparsity, stacklevel)
            self.reset_parameters()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense layer's weight."""
        return self.shape

    @property
    def weight(self) -> SparseWeight:
        """A `sparselab.nn.SparseWeight`: for code that reads a dense layer's weight or multiplies with it.

        It is no Parameter, and cannot be assigned.
        """
        return weight_view(self)  # type: ignore[no-any-return]

    @weight.setter
    def weight(self, value: object) -> None:
        if not is_weight_of(self, value):
            refuse_to_write(self.weight, "layer.weight = ...")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `torch.nn.Module`, which calls it to assign a Parameter; not under the name of `weight`."""
        if name == "weight":
            refuse_to_write(self.weight, "layer.weight = ...")
        super().register_parameter(name, param)

    def __dir__(self) -> list[str]:
        # torch.jit asks for all of these; there is no Parameter if the weights are frozen or computed.
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return names if self.storage.parameter in self._parameters else [n for n in names if n != "stored"]

    def topology(self) -> TensorTopology:
        """The topology that the layer has now, with its plans."""
        return self.storage.topology(self)

    def topology_arguments(self) -> tuple[Tensor, Tensor, list[int], str]:
        """The topology in the words of torch's operators."""
        return self.storage.arguments(self)

    @classmethod
    def _from_largest(cls: type[Layer], dense: Any, sparsity: float) -> Layer:
        """The largest weights of a dense layer, by magnitude; of equal ones the first in row-major order."""
        nnz = n_connections((1, dense.weight.numel()), sparsity)
        warn_if_none(nnz, (len(dense.weight), dense.weight[:1].numel()), sparsity)
        return cls.from_positions(dense, largest_positions(dense.weight, nnz))

    @classmethod
    def from_positions(cls: type[Layer], dense: Any, positions: Tensor) -> Layer:
        """The weights of a dense layer at these int64 positions, ascending."""
        return cls._holding(dense, positions, dense.weight.detach().reshape(-1)[positions])

    @classmethod
    def _from_layer(cls: type[Layer], layer: SparseLayer) -> Layer:
        """The same connections, weights, biases, mode and trainability."""
        new = cls._holding(layer, layer.positions(), layer.per_connection(layer.stored.detach()))
        if layer.forward_mask is not None:
            mask = layer.per_connection(layer.forward_mask)
            new.forward_mask = mask.reshape(new.weight_values.shape).clone()
        return new

    @classmethod
    def _holding(cls: type[Layer], like: Any, positions: Tensor, weights: Tensor, **settings: Any) -> Layer:
        """A layer like a dense or sparse one, with its biases, and with these connections."""
        size = math.prod(like.shape) if is_sparse(like) else weight_of(like).numel()
        new = cls.like(like, 1 - len(positions) / max(size, 1), device="meta", **settings)
        new = new.to_empty(device=weights.device)
        new._connect(positions, weights)
        if new.bias is not None:
            with torch.no_grad():
                new.bias.copy_(like.bias)
        return new

    def _dense_twin(self) -> Any:
        """A dense layer with the same outputs, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        self.storage.check_kin(self)
        settings = {name: getattr(self, name) for name in self.settings}
        values = self.in_use
        new: Any = self.dense_type(**settings, bias=self.bias is not None, device="meta", dtype=values.dtype)
        new.weight = nn.Parameter(self.weight.detach().to_dense(), values.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach().to(values.dtype, copy=True)
            new.bias = nn.Parameter(bias, self.bias.requires_grad)
        return new.train(self.training)

    def reset_parameters(self) -> None:
        """Draw a new random topology of the same count, and new weights and biases."""
        storage = self.storage
        if find_narrow(self) is not None:
            storage.held(self)  # says that it is frozen
        with connections_replaced(self):
            storage.set_positions(self, storage.draw(self, np.random.default_rng(draw_seed())))
        self.forward_mask = None
        storage.draw_weights(self)
        self._draw_bias(storage.input_pointers(self))

    def _connect(self, positions: Tensor, weights: Tensor | None) -> None:
        self.storage.connect(self, positions, weights)

    def freeze(self: Layer, weights: torch.dtype | None = None) -> Layer:
        """Let go of what only training needs, in place, and return the layer itself.

        That is: ``requires_grad`` of `weight_values` and `bias`, their gradients, the `gradient_hook` of an
        algorithm (which must take no more steps), and the plans of the backward passes. The plan of the
        forward pass stays. A gradient by x can still be had; its plan is then made anew, and kept.

        Parameters
        ----------
        weights : torch.bfloat16, torch.int8 or torch.float32, optional
            Hold the weights of a linear layer in these few bits, rounded to nearest, and in no others: in
            int8 with a float32 scale for each output, ``weight_scales``. `weight_values` is a buffer then,
            which is neither trained nor cast (by ``half()``, say). Inputs of float32, bfloat16 and float16
            are taken, outputs have their dtype, sums are float32. `weight` and `to_dense` give the rounded
            weights in float32; a state loads into layers that are frozen so, too. float32 makes a Parameter
            of them again. Weights that a `forward_mask` leaves out become 0. By default they stay as they
            are.

        Raises
        ------
        TypeError, ValueError
            If weights is another dtype, the layer is no linear one, is of float64, or computes its weights,
            or they are infinite or NaN. Nothing has been changed then.

        Examples
        --------
        >>> from sparselab import SparseLinear
        >>> SparseLinear(64, 32).freeze().weight_values.requires_grad
        False
        >>> SparseLinear(64, 32).freeze(weights=torch.int8)
        SparseLinear(in_features=64, out_features=32, bias=True, sparsity=0.8999, nnz=205, weights=int8)
        """
        if weights is not None:
            self._set_weights(weights)
        self.requires_grad_(False)
        self.zero_grad(set_to_none=True)
        self.gradient_hook = None
        if not self.indices.is_meta:
            self.topology().keep_forward()
        return self

    def _set_weights(self, dtype: torch.dtype) -> None:
        raise TypeError(
            f"weights of a {type(self).__name__} must stay as they are, got {dtype}; SparseLinear, "
            "FanInLinear and BlockSparseLinear can be frozen in torch.bfloat16 or torch.int8"
        )

    def forget_origin(self) -> None:
        """Let the layer be no copy of another one any more, nor another one a copy of it.

        Else, once one of them has other connections, changes of this one's weights in place are taken for a
        wrong average of both and refused.
        """
        if self.storage.kin is not None:
            self.storage.kin.leave(self)

    def use_measured(self, measured: Measured | None) -> None:
        """Let forward passes go by what was measured, as long as the density stays; None: by the rule."""
        self.storage.measured = measured
        if not self.indices.is_meta:
            self.topology().measured = measured

    def plan_bytes(self) -> int:
        """Bytes of the kernel plans held now."""
        return self.storage.plan_bytes()

    def __deepcopy__(self: Layer, memo: dict[int, Any]) -> Layer:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        relate(new, self)
        return new

    def __getstate__(self) -> dict[str, Any]:
        self.storage.check_kin(self)
        state = super().__getstate__()
        if self.indices.dtype == torch.uint16:
            # pickle cannot load a uint16 tensor (torch.save can), so the columns travel as int16 bits.
            state["_buffers"] = {**self._buffers, "indices": self.indices.view(torch.int16)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _living.add(self)
        if self.indices.dtype == torch.int16:
            self.indices = self.indices.view(torch.uint16)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.storage.check_kin(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.storage.save(self, destination, prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load into whatever topology this layer has now: the saved one is checked and replaces it."""
        storage = self.storage
        saved = {name: state_dict.get(prefix + name) for name in storage.saved}
        computed = storage.parameter not in self._parameters and find_narrow(self) is None
        try:
            check_state(self, state_dict, prefix)
            if computed and saved["indices"] is not None:  # what they are computed from is loaded elsewhere
                saved[storage.parameter] = getattr(self, storage.parameter).detach()
                if saved["indices"].shape != self.indices.shape:
                    raise ValueError(
                        f"the state must have {self.nnz} connections, as many as the layer, whose weights "
                        f"are computed, got {saved['indices'].shape[0]}; remove its parametrization first"
                    )
            loaded = storage.check_state(saved, self.indices.dtype)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if loaded is None and strict and prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is that of a dense layer, which says nothing of connections: load "
                "the state into the dense model and sparsify that"
            )
        with connections_replaced(self):
            if loaded is not None:
                state_dict = storage.load(self, {**state_dict}, prefix, loaded)
                self._fit_forward_mask(state_dict.get(prefix + "forward_mask"))
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        self.forget_origin()
        source = _whose(saved["indices"])
        if source is not None and source is not self:
            relate(self, source)
        storage.refresh(self)


def _whose(indices: Tensor | None) -> CompressedLayer | None:
    """The layer whose columns these are, if it is alive and they are its own and no copy."""
    if indices is None or indices.numel() == 0:
        return None
    place = indices.data_ptr()
    return next((layer for layer in list(_living) if layer.indices.data_ptr() == place), None)
