"""Engines, which compute the features for an `Encoder`: one per file."""

from typing import Literal

Modality = Literal["image", "text"]

# Prefix of the names that open_clip loads, as in "open_clip:ViT-B-32/openai" and "open_clip:local-dir:FOLDER"
OPEN_CLIP = "open_clip:"
