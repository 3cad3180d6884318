"""Every Python snippet and every `lotlip` command of the README and of the pages beside it, run as written."""

import argparse
import dataclasses
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

import tiny_clip
import tiny_diffusion
from lotlip_hf import LoTLIPModel
from lotlip_hf.cli import main as lotlip
from lotlip_hf.conversion.clip import convert as convert_clip
from lotlip_hf.relabel.config import add_arguments
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from lotlip_hf.training.config import TrainingConfig, parse_arguments
from scripts import load_script
from tiny_captioners import save_instructblip, save_llava

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = ("docs/backbones.md", "docs/captions.md", "docs/objective.md", "docs/trainer.md")


def blocks(file: str, language: str) -> list[str]:
    text = (REPOSITORY / file).read_text(encoding="utf-8").replace("{{ model_id }}", "checkpoint")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(file: str, program: str = "lotlip") -> list[list[str]]:
    """The arguments of every command of a program."""
    lines = "".join(blocks(file, "bash")).replace("\\\n", " ").splitlines()
    all_words = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index(program) + 1 :] for words in all_words if program in words]


def first_words(value: object) -> str:
    return re.sub(r"\W+", "-", " ".join(value[:4]) if isinstance(value, list) else str(value).split("\n")[0])[:60]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, golden: Path, official_checkpoint: Path) -> Path:
    """A folder with all that the README takes for granted."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(official_checkpoint, folder / "checkpoint")
    (folder / "photos").mkdir()
    shutil.copyfile(golden / "images" / "RGB_640x480.png", folder / "photos" / "cat.png")
    shutil.copyfile(golden / "images" / "L_300x200.png", folder / "photos" / "dog.png")
    for animal in ("cat", "dog"):
        (folder / "animals" / animal).mkdir(parents=True)
        shutil.copyfile(folder / "photos" / f"{animal}.png", folder / "animals" / animal / "1.png")
    (folder / "pictures").mkdir()
    with (folder / "pictures" / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number in range(8):
            one = scene(number)
            render(one, image_size=32).save(folder / "pictures" / f"{number}.png")
            captions = {"short_caption": short_caption(one), "long_captions": long_captions(one)}
            file.write(json.dumps({"file_name": f"{number}.png", "id": one.id, **captions}) + "\n")
    (folder / "captions.txt").write_text("A cat.\nA dog stands on a lawn. It holds a ball.\n", encoding="utf-8")
    for file in (golden / "official-corners2").iterdir():
        shutil.copyfile(file, folder / file.name)
    shutil.copytree(golden / "tokenizer", folder / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=100)).save_pretrained(folder / "bert")
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(folder / "vit")
    # as if they had come from the Hub
    save_instructblip(folder / "Salesforce" / "instructblip-vicuna-7b")
    save_llava(folder / "llava-hf" / "llava-1.5-7b-hf")
    BertTokenizer.from_pretrained(golden / "tokenizer").save_pretrained(folder / "google-bert" / "bert-base-uncased")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0.tar", "w") as shard:
        for file in ("0.png", "1.png"):
            shard.add(folder / "pictures" / file, file)
            shard.add(folder / "captions.txt", file.replace(".png", ".txt"))
    tiny_clip.save_clip(folder / "clip")
    convert_clip(folder / "clip", folder / "lotlip-clip", max_positions=248)
    tiny_diffusion.pipeline("sd").save_pretrained(folder / "stable-diffusion")
    prompts = (f"a {first} and the {second} of a house" for first in tiny_clip.WORDS for second in tiny_clip.WORDS)
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    return folder


@pytest.fixture
def cwd(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to write to."""
    folder = tmp_path / "cwd"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))  # of an evaluation's embeddings
    return folder


@pytest.mark.parametrize("file", ["README.md", "MODEL_CARD.md"])
def test_there_is_something_to_run(file: str) -> None:
    assert blocks(file, "python")
    assert commands(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet",
    [
        *(code for file in ("README.md", "MODEL_CARD.md") for code in blocks(file, "python")),
        *(code for file in PAGES if (code := "".join(blocks(file, "python")))),  # a page is one script
    ],
    ids=first_words,
)
def test_snippet(snippet: str, cwd: Path) -> None:
    if "OnnxModel" in snippet:
        (export,) = [words for words in commands("README.md") if words[:2] == ["convert", "onnx"]]
        assert lotlip(export) == 0
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_commands(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands("README.md") + commands("MODEL_CARD.md"):
        if words[0] == "train" or words[1] in ("clip", "onnx", "stock"):  # which other tests run
            continue
        status = lotlip([*words, "--max-retries=0"] if "--endpoint" in words else words)
        error = capsys.readouterr().err
        if words[0] == "push" and "--dry-run" not in words:
            assert status == 2
            assert "offline" in error
            continue
        if "--endpoint" in words:
            assert status == 2
            assert "localhost:8000" in error
        elif any(word.startswith("weiwu-ww/") for word in words):
            # There is no network here: everything before the download must be right.
            assert status == 2
            assert "weiwu-ww/" in error
        else:
            assert status == 0, f"{shlex.join(words)}\n{error}"
    for made in (
        "relabelled/README.md",
        "relabelled/data/00000-00000.parquet",
        "published/README.md",
        "ranked.png",
        "images.parquet",
        "texts.parquet",
        "converted/config.json",
        "again.pt",
        "scenes.json",
        "length.png",
        "sentences.png",
        "report.png",
        "results.yaml",
    ):
        assert (cwd / made).is_file(), made


def test_training_commands_have_options_that_exist() -> None:
    found = [words[1:] for words in commands("README.md") if words[0] == "train"]
    found += [words[1:] for words in commands("README.md", "lotlip_hf") + commands("docs/objective.md")]
    assert len(found) > 2
    for words in found:
        if "--resume" in words:
            with pytest.raises(FileNotFoundError, match="resume"):
                parse_arguments(words)
        else:
            assert parse_arguments(words).output == "run"
    sections = dict(part.split("\n", 1) for part in README.split("\n## "))
    relabel = argparse.ArgumentParser()
    add_arguments(relabel)
    known = {
        "Train": {"help", "config", *(field.name.replace("_", "-") for field in dataclasses.fields(TrainingConfig))},
        "Relabel": {option.removeprefix("--") for option in relabel._option_string_actions},
    }
    for section, least in (("Train", 8), ("Relabel", 5)):
        rows = re.findall(r"^\| .*? \| `(--.*?) \|$", sections[section], flags=re.MULTILINE)
        assert len(rows) >= least
        assert set(re.findall(r"--([a-z-]+)", " ".join(rows))) <= known[section]


@pytest.mark.slow
def test_conversion_commands(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("lotlip-clip")
    found = [words for words in commands("README.md") if words[1] in ("clip", "stock")]
    assert len(found) == 3
    for words in found:
        assert lotlip(words) == 0, capsys.readouterr().err
    assert type(AutoModel.from_pretrained("stock-clip")) is CLIPModel
    assert type(AutoModel.from_pretrained("stock")) is VisionTextDualEncoderModel


@pytest.mark.slow
def test_an_adapter_is_trained_and_swapped_in(cwd: Path) -> None:
    for name in ("align_text_encoder", "swap_text_encoder"):
        (words,) = commands("README.md", f"examples/{name}.py")
        load_script(f"examples/{name}.py").main(words)
    assert (cwd / "aligned" / "report.png").is_file()
    assert (cwd / "picture.png").is_file()


@pytest.mark.slow
def test_finetuning_commands(cwd: Path) -> None:
    for name, made in (("finetune_with_trainer", "finetuned"), ("finetune_lora", "lora/merged")):
        (words,) = commands("README.md", f"examples/{name}.py")
        load_script(f"examples/{name}.py").main(words)
        assert type(AutoModel.from_pretrained(cwd / made)) is LoTLIPModel


@pytest.mark.slow
def test_commands_that_go_on_have_options_that_exist() -> None:
    for script in ("examples/space/app.py", "benchmarks/ablation.py"):
        for words in commands("README.md", script):
            load_script(script).parse_arguments(words)


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "".join(blocks("README.md", "bash")), flags=re.MULTILINE)
    assert targets == ["quickstart", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("file", ["README.md", "MODEL_CARD.md", "docs/objective.md"])
def test_links_lead_somewhere(file: str) -> None:
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.split("\n")}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (REPOSITORY / target).is_file(), target
