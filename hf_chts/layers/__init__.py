"""Sparse layers, and which layers of a model become sparse."""
