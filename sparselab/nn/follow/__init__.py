"""What must follow the connections of layers: optimizer state, copies, and what configurations say."""
