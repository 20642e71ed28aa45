"""A linear layer whose connections are dense blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels import BlockCSR, PaddedCSR
from sparselab.kernels.arrays import n_connections
from sparselab.kernels.layouts.block_csr import check_block_shape
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.layers.linear import LinearLayer, require_linear
from sparselab.nn.ops.cpu.narrow_blocks import is_native, pays
from sparselab.nn.ops.cutting import cut
from sparselab.nn.ops.tracing import is_plain
from sparselab.nn.storage.blocks import Blocks
from sparselab.nn.storage.checks import (
    check_bias,
    check_size,
    read_sparsity,
    under_autocast,
    warn_if_none,
)
from sparselab.nn.storage.entries import largest_positions
from sparselab.nn.storage.patterns import read_blocks, read_pattern

if TYPE_CHECKING:
    import scipy.sparse

_BLOCK = (32, 32)


class BlockSparseLinear(LinearLayer):
    """A linear layer ``y = x W^T + b`` whose W is made of dense blocks, all of one shape.

    A loaded vector of tokens serves four multiply-adds in all three passes, where that of a `SparseLinear`
    serves one: at equal sparsity it is up to twice as fast. Small blocks cost little accuracy.

    Parameters
    ----------
    in_features, out_features : int
        Any sizes. Blocks that reach beyond them are stored whole; what lies outside is 0 and never trained.
    bias : bool
    sparsity : float in [0, 1], optional
        Fraction of blocks that do not exist; 0.9 if density is not given either. Exactly
        ``round((1 - sparsity) * grid[0] * grid[1])`` blocks are drawn uniformly at random, from torch's
        random generator.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    block_shape : (int, int)
        Outputs and inputs of a block. Four or more of either (4 x 1, 4 x 4, 8 x 32) make full use of the
        kernels; smaller blocks work.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16. In the latter two sums are still made in float32. Blocks whose
        sizes are multiples of 16 are multiplied in bfloat16 itself, also under autocast in bfloat16, by a CPU
        that has a matrix unit for it (Intel AMX).

    Attributes
    ----------
    weight_values : Parameter, (blocks, block_out, block_in)
        Weights of the blocks, in the order of their positions in the grid.
    indptr : int64 buffer, (grid[0] + 1,)
        ``weight_values[indptr[r] : indptr[r + 1]]`` are the blocks in row r of the grid.
    indices : uint16, int32 or int64 buffer, (blocks,)
        Column of each block in the grid.
    forward_mask : bool buffer, (blocks, block_out, block_in), or None
        As of `SparseLinear`.
    weight : SparseWeight, (out_features, in_features)
        As of `SparseLinear`.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        If a size or the shape of blocks is not valid, bias no bool, sparsity and density are both given, or
        either is not in [0, 1].

    Notes
    -----
    To an algorithm a connection is a block: `nnz` and `positions` count blocks of the `grid`. `set_topology`
    takes a matrix of whole blocks, or a boolean one of the shape of the grid.

    References
    ----------
    Gray, Radford, Kingma: GPU Kernels for Block-Sparse Weights, 2017.

    Examples
    --------
    >>> import torch, sparselab
    >>> layer = sparselab.BlockSparseLinear(1536, 384, sparsity=0.9, block_shape=(4, 4))
    >>> layer(torch.randn(8, 16, 1536)).shape
    torch.Size([8, 16, 384])
    >>> layer.grid, layer.nnz, layer.weight_values.shape
    ((96, 384), 3686, torch.Size([3686, 4, 4]))
    """

    storage: Blocks

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        block_shape: tuple[int, int] = _BLOCK,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = check_size("out_features", out_features), check_size("in_features", in_features)
        bias = check_bias(bias, f"BlockSparseLinear({in_features}, {out_features}")
        storage = Blocks(shape, check_block_shape(block_shape))
        amount = read_sparsity(sparsity, density)
        super().__init__(storage, n_connections(storage.grid, amount), bias, device, dtype)
        self._draw_if_there(amount)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, sparsity: float | None = None, *, density: float | None = None,
        block_shape: tuple[int, int] = _BLOCK,
    ) -> BlockSparseLinear:  # fmt: skip
        """The blocks of a dense layer with the largest L2 norms; of equal ones the first in their order."""
        require_linear(linear)
        blocks = cut(linear.weight.detach(), check_block_shape(block_shape))
        amount = read_sparsity(sparsity, density)
        nnz = n_connections((1, len(blocks)), amount)
        warn_if_none(nnz, (1, len(blocks)), amount, stacklevel=3)
        positions = largest_positions(blocks.double().square().sum((1, 2)), nnz)
        return cls._holding(linear, positions.cpu(), blocks[positions], block_shape=block_shape)

    @classmethod
    def from_pattern(
        cls,
        pattern: Any,
        bias: bool = True,
        *,
        block_shape: tuple[int, int] | None = None,
        shape: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockSparseLinear:
        """A layer with the blocks of a matrix (out_features, in_features), or of a grid of blocks.

        Parameters
        ----------
        pattern : SciPy sparse matrix or array, bool array or tensor, or torch.sparse_csr tensor
            As of `SparseLinear.from_pattern`; it must consist of whole blocks. Of a boolean one, if `shape`
            is given, each entry may stand for a block.
        bias : bool
        block_shape : (int, int), optional
            By default that of the pattern, if it is a SciPy BSR matrix, else (32, 32).
        shape : (int, int), optional
            ``(out_features, in_features)``; by default that of the pattern.
        dtype : torch.dtype, optional

        Raises
        ------
        TypeError, ValueError
            As `SparseLinear.from_pattern`; and if part of a block is missing.

        Examples
        --------
        >>> import numpy as np
        >>> layer = BlockSparseLinear.from_pattern(np.eye(2, dtype=bool), block_shape=(4, 4), shape=(8, 6))
        >>> layer.indptr, layer.sparsity
        (tensor([0, 1, 2]), 0.5)
        """
        if block_shape is None:
            block_shape = getattr(pattern, "blocksize", _BLOCK)
        rows, columns = read_pattern(pattern).shape if shape is None else shape
        new = cls(columns, rows, bias, sparsity=1.0, block_shape=block_shape, dtype=dtype)
        new._begin_with(*new._read(pattern))
        return new

    def _read(self, pattern: Any) -> tuple[Tensor, Tensor | None]:
        return read_blocks(pattern, self.shape, self.block_shape)

    def _under_autocast(self, input: Tensor) -> Tensor:
        autocast, weights = torch.get_autocast_dtype("cpu"), self.in_use
        if not (
            autocast is torch.bfloat16
            and weights.dtype is torch.float32
            and is_native(self.block_shape)
            # A compiled graph serves any number of tokens.
            and (
                not is_plain(input, weights)
                or pays(weights.numel(), input.numel() // max(self.in_features, 1))
            )
        ):
            return super()._under_autocast(input)
        values, bias = weights.to(autocast), None if self.bias is None else self.bias.to(autocast)
        return under_autocast(lambda x: self._multiply(x, values, bias), input, autocast)

    def cut(self, dense: Tensor) -> Tensor:
        """All blocks of the grid, in the order of positions, of a matrix (out_features, in_features).

        What lies outside the matrix is 0.
        """
        return cut(dense, self.block_shape)

    def to_scipy(self) -> scipy.sparse.bsr_array | scipy.sparse.csr_array:
        """W as a SciPy BSR array (out_features, in_features); CSR if blocks reach beyond it. A copy.

        Every weight of a block is stored, also one that is 0. bfloat16 and float16 become float32.

        Raises
        ------
        ModuleNotFoundError
            If SciPy is not installed.
        """
        whole = all(n % size == 0 for n, size in zip(self.shape, self.block_shape, strict=True))
        return self._blocks().to_scipy() if whole else super().to_scipy()

    def _blocks(self) -> BlockCSR:
        """W as it is in use, not to be written to; bfloat16 and float16 as float32."""
        values = self.in_use.detach().cpu()
        values = values.float() if values.itemsize < 4 else values
        return BlockCSR.of(self.storage.blocks(self), values.numpy())

    def _matrix(self) -> PaddedCSR:
        topology, slots = self.storage.entries(self)
        # An index of one entry would be a number to NumPy as long as it is a tensor.
        return PaddedCSR.of(topology, self._blocks().values.reshape(-1)[np.asarray(slots)])

    def reset_parameters(self) -> None:
        """Draw as many blocks anew, at random, and new weights and biases.

        Weights are drawn as by `fan_in_uniform_`, with the inputs that each output really has.
        """
        super().reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_shape={self.block_shape}"


def _recognises(state: State) -> dict[str, object] | None:
    if "indptr" not in state or "weight_values" not in state:
        return None
    block_shape = tuple(state["weight_values"].shape[1:])
    return None if block_shape == (1, 1) else {"block_shape": block_shape}


register_kind(LayerKind("block", BlockSparseLinear, (nn.Linear,), ("block_shape",), recognises=_recognises))
