"""Two layers with a nonlinearity between them, tile by tile."""
