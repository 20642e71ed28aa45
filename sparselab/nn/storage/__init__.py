"""What a sparse layer holds."""
