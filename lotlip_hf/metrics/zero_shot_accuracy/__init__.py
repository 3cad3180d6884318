"""Accuracy of zero-shot classification, in the folder layout of `evaluate.load`."""
