"""Atomic writes, checksums, and errors that name a file and a remedy. Imports no other room."""
