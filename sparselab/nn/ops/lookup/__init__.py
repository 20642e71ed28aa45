"""Rows of a sparse table that are looked up by number, with their gradients."""
