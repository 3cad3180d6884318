"""Engines, which compute the features for an `Encoder`: one per file."""

from typing import Literal

Modality = Literal["image", "text"]
