"""The tables of families in docs/towers.md."""

import re
from pathlib import Path
from typing import Any

import pytest

from lotlip_hf.modeling.backbones_lotlip import TEXT_BACKBONES, VISION_BACKBONES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "towers.md").read_text(encoding="utf-8")
OF_TESTS = {"tiny_rotary"}  # other tests add families of their own
TEXT = {name: family for name, family in TEXT_BACKBONES.items() if name not in OF_TESTS}
IMAGES = dict(VISION_BACKBONES)


def table(heading: str) -> dict[str, dict[str, str]]:
    """Cells by heading of a section's table, for each `model_type` of a row's first cell."""
    section = PAGE[PAGE.index(f"\n## {heading}\n") :].split("\n## ")[1]
    names, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    headings, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (names, *lines)]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for model_type in re.findall(r"`([\w-]+)`", row[0]):
            assert model_type not in found, f"{model_type} has two rows"
            found[model_type] = dict(zip(headings, row, strict=True))
    return found


def poolings(family: Any) -> str:
    """The default pooling, and the others."""
    others = [name for name in family.poolings() if name != family.default_pooling]
    return ", ".join([f"`{family.default_pooling}` (default)", *(f"`{name}`" for name in others)])


def corner_tokens(family: Any) -> str:
    if family.is_causal:
        return "behind the text" if family.corners_have_positions else "behind the text, without positions"
    if family.corners_first:
        return "before the text"
    return "after the first token" if family.corners_have_positions else "at the first token"


def stock(family: Any, tower: str) -> str:
    whole = set(family.stock_poolings) - set(family.excluded_poolings) and getattr(family, "in_dual_encoder", True)
    return "model" if whole else tower


def yes(value: Any) -> str:
    return "yes" if value else "no"


def test_every_family_has_a_row() -> None:
    assert table("Text encoders").keys() == TEXT.keys()
    assert table("Image encoders").keys() == IMAGES.keys()


@pytest.mark.parametrize("name", TEXT)
def test_text_encoders(name: str) -> None:
    family, row = TEXT[name], table("Text encoders")[name]
    assert row["poolings"] == poolings(family)
    assert row["corner tokens"] == corner_tokens(family)
    assert row["skips padding"] == yes(family.takes_rows)
    assert row["stock export"] == stock(family, "text tower")
    assert row["ONNX"] == yes(not family.no_onnx)
    assert (row["longest text"] == "any") == (not family.takes_positions and name.endswith("t5"))


@pytest.mark.parametrize("name", IMAGES)
def test_image_encoders(name: str) -> None:
    family, row = IMAGES[name], table("Image encoders")[name]
    assert row["poolings"] == poolings(family)
    assert row["`kept_patches`"] == yes(family.passing_embeddings is not None)
    assert ("interpolation" in row["image sizes"]) == (family.takes_interpolation and name != "siglip2_vision_model")
    assert row["stock export"] == stock(family, "image tower")
    assert row["ONNX"] == yes(not family.no_onnx)


def test_settings_of_a_family_exist() -> None:
    """The table of settings in "Add a family" has the defaults of `TextBackbone`."""
    from lotlip_hf.modeling.backbones_lotlip import TextBackbone

    section = PAGE[PAGE.index("| setting of `TextBackbone`") :].split("\n\n")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines()[2:]]
    assert len(rows) > 10
    for name, default, _ in rows:
        value = getattr(TextBackbone, name.strip(" `"))
        if isinstance(value, bool):
            assert default.strip() == yes(value), name
        else:
            assert default.replace("`", "").strip() == (value if isinstance(value, str) else ", ".join(value)), name
