"""Scenes, a drawn data set, and its small model."""
