"""What a sparse matrix holds: its topology, and the layouts of its values."""
