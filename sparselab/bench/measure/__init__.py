"""Timing, and what the machine can do."""
