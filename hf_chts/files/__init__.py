"""Writing files whole or not at all, checksums, and errors that name a file and a remedy. Knows nothing of models."""
