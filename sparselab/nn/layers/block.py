"""A linear layer whose connections are dense blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselab.kernels import BlockCSR, PaddedCSR
from sparselab.kernels.arrays import Array, check_fraction, n_connections
from sparselab.kernels.checks import ascending
from sparselab.kernels.layouts.block_csr import BlockTopology, check_block_shape, grid_of
from sparselab.kernels.layouts.padded_csr import RowTopology
from sparselab.nn.layers.base import SparseLayer
from sparselab.nn.layers.kinds import LayerKind, State, register_kind
from sparselab.nn.layers.linear import SparseLinear
from sparselab.nn.ops import block_linear as _block_functional
from sparselab.nn.ops import linear as functional
from sparselab.nn.ops.cpu.block_products import few_tokens, product
from sparselab.nn.ops.cpu.plans import BlockPlans, BlockSizes
from sparselab.nn.ops.cpu.variants import BLOCKS, possible
from sparselab.nn.storage.blocks import cut, join, read_blocks
from sparselab.nn.storage.checks import check_blocks
from sparselab.nn.storage.contract import as_matrix, largest_positions, move_blocks
from sparselab.nn.storage.patterns import read_pattern

if TYPE_CHECKING:
    import scipy.sparse

_BLOCK = (32, 32)


class BlockSparseLinear(SparseLinear):
    """A linear layer ``y = x W^T + b`` whose W is made of dense blocks, all of one shape.

    A loaded vector of tokens serves four multiply-adds in all three passes, where that of a `SparseLinear`
    serves one: at equal sparsity it is up to twice as fast. Small blocks cost little accuracy.

    Parameters
    ----------
    in_features, out_features : int
        Any sizes. Blocks that reach beyond them are stored whole; what lies outside is 0 and never trained.
    bias : bool
    density : float in [0, 1], optional
        Fraction of blocks that exist.
    sparsity : float in [0, 1], optional
        1 - density; 0.9 if neither is given. Exactly ``round((1 - sparsity) * grid[0] * grid[1])`` blocks are
        drawn uniformly at random, from torch's random generator.
    block_shape : (int, int)
        Outputs and inputs of a block. Four or more of either (4 x 1, 4 x 4, 8 x 32) make full use of the
        kernels; smaller blocks work.
    device : torch.device, optional
        Forward passes run on the CPU.
    dtype : torch.dtype, optional
        float32, float64 or bfloat16. In bfloat16 the sums are still made in float32.

    Attributes
    ----------
    values : Parameter, (blocks, block_out, block_in)
        Weights of the blocks, in the order of their positions in the grid.
    indptr : int64 buffer, (grid[0] + 1,)
        ``values[indptr[r] : indptr[r + 1]]`` are the blocks in row r of the grid.
    indices : uint16, int32 or int64 buffer, (blocks,)
        Column of each block in the grid.
    forward_mask : bool buffer, (blocks, block_out, block_in), or None
        As of `SparseLinear`.
    bias : Parameter, (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        If a size or the shape of blocks is not valid, density and sparsity are both given, or either is not
        in [0, 1].

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
    >>> layer.grid, layer.nnz, layer.values.shape
    ((96, 384), 3686, torch.Size([3686, 4, 4]))
    """

    _plans_kind: ClassVar[type[Any]] = BlockPlans

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        density: float | None = None,
        sparsity: float | None = None,
        block_shape: tuple[int, int] = _BLOCK,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        SparseLayer.__init__(self, in_features, out_features)
        self.block_shape = check_block_shape(block_shape)
        n_blocks = n_connections(self.grid, _read_sparsity(density, sparsity))
        self._allocate((n_blocks, *self.block_shape), bias, device, dtype)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, sparsity: float, block_shape: tuple[int, int] = _BLOCK
    ) -> BlockSparseLinear:
        """The blocks of a dense layer with the largest L2 norms; of equal ones the first in their order."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        blocks = cut(linear.weight.detach(), check_block_shape(block_shape))
        nnz = n_connections((1, len(blocks)), sparsity)
        positions = largest_positions(blocks.double().square().sum((1, 2)), nnz)
        return cls._holding(linear, positions.cpu(), blocks[positions], block_shape=block_shape)

    @classmethod
    def from_pattern(
        cls,
        pattern: Any,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        block_shape: tuple[int, int] | None = None,
        shape: tuple[int, int] | None = None,
    ) -> BlockSparseLinear:
        """A layer with the blocks of a matrix (out_features, in_features), or of a grid of blocks.

        Parameters
        ----------
        pattern : SciPy sparse matrix or array, bool array or tensor, or torch.sparse_csr tensor
            As of `SparseLinear.from_pattern`; it must consist of whole blocks. Of a boolean one, if `shape`
            is given, each entry may stand for a block.
        bias : bool
        dtype : torch.dtype, optional
        block_shape : (int, int), optional
            By default that of the pattern, if it is a SciPy BSR matrix, else (32, 32).
        shape : (int, int), optional
            ``(out_features, in_features)``; by default that of the pattern.

        Raises
        ------
        TypeError, ValueError
            As `SparseLinear.from_pattern`; and if part of a block is missing.

        Examples
        --------
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

    def cut(self, dense: Tensor) -> Tensor:
        """All blocks of the grid, in the order of positions, of a matrix (out_features, in_features).

        What lies outside the matrix is 0.
        """
        return cut(dense, self.block_shape)

    def _spread(self, weight: Tensor) -> None:
        blocks = weight.new_zeros((math.prod(self.grid), *self.block_shape))
        blocks[self.positions()] = self._in_use
        weight.copy_(join(blocks, self.shape))

    def to_scipy(self) -> scipy.sparse.bsr_array | scipy.sparse.csr_array:
        """W as a SciPy BSR array (out_features, in_features); CSR if blocks reach beyond it. A copy.

        Every weight of a block is stored, also one that is 0. bfloat16, which NumPy lacks, becomes float32.

        Raises
        ------
        ModuleNotFoundError
            If SciPy is not installed.
        """
        whole = all(n % size == 0 for n, size in zip(self.shape, self.block_shape, strict=True))
        return self._blocks().to_scipy() if whole else super().to_scipy()

    def _blocks(self) -> BlockCSR:
        """W as it is in use, not to be written to; bfloat16 as float32."""
        values = self._in_use.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        return BlockCSR.of(self._block_topology(), values.numpy())

    def _block_topology(self) -> BlockTopology:
        return BlockTopology(self.shape, self.block_shape, as_matrix(self))

    def _matrix(self) -> PaddedCSR:
        W = self._blocks()
        row, column = np.divmod(W.positions(), max(self.grid[1], 1))
        height, width = self.block_shape
        rows = row[:, None, None] * height + np.arange(height)[:, None]
        columns = column[:, None, None] * width + np.arange(width)
        inside = (rows < self.out_features) & (columns < self.in_features)
        positions = (rows * self.in_features + columns)[inside]
        order = np.argsort(positions)
        topology = RowTopology.from_positions(self.shape, positions[order])
        return PaddedCSR.of(topology, W.values[inside][order])

    def reset_parameters(self) -> None:
        """Draw as many blocks anew, at random, and new weights and biases.

        Weights are drawn as by `fan_in_uniform_`, with the inputs that each output really has.
        """
        super().reset_parameters()

    @torch.no_grad()
    def _draw_weights(self) -> None:
        fan_in = self._fan_in()
        bound = fan_in.clamp(min=1).to(self.values.dtype).rsqrt()
        per_block = torch.repeat_interleave(bound, torch.diff(self.indptr))
        self.values.uniform_(-1, 1).mul_(per_block[:, None, None])
        slots, outside = self._outside()
        self.values[slots] = self.values[slots].masked_fill(outside, 0)

    def _fan_in(self) -> Tensor:
        """int64 (grid[0],): inputs of each output of a block row."""
        width = self.block_shape[1]
        columns = (self.in_features - self.indices.long() * width).clamp(max=width)
        ends = torch.cat((columns.new_zeros(1), columns.cumsum(0)))[self.indptr]
        return torch.diff(ends)

    def _fan_in_pointers(self) -> Tensor:
        fan_in = self._fan_in().repeat_interleave(self.block_shape[0])[: self.out_features]
        return torch.cat((fan_in.new_zeros(1), fan_in.cumsum(0)))

    def _outside(self) -> tuple[Tensor, Tensor]:
        """Blocks that reach beyond W, int64 (n,), and where, bool (n, block_out, block_in)."""
        slots, outside = (torch.from_numpy(part) for part in self._block_topology().outside())
        return slots.to(self.values.device), outside.to(self.values.device)

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return grid_of(self.shape, self.block_shape)

    def _layout(self, row_nnz: Array) -> tuple[int, ...]:
        return (int(row_nnz.sum()), *self.block_shape)

    def _index_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        return layout[:1]

    def _make_room(self, state_dict: dict[str, Any], prefix: str, indices: Tensor) -> dict[str, Any]:
        self._resize((len(indices), *self.block_shape))
        return {**state_dict, prefix + "indices": indices}

    @property
    def nnz(self) -> int:
        """Live blocks."""
        return self.values.shape[0]

    @property
    def n_weights(self) -> int:
        """Live weights: those of the blocks that lie within W."""
        if self.values.is_meta:
            return min(self.values.numel(), self.out_features * self.in_features)
        return int(self._fan_in_pointers()[-1])

    @property
    def density(self) -> float:
        """Live fraction of W, in weights (1 for a layer without positions)."""
        size = self.in_features * self.out_features
        return self.n_weights / size if size else 1.0

    def per_connection(self, entries: Tensor) -> Tensor:
        """The entries (blocks, block_out, block_in) themselves: a connection is a block."""
        return entries

    @torch.no_grad()
    def put(self, entries: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Set some of the entries (blocks, block_out, block_in); what lies outside W becomes 0."""
        entries[slots] = numbers
        edge, outside = self._outside()
        entries[edge] = entries[edge].masked_fill(outside, 0)

    def moved(self, entries: Tensor, source: Tensor) -> Tensor:
        """What lives per block, after a `rewrite` that returned `source`; see `SparseTopology`."""
        return move_blocks(entries, source)

    def _rewritten(self, drop: Array, grow: Array) -> tuple[RowTopology, Tensor, Tensor]:
        new, source = as_matrix(self).rewrite(ascending(drop), ascending(grow), compact=True)
        moved = torch.from_numpy(source)
        return new, move_blocks(self.values.detach().clone(), moved), moved

    def _shortcut(self, x: Tensor) -> Tensor | None:
        return functional.infer(x, self._parameters, self._buffers, self._plans, few_tokens)

    def _product(self, tokens: Tensor) -> Tensor:
        return _block_functional.sparse_block_linear(
            tokens, self._in_use, self.bias, self.indptr, self.indices, self.out_features, self._plans
        )

    def _ways(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        plans = BlockPlans(self.indptr, self.indices, BlockSizes(self.shape, self.block_shape))
        weights = self._in_use.detach()
        return {
            name: partial(product, x, weights, self.bias, plans, name) for name in possible(len(x), BLOCKS)
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_shape={self.block_shape}"

    def _check_state(self, state: dict[str, Any]) -> Tensor | None:
        return check_blocks(state, self.shape, self.block_shape, self.indices.dtype)


def _read_sparsity(density: float | None, sparsity: float | None) -> float:
    """The sparsity, from either way to say it."""
    if density is None:
        return 0.9 if sparsity is None else sparsity
    if sparsity is not None:
        raise ValueError(f"give density or sparsity, not both, got {density} and {sparsity}")
    check_fraction("density", density)
    return 1 - float(density)


def _recognises(state: State) -> dict[str, object] | None:
    if "indptr" not in state or state["values"].ndim != 3:
        return None
    return {"block_shape": tuple(state["values"].shape[1:])}


register_kind(LayerKind("block", BlockSparseLinear, (nn.Linear,), ("block_shape",), recognises=_recognises))
