"""Relabels image sets with long captions by models that describe images."""
