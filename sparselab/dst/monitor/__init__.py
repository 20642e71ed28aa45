"""Watching topologies."""
