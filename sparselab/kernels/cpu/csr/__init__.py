"""Products of matrices of single connections."""
