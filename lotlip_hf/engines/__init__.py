"""Engines, which compute the features for an `Encoder`: one per file."""
