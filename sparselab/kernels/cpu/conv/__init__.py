"""Products for convolutions, without unfolding."""
