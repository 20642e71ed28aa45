"""What must follow the connections of layers: optimizer state, and copies."""
