"""Convolutions as torch operators, what their growth sees, and what they are beside their weights."""
