"""Training: the Trainer, the callback that evolves the topology, and the state they keep."""
