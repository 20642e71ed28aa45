"""Inputs that are no dense tensors."""
