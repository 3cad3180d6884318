"""Accuracy of zero-shot classification, in the layout that `evaluate.load` reads."""
