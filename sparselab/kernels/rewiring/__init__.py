"""Dropping and growing connections, and choosing which."""
