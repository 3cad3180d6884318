"""Captions for images by models that describe them."""
