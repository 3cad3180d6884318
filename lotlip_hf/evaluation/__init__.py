"""Evaluation: retrieval between images and texts, and zero-shot classification."""
