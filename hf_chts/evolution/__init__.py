"""Evolving the topology of a sparse model while any training loop trains it."""
