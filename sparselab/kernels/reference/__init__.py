"""The products as plain loops: what they mean. Slow; for reading and for tests."""
