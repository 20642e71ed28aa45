"""The products as torch operators with gradients."""
