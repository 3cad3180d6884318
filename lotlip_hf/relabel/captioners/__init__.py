"""Captioners, one kind in each file."""
