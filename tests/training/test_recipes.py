"""Every file in `recipes/` trains, with tiny towers of the same families and a few drawn pictures."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, BertTokenizer, ViTImageProcessorPil

import tiny_clip
import tiny_tokenizers
from lotlip_hf import LoTLIPModel
from lotlip_hf.cli import main as lotlip
from lotlip_hf.conversion import clip as clip_conversion
from lotlip_hf.scenes.dataset import TAGS, scenes_dataset
from lotlip_hf.training import linear_heads
from lotlip_hf.training.config import NEW_MODEL, parse_arguments
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
    "laclip": ("bert", "vit"),
    "veclip": ("bert", "vit"),
    "hq-clip": ("bert", "vit"),
    "unime": ("bert", "vit"),
    "a-clip": ("bert", "vit"),
}
CHECKPOINTS = ("long-clip", "proclip-2", "dclip", "clippings", "mcip")  # recipes that continue a model
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


def save_clip(folder: Path) -> Path:
    """Saves a tiny LoTLIP over CLIP's towers, with stretched positions."""
    tiny_clip.save_clip(folder / "clip")
    clip_conversion.convert(folder / "clip", folder / "lotlip", num_corner_tokens=0, max_positions=90)
    return folder / "lotlip"


def save_taught_scenes(folder: Path, dim: int) -> Path:
    """Saves a few scenes with embeddings of a teacher, here drawn at random."""
    folder.mkdir()
    rows, drawn = [], Random(0)
    for index, record in enumerate(scenes_dataset(8)):
        record["image"].save(folder / f"{index}.png")
        embeds = {f"teacher_{kind}_embeds": [drawn.gauss(0, 1) for _ in range(dim)] for kind in ("image", "text")}
        rows.append(
            {"file_name": f"{index}.png", "short_caption": record["short_caption"], "long_captions": [], **embeds}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_every_recipe_is_trained() -> None:
    assert {recipe.stem for recipe in RECIPES} == {*TOWERS, *CHECKPOINTS}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_parses(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tags.txt").write_text("cat\n", encoding="utf-8")  # of hq-clip
    (tmp_path / "classes.txt").write_text("cat\n", encoding="utf-8")  # of mcip
    monkeypatch.chdir(tmp_path)
    argv = ["--data", "pictures", *(OWN_TOWERS if recipe.stem == "small-data" else ())]
    config = parse_arguments(["--recipe", recipe.stem, *argv])
    assert config == parse_arguments(["--config", str(recipe), *argv])
    assert config.model is not None or None not in (config.text_model, config.image_model)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--recipe", "unime", "--model", "checkpoint"], ("checkpoint", None, None)),
        (["--recipe", "veclip", "--model", "scenes"], ("scenes", None, 0)),
        (["--recipe", "unime", "--model", "checkpoint", "--num-corner-tokens", "1"], ("checkpoint", None, 1)),
        (["--recipe", "llm2clip", "--model", "checkpoint"], ("checkpoint", None, None)),
        (["--recipe", "long-clip", *OWN_TOWERS], (None, "text", None)),
    ],
)
def test_a_model_takes_the_place_of_that_of_the_recipe(argv: list[str], expected: tuple[Any, ...]) -> None:
    config = parse_arguments(argv)
    assert (config.model, config.text_model, config.num_corner_tokens) == expected
    assert config.model is None or all(getattr(config, name) is None for name in NEW_MODEL)


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
def test_a_recipe_trains_two_steps(
    recipe: Path, tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tags.txt").write_text("\n".join(TAGS), encoding="utf-8")
    (tmp_path / "classes.txt").write_text("validation-0-group-0\nvalidation-0-group-1", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = parse_arguments(["--config", str(recipe), "--data", "scenes"])
    data, argv = ["--data", "scenes", "--num-scenes", "8"], list[str]()
    if recipe.stem in CHECKPOINTS:
        argv += ["--model", str(save_clip(tmp_path))]
    else:
        argv += save_towers(tmp_path, golden, *TOWERS[recipe.stem])
    if recipe.stem in ("clippings", "mcip"):
        data += ["--split", "validation"]  # whose records have groups
    if config.teacher == "columns":
        data = ["--data", str(save_taught_scenes(tmp_path / "taught", tiny_clip.PROJECTION_DIM))]
    elif config.teacher not in (None, "ema"):
        tiny_clip.save_clip(tmp_path / "teacher")
        argv += ["--teacher", str(tmp_path / "teacher"), "--projection-dim", str(tiny_clip.PROJECTION_DIM)]
    if config.grad_cache_chunk is not None:
        argv += ["--grad-cache-chunk", "2"]
    argv += ["--mixed-precision", "no", "--max-steps", "2", "--log-steps", "1", "--cache", str(tmp_path / "cache")]
    assert lotlip(["train", "--config", str(recipe), *SMALL, *argv, *data, "--output", str(tmp_path / "run")]) == 0
    entries = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]
    names = {term.partition(":")[0] for term in config.terms}
    assert all(any(key.startswith(f"loss_{name}") for key in entries[0]) for name in names)
    model = LoTLIPModel.from_pretrained(tmp_path / "run" / "checkpoint-2")
    text = model.config.text_config
    if recipe.stem in CHECKPOINTS:
        return
    assert text.num_corner_tokens == config.num_corner_tokens
    assert text.projection == (config.text_projection or "linear")
    assert config.text_pooling in (None, text.pooling)
