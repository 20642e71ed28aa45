"""An embedding that stores, looks up and trains only its live connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselab.kernels.arrays import n_connections
from sparselab.nn.layers.base import weight_of
from sparselab.nn.layers.compressed import CompressedLayer
from sparselab.nn.layers.dense import DenseLayer, DenseType, register_dense
from sparselab.nn.layers.extras import refuse_to_lose
from sparselab.nn.layers.kinds import LayerKind, register_kind
from sparselab.nn.ops.lookup.rows import lookup
from sparselab.nn.ops.tools.nodes import is_node, node_of
from sparselab.nn.storage.checks import check_size, read_sparsity
from sparselab.nn.storage.patterns import read_pattern
from sparselab.nn.storage.table import Table


class SparseEmbedding(CompressedLayer):
    """Drop-in for `torch.nn.Embedding`: rows of a sparse table, dense when they are looked up.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    padding_idx : int, optional
        A row that gets no gradient, and whose weights start as 0; from the end if it is negative.
    max_norm : float, optional
        Rows of a larger norm are scaled down to it, in place, when they are looked up.
    norm_type : float
        The p of that norm.
    scale_grad_by_freq : bool
        Divide the gradient of a row by how often it is in the input.
    sparse : bool
        Must be False: the gradient has an entry for each live connection, and none for any other.
    sparsity : float in [0, 1], optional
        Fraction of the table that does not exist; 0.9 if density is not given either. Exactly
        ``round((1 - sparsity) * num_embeddings * embedding_dim)`` connections are drawn uniformly at random.
    density : float in [0, 1], optional
        ``1 - sparsity``, in place of it.
    device : torch.device, optional
    dtype : torch.dtype, optional
        float32, float64, bfloat16 or float16.

    Attributes
    ----------
    weight_values : Parameter, (nnz, 1, 1)
        Weights of the live connections, row by row. They are normal, of mean 0, and so large that rows have
        the norm on average that those of `torch.nn.Embedding` have.
    indptr, indices, forward_mask
        As of `sparselab.SparseLinear`.
    weight : SparseWeight, (num_embeddings, embedding_dim)
        As of `SparseLinear`. ``TiedLinear(embedding)`` is an output head that shares it.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above.

    Notes
    -----
    Neither the table nor its gradient ever exists dense. To an algorithm the rows are outputs and the columns
    inputs; its gradient is the sum of the outputs' gradients by the number of their row.

    Examples
    --------
    >>> import torch, sparselab
    >>> embedding = sparselab.SparseEmbedding(10_000, 64, padding_idx=0, sparsity=0.9)
    >>> embedding(torch.tensor([[1, 2, 0], [4, 1, 0]])).shape
    torch.Size([2, 3, 64])
    >>> embedding.nnz
    64000
    """

    storage: Table
    tensor_names = ("weight_values", "indptr", "indices", "forward_mask")
    dense_class = dense_type = nn.Embedding
    settings = (
        "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"
    )  # fmt: skip

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False, *, sparsity: float | None = None, density: float | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        shape = check_size("num_embeddings", num_embeddings), check_size("embedding_dim", embedding_dim)
        if sparse is not False:
            raise ValueError(
                "sparse must be False, for the gradient has one entry for each live connection, got "
                f"{sparse!r}; how sparse the table is, is said by sparsity=..."
            )
        amount = read_sparsity(sparsity, density)
        super().__init__(Table(shape), n_connections(shape, amount), False, device, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = _read_padding(padding_idx, shape[0])
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self._draw_if_there(amount)

    @classmethod
    def from_dense(
        cls, embedding: nn.Embedding, sparsity: float | None = None, *, density: float | None = None
    ) -> SparseEmbedding:
        """The largest weights of a dense embedding, by magnitude; of equal ones the first."""
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be a torch.nn.Embedding, got {type(embedding).__name__}")
        return cls._from_largest(embedding, read_sparsity(sparsity, density))

    @classmethod
    def from_pattern(
        cls, pattern: object, padding_idx: int | None = None, *, dtype: torch.dtype | None = None
    ) -> SparseEmbedding:
        """A table with the connections of a matrix (num_embeddings, embedding_dim).

        As `SparseLinear.from_pattern`.
        """
        (rows, columns), positions, weights = read_pattern(pattern)
        new = cls(rows, columns, padding_idx, sparsity=1.0, dtype=dtype)
        new._begin_with(positions, weights)
        return new

    @classmethod
    def like(
        cls, layer: Any, sparsity: float | None = None, device: torch.device | str | None = None,
        **settings: Any,
    ) -> SparseEmbedding:  # fmt: skip
        """A new table with the settings of another one, dense or sparse, and random weights.

        They are as large as those of a dense table, which may have been scaled for what reads it, such as a
        head that is tied to it: rows have the norm of dense ones on average.
        """
        weight = weight_of(layer)
        make: Any = cls
        new: SparseEmbedding = make(
            **{name: getattr(layer, name) for name in cls.settings},
            device=weight.device if device is None else device, dtype=weight.dtype,
            **({} if sparsity is None else {"sparsity": sparsity}), **settings,
        )  # fmt: skip
        new._train_as(layer, weight)
        if isinstance(layer, nn.Embedding) and weight.numel() > 1 and not new.weight_values.is_meta:
            scale = weight.detach().float().square().mean().sqrt()
            with torch.no_grad():
                new.weight_values.mul_(scale if scale > 0 else 1)
        return new

    def to_dense(self) -> nn.Embedding:
        """A `torch.nn.Embedding` with the same rows, mode and trainability."""
        refuse_to_lose(self, "to_dense", self.tensor_names)
        values = self.in_use
        settings = {name: getattr(self, name) for name in self.settings}
        new = nn.Embedding(**settings, device="meta", dtype=values.dtype)
        new.weight = nn.Parameter(self.weight.detach().to_dense(), values.requires_grad)
        return new.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """The rows with these numbers.

        Parameters
        ----------
        input : int32 or int64 tensor of any shape

        Returns
        -------
        (*input.shape, embedding_dim)

        Raises
        ------
        RuntimeError
            If the input has another dtype, or is on another device.
        IndexError
            If a number is no row.
        """
        if is_node(input):
            return node_of(self, input)  # type: ignore[no-any-return]
        if not isinstance(input, Tensor) or input.dtype not in (torch.int32, torch.int64):
            what = input.dtype if isinstance(input, Tensor) else type(input).__name__
            raise RuntimeError(f"input must be a tensor of int32 or int64, got {what}")
        if input.device != self.indices.device:
            raise RuntimeError(f"input must be on {self.indices.device}, as the layer, got {input.device}")
        tokens = input.flatten().long()
        if self.max_norm is not None:
            self._renormalise(tokens)
        values = self.in_use
        rows = lookup(tokens, values, self, self._factors(tokens, values.dtype))
        return rows.reshape(*input.shape, self.embedding_dim)

    def _factors(self, tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
        """By what the gradient of each token is multiplied; None if by 1."""
        if not torch.is_grad_enabled() or (self.padding_idx is None and not self.scale_grad_by_freq):
            return None
        factors = torch.ones_like(tokens, dtype=dtype)
        if self.scale_grad_by_freq:
            rows = max(self.num_embeddings, 1)
            at = tokens.clamp(0, rows - 1)  # numbers of no row are refused where rows are looked up
            often = factors.new_zeros(rows, dtype=torch.int64)
            factors = factors / often.index_add(0, at, torch.ones_like(at))[at]
        if self.padding_idx is not None:
            factors = torch.where(tokens == self.padding_idx, 0, factors)
        return factors

    @torch.no_grad()
    def _renormalise(self, tokens: Tensor) -> None:
        """Scale the rows of these tokens down to `max_norm`, as `torch.embedding_renorm_`."""
        rows = lookup(numbers := torch.unique(tokens), self.in_use, self)
        norms = torch.linalg.vector_norm(rows, self.norm_type, dim=1)
        assert self.max_norm is not None
        factors = torch.where(norms > self.max_norm, self.max_norm / (norms + 1e-7), 1)
        if bool((factors != 1).any()):
            by_row = factors.new_ones(self.num_embeddings).index_copy(0, numbers, factors)
            row = self.positions() // max(self.embedding_dim, 1)
            self.weight_values.mul_(by_row[row].view(-1, 1, 1))

    def extra_repr(self) -> str:
        said = [f"{self.num_embeddings}, {self.embedding_dim}"]
        said += [f"padding_idx={self.padding_idx}"] * (self.padding_idx is not None)
        said += [f"max_norm={self.max_norm}"] * (self.max_norm is not None)
        said += ["scale_grad_by_freq=True"] * bool(self.scale_grad_by_freq)
        return f"{', '.join(said)}, sparsity={self.sparsity:.4g}, nnz={self.nnz}"


def _read_padding(padding_idx: int | None, rows: int) -> int | None:
    """The row, counted from the start."""
    if padding_idx is None:
        return None
    at = int(padding_idx)
    if not -rows <= at < rows:
        raise ValueError(f"padding_idx must be one of {-rows}..{rows - 1}, got {padding_idx}")
    return at % rows


def _parts(embedding: nn.Embedding) -> Sequence[DenseLayer]:
    """The embedding itself, unless its gradient is a sparse tensor."""
    return () if embedding.sparse else (DenseLayer(embedding, "", embedding, (embedding.weight,)),)


register_dense(DenseType(nn.Embedding, _parts, known=("weight",)))
register_kind(LayerKind("sparse", SparseEmbedding, (nn.Embedding,)))
