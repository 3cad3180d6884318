"""Converts checkpoints from and to other layouts."""
