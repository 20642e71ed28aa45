"""Truly sparse neural network training in PyTorch, on any CPU."""
