"""Sparse kernels on NumPy arrays: the four products and updates that sparse training needs.

W is a `PaddedCSR` of shape (rows, columns) = (``out_features``, ``in_features``), or a `BlockCSR`, whose
connections are dense blocks. Dense matrices are feature-major, one token per column: X is (columns, tokens),
Y is (rows, tokens). They may have any strides, so a token-major PyTorch batch ``x`` of shape
(tokens, in_features) is passed as ``x.T`` without a copy.

Results are the same bits for any number of threads: each output has one writer and one order of summation.
A NaN or infinity goes through as in dense arithmetic, except that a connection that does not exist
contributes nothing (dense 0 x inf would be NaN).
"""

from sparselab.kernels.api import Rewrite, rewrite, sddmm_dw, spmm, spmm_t
from sparselab.kernels.layouts.block_csr import BlockCSR
from sparselab.kernels.layouts.padded_csr import PaddedCSR

__all__ = ["BlockCSR", "PaddedCSR", "Rewrite", "rewrite", "sddmm_dw", "spmm", "spmm_t"]
