"""A new family of text encoders is a class in a file, and a line in `TEXT_BACKBONES`."""

from pathlib import Path

import pytest

import tiny_rotary
from lotlip_hf import cli
from lotlip_hf.modeling.backbones_lotlip import TEXT_BACKBONES
from seams import save_model, train_alone_and_together


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the family."""
    tiny_rotary.register()
    return cli.main(argv)


@pytest.mark.slow
def test_one_process_and_two_train_and_evaluate_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXT_BACKBONES, "tiny_rotary", tiny_rotary.TinyRotary())  # and taken out again
    tiny_rotary.register()
    backbone = tiny_rotary.TinyRotaryConfig(vocab_size=400, max_position_embeddings=194)
    model = save_model(tmp_path / "model", backbone_config=backbone)
    train_alone_and_together(__name__, tmp_path, "--model", str(model))
