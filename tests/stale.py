"""Tokenizers that have kept what a call asked for, as transformers writes and reads them."""

import json
from pathlib import Path

from tokenizers import Tokenizer

CALL_STATE = {"max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id"}


def make_stale(folder: Path, max_length: int = 16, direction: str = "left") -> Path:
    """A folder whose tokenizer.json and tokenizer_config.json keep a call's truncation and padding."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length, stride=2, direction=direction)
    backend.enable_padding(direction=direction, length=max_length)
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"max_length": max_length, "stride": 2, "truncation_strategy": "longest_first"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def is_clean(folder: Path) -> bool:
    """Whether a folder's tokenizer keeps nothing of a call."""
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return state["truncation"] is state["padding"] is None and not CALL_STATE & settings.keys()
