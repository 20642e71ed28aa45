"""What is timed, and the gate it must pass."""
