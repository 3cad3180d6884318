"""Scenes, a data set of drawn pictures, and a small model for it."""
