"""Whole models, and whole runs, in files."""
