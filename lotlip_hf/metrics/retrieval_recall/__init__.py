"""Recall at k of retrieval, in the folder layout of `evaluate.load`."""
