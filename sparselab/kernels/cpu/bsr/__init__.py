"""Products of matrices of dense blocks."""
