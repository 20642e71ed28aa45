"""What `layer.weight` is: a view of the live weights that torch's functions multiply with."""
