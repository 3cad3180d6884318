"""Evaluation: how well images and texts find each other."""
