"""Connections to start from, drawn by a rule of their own."""
