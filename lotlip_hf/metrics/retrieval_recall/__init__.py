"""Recall at k of retrieval, in the layout that `evaluate.load` reads."""
