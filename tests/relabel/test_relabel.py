"""Relabelling: what is written, what is done with poor captions, and that no interruption changes either."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.hf_api import api as hf_api
from PIL import Image
from transformers import BertTokenizer

from lotlip_hf.cli import main
from lotlip_hf.data.records import load_records
from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.options import Parser
from lotlip_hf.relabel.captioners.base import PROMPT, Answer, CaptionerConfig
from lotlip_hf.relabel.captioners.local import LocalCaptioner
from lotlip_hf.relabel.config import RelabelConfig, add_arguments, read_config
from lotlip_hf.relabel.quality import judge
from lotlip_hf.relabel.run import relabel
from lotlip_hf.scenes.dataset import scenes_dataset
from openai_server import each_image_first, openai_server, use_in_process
from processes import Started, finish
from scripts import load_script
from tiny_captioners import counting_tokenizer, save_llava

NUMBER = 23


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings with raw captions; `7.png` is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = scenes_dataset(NUMBER)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for number in range(NUMBER):
            scenes[number]["image"].save(folder / f"{number}.png")
            line = {"file_name": f"{number}.png", "short_caption": scenes[number]["short_caption"]}
            metadata.write(json.dumps(line) + "\n")
    (folder / "7.png").write_bytes(b"no image")
    return folder


class Speaker:
    """A captioner whose words come from the pixels alone, and from the seed where tokens are drawn."""

    group_size, concurrency, revision = 4, 1, "0123abc"

    def __init__(self, config: CaptionerConfig) -> None:
        self.config = config
        self.asked: list[tuple[str, float]] = []
        self.seeds: list[int] = []
        self.is_closed = False

    def answer(self, images: Sequence[Image.Image], settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Answer]:
        assert 1 <= len(images) == len(seeds) <= self.group_size
        return [self.one(image, settings, seed) for image, seed in zip(images, seeds, strict=True)]

    def one(self, image: Image.Image, settings: Mapping[str, Any], seed: int) -> Answer:
        key = digest(image)
        self.asked.append((key, settings["temperature"]))
        self.seeds.append(seed)
        drawn = f" It was drawn with the number {seed}." if settings["temperature"] else ""
        return Answer(f"{self.config.model} sees a picture with the number {key}. It has a plain ground.{drawn}", True)

    def close(self) -> None:
        self.is_closed = True


def key_of(pictures: Path, number: int) -> str:
    return digest(Image.open(pictures / f"{number}.png").convert("RGB"))


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:8]


def config(data: Path, output: Path, *models: str, **options: Any) -> RelabelConfig:
    captioners = [CaptionerConfig(model) for model in models or ("first", "second")]
    defaults = {"tokenizer": counting_tokenizer(), "shard_size": 10, "captioners": captioners}
    return RelabelConfig(data=str(data), output=str(output), **{**defaults, **options})


def run(
    options: RelabelConfig, make: Callable[[CaptionerConfig], Any] = Speaker
) -> tuple[dict[str, Any] | None, list[Any]]:
    """What `relabel` returns, and the captioners that it made."""
    made: list[Any] = []

    def keep(captioner: CaptionerConfig) -> Any:
        made.append(make(captioner))
        return made[-1]

    return relabel(options, make_captioner=keep, progress=False), made


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, hidden files too."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def rows(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((output / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def skipped(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]


def some(pictures: Path, folder: Path, number: int) -> Path:
    """A folder with the first pictures alone."""
    folder.mkdir()
    for name in (f"{one}.png" for one in range(number)):
        shutil.copy(pictures / name, folder)
    return folder


def tars(pictures: Path, folder: Path, *shards: range) -> Path:
    """A folder of WebDataset shards with these pictures."""
    folder.mkdir()
    for number, shard in enumerate(shards):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for one in shard:
                tar.add(pictures / f"{one}.png", f"{one}.png")
    return folder


# What is written


def test_shards_hold_a_caption_of_each_captioner(pictures: Path, tmp_path: Path) -> None:
    statistics, (first, second) = run(config(pictures, tmp_path / "out"))
    assert first.is_closed
    assert second.is_closed
    count = BertTokenizer.from_pretrained(counting_tokenizer())
    written = rows(tmp_path / "out")
    assert [row["id"] for row in written] == [f"{number}.png" for number in range(NUMBER) if number != 7]
    raw = [json.loads(line)["short_caption"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for row in written:
        assert row["image"] == {"bytes": None, "path": row["id"]}  # from the image folder on
        image = Image.open(pictures / row["image"]["path"]).convert("RGB")
        expected = [
            f"{model} sees a picture with the number {digest(image)}. It has a plain ground."
            for model in ("first", "second")
        ]
        assert row["long_captions"] == expected
        assert row["short_caption"] == raw[int(row["id"].removesuffix(".png"))]
        for model, text, details in zip(("first", "second"), expected, row["captions"], strict=True):
            assert details["tokens"] == len(count.tokenize(text))
            assert details["sub_captions"] == 2
            assert json.loads(details["settings"]) == CaptionerConfig(model).settings()
            fixed = [details[name] for name in ("model", "revision", "prompt", "attempts", "reasons", "dropped")]
            assert fixed == [model, "0123abc", PROMPT, 1, [], None]
    (entry,) = skipped(tmp_path / "out")
    assert (entry["id"], entry["image"]) == ("7.png", "7.png")
    assert "not an image" in entry["reason"]
    assert statistics == json.loads((tmp_path / "out" / "statistics.json").read_text(), object_hook=numbers)
    assert (statistics["images"], statistics["skipped"]) == (NUMBER - 1, 1)


def numbers(pairs: dict[str, Any]) -> dict[Any, Any]:
    """JSON has no numbers for keys."""
    return {int(key) if key.isdigit() else key: value for key, value in pairs.items()}


def test_the_statistics_are_those_of_the_texts(pictures: Path, tmp_path: Path) -> None:
    """As the LoTLIP paper's table 6 has them."""
    statistics, _ = run(config(pictures, tmp_path / "out", shard_size=4))
    count, written = BertTokenizer.from_pretrained(counting_tokenizer()), rows(tmp_path / "out")
    texts = {
        "raw captions": [row["short_caption"] for row in written],
        "first": [row["long_captions"][0] for row in written],
        "second": [row["long_captions"][1] for row in written],
        "all long captions": [text for row in written for text in row["long_captions"]],
    }
    assert [row["name"] for row in statistics["captions"]] == list(texts)
    for row in statistics["captions"]:
        tokens = [len(count.tokenize(text)) for text in texts[row["name"]]]
        sentences = [len(split_sentences(text)) for text in texts[row["name"]]]
        assert row["texts"] == len(tokens)
        assert row["mean_tokens"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-9)
        assert row["mean_sub_captions"] == pytest.approx(sum(sentences) / len(sentences), abs=1e-9)
        assert row["tokens"] == dict(sorted(Counter(tokens).items()))
        assert row["sub_captions"] == dict(sorted(Counter(sentences).items()))
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["size_categories"] == ["n<1K"]
    assert metadata["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    first = statistics["captions"][1]
    assert f"| first | 22 | 22 | {first['mean_sub_captions']:.2f} | {first['mean_tokens']:.2f} |" in card
    assert "0123abc" in card
    with Image.open(tmp_path / "out" / "histograms.png") as histograms:
        assert len(histograms.convert("L").getcolors(1 << 20)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("embed_images", [False, True])
def test_datasets_reads_the_folder_as_it_is(
    embed_images: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not embed_images:
        monkeypatch.chdir(pictures)  # where `datasets` looks for relative paths
    run(config(pictures, tmp_path / "first", embed_images=embed_images))
    (tmp_path / "first").rename(tmp_path / "out")  # wherever it lies
    dataset = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == NUMBER - 1
    assert isinstance(dataset.features["image"], ImageFeature)
    assert dataset[3]["image"].size == Image.open(pictures / "3.png").size


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_bytes_of_images_are_the_files(format: str, pictures: Path, tmp_path: Path) -> None:
    run(config(pictures, tmp_path / "out", embed_images=True, format=format))
    records = list(load_records(tmp_path / "out"))
    assert len(records) == NUMBER - 1
    for record in records:
        assert record["image"]["bytes"] == (pictures / record["id"]).read_bytes()
        assert len(record["long_captions"]) == 2
    if format == "webdataset":
        with tarfile.open(tmp_path / "out" / "data" / "00000-00001.tar") as tar:
            assert tar.getnames()[:2] == ["00000-00001-000000.png", "00000-00001-000000.json"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder of pictures", "parquet", "webdataset", "stream"])
def test_sources(source: str, pictures: Path, tmp_path: Path) -> None:
    """All give the same captions; where there is no raw one, the long one's first sentence is the short one."""
    run(config(pictures, tmp_path / "expected"))
    expected = {row["id"]: row for row in rows(tmp_path / "expected")}
    options: dict[str, Any] = {}
    raw = [json.loads(line)["short_caption"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    names = [f"{number}.png" for number in range(NUMBER)]
    data = tmp_path / "data"
    data.mkdir()
    if source == "folder of pictures":
        for name in names:
            shutil.copy(pictures / name, data)
    elif source == "parquet":
        images = [{"bytes": (pictures / name).read_bytes(), "path": None} for name in names]
        Dataset.from_dict({"picture": images, "alt": raw, "key": names}).to_parquet(data / "a.parquet")
        options = {"image_column": "picture", "short_column": "alt", "id_column": "key"}
    elif source == "webdataset":
        for shard, some in enumerate((names[:9], names[9:])):
            with tarfile.open(data / f"{shard}.tar", "w") as tar:
                for name in some:
                    tar.add(pictures / name, name)
                    text = raw[int(name[:-4])].encode()
                    member = tarfile.TarInfo(name.replace(".png", ".txt"))
                    member.size = len(text)
                    tar.addfile(member, io.BytesIO(text))
        options = {"short_column": "txt"}
    else:
        data = pictures
        options = {"streaming": True}
    statistics, _ = run(config(data, tmp_path / "out", **options))
    assert (statistics["images"], statistics["skipped"]) == (NUMBER - 1, 1)
    for row in rows(tmp_path / "out"):
        name = re.search(r"(\d+)(\.png)?$", row["id"])[1] + ".png"
        assert row["long_captions"] == expected[name]["long_captions"]
        short = expected[name]["short_caption"]
        if source == "folder of pictures":
            short = row["long_captions"][0].split(".")[0]
        assert row["short_caption"] == short
        assert (row["image"]["bytes"] is None) == (source in ("folder of pictures", "stream"))
    (entry,) = skipped(tmp_path / "out")
    assert "7" in entry["id"]


def test_a_damaged_shard_is_listed_and_the_others_are_done(pictures: Path, tmp_path: Path) -> None:
    data = tars(pictures, tmp_path / "data", range(6), range(10, 16))
    whole = (data / "0.tar").read_bytes()
    (data / "0.tar").write_bytes(whole[: whole.rindex(b"5.png") + 700])
    statistics, _ = run(config(data, tmp_path / "out", short_column="none"))
    assert statistics["images"] == 11
    (entry,) = skipped(tmp_path / "out")
    assert entry["id"] == "0.tar"
    assert "truncated" in entry["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text are Linux's")
def test_names_and_answers_that_are_no_text(pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(pictures / "1.png", os.fsencode(data) + b"/caf\xe9.png")
    (data / "broken.png").write_bytes(b"")
    for number in range(3):
        shutil.copy(pictures / f"{number}.png", data / f"picture \u00e9 {number}.png")

    class Half(Speaker):
        def one(self, image: Image.Image, settings: Mapping[str, Any], seed: int) -> Answer:
            return Answer("A picture of a thing with half a sign \ud83d in the middle of it.", True)

    for format in ("parquet", "webdataset"):
        run(config(data, tmp_path / format, format=format), Half)
        records = list(load_records(tmp_path / format))
        assert [record["id"] for record in records] == [f"picture \u00e9 {number}.png" for number in range(3)]
        assert records[0]["long_captions"] == 2 * ["A picture of a thing with half a sign ? in the middle of it."]
        assert [one["id"] for one in skipped(tmp_path / format)] == ["broken.png", "caf\\xe9.png"]


# Poor captions


class Refuser(Speaker):
    """Refuses some pictures: one for good, one until it is asked a second time, one a third."""

    def __init__(self, config: CaptionerConfig, stubborn: Mapping[str, int]) -> None:
        super().__init__(config)
        self.stubborn = stubborn

    def one(self, image: Image.Image, settings: Mapping[str, Any], seed: int) -> Answer:
        asked = sum(key == digest(image) for key, _ in self.asked)
        answer = super().one(image, settings, seed)
        if asked < self.stubborn.get(digest(image), 0):
            return Answer(f"I'm sorry, but I cannot see the image that you have sent me {asked}.", True)
        return answer


@pytest.mark.slow
def test_refusals_are_asked_again_with_other_settings_then_dropped(pictures: Path, tmp_path: Path) -> None:
    keys = [key_of(pictures, number) for number in range(5)]
    stubborn = {keys[0]: 1, keys[1]: 2, keys[2]: 99}
    statistics, (captioner,) = run(
        config(pictures, tmp_path / "out", "one"), lambda options: Refuser(options, stubborn)
    )
    for number, asked in enumerate((2, 3, 3, 1, 1)):
        assert [temperature for key, temperature in captioner.asked if key == keys[number]] == [0, 0.7, 0.7][:asked]
        (details,) = rows(tmp_path / "out")[number]["captions"]
        assert details["attempts"] == asked
        assert json.loads(details["settings"])["temperature"] == (0.7 if asked > 1 else 0)
        assert details["reasons"] == (["refusal"] if number == 2 else [])
        assert details["earlier_reasons"] == (["refusal"] if number < 3 else [])
    dropped = rows(tmp_path / "out")[2]
    assert dropped["long_captions"] == [""]
    assert dropped["captions"][0]["dropped"] == ("I'm sorry, but I cannot see the image that you have sent me 2.")
    assert dropped["captions"][0]["tokens"] == dropped["captions"][0]["sub_captions"] == 0
    counts = statistics["captions"][1]
    assert (counts["texts"], counts["dropped"], counts["asked_again"]) == (NUMBER - 2, 1, 3)
    assert (counts["mended"], counts["dropped_for"], counts["marked"]) == ({"refusal": 2}, {"refusal": 1}, {})
    assert "| retry | 2 | 0 | 1 |" in (tmp_path / "out" / "README.md").read_text()
    assert len(captioner.seeds) == len(set(captioner.seeds)) == len(captioner.asked)  # each attempt draws otherwise


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_policies(policy: str, pictures: Path, tmp_path: Path) -> None:
    key = key_of(pictures, 2)
    statistics, (captioner,) = run(
        config(pictures, tmp_path / "out", "one", policies={"refusal": policy}),
        lambda options: Refuser(options, {key: 1}),
    )
    assert max(Counter(key for key, _ in captioner.asked).values()) == 1
    row = rows(tmp_path / "out")[2]
    assert row["captions"][0]["reasons"] == ["refusal"]
    refusal = "I'm sorry, but I cannot see the image that you have sent me 0."
    assert row["long_captions"] == ([refusal] if policy == "keep" else [""])
    assert row["captions"][0]["dropped"] == (None if policy == "keep" else refusal)
    kind = "marked" if policy == "keep" else "dropped_for"
    assert statistics["captions"][1][kind] == {"refusal": 1}


@pytest.mark.parametrize(("retry", "asked"), [({}, 1), ({"repetition_penalty": 1.2}, 2), ({"temperature": 0.1}, 3)])
def test_greedy_captions_are_not_asked_for_again_in_vain(
    retry: dict[str, float], asked: int, pictures: Path, tmp_path: Path
) -> None:
    options = config(pictures, tmp_path / "out", captioners=[CaptionerConfig("one", retry=retry)])
    _, (captioner,) = run(options, lambda options: Refuser(options, {key_of(pictures, 2): 99}))
    assert max(Counter(key for key, _ in captioner.asked).values()) == asked


def test_what_was_wrong_is_counted_and_listed_without_raw_captions_too(pictures: Path, tmp_path: Path) -> None:
    data = some(pictures, tmp_path / "data", 4)

    class Short(Speaker):
        def one(self, image: Image.Image, settings: Mapping[str, Any], seed: int) -> Answer:
            return Answer("A red ball here. A red ball here.", True)

    statistics, _ = run(config(data, tmp_path / "out", "one"), Short)
    counts = statistics["captions"][1]
    assert (statistics["images"], counts["dropped"], counts["asked_again"]) == (0, 4, 4)
    assert counts["dropped_for"] == {"too_short": 4}  # the repetition alone would have been kept
    for entry in skipped(tmp_path / "out"):
        (details,) = entry["captions"]
        assert details["reasons"] == ["repeated_sentence", "too_short"]
        assert details["dropped"] == "A red ball here. A red ball here."


def test_raw_captions_that_are_odd(pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    captions = ["half a sign \ud83d", 1984, None, " ", float("nan")]
    with open(data / "rows.jsonl", "w") as table:
        for number, caption in enumerate(captions):
            line = {"image": str(pictures / f"{number}.png"), "short_caption": caption}
            table.write(json.dumps(line) + "\n")
    run(config(data, tmp_path / "out", "one", streaming=True, image_root=str(pictures)))
    shorts = [row["short_caption"] for row in rows(tmp_path / "out")]
    assert shorts[:2] == ["half a sign ?", "1984"]
    assert all(short.startswith("one sees a picture") for short in shorts[2:])


# Interruptions


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_stopped_anywhere_it_ends_in_the_same_bytes(format: str, pictures: Path, tmp_path: Path) -> None:
    """Stopped at every third group, some lines half-written; no group that was answered is asked again."""
    run(config(pictures, tmp_path / "expected", format=format))
    asked: Counter[str] = Counter()
    shuffled = random.Random(0)

    class Stopping(Speaker):
        calls = 0

        def answer(self, images: Any, settings: Any, seeds: Any) -> list[Answer]:
            Stopping.calls += 1
            if Stopping.calls % 3 == 0:
                raise Interrupted
            answers = super().answer(images, settings, seeds)
            asked.update(f"{self.config.model} {key}" for key, _ in self.asked[-len(images) :])
            return answers

    for _ in range(100):
        try:
            run(config(pictures, tmp_path / "out", format=format), Stopping)
            break
        except Interrupted:
            for journal in (tmp_path / "out" / ".relabel").glob("*.partial"):
                content = journal.read_bytes()
                if shuffled.random() < 0.7:  # as if the machine had stopped in the middle of a line
                    journal.write_bytes(content + b'{"group": 3, "captions": [{"text": "A dr')
    found = files(tmp_path / "out")
    assert found == files(tmp_path / "expected")
    assert len(asked) == 2 * (NUMBER - 1)
    assert set(asked.values()) == {1}
    # there is nothing left to do
    _, made = run(config(pictures, tmp_path / "out", format=format))
    assert made == []
    assert files(tmp_path / "out") == found


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process's share after the other; `test_two_processes` has real ones."""
    from accelerate import PartialState

    data = tars(pictures, tmp_path / "data", range(7), range(7, 14), range(14, 21))
    for source, options, sizes in ((pictures, {}, (1, 3)), (data, {"short_column": "none"}, (1, 2, 4))):
        outputs = []
        for world_size in sizes:
            output = tmp_path / f"{source.name}-{world_size}"
            outputs.append(output)
            for rank in range(world_size):
                state = PartialState()
                monkeypatch.setitem(state.__dict__, "process_index", rank)
                monkeypatch.setitem(state.__dict__, "num_processes", world_size)
                statistics, made = run(config(source, output, shard_size=3, **options))
                assert (statistics is None) == (rank < world_size - 1)
                assert made
            monkeypatch.undo()
        for output in outputs[1:]:
            assert files(output) == files(outputs[0])


def stopping_at(model: str, images: int) -> type[Speaker]:
    """A captioner that stops the run when this model has seen as many images."""

    class Stopping(Speaker):
        def answer(self, images_: Any, settings: Any, seeds: Any) -> list[Answer]:
            if self.config.model == model and len(self.asked) >= images:
                raise Interrupted
            return super().answer(images_, settings, seeds)

    return Stopping


@pytest.mark.slow
def test_changed_options_and_records_are_refused(pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(config(data, output), stopping_at("second", 4))
    before = files(output)
    with pytest.raises(ValueError, match="`seed`"):
        run(config(data, output, seed=1))
    with pytest.raises(ValueError, match="captioner 1.*'third'"):
        run(config(data, output, "first", "third"))
    with pytest.raises(ValueError, match=r"captioner 1 \(second\)"):
        run(config(data, output, "first"))
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="--output"):
        run(config(data, output))
    (data / "metadata.jsonl").write_text("\n".join([*lines[1:], lines[0]]))
    with pytest.raises(ValueError, match="00000-0000."):
        run(config(data, output))
    assert files(output) == before


@pytest.mark.slow
def test_what_has_not_begun_may_change(pictures: Path, tmp_path: Path) -> None:
    """A misspelt name costs nothing that was done; nor do other addresses, batches and spellings of the folder."""

    class Missing(Speaker):
        def __init__(self, config: CaptionerConfig) -> None:
            super().__init__(config)
            if config.model == "typo":
                raise OSError("typo: no such model")

    with pytest.raises(OSError, match="no such model"):
        run(config(pictures, tmp_path / "out", "typo", seed=5), Missing)
    with pytest.raises(OSError, match="no such model"):
        run(config(pictures, tmp_path / "out", "first", "typo"), Missing)
    captioners = [
        CaptionerConfig("first", batch_size=3, max_retries=0),
        CaptionerConfig("second"),
        CaptionerConfig("x"),
    ]
    _, made = run(config(Path(f"{pictures}/"), tmp_path / "out", captioners=captioners))
    assert [captioner.config.model for captioner in made] == ["second", "x"]  # the first had done its part
    run(config(pictures, tmp_path / "expected", "first", "second", "x"))
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_all_models_are_looked_for_before_the_first_goes_to_work(llava: str, pictures: Path, tmp_path: Path) -> None:
    captioners = [local(llava), local(str(tmp_path / "missing"))]
    with pytest.raises(FileNotFoundError, match="missing"):
        relabel(config(pictures, tmp_path / "out", captioners=captioners), progress=False)
    captioners = [local(llava), CaptionerConfig("tiny", endpoint="http://localhost:1", num_beams=2)]
    with pytest.raises(ValueError, match="num_beams"):
        relabel(config(pictures, tmp_path / "out", captioners=captioners), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smaller_batches_after_the_memory_did_not_suffice(pictures: Path, tmp_path: Path) -> None:
    class Smaller(Speaker):
        def __init__(self, config: CaptionerConfig) -> None:
            super().__init__(config)
            self.group_size = config.batch_size

    class Large(Smaller):
        def answer(self, images: Any, settings: Any, seeds: Any) -> list[Answer]:
            if len(self.asked) > 12:
                raise torch.OutOfMemoryError("set a smaller `batch_size`")
            return super().answer(images, settings, seeds)

    captioners = [CaptionerConfig("first", batch_size=4)]
    with pytest.raises(torch.OutOfMemoryError):
        run(config(pictures, tmp_path / "out", captioners=captioners), Large)
    captioners = [CaptionerConfig("first", batch_size=1)]
    _, (captioner,) = run(config(pictures, tmp_path / "out", captioners=captioners), Smaller)
    assert len(captioner.asked) == 13  # the first shard was written; the second is begun anew
    run(config(pictures, tmp_path / "expected", "first"))
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "format"), [("folder", "parquet"), ("table elsewhere", "webdataset")])
def test_storage_that_goes_away_stops_the_run(source: str, format: str, pictures: Path, tmp_path: Path) -> None:
    """What is skipped is skipped for good: images that will be there again in a minute are not."""
    volume = tmp_path / "volume"
    shutil.copytree(pictures, volume)
    data = volume
    if source == "table elsewhere":
        data = tmp_path / "table.jsonl"
        lines = [{"image": str(volume / f"{number}.png"), "short_caption": "a"} for number in range(NUMBER)]
        lines.insert(1, {"image": str(tmp_path / "never" / "there.png"), "short_caption": "a"})
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = 1 + (source == "table elsewhere")

    class Unplugging(Speaker):
        def answer(self, images: Any, settings: Any, seeds: Any) -> list[Answer]:
            if len(self.asked) > 6 and volume.exists():  # what was read ahead is answered still
                volume.rename(tmp_path / "away")
            return super().answer(images, settings, seeds)

    options = config(data, tmp_path / "out", "one", format=format)
    with pytest.raises(OSError, match="volume|table"):
        run(options, Unplugging)
    (tmp_path / "away").rename(volume)
    statistics, _ = run(options)
    assert (statistics["images"], statistics["skipped"]) == (NUMBER - 1, expected)


def test_an_image_that_a_model_fails_on(pictures: Path, tmp_path: Path) -> None:
    """It alone is left out; where each image fails, the model does."""
    odd = key_of(pictures, 5)

    class Failing(Speaker):
        fails_on: tuple[str, ...] = (odd,)

        def one(self, image: Image.Image, settings: Mapping[str, Any], seed: int) -> Answer:
            if not self.fails_on or digest(image) in self.fails_on:
                raise RuntimeError("image features and tokens do not match")
            return super().one(image, settings, seed)

    run(config(pictures, tmp_path / "out", "one"), Failing)
    for row in rows(tmp_path / "out"):
        (details,) = row["captions"]
        assert (row["id"] == "5.png") == (details["reasons"] == ["no_answer"]) == (row["long_captions"] == [""])
        if row["id"] == "5.png":
            assert details["dropped"].endswith("(RuntimeError: image features and tokens do not match)")
    Failing.fails_on = ()
    with pytest.raises(ValueError, match="tokens do not match"):
        run(config(pictures, tmp_path / "none", "one"), Failing)


@pytest.mark.slow
def test_records_that_changed_after_their_shard_was_written(pictures: Path, tmp_path: Path) -> None:
    data = some(pictures, tmp_path / "data", 12)
    run(config(data, tmp_path / "out", "one"))
    (data / "5.png").rename(data / "55.png")
    with pytest.raises(ValueError, match="00000-00000"):
        run(config(data, tmp_path / "out", "one"))
    shards = tars(pictures, tmp_path / "shards", range(1), range(1, 2))
    options = config(shards, tmp_path / "streamed", "one", short_column="none")
    run(options)
    (shards / "1.tar").unlink()
    with pytest.raises(ValueError, match="00001-00000.parquet"):
        run(options)


@pytest.mark.parametrize("process", [0, 1])
def test_two_runs_at_a_time(process: int, pictures: Path, tmp_path: Path) -> None:
    """A process of another run, or the second of two is still at work."""
    options = config(pictures, tmp_path / "out", "one")
    (tmp_path / "out" / ".relabel").mkdir(parents=True)
    with FileLock(tmp_path / "out" / ".relabel" / f"lock-{process}"), pytest.raises(OSError, match="another run"):
        run(options)
    run(options)


def test_one_slow_image_holds_up_nothing_but_its_own_chunk(pictures: Path, tmp_path: Path) -> None:
    slow, done = key_of(pictures, 1), threading.Event()

    class Waiting(Speaker):
        group_size, concurrency = 1, 2

        def one(self, image: Image.Image, settings: Mapping[str, Any], seed: int) -> Answer:
            if digest(image) == slow:
                assert done.wait(60)  # for all the others
            elif len(self.asked) == NUMBER - 3:
                done.set()
            return super().one(image, settings, seed)

    run(config(pictures, tmp_path / "out", "one"), Waiting)
    assert len(rows(tmp_path / "out")) == NUMBER - 1
    assert done.is_set()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a shard", "behind a shard"])
def test_killed_at_nasty_moments(moment: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(pictures, tmp_path / "expected"))
    child = os.fork()
    if not child:
        if moment == "in a shard":  # its temporary file is there
            monkeypatch.setattr("lotlip_hf.relabel.shards.shard_statistics", lambda *_: os._exit(9))
        else:
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: os._exit(9))
        run(config(pictures, tmp_path / "out"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = files(tmp_path / "out")
    assert any("captioner" in name for name in left)
    assert any(name.startswith("data/.") for name in left) == (moment == "in a shard")
    run(config(pictures, tmp_path / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.slow
def test_a_full_disk_is_named(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= 9:
            raise OSError(errno.ENOSPC, "No space left on device")

    class Several(Speaker):
        concurrency = 4

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"\.relabel/.*No space left on device"):
        patch.setattr(os, "fsync", full)
        run(config(pictures, tmp_path / "out"), Several)
    run(config(pictures, tmp_path / "out"))
    run(config(pictures, tmp_path / "expected"))
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_outputs_that_are_somebody_elses(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="full"):
        run(config(pictures, tmp_path / "full"))
    with pytest.raises(FileExistsError, match="letter.txt"):
        run(config(pictures, tmp_path / "full" / "letter.txt"))
    with pytest.raises(ValueError, match="--output"):
        run(config(pictures, pictures / "out"))
    with pytest.raises(ValueError, match="--tokenizer"):
        run(config(pictures, tmp_path / "out", tokenizer=str(tmp_path / "missing")))
    assert not (tmp_path / "out").exists()
    assert not (pictures / "out").exists()


# Real models, endpoints and processes

# what random weights say is no good caption
KEEP = dict.fromkeys(
    ("empty", "refusal", "copied_prompt", "loop", "repeated_sentence", "cut_off", "too_short"), "keep"
)
FAULTS = {**dict.fromkeys((0, 1), "429"), 4: "cut", 6: "cut-json", 8: "garbage", 9: "html", 11: "reset"}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random captioner."""
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return str(folder)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process(monkeypatch)


def local(folder: str, **options: Any) -> CaptionerConfig:
    return CaptionerConfig(folder, **{"dtype": "float32", "max_new_tokens": 12, "batch_size": 3, **options})


@pytest.mark.slow
def test_models_of_transformers(llava: str, pictures: Path, tmp_path: Path) -> None:
    captioner = local(llava, prompt="what is it")
    options = config(pictures, tmp_path / "out", captioners=[captioner], policies=KEEP)
    assert relabel(options, progress=False)["images"] == NUMBER - 1
    model = LocalCaptioner(captioner)
    written = {row["id"]: row for row in rows(tmp_path / "out")}
    names = [f"{number}.png" for number in range(NUMBER)]
    groups = [names[k : min(k + 3, chunk + 10)] for chunk in (0, 10, 20) for k in range(chunk, min(chunk + 10, 23), 3)]
    assert sorted(sum(groups, [])) == sorted(names)
    for group in groups:
        readable = [name for name in group if name != "7.png"]
        images = [Image.open(pictures / name).convert("RGB") for name in readable]
        answers = model.answer(images, captioner.settings(), [0] * len(images))
        for name, answer in zip(readable, answers, strict=True):
            text, reasons = judge(answer.text, "what is it", answer.finished)
            assert written[name]["long_captions"] == [text]
            assert tuple(written[name]["captions"][0]["reasons"]) == reasons
    assert len({row["long_captions"][0] for row in written.values()}) > 10


@pytest.mark.slow
@pytest.mark.usefixtures("endpoint")
def test_an_endpoint_that_stumbles(pictures: Path, tmp_path: Path) -> None:
    """Late answers, 429, 500, connections cut and reset, half a JSON and garbage: nothing is lost, nothing differs."""
    with openai_server() as server:
        captioner = CaptionerConfig("tiny", endpoint=server.url, concurrency=4)
        relabel(config(pictures, tmp_path / "expected", captioners=[captioner]), progress=False)
        assert set(server.per_image.values()) == {1}
        assert len(server.per_image) == NUMBER - 1
    first = each_image_first("500")
    with openai_server(lambda number, *asked: first(number, *asked) or FAULTS.get(number)) as server:
        captioner = CaptionerConfig("tiny", endpoint=server.url, concurrency=4)
        relabel(config(pictures, tmp_path / "out", captioners=[captioner]), progress=False)
        assert 1 < server.highest_at_once <= 4
        assert len(server.requests) > NUMBER - 1
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.usefixtures("endpoint")
def test_an_endpoint_that_stays_down(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stops the run; what was done is kept, and is not asked for again when the endpoint is back."""
    arguments = ["relabel", f"--data={pictures}", "--captioner=tiny", f"--tokenizer={counting_tokenizer()}"]
    arguments += ["--shard-size=10", "--concurrency=3", "--max-retries=2"]
    with openai_server() as server:
        assert main([*arguments, f"--output={tmp_path / 'expected'}", f"--endpoint={server.url}"]) == 0
    capsys.readouterr()
    with openai_server(lambda number, *_: "503" if number >= 14 else None) as server:
        assert main([*arguments, f"--output={tmp_path / 'out'}", f"--endpoint={server.url}"]) == 2
        answered = {request.image for request in server.requests if request.fault is None}
    message = capsys.readouterr().err
    assert server.url.split("/")[2] in message
    assert "503" in message
    assert len(answered) == 14
    assert not (tmp_path / "out" / "README.md").exists()
    with openai_server() as server:  # at another address
        assert main([*arguments, f"--output={tmp_path / 'out'}", f"--endpoint={server.url}"]) == 0
        assert not answered & server.per_image.keys()
        assert len(server.per_image) == NUMBER - 1 - 14
    assert files(tmp_path / "out").keys() == files(tmp_path / "expected").keys()
    assert rows(tmp_path / "out") == rows(tmp_path / "expected")
    output, error = capsys.readouterr()
    assert ["tiny", "22", "22", "4.00"] in [line.split()[:4] for line in output.splitlines()]
    assert "1 record was skipped" in error
    assert "skipped.jsonl" in error


def write_options(file: Path, pictures: Path, captioners: list[dict[str, Any]]) -> list[str]:
    options = {"data": str(pictures), "tokenizer": counting_tokenizer(), "captioners": captioners, "policies": KEEP}
    file.write_text(yaml.safe_dump(options))
    return [f"--config={file}", "--shard-size=5", "--dtype=float32", "--max-new-tokens=12", "--batch-size=2"]


@pytest.mark.slow
@pytest.mark.usefixtures("endpoint")
def test_killed_at_a_random_moment_it_ends_in_the_same_bytes(llava: str, pictures: Path, tmp_path: Path) -> None:
    """`kill -9` with a model that runs here and an endpoint."""
    moments = random.Random(1)
    with openai_server(seconds=0.1) as server:
        captioners = [{"model": llava}, {"model": "tiny", "endpoint": server.url, "concurrency": 2}]
        arguments = write_options(tmp_path / "options.yaml", pictures, captioners)
        assert main(["relabel", *arguments, f"--output={tmp_path / 'expected'}"]) == 0
        asked = server.per_image
        output = tmp_path / "out"
        kept_groups = moments.randint(2, 28)
        argv = ["relabel", *arguments, f"--output={output}"]
        killed = Started("lotlip_hf.cli", argv, tmp_path, 1, ask_loopback)
        killed.wait_until(lambda: count_groups(output) >= kept_groups)
        time.sleep(moments.random() * 0.1)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait().codes == [-signal.SIGKILL]
        assert not (output / "README.md").exists()
        ended = Started("lotlip_hf.cli", argv, tmp_path, 1, ask_loopback).wait()
        assert ended.codes == [0], ended.text
        again = {image: number - asked[image] for image, number in server.per_image.items()}
    assert files(output) == files(tmp_path / "expected")
    # asked again at most what was under way when the process was killed
    assert sum(again.values()) <= NUMBER - 1 + 2
    assert min(again.values()) >= 1


def ask_loopback() -> None:
    use_in_process(pytest.MonkeyPatch())


def count_groups(output: Path) -> int:
    """Groups that were answered so far; those of a shard that is written count as if each image was one."""
    lines = 5 * len(list((output / "data").glob("*.parquet")))
    for journal in output.glob(".relabel/*-captioner-*"):
        with contextlib.suppress(FileNotFoundError):  # it has got its last name
            lines += journal.read_bytes().count(b"\n") - 1
    return lines


@pytest.mark.slow
def test_two_processes_write_what_one_writes(llava: str, pictures: Path, tmp_path: Path) -> None:
    captioners = [{"model": llava}]
    arguments = write_options(tmp_path / "options.yaml", pictures, captioners)
    one = [*arguments, f"--output={tmp_path / 'one'}"]
    assert main(["relabel", *one]) == 0
    argv = ["relabel", *arguments, f"--output={tmp_path / 'two'}"]
    ended = finish("lotlip_hf.cli", argv, tmp_path, num_processes=2)
    assert ended.stdout.count("mean sub-captions") >= 1
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_training_reads_the_output_as_it_is(format: str, pictures: Path, tmp_path: Path) -> None:
    run(config(pictures, tmp_path / "out", format=format))
    arguments = ["--model=scenes", f"--data={tmp_path / 'out'}", f"--output={tmp_path / 'run'}", "--max-steps=2"]
    arguments += ["--batch-size=8", "--num-workers=0", "--trackers=none", "--on-error=raise"]
    arguments += [f"--image-folder={pictures}"] if format == "parquet" else []
    assert load_script("examples/train.py").main(arguments) == 0
    assert list((tmp_path / "run").glob("checkpoint-*"))


# Options


def test_options_of_a_file_and_of_flags(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "data": "pictures",
                "seed": 3,
                "policies": {"loop": "keep"},
                "rules": {"min_words": 4},
                "captioners": ["a", {"model": "b", "prompt": "Say.", "temperature": 1, "retry": {"top_p": 0.5}}],
            }
        )
    )
    parser = Parser()
    add_arguments(parser)
    flags = ["--output=out", "--seed=4", "--policy=refusal=drop", "--rule=loop_repeats=5", "--max-new-tokens=9"]
    flags += ["--request-field=max_tokens=max_completion_tokens", "--request-field=temperature=none"]
    options = read_config(parser.parse_args([f"--config={file}", *flags]))
    assert (options.data, options.output, options.seed) == ("pictures", "out", 4)
    assert [options.policies[reason] for reason in ("loop", "refusal", "empty")] == ["keep", "drop", "retry"]
    assert (options.rules.min_words, options.rules.loop_repeats) == (4, 5)
    first, second = options.captioners
    assert (first.model, first.prompt, first.max_new_tokens) == ("a", PROMPT, 9)
    assert first.request_fields == {"max_tokens": "max_completion_tokens", "temperature": None}
    assert (second.prompt, second.temperature, second.max_new_tokens) == ("Say.", 1, 9)
    assert second.settings(1) == {**second.settings(0), "top_p": 0.5}
    # models that are named by flags stand in for the file's
    options = read_config(parser.parse_args([f"--config={file}", "--output=o", "--captioner=c", "--captioner=d"]))
    assert [captioner.model for captioner in options.captioners] == ["c", "d"]


def test_a_tokenizer_that_cannot_be_had_is_said_at_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the better part of a minute, and not after the records were read."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    slept: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hf_api, "endpoint", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr("lotlip_hf.relabel.run.load_records", lambda *_, **__: pytest.fail("records were read"))
    with pytest.raises(ValueError, match="--tokenizer org/none"):
        run(config(pictures, tmp_path / "out", tokenizer="org/none"))
    assert sum(slept) < 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--captioner"),
        (["--captioner=a", "--request-field=max_tokens"], "--request-field"),
        (["--captioner=a", "--image-root=nowhere"], "--image-root"),
        (["--captioner=a", "--policy=lop=keep"], "policies.*lop"),
        (["--captioner=a", "--rule=words=3"], "min_words"),
        (["--captioner=a", "--mapping=nothing"], "mapping"),
    ],
)
def test_wrong_options_are_named(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relabel", "--data=pictures", "--output=out", *flags]) == 2
    assert re.search(word, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("captioner: a", "captioners"),
        ("captioners: [{model: m, promt: p}]", "prompt"),
        ("captioners: [{model: m, retry: {words: 3}}]", "retry"),
        ("captioners: [{model: m, retry: {temperature: -1}}]", "temperature"),
    ],
)
def test_wrong_files_of_options_are_named(
    options: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text(options)
    arguments = ["--data=pictures", "--output=out", f"--config={tmp_path / 'options.yaml'}"]
    assert main(["relabel", *arguments]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "word", "more"),
    [
        ("empty", "empty", []),
        ("table.jsonl", "--short-column", []),
        ("none.jsonl", "none.jsonl", []),
        ("table.jsonl", "gone", ["--image-folder=gone"]),
    ],
)
def test_data_that_are_not_there(
    data: str, word: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.jsonl").write_text('{"image": "a.png", "words": "a cat"}\n')
    (tmp_path / "none.jsonl").write_text("")
    arguments = ["relabel", "--captioner=a", f"--output={tmp_path / 'out'}", f"--tokenizer={counting_tokenizer()}"]
    assert main([*arguments, f"--data={tmp_path / data}", *more]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
