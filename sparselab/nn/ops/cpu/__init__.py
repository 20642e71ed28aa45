"""The operators on CPU tensors."""
