"""Records of a run's topology, beside its checkpoints: training writes them, and the report reads them."""
