"""Official checkpoints to transformers folders and back, through the command line that people type."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
)
from transformers.image_utils import load_image

import tiny
from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPProcessor,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPTokenizer,
    LoTLIPVisionConfig,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
    cli,
)
from lotlip_hf.conversion import official
from lotlip_hf.conversion.official import convert, reverse

TOLERANCE = {"atol": 1e-5, "rtol": 0}
FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES |= tiny.CODE
WORDS = "module.text.transformer.embeddings.word_embeddings.weight"
POSITION_IDS = "module.text.transformer.embeddings.position_ids"
RELEASED = ["weiwu-ww/LoTLIP-ViT-B-16-100M", "weiwu-ww/LoTLIP-ViT-B-32-100M"]
QKV = "visual.trunk.blocks.1.attn.qkv.weight"
REMOVED = object()


class Source:
    """A copy of the tiny official model with two corner tokens, for a test to spoil, and the command to convert it."""

    def __init__(self, golden: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.checkpoint, self.config = folder / "model.pt", folder / "open_clip_config.json"
        self.tokenizer, self.output = golden / "tokenizer", folder.parent / "output"
        folder.mkdir()
        for name in ("model.pt", "open_clip_config.json", "bert_config.json"):
            shutil.copyfile(golden / "official-corners2" / name, folder / name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return torch.load(self.checkpoint, weights_only=True)["state_dict"]

    def save(self, state_dict: dict[str, Any]) -> None:
        torch.save({"state_dict": state_dict}, self.checkpoint)

    def set(self, file: str = "open_clip_config.json", section: str | None = None, **changes: Any) -> None:
        content = json.loads((self.folder / file).read_text())
        settings = content if section is None else content[section]
        settings.update(changes)
        for key in [key for key, value in settings.items() if value is REMOVED]:
            del settings[key]
        (self.folder / file).write_text(json.dumps(content))

    def arguments(self) -> list[str]:
        return [
            *("--checkpoint", str(self.checkpoint), "--open-clip-config", str(self.config)),
            *("--tokenizer", str(self.tokenizer), "--output", str(self.output)),
        ]

    def convert(self) -> Path:
        return convert(self.checkpoint, self.config, self.tokenizer, self.output)

    def error(self, arguments: list[str] | None = None) -> str:
        """The one message of a conversion that fails, after which everything is as it was."""
        before = snapshot(self.folder.parent)
        self.capsys.readouterr()
        assert official.main(self.arguments() if arguments is None else arguments) == 2
        printed = self.capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("lotlip convert official: error: ")
        assert printed.err.count("error: ") == 1
        assert "Traceback" not in printed.err
        assert snapshot(self.folder.parent) == before
        return printed.err


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with what it holds, and every folder in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def bits(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
        for name, tensor in state_dict.items()
    }


@pytest.fixture
def source(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Source:
    return Source(golden, tmp_path / "official", capsys)


# What a conversion gives


@pytest.mark.slow
@pytest.mark.parametrize(
    "main", [official.main, lambda argv: cli.main(["convert", "official", *argv])], ids=["module", "lotlip"]
)
@pytest.mark.parametrize(("corners", "max_length"), [(2, 126), (0, 77)])
def test_command_line(
    main: Callable[[list[str]], int],
    corners: int,
    max_length: int,
    golden: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, output = golden / f"official-corners{corners}", tmp_path / "new" / "checkpoint"
    arguments = ["--checkpoint", str(folder / "model.pt"), "--open-clip-config", str(folder / "open_clip_config.json")]
    before = snapshot(folder)
    assert main([*arguments, "--tokenizer", str(golden / "tokenizer"), "--output", str(output)]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    num_parameters = sum(t.numel() for t in load_file(output / "model.safetensors").values())
    assert lines[0] == f"Wrote {output}"
    assert f"{num_parameters:,} parameters" in lines[1]
    assert f"{corners} corner tokens, texts of up to {max_length} tokens" in lines[2]
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == [output.name]

    assert main(["--reverse", "--checkpoint", str(output), "--output", str(tmp_path / "model.pt")]) == 0
    assert capfd.readouterr() == (f"Wrote {tmp_path / 'model.pt'}\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "model.pt"}
    assert snapshot(folder) == before


@pytest.mark.slow
def test_command_line_in_a_process_of_its_own(source: Source) -> None:
    command = [sys.executable, "-m", "lotlip_hf.conversion.official", *source.arguments()]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(f"Wrote {source.output}\n")
    assert {path.name for path in source.output.iterdir()} == FILES


@pytest.mark.slow
@pytest.mark.parametrize("corners", [2, 0])
def test_every_class_loads_the_folder(corners: int, golden: Path, tmp_path: Path) -> None:
    official_folder = golden / f"official-corners{corners}"
    folder = convert(
        official_folder / "model.pt", official_folder / "open_clip_config.json", golden / "tokenizer", tmp_path / "out"
    )
    texts = json.loads((official_folder / "texts.json").read_text())
    expected = load_file(official_folder / "expected.safetensors")
    # the official ids hold the corner tokens behind [CLS]
    ids = torch.cat([expected["long_input_ids"][:, :1], expected["long_input_ids"][:, 1 + corners :]], dim=1)

    config = AutoConfig.from_pretrained(folder)
    assert type(config) is LoTLIPConfig
    assert config.text_config.num_corner_tokens == corners
    model = AutoModel.from_pretrained(folder)
    assert type(model) is LoTLIPModel
    for part in (AutoTokenizer, LoTLIPTokenizer):
        tokenizer = part.from_pretrained(folder)
        assert type(tokenizer) is LoTLIPTokenizer
        assert tokenizer.model_max_length == ids.shape[1] == (126 if corners else 77)
        encoded = tokenizer(texts["long"], padding="max_length", truncation=True, return_tensors="pt", verbose=False)
        assert torch.equal(encoded.input_ids, ids)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is LoTLIPProcessor
    assert processor.tokenizer.model_max_length == ids.shape[1]

    pixel_values, features = expected["pixel_values"], {}
    for model_class in (
        LoTLIPModel,
        LoTLIPTextModel,
        LoTLIPTextModelWithProjection,
        LoTLIPVisionModel,
        LoTLIPVisionModelWithProjection,
    ):
        part, info = model_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (model_class, info)
        with torch.inference_mode():
            features[model_class] = part(ids) if "Text" in model_class.__name__ else None
            if "Vision" in model_class.__name__:
                features[model_class] = part(pixel_values)
    long, image = expected["long_text_features"], expected["image_features"]
    with torch.inference_mode():
        projected = model.text_projection(features[LoTLIPTextModel].pooler_output)
    torch.testing.assert_close(projected, long, **TOLERANCE)
    torch.testing.assert_close(features[LoTLIPTextModelWithProjection].text_embeds, long, **TOLERANCE)
    torch.testing.assert_close(features[LoTLIPVisionModel].pooler_output, image, **TOLERANCE)
    torch.testing.assert_close(features[LoTLIPVisionModelWithProjection].image_embeds, image, **TOLERANCE)


def test_image_processor_is_the_official_one(official_checkpoint: Path, golden: Path) -> None:
    image_processor = AutoProcessor.from_pretrained(official_checkpoint).image_processor
    expected = load_file(golden / "images" / "expected_pixels.safetensors")
    settings = image_processor.to_dict()
    assert (settings["size"], settings["crop_size"]) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    compared = 0
    for name, pixels in expected.items():
        if name.startswith("lotlip."):
            side = pixels.shape[-1]
            ours = image_processor(
                load_image(str(golden / "images" / name.removeprefix("lotlip."))),
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                return_tensors="pt",
            )
            torch.testing.assert_close(ours.pixel_values.reshape(pixels.shape), pixels, **TOLERANCE)
            compared += 1
    assert compared == len(list((golden / "images").glob("*.png")))


@pytest.mark.slow
def test_whole_tokenizer_folder(source: Source, official_checkpoint: Path, tmp_path: Path) -> None:
    stock = BertTokenizer.from_pretrained(source.tokenizer)
    stock.save_pretrained(tmp_path / "stock")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in (tmp_path / "stock").iterdir()}
    source.tokenizer = tmp_path / "stock"
    ours = AutoTokenizer.from_pretrained(source.convert())
    from_vocab = AutoTokenizer.from_pretrained(official_checkpoint)
    assert ours.model_max_length == from_vocab.model_max_length == 126
    texts = ["A cat sleeps. It is grey &amp; old.", "", "Ünïcödé [SEP] 漢字", "long " * 300]
    for text in texts:
        assert ours(text, truncation=True).input_ids == from_vocab(text, truncation=True).input_ids
    # a folder of this package is a tokenizer too
    source.tokenizer, source.output = official_checkpoint, tmp_path / "again"
    again = AutoTokenizer.from_pretrained(source.convert())
    assert again(texts[0]).input_ids == from_vocab(texts[0]).input_ids


def test_configuration_as_open_clip_publishes_it(source: Source, official_checkpoint: Path) -> None:
    model_cfg = json.loads(source.config.read_text())
    source.config.write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.4, 0.4, 0.4]}}))
    # the official code takes 0.5 for its timm towers, whatever stands there
    assert snapshot(source.convert()) == snapshot(official_checkpoint)
    source.output = source.output.with_name("other")
    source.config.write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"interpolation": "bilinear"}}))
    assert "interpolation" in source.error()


@pytest.mark.slow
def test_linear_projection_of_the_images(source: Source, golden: Path, tmp_path: Path) -> None:
    state_dict = source.state_dict()
    state_dict["module.visual.head.proj.weight"] = torch.randn(12, 16)
    state_dict["module.text.proj.weight"] = state_dict["module.text.proj.weight"][:12].clone()
    source.save(state_dict)
    source.set(embed_dim=12)
    source.set(section="vision_cfg", timm_proj=REMOVED)  # open_clip's default
    model = AutoModel.from_pretrained(source.convert())
    expected = load_file(golden / "official-corners2" / "expected.safetensors")
    with torch.inference_mode():
        features = model.get_image_features(expected["pixel_values"]).pooler_output
    weight = state_dict["module.visual.head.proj.weight"]
    torch.testing.assert_close(features, expected["image_features"] @ weight.T, **TOLERANCE)
    reverse(source.output, tmp_path / "back.pt")
    assert bits(torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]) == bits(state_dict)


# There and back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "nested", "corners"),
    [(torch.float32, True, 2), (torch.float16, True, 0), (torch.bfloat16, False, 2)],
)
def test_reverse_is_the_inverse(corners: int, nested: bool, dtype: torch.dtype, golden: Path, tmp_path: Path) -> None:
    original = torch.load(golden / f"official-corners{corners}" / "model.pt", weights_only=True)["state_dict"]
    original = {name: tensor.to(dtype) for name, tensor in original.items()}
    original["module.visual.trunk.norm.bias"][:3] = torch.tensor([-0.0, torch.nan, torch.inf])
    given: Any = {"epoch": 3, "name": "run", "state_dict": original}
    if not nested:  # as from a run on one device, of parameters, one of them not contiguous
        given = {name.removeprefix("module."): torch.nn.Parameter(tensor) for name, tensor in original.items()}
        given["text.proj.weight"] = original["module.text.proj.weight"].t().contiguous().t()
    torch.save(given, tmp_path / "model.pt")
    config = golden / f"official-corners{corners}" / "open_clip_config.json"

    folder = convert(tmp_path / "model.pt", config, golden / "tokenizer", tmp_path / "folder")
    assert AutoModel.from_pretrained(folder).dtype == dtype
    back = torch.load(reverse(folder, tmp_path / "back.pt"), weights_only=True)
    assert back.keys() == {"state_dict"}
    assert bits(back["state_dict"]) == bits(original)
    again = convert(tmp_path / "back.pt", config, golden / "tokenizer", tmp_path / "again")
    assert snapshot(again) == snapshot(folder)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.", "model.module._orig_mod."])
def test_prefixes_of_wrappers(source: Source, official_checkpoint: Path, prefix: str) -> None:
    state_dict = {name.removeprefix("module."): tensor for name, tensor in source.state_dict().items()}
    source.save({prefix + name: tensor for name, tensor in state_dict.items()})
    assert snapshot(source.convert()) == snapshot(official_checkpoint)


def test_position_ids_of_old_checkpoints(source: Source, official_checkpoint: Path) -> None:
    state_dict = source.state_dict()
    state_dict[POSITION_IDS] = torch.arange(160).unsqueeze(0)
    source.save(state_dict)
    assert snapshot(source.convert()) == snapshot(official_checkpoint)


def test_official_layout_names_every_tensor_once(official_checkpoint: Path, golden: Path) -> None:
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    layout = official.official_layout(model)
    expected = torch.load(golden / "official-corners2" / "model.pt", weights_only=True)["state_dict"]
    assert {f"module.{name}" for name in layout} == expected.keys()
    ours = [name for names in layout.values() for name in names]
    assert len(ours) == len(set(ours))
    assert set(ours) == model.state_dict().keys()


# Tensors that do not fit


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda s: s.update({"module.visual.head.proj.bias": torch.ones(16)}), "visual.head.proj.bias"),
        (lambda s: s.pop("module.logit_scale"), "logit_scale"),
        (lambda s: s.update({f"module.{QKV}": torch.ones(47, 16)}), QKV),
        (lambda s: s.update({"module.visual.trunk.pos_embed": torch.ones(1, 0, 16)}), "visual.trunk.pos_embed"),
        (lambda s: s.update({POSITION_IDS: torch.arange(1, 161)[None]}), POSITION_IDS[7:]),
        (lambda s: s.update({"module.text.proj.weight": torch.ones(16, 16, dtype=torch.int64)}), "torch.int64"),
        (lambda s: s.update({"module.logit_scale": s["module.logit_scale"].half()}), "torch.float16"),
        (lambda s: s.clear(), "visual.trunk.cls_token"),
    ],
)
def test_every_tensor_is_accounted_for(source: Source, spoil: Callable[[dict], Any], name: str) -> None:
    state_dict = source.state_dict()
    spoil(state_dict)
    source.save(state_dict)
    assert name in source.error()


# Configurations that do not fit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "timm_proj", "mlp"),
        ("vision_cfg", "timm_pool", REMOVED),
        ("text_cfg", "hf_pooler_type", REMOVED),
        ("text_cfg", "hf_proj_type", REMOVED),
        ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
        ("vision_cfg", "heads", REMOVED),
        ("vision_cfg", "image_size", "32"),
        ("text_cfg", "context_length", 4),
        (None, "text_cfg", REMOVED),
    ],
)
def test_configuration_that_cannot_be_reproduced(source: Source, section: str | None, key: str, value: Any) -> None:
    source.set(section=section, **{key: value})
    message = source.error()
    assert key in message
    assert str(source.config) in message


@pytest.mark.parametrize(
    ("file", "section", "key", "value", "word"),
    [
        ("open_clip_config.json", None, "embed_dim", 24, "text.proj.weight"),
        ("open_clip_config.json", "text_cfg", "num_corner_token", 3, WORDS[7:]),
        ("open_clip_config.json", "vision_cfg", "image_size", 64, "visual.trunk.pos_embed"),
        ("open_clip_config.json", "vision_cfg", "heads", 3, "visual.trunk.blocks"),
        ("bert_config.json", None, "hidden_size", "16", "bert_config.json"),
        ("bert_config.json", None, "is_decoder", True, "is_decoder"),
        ("bert_config.json", None, "num_hidden_layers", 3, "text.transformer.encoder.layer.2"),
        ("bert_config.json", None, "num_attention_heads", 3, "open_clip_config.json"),
        ("bert_config.json", None, "vocab_size", 30524, "--tokenizer"),
    ],
)
def test_configuration_that_the_tensors_do_not_fit(
    source: Source, file: str, section: str | None, key: str, value: Any, word: str
) -> None:
    source.set(file, section=section, **{key: value})
    assert word in source.error()


def test_bert_configuration_is_needed_for_any_but_bert_base(source: Source) -> None:
    (source.folder / "bert_config.json").unlink()
    # BERT-base is assumed, and the tensors are not its
    assert "text.transformer.encoder.layer.0" in source.error()
    source.set(section="text_cfg", hf_model_name="bert-large-uncased")
    assert "bert_config.json" in source.error()


@pytest.mark.parametrize(
    ("file", "content"), [("open_clip_config.json", b"[]"), ("bert_config.json", b'{"hidden_size": 16,')]
)
def test_bad_json(source: Source, file: str, content: bytes) -> None:
    (source.folder / file).write_bytes(content)
    assert str(source.folder / file) in source.error()


# Files that are not what they should be


def saved(content: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: b"hello world",
        lambda good: good[: len(good) // 2],
        lambda good: saved(torch.load(io.BytesIO(good), weights_only=True), _use_new_zipfile_serialization=False)[:-9],
        lambda good: safetensors.torch.save({"logit_scale": torch.ones(())}),
        lambda good: saved({"state_dict": {"logit_scale": 1.0}}),
        lambda good: saved({"state_dict": {"module.text.proj.weight": torch.eye(16).to_sparse()}}),
        lambda good: saved(torch.nn.Linear(2, 2)),
    ],
    ids=["text", "half", "truncated legacy", "safetensors", "number", "sparse", "module"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_not_a_checkpoint(source: Source, spoil: Callable[[bytes], bytes]) -> None:
    good = source.checkpoint.read_bytes()
    bad = spoil(good)
    assert bad != good
    source.checkpoint.write_bytes(bad)
    message = source.error()
    assert str(source.checkpoint) in message
    assert len(message.splitlines()) == 1


class Attack:
    """Pickled, it makes a file as soon as it is loaded by an unpickler that trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write",
    [pickle.dumps, saved, lambda content: saved(content, _use_new_zipfile_serialization=False)],
    ids=["pickle", "zip", "legacy"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_pickle_runs(source: Source, tmp_path: Path, write: Callable[[Any], bytes]) -> None:
    made = tmp_path / "made-by-the-pickle"
    source.checkpoint.write_bytes(write({"state_dict": {"logit_scale": torch.ones(()), "attack": Attack(made)}}))
    assert str(source.checkpoint) in source.error()
    assert not made.exists()
    if write is saved:  # the attack is a real one
        torch.load(source.checkpoint, weights_only=False)
        assert made.exists()


def test_missing_files_and_options(source: Source) -> None:
    arguments = source.arguments()
    assert "--open-clip-config" in source.error([*arguments[:2], *arguments[4:]])
    for missing in (source.checkpoint, source.config):
        missing.unlink()
        assert str(missing) in source.error()


@pytest.mark.parametrize(
    "files",
    [
        None,
        {"vocab.txt": ""},
        {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n"},
        {"tokenizer.json": "{", "tokenizer_config.json": "{}"},
    ],
)
def test_bad_tokenizer(source: Source, tmp_path: Path, files: dict[str, str] | None) -> None:
    source.tokenizer = tmp_path / "tokenizer"
    if files is not None:
        source.tokenizer.mkdir()
        for name, content in files.items():
            (source.tokenizer / name).write_text(content)
    message = source.error()
    assert "--tokenizer" in message
    assert str(source.tokenizer) in message


def test_tokenizer_that_holds_corner_tokens(source: Source, tmp_path: Path) -> None:
    stock = BertTokenizer.from_pretrained(source.tokenizer)
    stock.add_tokens(["[Corner0]", "[Corner1]"], special_tokens=True)
    stock.save_pretrained(tmp_path / "official-tokenizer")
    source.tokenizer = tmp_path / "official-tokenizer"
    assert "corner tokens" in source.error()


def test_tokenizer_of_the_configuration(source: Source, tmp_path: Path) -> None:
    source.set(section="text_cfg", hf_tokenizer_name=str(source.tokenizer))
    folder = convert(source.checkpoint, source.config, output=source.output)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 126
    source.output = tmp_path / "other"
    arguments = source.arguments()
    del arguments[4:6]
    source.set(section="text_cfg", hf_tokenizer_name=REMOVED)
    assert "--tokenizer" in source.error(arguments)


# Where it is written


def test_output_that_exists_stays_as_it_is(source: Source) -> None:
    source.output.mkdir()
    (source.output / "notes.txt").write_text("mine")
    assert str(source.output) in source.error()


def test_output_may_be_an_empty_folder_or_a_link_to_one(source: Source, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    source.output.symlink_to(real)
    assert source.convert() == source.output
    assert source.output.is_symlink()
    assert {path.name for path in real.iterdir()} == FILES


@pytest.mark.parametrize("exists", [False, True])
def test_failure_half_way_leaves_nothing(source: Source, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    if exists:
        source.output.mkdir()

    def fail(self: Any, folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").is_file()  # the weights are written, but not in the output
        assert not source.output.exists() or not any(source.output.iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoTLIPProcessor, "save_pretrained", fail)
    assert "No space left on device" in source.error()
    monkeypatch.setattr(LoTLIPProcessor, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = snapshot(source.folder.parent)
    with pytest.raises(KeyboardInterrupt):
        source.convert()
    assert snapshot(source.folder.parent) == before


def test_what_was_saved_is_compared(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    save = LoTLIPModel.save_pretrained

    def save_with_an_error(self: LoTLIPModel, folder: Path) -> None:
        with torch.no_grad():
            self.vision_model.backbone.layers[1].attention.k_proj.weight[3, 5] += 1e-6
        save(self, folder)

    monkeypatch.setattr(LoTLIPModel, "save_pretrained", save_with_an_error)
    assert QKV in source.error()


# The released models


@pytest.mark.parametrize(("repo_id", "patch_size"), [(RELEASED[0], 16), (RELEASED[1], 32)])
def test_released_configuration(repo_id: str, patch_size: int) -> None:
    vision = LoTLIPVisionConfig(backbone_config=ViTConfig(patch_size=patch_size, layer_norm_eps=1e-6))
    expected = LoTLIPConfig(vision_config=vision)
    with torch.device("meta"):  # shapes alone
        state_dict = official.to_official(LoTLIPModel(expected))
    assert state_dict["visual.trunk.pos_embed"].shape == (1, (224 // patch_size) ** 2 + 1, 768)
    assert state_dict["text.transformer.embeddings.word_embeddings.weight"].shape == (30524, 768)
    bert = official._load_bert_config(None, official.RELEASED[repo_id]["text_cfg"])
    config = official.config_from_official(official.RELEASED[repo_id], bert, state_dict)
    assert config.to_dict() == expected.to_dict()
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 12
    assert config.vision_config.patch_size == patch_size
    assert config.text_config.num_corner_tokens == 2
    assert official.RELEASED[repo_id]["text_cfg"]["context_length"] == 128
    with torch.device("meta"):
        model = LoTLIPModel(config)
    assert official.from_official(state_dict, model).keys() == model.state_dict().keys()


@pytest.mark.parametrize("repo_id", RELEASED)
def test_released_checkpoint_is_fetched(source: Source, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def download(*names: str) -> str:
        fetched.append(names)
        return str(source.checkpoint)

    monkeypatch.setattr(official, "hf_hub_download", download)
    convert(repo_id, source.config, source.tokenizer, source.output)
    assert fetched == [(repo_id, "model.pt")]
    # its own configuration is another than that of the tiny tensors
    source.output = source.output.with_name("other")
    arguments = ["--checkpoint", repo_id, "--tokenizer", str(source.tokenizer), "--output", str(source.output)]
    assert "do not fit" in source.error(arguments)
    assert fetched == [(repo_id, "model.pt")] * 2


# Back


@pytest.fixture
def back(source: Source, tmp_path: Path) -> Callable[[Path], str]:
    def error(folder: Path) -> str:
        return source.error(["--reverse", "--checkpoint", str(folder), "--output", str(tmp_path / "back.pt")])

    return error


@pytest.mark.slow
def test_reverse_of_what_is_no_checkpoint(
    back: Callable[[Path], str], tmp_path: Path, official_checkpoint: Path
) -> None:
    assert "nowhere" in back(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in back(tmp_path / "empty")
    text = {**tiny.TEXT_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=tiny.IMAGE_SIZE)).save_pretrained(tmp_path / "clip")
    assert "clip" in back(tmp_path / "clip")
    (tmp_path / "back.pt").write_text("mine")
    assert "back.pt" in back(official_checkpoint)
    (tmp_path / "back.pt").unlink()

    folder = tmp_path / "spoilt"
    shutil.copytree(official_checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(folder) in back(folder)
    state_dict = load_file(official_checkpoint / "model.safetensors")
    corners = state_dict.pop("text_model.corner_embeds")
    safetensors.torch.save_file(state_dict, weights, {"format": "pt"})
    assert "text_model.corner_embeds" in back(folder)
    extra = {**state_dict, "text_model.corner_embeds": corners, "text_model.extra": torch.ones(2)}
    safetensors.torch.save_file(extra, weights, {"format": "pt"})
    assert "text_model.extra" in back(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: tiny.config("roberta", "vit"), "roberta"),
        (lambda: tiny.config("bert", "vit", pooling="cls"), "cls"),
        (lambda: tiny.config("bert", "vit"), "layer_norm_eps"),
        (
            lambda: LoTLIPConfig(
                text_config=tiny.text_config("bert"),
                vision_config=tiny.vision_config("vit", pooling="cls", pooled_layers=2),
            ),
            "pooled_layers",
        ),
        (
            lambda: with_vit(layer_norm_eps=1e-6, qkv_bias=False),
            "vision_model.backbone.layers.0.attention.k_proj.bias",
        ),
    ],
)
def test_reverse_of_a_model_without_official_counterpart(
    back: Callable[[Path], str], tmp_path: Path, make: Callable[[], LoTLIPConfig], word: str
) -> None:
    LoTLIPModel(make()).save_pretrained(tmp_path / "model")
    assert word in back(tmp_path / "model")


def with_vit(**kwargs: Any) -> LoTLIPConfig:
    config = tiny.config("bert", "vit")
    for name, value in kwargs.items():
        setattr(config.vision_config.backbone_config, name, value)
    return config


def test_reverse_takes_no_more_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert official.main(["--reverse", "--checkpoint", "folder", "--output", "model.pt", "--tokenizer", "t"]) == 2
    assert "--reverse" in capsys.readouterr().err
