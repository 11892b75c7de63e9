"""Files that are written whole or not at all, and checksums of them. Knows nothing of models."""
