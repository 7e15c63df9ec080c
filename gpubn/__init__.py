"""Batch normalization and its relatives on NumPy and CuPy arrays."""
