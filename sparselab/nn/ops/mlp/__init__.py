"""Two layers with a nonlinearity between them as one operation."""
