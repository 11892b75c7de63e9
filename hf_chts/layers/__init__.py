"""Masked layers, and how a model gets them."""
