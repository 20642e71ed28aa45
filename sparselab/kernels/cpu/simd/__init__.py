"""Vectors, as LLVM sees them."""
