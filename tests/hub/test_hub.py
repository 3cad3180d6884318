"""Publishing to a Hub and loading from it, with the real client: files, cards, errors, hostile repositories."""

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

import tiny
import tiny_clip
from hub_server import READ_TOKEN, WRITE_TOKEN, Answer, Fault, Hub, environment, hub_server, use_in_process
from lotlip_hf import Encoder, LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel
from lotlip_hf.cli import main as lotlip
from lotlip_hf.evaluation.results import load_results
from lotlip_hf.grid import save_grid
from lotlip_hf.hub.card import TAGS, CardFields, card_bytes
from lotlip_hf.hub.push import SENTENCE_TRANSFORMERS, PushError, push, write_repository
from lotlip_hf.loading import load_model
from lotlip_hf.modeling import modeling_lotlip
from lotlip_hf.search import SearchResult
from scripts import WITHOUT_LOTLIP

REPO = "lotlip/tiny"
CODE = {file.name for file in Path(modeling_lotlip.__file__).parent.glob("*_lotlip.py")}
FILES = {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} | CODE
FILES |= {"tokenizer_config.json", *SENTENCE_TRANSFORMERS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as server:
        use_in_process(monkeypatch, server, tmp_path / "cache", token=WRITE_TOKEN)
        yield server


@pytest.fixture
def published(hub: Hub, official_checkpoint: Path) -> Hub:
    """A Hub with the tiny checkpoint."""
    push(official_checkpoint, REPO, card=CardFields(license="apache-2.0"))
    return hub


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns its error message, which is one line."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        assert lotlip([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        message = re.search(r"lotlip: error: .*\Z", printed.rstrip())  # a progress bar may precede it
        assert message is not None, printed
        return message[0]

    return run


def content(hub: Hub, name: str, revision: str = "main") -> bytes:
    return hub.files(REPO, revision)[name]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """Copies a checkpoint and changes its configuration."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


# Published files


def test_a_dry_run_writes_what_is_published(
    hub: Hub, official_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["push", str(official_checkpoint), "--repo-id", REPO, "--license", "mit", "--tag", "drawings"]
    assert lotlip([*arguments, "--dry-run", str(tmp_path / "dry")]) == 0
    out = capsys.readouterr().out
    assert not hub.repos
    assert not hub.requests
    dry = contents(tmp_path / "dry")
    assert dry.keys() == FILES
    for name in sorted(FILES):
        assert f"{len(dry[name]):,}  {name}\n" in out
    assert lotlip([*arguments, "--private"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.repos["model", REPO].private
    assert hub.files(REPO) == dry
    assert len(hub.matching("POST", "/commit/")) == 1
    assert hub.matching("GET", "/xet-write-token/")  # the upload uses Xet, as on the real Hub
    for name in CODE:
        assert dry[name] == (Path(modeling_lotlip.__file__).parent / name).read_bytes()
    auto_map = json.loads(dry["config.json"])["auto_map"]
    assert (
        auto_map["AutoModel"] == auto_map["AutoModelForZeroShotImageClassification"] == "modeling_lotlip.LoTLIPModel"
    )
    card = ModelCard(dry["README.md"].decode())
    assert card.data.to_dict() == {
        "language": ["en"],
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": [*TAGS, "drawings"],
    }
    assert f'from_pretrained("{REPO}"' in card.text
    assert "126 tokens" in card.text


@pytest.mark.slow
def test_push_to_hub_of_a_model(hub: Hub, official_checkpoint: Path) -> None:
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    assert isinstance(model, LoTLIPModel)
    commit = model.push_to_hub(REPO, commit_message="First", tags=["mine"], max_shard_size="1MB", revision="try")
    assert commit.commit_message == "First"
    files = hub.files(REPO, "try")
    assert not hub.files(REPO).keys() & {"config.json"}
    assert "mine" in ModelCard(files["README.md"].decode()).data.tags
    assert {"model.safetensors.index.json", "tokenizer.json", "processor_config.json"} <= files.keys()
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    again = LoTLIPModel.from_pretrained(REPO, revision="try")
    assert_equal_weights(again, model)

    fresh = LoTLIPModel(tiny.config())
    with pytest.raises(ValueError, match="`processor`"):
        fresh.push_to_hub("lotlip/fresh")
    fresh.push_to_hub("lotlip/fresh", processor=AutoProcessor.from_pretrained(official_checkpoint))
    assert hub.files("lotlip/fresh", "main").keys() == FILES


def test_a_name_without_a_namespace(hub: Hub, official_checkpoint: Path, tmp_path: Path) -> None:
    changed(official_checkpoint, tmp_path / "broken", projection_dim=7)
    with pytest.raises(ValueError, match="broken"):
        push(tmp_path / "broken", "my-lotlip")
    assert not hub.repos
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    model.push_to_hub("my-lotlip", tags="mine", max_shard_size=None)
    files = hub.files("ada/my-lotlip", "main")
    assert files.keys() == FILES
    assert b'from_pretrained("ada/my-lotlip"' in files["README.md"]
    assert ModelCard(files["README.md"].decode()).data.tags == [*TAGS, "mine"]


def test_a_model_with_an_adapter(hub: Hub, official_checkpoint: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs `pip install peft`")
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    model.add_adapter(peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="adapter"):
        model.push_to_hub(REPO)
    with pytest.raises(ValueError, match="PeftModel"):
        push(peft.PeftModel(LoTLIPModel(tiny.config()), peft.LoraConfig(target_modules="all-linear")), REPO)  # pyright: ignore[reportArgumentType]
    assert not hub.repos


@pytest.mark.slow
def test_a_model_from_the_hub(hub: Hub, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(official_checkpoint, REPO, private=True)
    model = LoTLIPModel.from_pretrained(REPO)
    monkeypatch.delenv("HF_TOKEN")
    model.push_to_hub("lotlip/other", token=WRITE_TOKEN)
    push(REPO, "lotlip/copy", token=WRITE_TOKEN)
    for name in ("lotlip/other", "lotlip/copy"):
        assert hub.files(name, "main").keys() == FILES


def assert_equal_weights(model: Any, other: Any) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_what_an_earlier_commit_left_is_not_read(hub: Hub, official_checkpoint: Path) -> None:
    push(official_checkpoint, REPO, max_shard_size="1MB")
    api = HfApi()
    for name in ("pytorch_model.bin", "preprocessor_config.json", "adapter_config.json", "adapter_model.safetensors"):
        api.upload_file(repo_id=REPO, path_in_repo=name, path_or_fileobj=b"{}")
    neighbours = {"notes.txt", "images/cat.png", "training_args.bin", "onnx/x.bin", "embeddings/coco.safetensors"}
    neighbours |= {"adapters/adapter_model.safetensors", "adapters/adapter_config.json", "older/model.safetensors"}
    hub.add(REPO, dict.fromkeys(neighbours, b"theirs"))
    push(official_checkpoint, REPO)
    assert hub.files(REPO).keys() == FILES | neighbours


@pytest.mark.slow
def test_a_pull_request(published: Hub, official_checkpoint: Path) -> None:
    before = hub_commit(published)
    commit = push(official_checkpoint, REPO, card=CardFields(license="mit"), create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert hub_commit(published) == before
    assert b"license: mit" in content(published, "README.md", "refs/pr/1")
    push(official_checkpoint, REPO, card=CardFields(license="bsd-3-clause"), revision="refs/pr/1")
    assert b"license: bsd-3-clause" in content(published, "README.md", "refs/pr/1")
    assert set(published.repos["model", REPO].refs) == {"refs/heads/main", "refs/pr/1"}
    assert hub_commit(published) == before


def test_another_commit_in_between(published: Hub, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_folder = HfApi.upload_folder

    def after_theirs(api: HfApi, **options: Any) -> Any:
        published.add(REPO, {"theirs.txt": b"theirs"})
        return upload_folder(api, **options)

    before = published.files(REPO)
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", after_theirs)
        with pytest.raises(PushError, match=REPO) as caught:
            push(official_checkpoint, REPO, card=CardFields(license="mit"))
    assert caught.value.status == 412
    assert published.files(REPO) == {**before, "theirs.txt": b"theirs"}
    push(official_checkpoint, REPO, card=CardFields(license="mit"))
    assert b"license: mit" in content(published, "README.md")
    assert published.files(REPO).keys() == FILES | {"theirs.txt"}


def hub_commit(hub: Hub) -> str:
    return hub.repos["model", REPO].refs["refs/heads/main"]


# The model card


RESULTS = {
    "task": "image-text-retrieval",
    "dataset": {"id": "urban1k", "name": "Urban1k", "split": "test"},
    "metrics": {"image_to_text_r1": 81.25, "text_to_image_r1": 79.5},
}


def test_results_and_training_reach_the_card(official_checkpoint: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(official_checkpoint, trained)
    options = "text_model: google-bert/bert-base-uncased\nimage_model: /home/me/vit\ndata: someone/captions\n"
    (trained / "training_config.yaml").write_text(options)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    fields = CardFields(results=[tmp_path / "results.json"])
    folder = write_repository(trained, tmp_path / "out", "me/mine", card=fields)
    assert contents(folder).keys() == FILES
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == ["google-bert/bert-base-uncased"]
    assert card.data.datasets == ["someone/captions"]
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].is_equal_except_value(load_results(tmp_path / "results.json").entries[0])
    assert [result.metric_value for result in card.data.eval_results] == [81.25, 79.5]
    assert "Trained with lotlip-hf from google-bert/bert-base-uncased on someone/captions." in card.text
    assert "**Urban1k (test)**" in card.text
    assert "| image to text | 81.25 |" in card.text
    assert "/home/me" not in card.content
    given = CardFields(base_model=["a/b"], datasets=["c/d", "e/f"], origin="From nowhere.")
    folder = write_repository(trained, tmp_path / "given", "me/mine", card=given)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets) == (["a/b"], ["c/d", "e/f"])
    assert "From nowhere." in card.text


def card_of(checkpoint: Path, folder: Path, **fields: Any) -> ModelCard:
    """Returns the card that is published with a checkpoint."""
    return ModelCard.load(write_repository(checkpoint, folder, "me/mine", card=CardFields(**fields)) / "README.md")


def test_the_card_leaves_out_paths_and_free_text(official_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-7"
    shutil.copytree(official_checkpoint, folder)
    assert "All options" not in card_of(folder, tmp_path / "plain").text
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"] |= {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    options = {
        "learning_rate": 0.001,
        "data": "/home/me/pictures",
        "terms": ["sigmoid", "infonce:2"],
        "batch_size": 16,
        "seed": 3,
    }
    options |= {"lock_vision": True, "max_steps": 9, "num_epochs": 1.0, "output": "/home/me", "num_workers": 4}
    options |= {
        "splitter": "<script>",
        "term_options": ["<b>"],
        "captioners": [0, 2],
        "<b>": "<b>",
        "short_column": "<i>",
    }
    options |= {"image_folder": "my/pictures", "image_root": "my/root", "max_record_bytes": 1 << 28}
    (tmp_path / "run" / "training_config.yaml").write_text(yaml.safe_dump(options))
    text = card_of(folder, tmp_path / "small").text
    assert "112 x 112 pixels" in text
    trained = text.split("## How it was trained")[1].split("## Intended")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", trained, flags=re.MULTILINE))
    assert rows == {
        **{"seed": "3", "lock_vision": "yes", "captioners": "0, 2", "terms": "sigmoid, infonce:2", "max_steps": "9"},
        **{"batch_size": "16, of each process", "learning_rate": "0.001"},
    }
    facts = dict(re.findall(r"^- \*\*(.+)\*\*: (.*)$", trained, flags=re.MULTILINE))
    assert facts["Objective"] == "`sigmoid`, `infonce:2`"
    assert facts["Batch"] == "16 images of each process"
    assert facts["Length"] == "7 steps of 9"
    assert "--dataset" in facts["Data"]  # a path is not published
    assert not re.search("home|my/|script|<[bi]>", trained)


def test_the_card_of_a_run(official_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-20"
    shutil.copytree(official_checkpoint, folder)
    options = {
        "data": "scenes",
        "num_scenes": 200,
        "captions": "sub_captions",
        "num_long_texts": 3,
        "num_sentences": 1,
    }
    options |= {"batch_size": 16, "max_steps": 20, "eval_data": "scenes", "eval_samples": 50, "model": "a/b"}
    (folder / "training_config.yaml").write_text(yaml.safe_dump(options))
    (folder / "state").mkdir()
    for process in range(2):
        progress = {"counts": {"records": 320}, "data": {"num_records": 200}}
        (folder / "state" / f"{process}-progress.json").write_text(json.dumps(progress))
    recalls = {"long_image_to_text_r1": 0.5, "long_text_to_image_r1": 0.25, "short_image_to_text_r1": 0.125}
    lines = [{"step": 10, "long_image_to_text_r1": 0.75}, {"step": 20, "loss": 2.5}, {"step": 20, **recalls}]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card_of(folder, tmp_path / "out").text
    facts = dict(re.findall(r"^- \*\*(.+)\*\*: (.*)$", text, flags=re.MULTILINE))
    assert "[a/b](https://huggingface.co/a/b)" in facts["Initial weights"]
    assert "200 drawn pictures" in facts["Data"]
    assert "3 sub-captions of 1 sentence " in facts["Captions"]
    assert facts["Batch"] == "32 images"
    assert facts["Length"] == "20 steps, 640 images seen, 3.2 epochs of 200 records"
    assert "step 20" in text
    assert "50 held-out scenes" in text
    assert "| long captions | image to text | 50.00 |\n| long captions | text to image | 25.00 |" in text
    assert "75.00" not in text
    (folder / "state" / "1-progress.json").write_text('{"counts": {"records": "<b>"}}')
    text = card_of(folder, tmp_path / "damaged").text
    assert "20 steps\n" in text
    assert "16 images of each process" in text
    (tmp_path / "run" / "log.jsonl").write_text("[]\n{}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        card_of(folder, tmp_path / "no")


BOMB = "".join(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("training_config.yaml", f"a0: &a0 [1]\n{BOMB}terms: *a9\nmodel: *a9\ncaptioners: *a9\n"),
        ("training_config.yaml", f"batch_size: 0x{'f' * 9999}\nseed: 0x{'f' * 9999}\n"),
        ("../log.jsonl", '{"step": 7, "long_image_to_text_r1": %s, "a_to_b": 1}\n' % ("9" * 400)),
        ("../log.jsonl", '{"step": 7, "long_image_to_text_r%s": 0.5}\n' % ("9" * 5000)),
        ("state/0-progress.json", '{"counts": {"records": %s}, "data": {"num_records": 3}}' % ("9" * 400)),
    ],
    ids=["aliases", "numbers", "recalls", "ranks", "progress"],
)
def test_a_hostile_run(official_checkpoint: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "run" / "checkpoint-7"
    shutil.copytree(official_checkpoint, folder)
    (folder / "state").mkdir()
    (folder / "training_config.yaml").write_text("{}")
    (folder / name).write_text(content)
    text = card_of(folder, tmp_path / "out").text
    assert "7 steps\n" in text
    assert "Validation" not in text
    assert len(text) < 5000


@pytest.mark.parametrize("name", ["README.md", "ranked_examples.png"])
def test_links_of_a_checkpoint_are_not_published(official_checkpoint: Path, tmp_path: Path, name: str) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    (tmp_path / "secret.md").write_text("secret")
    folder = tmp_path / "models" / "snapshots" / "1"
    shutil.copytree(official_checkpoint, folder)
    (folder / name).symlink_to(tmp_path / f"secret{Path(name).suffix}")
    with pytest.raises(ValueError, match=name):
        write_repository(folder, tmp_path / "out", REPO)
    (folder / name).unlink()
    (tmp_path / "models" / "blobs").mkdir()  # as in the cache of the Hub
    shutil.copy(tmp_path / f"secret{Path(name).suffix}", tmp_path / "models" / "blobs" / "2")
    (folder / name).symlink_to("../../blobs/2")
    assert (write_repository(folder, tmp_path / "out", REPO) / name).is_file()


# Facts that the card lacks


def test_the_card_asks_for_unknown_facts(
    official_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "mine.jpg")
    given = {"--license": "mit", "--dataset": "a/b", "--results": tmp_path / "results.json"}
    given["--picture"] = tmp_path / "mine.jpg"
    arguments: list[Any] = ["push", official_checkpoint, "--repo-id", REPO]
    for number in range(len(given) + 1):
        options = [each for pair in list(given.items())[:number] for each in pair]
        assert lotlip([str(each) for each in (*arguments, *options, "--dry-run", tmp_path / str(number))]) == 0
        printed = capsys.readouterr().err
        text = (tmp_path / str(number) / "README.md").read_text()
        for index, option in enumerate(given):
            assert (f"({option})" in printed) == (f"`{option}`" in text) == (index >= number)
    shutil.copytree(official_checkpoint, tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text(text.replace("# tiny", "# Mine") + "*Not stated. Pass `--license`")
    capsys.readouterr()
    assert lotlip(["push", str(tmp_path / "own"), "--repo-id", REPO, "--dry-run", str(tmp_path / "kept")]) == 0
    assert "--license" not in capsys.readouterr().err


def test_the_picture_of_ranked_examples(
    hub: Hub, official_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    save_grid([SearchResult(tmp_path / "red.png", 0.5)], tmp_path / "drawn.png", "A red]\n<b> picture")
    push(official_checkpoint, REPO, card=CardFields(picture=tmp_path / "drawn.png"))
    line = "![A red\\] &lt;b&gt; picture](ranked_examples.png)"
    assert content(hub, "ranked_examples.png") == (tmp_path / "drawn.png").read_bytes()
    assert line in content(hub, "README.md").decode()
    assert "--picture" not in caplog.text
    assert "--license" in caplog.text

    push(official_checkpoint, REPO)  # the picture is kept
    assert content(hub, "ranked_examples.png")
    assert line in content(hub, "README.md").decode()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "[x](y).webp")
    push(official_checkpoint, REPO, card=CardFields(picture=tmp_path / "[x](y).webp"))
    assert "ranked_examples.png" not in hub.files(REPO)
    assert "![Ranked examples](ranked_examples.webp)" in content(hub, "README.md").decode()

    again = tmp_path / "again"
    shutil.copytree(official_checkpoint, again)
    shutil.copyfile(tmp_path / "drawn.png", again / "ranked_examples.png")
    folder = write_repository(again, tmp_path / "copied", REPO)
    assert (folder / "ranked_examples.png").read_bytes() == (tmp_path / "drawn.png").read_bytes()
    assert line in (folder / "README.md").read_text()


def test_pictures_that_are_refused(official_checkpoint: Path, tmp_path: Path, error: Callable[..., str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (40, 30)).save(tmp_path / "other.bmp")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate((10 << 20) + 1)
    arguments = ["push", official_checkpoint, "--repo-id", REPO, "--dry-run", tmp_path / "dry"]
    for name in ("text.png", "other.bmp", "large.png", "missing.png"):
        assert name in error(*arguments, "--picture", tmp_path / name)
    assert not (tmp_path / "dry").exists()


def test_results_are_in_percent_with_their_intervals(official_checkpoint: Path, tmp_path: Path) -> None:
    def result(captions: Any, count: int, **others: Any) -> Path:
        metrics = {"image_to_text_r1": 0.0625, "image_to_text_r1_low": 0.0125, "image_to_text_r1_high": 0.1}
        metrics |= {"image_to_text_r10": 1.0, "image_to_text_median_rank": 6.5}
        protocol = {"captions": captions, "num_images": count, "num_texts": count, **others}
        dataset = {"id": "me/a", "name": "A|B <b>", "split": None}
        file = tmp_path / f"{count}.json"
        file.write_text(json.dumps({**RESULTS, "dataset": dataset, "metrics": metrics, "protocol": protocol}))
        return file

    cut = {"normalization": "stripped", "num_texts_cut": 3, "max_length": 64}
    files = [
        result("long", 1000, **cut),
        result("short", 20, first_images=20, num_texts=100, normalization=None),
        result("the first | line", 9),
    ]
    card = card_of(official_checkpoint, tmp_path / "out", results=files)
    shown = card.text.split("## Results")[1].split("## How")[0].replace("\\|", "/")
    about = re.findall(r"^\*\*A/B &lt;b&gt;\*\*: (.*)\.$", shown, flags=re.MULTILINE)
    assert about == [
        "1,000 images; 1 text per image; long captions; captions normalised; 3 texts cut at 64 tokens",
        "the first 20 images; 5 texts per image; short captions; captions not normalised",
        "9 images; 1 text per image; captions: the first / line",
    ]
    head = ["R@1 (%)", "95 % interval", "R@10 (%)", "median rank"]
    values = ["6.25", "1.25 - 10.00", "100.00", "6.5"]
    rows = [line[2:-2].split(" | ") for line in shown.splitlines() if line.startswith(("| direction", "| image"))]
    without = [[*cells[:2], cells[3]] for cells in (head, values)]  # R@10 of 9 candidates is always 100
    assert [row[1:] for row in rows] == [head, values, head, values, *without]
    entries = card.data.to_dict()["model-index"][0]["results"]
    assert [entry["dataset"].get("config") for entry in entries] == [
        *("long captions", "short captions, first 20 images", None)
    ]


def test_results_of_a_classification(official_checkpoint: Path, tmp_path: Path) -> None:
    metrics = {"accuracy_top1": 0.5, "other|<b>": 1.5}
    protocol = {"num_images": 40, "num_classes": 10}
    content = {**RESULTS, "task": "zero-shot-image-classification", "metrics": metrics, "protocol": protocol}
    (tmp_path / "results.json").write_text(json.dumps(content))
    text = card_of(official_checkpoint, tmp_path / "out", results=tmp_path / "results.json").text
    assert "40 images; 10 classes" in text
    assert "| top-1 (%) |\n| ---: |\n| 50.00 |\n" in text


@pytest.mark.slow
def test_results_of_another_model_are_refused(official_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    model, processor = load_model(official_checkpoint, device="cpu")
    half = copy.deepcopy(model).to(torch.bfloat16)
    for evaluated, dtype in ((model, "float32"), (half, "bfloat16")):
        own = {modality: Encoder(evaluated, processor).fingerprint(modality) for modality in ("image", "text")}
        protocol = {"first_images": 50, "num_images": 50}
        file.write_text(json.dumps({**RESULTS, "model_fingerprint": own, "dtype": dtype, "protocol": protocol}))
        folder = write_repository(official_checkpoint, tmp_path / dtype, "me/mine", card=CardFields(results=[file]))
        results = ModelCard.load(folder / "README.md").data.eval_results
        assert results is not None
        assert [result.dataset_args for result in results] == [{"num_images": 50}] * 2
    for other in ({**own, "text": "0" * 32}, {**own, "image": "0" * 32}):
        file.write_text(json.dumps({**RESULTS, "model": "another", "model_fingerprint": other, "dtype": "bfloat16"}))
        with pytest.raises(ValueError, match=r"results\.json.* another"):
            write_repository(official_checkpoint, tmp_path / "no", "me/mine", card=CardFields(results=[file]))
    assert not (tmp_path / "no").exists()


OWN_CARD = b"---\r\nlicense: mit   # ours\r\ntags: [a]\r\n---\r\n\r\n# Mine\r\n"


def test_a_card_of_ones_own_is_kept(official_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(official_checkpoint, tmp_path / "own")
    (tmp_path / "own" / "README.md").write_bytes(OWN_CARD)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    folder = write_repository(tmp_path / "own", tmp_path / "kept", "me/mine")
    assert (folder / "README.md").read_bytes() == OWN_CARD
    fields = CardFields(
        license="apache-2.0", base_model="a/b", datasets=["c/d"], tags="drawings", results=tmp_path / "results.json"
    )
    folder = write_repository(tmp_path / "own", tmp_path / "measured", "me/mine", card=fields)
    assert b"\r\n\r\n# Mine\r\n" in (folder / "README.md").read_bytes()
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("apache-2.0", ["a/b"], ["c/d"])
    assert card.data.tags == ["a", "drawings"]
    assert card.data.language is None
    assert card.data.eval_results is not None
    assert len(card.data.eval_results) == 2


@pytest.mark.parametrize(
    "text",
    [
        "<!-- This model card has been generated automatically according to the information the -->\n# run",
        "# SentenceTransformer\n\nThis is a [sentence-transformers](https://www.SBERT.net) model trained on",
        "",
    ],
)
def test_a_card_that_a_trainer_wrote_is_not_kept(official_checkpoint: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(official_checkpoint, tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text(f"---\nlicense: mit\ntags: [x]\n---\n\n{text}\n")
    card = ModelCard.load(write_repository(tmp_path / "own", tmp_path / "out", "me/mine") / "README.md")
    assert (card.data.license, card.data.tags) == ("mit", TAGS)
    assert 'from_pretrained("me/mine"' in card.text


@pytest.mark.slow
def test_the_card_in_the_repository(published: Hub, official_checkpoint: Path, tmp_path: Path) -> None:
    ours = content(published, "README.md")
    longer = shutil.copytree(official_checkpoint, tmp_path / "longer")
    settings = json.loads((longer / "tokenizer_config.json").read_text())
    (longer / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 100}))
    push(longer, REPO, card=CardFields(language="de"))  # the text was not edited: it is replaced
    card = ModelCard(content(published, "README.md").decode())
    assert "100 tokens" in card.text
    assert "126 tokens" not in card.text
    assert "German" in card.text
    assert (card.data.license, card.data.language) == ("apache-2.0", ["de"])

    for theirs in (OWN_CARD, ours.replace(b"# tiny", b"# Our tiny model")):
        published.add(REPO, {"README.md": theirs})
        push(official_checkpoint, REPO)
        assert content(published, "README.md") == theirs
    push(official_checkpoint, REPO, card=CardFields(license="mit"))
    assert content(published, "README.md") == theirs.replace(b"license: apache-2.0", b"license: mit")
    (longer / "README.md").write_bytes(OWN_CARD)
    push(longer, REPO)
    assert content(published, "README.md") == OWN_CARD
    published.add(REPO, {"README.md": b"---\na: [\n---\n# Mine"})
    with pytest.raises(ValueError, match="README.md"):
        push(official_checkpoint, REPO)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "---\nlicense: [\n---\n# Mine"),
        ("README.md", "---\n- a\n---\n# Mine"),
        ("training_config.yaml", "model: ["),
        ("training_config.yaml", "- model"),
    ],
)
def test_files_beside_the_checkpoint_that_cannot_be_read(
    hub: Hub, official_checkpoint: Path, tmp_path: Path, error: Callable[..., str], name: str, text: str
) -> None:
    folder = shutil.copytree(official_checkpoint, tmp_path / "broken")
    (folder / name).write_text(text)
    assert f"lotlip: error: {folder / name}: " in error("push", folder, "--repo-id", REPO)
    assert not hub.repos


def test_paths_of_a_training_are_no_hub_ids(official_checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load_model(official_checkpoint, device="cpu")
    names = ["google/vit", "runs/checkpoint-500", "data/*", "a/b.jsonl", "bert", "../a/b", "a/b/c", "", None, ["a/b"]]
    told = []
    for name in names:
        (tmp_path / "training_config.yaml").write_text(yaml.safe_dump({"data": name}))
        card = ModelCard(card_bytes(model, processor, tmp_path, "me/mine", CardFields()).decode())
        told += card.data.datasets or []
    assert told == ["google/vit"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"task": "x", "dataset": "y", "metrics": {"r": 1}}', '{"task": 1'])
def test_files_that_are_no_results(
    tmp_path: Path, official_checkpoint: Path, error: Callable[..., str], text: str
) -> None:
    (tmp_path / "results.json").write_text(text)
    arguments = ["push", official_checkpoint, "--repo-id", REPO, "--results", tmp_path / "results.json"]
    message = error(*arguments, "--dry-run", tmp_path / "dry")
    assert str(tmp_path / "results.json") in message
    assert not (tmp_path / "dry").exists()


# Errors of publishing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "is_published", "is_there", "word"),
    [
        (Fault("POST", "/repos/create", Answer(401)), False, False, "hf auth login"),
        (Fault("POST", "/preupload/", Answer(503), times=99), False, False, "503"),
        (Fault("POST", "/validate-yaml", Answer(500)), False, False, "Push again"),
        (Fault("GET", "/xet-write-token/", Answer(403)), False, False, "403"),
        (Fault("POST", "/commit/", Answer(403), times=99), False, False, "write access"),
        (Fault("POST", "/commit/", Answer(500), times=99), None, False, f"{REPO}/commits/main"),
        (Fault("POST", "/commit/", None), None, True, f"{REPO}/commits/main"),  # the answer is lost
        (Fault("GET", "/tree/", Answer(503), times=99), True, True, f"{REPO}/commit/"),
    ],
    ids=lambda value: value.path if isinstance(value, Fault) else None,
)
def test_errors_say_whether_it_was_published(
    hub: Hub, official_checkpoint: Path, fault: Fault, is_published: bool | None, is_there: bool, word: str
) -> None:
    hub.faults.append(replace(fault))
    with pytest.raises(PushError, match=word) as caught:
        push(official_checkpoint, REPO)
    assert caught.value.published is is_published
    assert REPO in str(caught.value)
    assert (hub.files(REPO).keys() if hub.repos else set()) == (FILES if is_there else set())
    hub.faults.clear()
    push(official_checkpoint, REPO)
    assert hub.files(REPO).keys() == FILES


def test_a_card_that_cannot_be_fetched_is_not_taken_for_missing(published: Hub, official_checkpoint: Path) -> None:
    published.faults.append(Fault("HEAD", "/README.md", Answer(503), times=99))
    before = published.files(REPO)
    with pytest.raises(PushError, match=REPO):
        push(official_checkpoint, REPO, card=CardFields(license="mit"))
    assert published.files(REPO) == before


def test_a_damaged_upload_is_noticed(hub: Hub, official_checkpoint: Path) -> None:
    hub.damaged |= {"config.json", "model.safetensors"}
    with pytest.raises(PushError, match=r"config\.json, model\.safetensors") as caught:
        push(official_checkpoint, REPO)
    assert caught.value.published
    hub.damaged.clear()
    push(official_checkpoint, REPO)
    assert type(AutoModel.from_pretrained(REPO)) is LoTLIPModel


def test_tokens(
    hub: Hub, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["push", str(official_checkpoint), "--repo-id", REPO, "--private"]
    for token, status in ((READ_TOKEN, 2), (WRITE_TOKEN, 0)):
        monkeypatch.setenv("HF_TOKEN", token)
        assert lotlip(arguments) == status
        printed = "".join(capsys.readouterr())
        assert token not in printed
        assert ("write access" in printed) is bool(status)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=REPO):
        AutoModel.from_pretrained(REPO)
    assert type(AutoModel.from_pretrained(REPO, token=READ_TOKEN)) is LoTLIPModel


def test_what_cannot_be_published(tmp_path: Path, official_checkpoint: Path, error: Callable[..., str]) -> None:
    dry_run = ["--repo-id", REPO, "--dry-run", tmp_path / "dry"]
    assert "nowhere" in error("push", tmp_path / "nowhere", *dry_run)
    tiny_clip.save_clip(tmp_path / "clip")
    assert "CLIPModel" in error("push", tmp_path / "clip", *dry_run)
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "mine").touch()
    assert str(tmp_path / "dry") in error("push", official_checkpoint, *dry_run)
    assert "a/b/c" in error("push", official_checkpoint, "--repo-id", "a/b/c")


# Loading


@pytest.mark.slow
def test_every_auto_class_and_revisions(published: Hub, official_checkpoint: Path, tmp_path: Path) -> None:
    first = hub_commit(published)
    changed(official_checkpoint, tmp_path / "changed", logit_scale_init_value=1.5)
    push(tmp_path / "changed", REPO)
    published.repos["model", REPO].refs["refs/tags/v1"] = first
    classes = (AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoTokenizer, AutoProcessor)
    names = ["LoTLIPConfig", "LoTLIPModel", "LoTLIPModel", "LoTLIPTokenizer", "LoTLIPProcessor"]
    loaded = [type(auto.from_pretrained(REPO)) for auto in classes]
    assert [one.__name__ for one in loaded] == names
    assert all(one.__module__.startswith("lotlip_hf.") for one in loaded)
    assert type(AutoImageProcessor.from_pretrained(REPO)).__name__.startswith("CLIPImageProcessor")
    assert AutoConfig.from_pretrained(REPO).logit_scale_init_value == 1.5
    for revision in ("v1", first):
        assert AutoConfig.from_pretrained(REPO, revision=revision).logit_scale_init_value > 2
        assert type(AutoModel.from_pretrained(REPO, revision=revision)) is LoTLIPModel
    config = AutoConfig.from_pretrained(REPO)
    assert type(AutoModel.from_pretrained(REPO, config=config.text_config)) is LoTLIPTextModel
    assert type(AutoModel.from_pretrained(REPO, config=config.vision_config)) is LoTLIPVisionModel
    # the installed code runs, despite trust_remote_code=True
    assert type(AutoModel.from_pretrained(REPO, trust_remote_code=True)) is LoTLIPModel


WITHOUT_THE_PACKAGE = (
    WITHOUT_LOTLIP
    + """
import json, re, sys
import torch
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification,
    AutoProcessor, AutoTokenizer)
torch.set_num_threads(1)
repo, revision, folder, expected = sys.argv[1:]
code = {"trust_remote_code": True}
answers = {}
try:
    AutoModel.from_pretrained(repo, trust_remote_code=False)
except ValueError as error:
    answers["refused"] = "trust_remote_code=True" in str(error)
autos = (AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoTokenizer, AutoImageProcessor,
    AutoProcessor)
answers["classes"] = [type(auto.from_pretrained(repo, **code)).__name__ for auto in autos]
config = AutoConfig.from_pretrained(repo, **code)
towers = [AutoModel.from_pretrained(repo, config=part, **code) for part in (config.text_config, config.vision_config)]
answers["towers"] = [type(tower).__name__ for tower in towers]
answers["pinned"] = AutoConfig.from_pretrained(repo, revision=revision, **code).logit_scale_init_value
model = AutoModel.from_pretrained(repo, revision=revision, **code)
processor = AutoProcessor.from_pretrained(repo, revision=revision, **code)
answers["module"] = type(model).__module__
inputs = processor(text=["A cat. It sleeps."], images=Image.new("RGB", (50, 40), "red"), return_tensors="pt")
with torch.no_grad():
    answers["logit"] = model(**inputs).logits_per_image.item()
model.save_pretrained(folder + "/whole")
processor.save_pretrained(folder + "/whole")
towers[0].save_pretrained(folder + "/text")
again = AutoModel.from_pretrained(folder + "/whole", **code)
with torch.no_grad():
    answers["again"] = again(**AutoProcessor.from_pretrained(folder + "/whole", **code)(
        text=["A cat. It sleeps."], images=Image.new("RGB", (50, 40), "red"), return_tensors="pt"
    )).logits_per_image.item()
answers["text"] = type(AutoModel.from_pretrained(folder + "/text", **code)).__name__
card = open(expected).read()
for snippet in re.findall(r"^```python\\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL):
    exec(snippet, {})
try:
    from sentence_transformers import SentenceTransformer
    sentences = SentenceTransformer(repo, revision=revision, trust_remote_code=True, device="cpu")
    answers["embeddings"] = sentences.encode(["A cat. It sleeps.", "A dog."]).tolist()
    answers["sentences"] = type(sentences[0].model).__module__
except ImportError:
    pass
print(json.dumps(answers))
"""
)


@pytest.mark.slow
def test_loading_without_the_package(published: Hub, official_checkpoint: Path, tmp_path: Path) -> None:
    first = hub_commit(published)
    push(changed(official_checkpoint, tmp_path / "changed", logit_scale_init_value=1.5), REPO)
    (tmp_path / "card.md").write_bytes(content(published, "README.md"))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (640, 480), "orange").save(tmp_path / "photos" / "cat.png")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_THE_PACKAGE, REPO, first, tmp_path, tmp_path / "card.md"],
        capture_output=True,
        text=True,
        env=environment(published, tmp_path / "home"),
        cwd=tmp_path,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    answers = json.loads(process.stdout.strip().split("\n")[-1])
    assert answers["refused"]
    names = ["LoTLIPConfig", "LoTLIPModel", "LoTLIPModel", "LoTLIPTokenizer"]
    assert answers["classes"][:4] == names
    assert answers["classes"][4].startswith("CLIPImageProcessor")
    assert answers["classes"][5] == "LoTLIPProcessor"
    assert answers["towers"] == ["LoTLIPTextModel", "LoTLIPVisionModel"]
    assert answers["text"] == "LoTLIPTextModel"
    assert answers["pinned"] > 2
    assert answers["module"].startswith("transformers_modules.")
    assert answers["again"] == answers["logit"]
    whole = {name for name in contents(tmp_path / "whole") if "__pycache__" not in name}
    assert whole == FILES - {"README.md", *SENTENCE_TRANSFORMERS}
    # the installed package gives the same logit
    model, processor = load_model(tmp_path / "whole")
    inputs = processor(text=["A cat. It sleeps."], images=Image.new("RGB", (50, 40), "red"), return_tensors="pt")
    with torch.no_grad():
        assert abs(model(**inputs).logits_per_image.item() - answers["logit"]) < 1e-5
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("the rest needs `pip install sentence-transformers`")
    assert answers["sentences"].startswith("transformers_modules.")
    embeddings = torch.tensor(answers["embeddings"])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2), rtol=0, atol=1e-5)
    expected = Encoder(model, processor).encode_texts(["A cat. It sleeps.", "A dog."], progress=False)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


# Errors of loading


@pytest.mark.parametrize("status", [401, 500])
def test_a_hub_that_does_not_give(published: Hub, status: int) -> None:
    published.faults.append(Fault("GET", r"\.safetensors$", Answer(status), times=99))
    with pytest.raises(OSError) as caught:  # noqa: PT011  (the message is the client's)
        AutoModel.from_pretrained(REPO)
    assert "safetensors there" not in str(caught.value)
    published.faults.clear()
    assert type(AutoModel.from_pretrained(REPO)) is LoTLIPModel


def test_a_tokenizer_configuration_that_is_not_given(published: Hub) -> None:
    published.faults.append(Fault("HEAD", r"/tokenizer_config.json", Answer(503), times=99))
    with pytest.raises(OSError, match="tokenizer_config.json"):
        AutoProcessor.from_pretrained(REPO)


# Malicious and broken repositories


def test_pickled_weights_are_refused(official_checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(official_checkpoint, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.add(REPO, {file.name: file.read_bytes() for file in folder.iterdir()})
    for name in (folder, REPO):
        with pytest.raises(OSError, match="safetensors"):
            AutoModel.from_pretrained(name)
    expected = LoTLIPModel.from_pretrained(official_checkpoint)
    assert_equal_weights(LoTLIPModel.from_pretrained(folder, use_safetensors=False), expected)


def test_other_code_is_not_run(official_checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(official_checkpoint, folder)
    ran = tmp_path / "ran"
    for name in ("modeling_lotlip.py", "tokenization_lotlip.py"):
        with (folder / name).open("a") as file:
            file.write(f"\nopen({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "someone/evil--modeling.Evil"
    (folder / "config.json").write_text(json.dumps(config))
    hub.add(REPO, {file.name: file.read_bytes() for file in folder.iterdir()})
    for name in (folder, REPO):
        load_model(name)
        model = AutoModel.from_pretrained(name, trust_remote_code=True)
        assert "AutoModelForCausalLM" not in model.config.auto_map
    assert not ran.exists()
