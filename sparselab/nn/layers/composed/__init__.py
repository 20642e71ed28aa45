"""Modules that are made of several layers, each of which may be dense or sparse."""
