"""Metrics of images and texts."""

from .clip_score import CLIPScores, clip_score

__all__ = ["CLIPScores", "clip_score"]
