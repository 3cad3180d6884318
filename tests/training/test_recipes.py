"""Every file in `recipes/` trains, with tiny towers of the same families and a few drawn pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, BertTokenizer, ViTImageProcessorPil

import tiny_clip
import tiny_tokenizers
from lotlip_hf import LoTLIPModel
from lotlip_hf.cli import main as lotlip
from lotlip_hf.training import linear_heads
from lotlip_hf.training.config import parse_arguments
from lotlip_hf.training.log import read_log

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.endswith("-relabel"))
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {**SIZE, "num_hidden_layers": 4, "image_size": 32, "patch_size": 16}
# Model types of the two encoders.
TOWERS = {
    "bert-vit": ("bert", "vit"),
    "modernbert-dinov3": ("modernbert", "dinov3_vit"),
    "qwen3-siglip2": ("qwen3", "siglip_vision_model"),
    "llm2clip": ("llama", "clip_vision_model"),
    "proclip-1": ("llama", "clip_vision_model"),
    "small-data": ("bert", "dinov2"),
}
OWN_TOWERS = ["--text-model", "text", "--image-model", "image"]  # small-data has none
DECODER = {"num_key_value_heads": 1, "head_dim": 8}
# Options that need a GPU, many pictures or much time.
SMALL = ["--batch-size", "4", "--num-workers", "0", "--warmup-steps", "0", "--save-steps", "2", "--trackers", "none"]


def save_towers(folder: Path, golden: Path, text_type: str, image_type: str) -> list[str]:
    """Saves two tiny encoders with tokenizer and image processor. Returns the options that name them."""
    text, image = folder / "text", folder / "image"
    tokenizer: Any = BertTokenizer.from_pretrained(golden / "tokenizer")
    decoders = {"qwen3": tiny_tokenizers.toy_qwen, "llama": tiny_tokenizers.toy_llama}
    own: dict[str, Any] = {"max_position_embeddings": 4096}
    if text_type in decoders:
        tokenizer, own = decoders[text_type](), {**own, **DECODER}
    names = ("pad", "bos", "eos", "cls", "sep")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in names}
    config = AutoConfig.for_model(text_type, **SIZE, **own, **ids, vocab_size=len(tokenizer))
    AutoModel.from_config(config).save_pretrained(text)
    tokenizer.save_pretrained(text)
    AutoModel.from_config(AutoConfig.for_model(image_type, **IMAGE)).save_pretrained(image)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(image)
    return ["--text-model", str(text), "--image-model", str(image)]


def test_every_recipe_is_trained() -> None:
    assert {recipe.stem for recipe in RECIPES} == set(TOWERS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_parses(recipe: Path) -> None:
    argv = ["--data", "pictures", *(OWN_TOWERS if recipe.stem == "small-data" else ())]
    config = parse_arguments(["--recipe", recipe.stem, *argv])
    assert config == parse_arguments(["--config", str(recipe), *argv])
    assert config.text_model is not None
    assert config.image_model is not None


def test_small_data_trains_its_stages(
    tmp_path: Path, golden: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_heads, "BATCH_SIZE", 32)  # of the baseline
    towers = save_towers(tmp_path, golden, *TOWERS["small-data"])
    steps = "--batch-size 8 --max-steps 4 --eval-steps 2 --log-steps 1 --num-workers 0 --trackers none"
    data = ["--data", "scenes", "--num-scenes", "40", "--cache", str(tmp_path / "cache")]
    output = tmp_path / "run"
    argv = ["train", "--recipe", "small-data", *towers, *steps.split(), *data, "--output", str(output)]
    assert lotlip(argv) == 0
    ended = json.loads((output / "stages.json").read_text())
    assert list(ended) == list(parse_arguments(["--recipe", "small-data"]).stages or ())
    for stage, checkpoint in ended.items():
        assert {entry["step"] for entry in read_log(output / stage)} == {0, 1, 2, 3, 4}
        model = LoTLIPModel.from_pretrained(output / stage / checkpoint).config
        assert model.text_config.num_corner_tokens == 2
        assert (model.vision_config.pooled_layers, model.vision_config.pooled_size) == (4, 8 * 16)


def test_small_data_trains_on_few_pictures(
    tmp_path: Path, golden: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the towers, less than their warm-up; held-out pictures of the user's own replace a share."""
    monkeypatch.setattr(linear_heads, "BATCH_SIZE", 32)
    towers = save_towers(tmp_path, golden, *TOWERS["small-data"])
    data = "--data scenes --num-scenes 12 --eval-data scenes --eval-samples 8 --num-workers 0 --trackers none".split()
    output = tmp_path / "run"
    own = [*towers, "--cache", str(tmp_path / "cache"), "--output", str(output)]
    assert lotlip(["train", "--recipe", "small-data", *own, *data]) == 0
    (line,) = [entry for entry in read_log(output / "towers") if "loss" in entry]
    assert line["step"] == 1
    assert json.loads((output / "results.json").read_text())["num_images"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [one for one in RECIPES if one.stem != "small-data"], ids=lambda recipe: recipe.stem
)
def test_a_recipe_trains_two_steps(recipe: Path, tmp_path: Path, golden: Path) -> None:
    config = parse_arguments(["--config", str(recipe), "--data", "scenes"])
    towers = save_towers(tmp_path, golden, *TOWERS[recipe.stem])
    changed = ["--mixed-precision", "no", "--max-steps", "2", "--log-steps", "1", "--cache", str(tmp_path / "cache")]
    if config.teacher is not None:
        tiny_clip.save_clip(tmp_path / "teacher")
        changed += ["--teacher", str(tmp_path / "teacher"), "--projection-dim", str(tiny_clip.PROJECTION_DIM)]
    if config.grad_cache_chunk is not None:
        changed += ["--grad-cache-chunk", "2"]
    data = ["--data", "scenes", "--num-scenes", "8", "--output", str(tmp_path / "run")]
    assert lotlip(["train", "--config", str(recipe), *towers, *SMALL, *changed, *data]) == 0
    assert [entry["step"] for entry in read_log(tmp_path / "run") if "loss" in entry] == [1, 2]
    model = LoTLIPModel.from_pretrained(tmp_path / "run" / "checkpoint-2")
    text = model.config.text_config
    assert text.num_corner_tokens == config.num_corner_tokens
    assert text.projection == (config.text_projection or "linear")
    assert config.text_pooling in (None, text.pooling)
