"""What whole models are made before they only infer."""
