"""Strangers' indexes, names and checkpoints do no harm, and what cannot be written is not there."""

import io
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lotlip_hf import Encoder
from lotlip_hf.cli import main
from lotlip_hf.embed import embed_texts
from lotlip_hf.files import all_or_nothing, markdown_text, own_folder
from lotlip_hf.hub.push import write_repository
from lotlip_hf.plots import figure, save
from lotlip_hf.search import ImageIndex, build_index
from lotlip_hf.store import FILE, EmbeddingStore
from lotlip_hf.terminal import PrintableFormatter, PrintableStream, printable_lines, printable_output, run

Pair = tuple[Any, Any]
THESIS = b"four years of work\n" * 100


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    path = tmp_path / "thesis.txt"
    path.write_bytes(THESIS)
    return path


def index_of(pair: Pair, photos: Path) -> Any:
    return build_index(Encoder(*pair), photos, progress=False)


def vectors_of(index: ImageIndex) -> np.ndarray:
    with index.store as store:
        return store.vectors(index.locations)


def check_whole(pair: Pair, photos: Path, expected: np.ndarray) -> None:
    """The index is used or made anew: its answers are those of one that nobody touched."""
    for _ in range(2):
        np.testing.assert_allclose(vectors_of(index_of(pair, photos)), expected, atol=1e-6)


# F1. An index that came with a folder (what is in its file: test_store.py)


@pytest.mark.parametrize(
    "link", [os.symlink, os.link, lambda thesis, file: os.mkfifo(file), lambda _, file: file.mkdir()]
)
@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal"])
def test_an_index_of_links_writes_nowhere_else(
    pair: Pair, photos: Path, thesis: Path, end: str, link: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = vectors_of(index_of(pair, photos))
    file = photos / ".lotlip" / f"{FILE}{end}"
    file.unlink(missing_ok=True)
    link(thesis, file)
    check_whole(pair, photos, expected)
    assert thesis.read_bytes() == THESIS
    assert FILE in caplog.text


def test_an_index_folder_that_is_a_link_is_set_aside(pair: Pair, photos: Path, tmp_path: Path) -> None:
    expected = vectors_of(index_of(pair, photos))
    folder, elsewhere = photos / ".lotlip", tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    check_whole(pair, photos, expected)
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert not folder.is_symlink()


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_an_index_folder_that_is_none_is_set_aside(
    pair: Pair, photos: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make(photos / ".lotlip")
    assert len(index_of(pair, photos).files) == 3
    assert (photos / ".lotlip").is_dir()
    assert ".lotlip" in caplog.text


def test_scores_of_a_strangers_index_are_cosines(pair: Pair, photos: Path) -> None:
    index = index_of(pair, photos)
    with index.store as store:
        vectors = store.vectors(index.locations)
        stamps = store.held(index.files).stamps
        store.add(index.files, 100 * vectors, [stamps[name] for name in index.files])
    results = index_of(pair, photos).search(torch.from_numpy(vectors[0]))
    assert max(result.score for result in results) == 1


def test_the_partial_results_of_embed_are_its_own(pair: Pair, tmp_path: Path, thesis: Path) -> None:
    (tmp_path / "texts.txt").write_text("a dog\na cat\n")
    output, elsewhere = tmp_path / "out.parquet", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / FILE).symlink_to(thesis)
    Path(f"{output}.partial").symlink_to(elsewhere)
    assert embed_texts(Encoder(*pair), tmp_path / "texts.txt", output, progress=False) == 2
    assert thesis.read_bytes() == THESIS
    assert [path.name for path in elsewhere.iterdir()] == [FILE]


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_partial_results_of_embed_are_a_folder(pair: Pair, tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "texts.txt").write_text("a dog\n")
    make(tmp_path / "out.parquet.partial")
    assert embed_texts(Encoder(*pair), tmp_path / "texts.txt", tmp_path / "out.parquet", progress=False) == 1
    assert (tmp_path / "out.parquet").is_file()


def test_a_store_beside_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with EmbeddingStore(tmp_path / "link" / "store", "encoder", 3):  # what the user named may be a link
        pass
    assert (tmp_path / "disk" / "store" / FILE).is_file()
    assert own_folder(tmp_path / "link", "a", "b") == tmp_path / "link" / "a" / "b"


# F5. Names on terminals and in Markdown

NAMES = [
    "red\x1b[31m.png",
    "clear\x1b[2J.png",
    "title\x1b]0;x\x07.png",
    "c1\x9b2J.png",
    "bidi\u202egnp.png",
    "a\rb\nlotlip: c.png",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_names_do_nothing_on_a_terminal(
    name: str, photos: Path, official_checkpoint: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    os.rename(photos / "a.png", photos / name)
    (photos / f"bad{name}").write_text("no image")
    index = ["--index", str(tmp_path / "index")]
    search = ["search", "--model", str(official_checkpoint), "--device", "cpu", "--images", str(photos), *index]
    assert main([*search, "a dog"]) == 0
    with closing(sqlite3.connect(next((tmp_path / "index").rglob(FILE)))) as connection, connection:
        connection.execute("UPDATE entries SET error = ? WHERE error IS NOT NULL", ["not \x1b[2J\n an image"])
    assert main([*search, "a dog"]) == 0  # with the reasons of an index that came from elsewhere
    assert main(["report", str(photos / name)]) == 2  # in an error
    assert main(["search", *search[1:-2], "--images", str(tmp_path / name), "x"]) == 2
    captured = capfd.readouterr()
    text = captured.out + captured.err
    shown = text.replace("\r", "\n").replace("\x1b[A", "")  # of progress bars
    assert not set(text) & set("\x1b\x07\x9b\u202e")
    assert not [line for line in shown.split("\n") if line.startswith("lotlip: c")]
    assert name not in text


def test_libraries_write_no_controls_either(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("a.library").addHandler(handler)

    def command() -> int:
        print("\x1b[31mred\x1b[0m \x1b[2J\tname\u202e")
        logging.getLogger("a.library").warning("gone \x1b[2J")
        logging.getLogger("lotlip_hf.x").warning("%s %d", "line\nlotlip: end \x1b[2J", 5)
        print("\r 50 %", end="", file=sys.stderr)
        print("\x1b[A", end="", file=sys.stderr)
        raise ValueError("wrong \x07\nlotlip: faked")

    try:
        assert run("lotlip", command) == 2
    finally:
        logging.getLogger("a.library").removeHandler(handler)
    captured = capsys.readouterr()
    assert captured.out == "red \\x1b[2J\tname\\u202e\n"
    first, second, *others = captured.err.split("\n")
    assert first == "gone \\x1b[2J"
    assert second == "lotlip: line\\nlotlip: end \\x1b[2J 5"
    assert others == ["\r 50 %\x1b[Alotlip: error: wrong \\x07", "  lotlip: faked", ""]
    assert not isinstance(sys.stdout, PrintableStream)


def test_messages_of_several_lines() -> None:
    assert printable_lines("a:\n  b\nc\x1b") == "a:\n  b\n  c\\x1b"
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s\n  %s", (Path("a\nb"), "c"), None)
    assert PrintableFormatter().format(record) == "a\\nb\n  c"
    stream = io.StringIO()
    PrintableStream(stream).writelines(["a\n", "\x1b[2J\n"])
    assert stream.getvalue() == "a\n\\x1b[2J\n"
    with printable_output(), printable_output():
        assert isinstance(sys.stderr, PrintableStream)


@pytest.mark.parametrize(
    "text",
    [
        "<script>x</script>",
        "a | b",
        "![x](http://y)",
        "`code`",
        "# head",
        "- item",
        "1. item",
        "a\nb",
        "**b**",
        "&lt;",
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    shown = markdown_text(text)
    assert "\n" not in shown
    assert "<" not in shown
    for mark in "|`![*#":
        assert shown.count(mark) == shown.count(f"\\{mark}")
    assert not shown.startswith(("- ", "# ", "1. "))


def test_markdown_leaves_plain_texts() -> None:
    for text in ("ViT-B/16, 25.3 (x)", "-0.5", "2024-01-01", "image_to_text", "文字"):
        assert markdown_text(text) == text


# F7. Damaged input

SETTINGS = ["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"]


@pytest.fixture
def damaged(official_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official_checkpoint, tmp_path / "damaged"))


def commands(checkpoint: Path, photos: Path, tmp_path: Path) -> list[list[str]]:
    model = ["--model", str(checkpoint), "--device", "cpu"]
    return [
        ["search", *model, "--images", str(photos), "a dog"],
        ["push", str(checkpoint), "--repo-id", "a/b", "--dry-run", str(tmp_path / "published")],
        ["convert", "official", "--reverse", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "model.pt")],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"a":' * 100_000, "[]", "null", "\udcff"], ids=range(6))
@pytest.mark.parametrize("name", SETTINGS)
def test_damaged_settings_are_named(
    name: str, content: str, damaged: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged / name).write_bytes(content.encode(errors="surrogateescape"))
    for command in commands(damaged, photos, tmp_path)[: 3 if name == "config.json" else 1]:
        assert main(command) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "published").exists()
    assert not (tmp_path / "model.pt").exists()


WRONG = [
    *(("config.json", ["vision_config"], value) for value in (5, "x", [])),
    *(("config.json", ["text_config", "num_corner_tokens"], value) for value in ("x", [2], 10**30, -1)),
    ("config.json", ["auto_map"], 5),
    ("config.json", ["model_type"], []),
    ("config.json", ["dtype"], "x"),
    ("config.json", ["text_config", "id2label"], 5),
    ("config.json", ["text_config", "output_hidden_states"], "x"),
    ("config.json", ["text_config", "backbone_config", "num_hidden_layers"], 10**30),
    ("config.json", ["text_config", "backbone_config", "vocab_size"], 10**12),
    ("config.json", ["text_config", "backbone_config", "num_attention_heads"], -1),
    ("config.json", ["vision_config", "backbone_config", "image_size"], [10**9, 10**9]),
    *(("tokenizer_config.json", ["model_max_length"], value) for value in ("x", -1, [])),
    *(("processor_config.json", ["image_processor", "rescale_factor"], value) for value in ("x", {})),
    ("processor_config.json", ["image_processor", "image_std"], 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place", "value"), WRONG)
def test_wrong_types_in_a_checkpoint_are_named(
    name: str, place: list[str], value: Any, damaged: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    content = part = json.loads((damaged / name).read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (damaged / name).write_text(json.dumps(content))
    for command in commands(damaged, photos, tmp_path)[: 2 if name == "config.json" else 1]:
        assert main(command) == 2
        assert str(damaged) in capsys.readouterr().err


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "..", "", 5, None, ["a"]])
def test_weights_lie_in_their_folder(
    file: Any, damaged: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(damaged / "model.safetensors", tmp_path / "other.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"logit_scale": file}}
    for content in (index, {"weight_map": file}, {}, []):
        (damaged / "model.safetensors.index.json").write_text(json.dumps(content))
        for command in commands(damaged, photos, tmp_path):
            assert main(command) == 2
            assert "model.safetensors.index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key", ["task", "model_revision", "data_fingerprint", "dataset", "metrics", "protocol", "date"]
)
@pytest.mark.parametrize("value", [[1], {"a": []}, 10**400, "x\x1b[2J|\ny"])
def test_results_of_wrong_types(key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recall = {f"{way}_r{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    content: dict[str, Any] = {
        **{"task": "image-text-retrieval", "model": "a/b", "benchmark": "iiw", "date": "2026-01-01T00:00:00"},
        "dataset": {"id": "i", "name": "IIW", "split": None, "revision": None},
        "metrics": {**recall, "image_to_text_median_rank": 1, "text_to_image_median_rank": 1},
        "protocol": {"num_images": 5},
    }
    for place in ([key], ["dataset", key], ["metrics", "image_to_text_r1"]):
        changed = json.loads(json.dumps(content))
        (changed[place[0]] if len(place) > 1 else changed)[place[-1]] = value
        (tmp_path / "r.json").write_text(json.dumps(changed))
        for words in (["--format", "markdown"], ["--model-index", str(tmp_path / "index.yaml"), "--overwrite"]):
            status = main(["report", str(tmp_path / "r.json"), *words])
            captured = capsys.readouterr()
            assert status in (0, 2)
            assert status == 0 or "r.json" in captured.err
            assert "\x1b" not in captured.out + captured.err


# F7. A full disk


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this process end after 4 KiB, as on a full disk."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield  # pyright: ignore[reportReturnType]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("command", ["convert", "reverse", "push", "grid", "embed"])
def test_what_a_full_disk_ends_is_not_there(
    command: str,
    full: None,
    official_checkpoint: Path,
    golden: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    official, output = golden / "official-corners2", tmp_path / "made" / "output.png"
    output.parent.mkdir()
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"text {number}\n" for number in range(40)))
    words = {
        "convert": f"convert official --checkpoint {official}/model.pt --tokenizer {golden}/tokenizer "
        f"--open-clip-config {official}/open_clip_config.json --output {output}",
        "reverse": f"convert official --reverse --checkpoint {official_checkpoint} --output {output}",
        "push": f"push {official_checkpoint} --repo-id a/b --dry-run {output}",
        "grid": f"search --model {official_checkpoint} --device cpu --images {photos} --save-grid {output} dog",
        "embed": f"embed --model {official_checkpoint} --device cpu --texts {texts} --output {output}",
    }
    assert main(words[command].split()) == 2
    # the search ends at its index
    assert str(photos / ".lotlip" if command == "grid" else output) in capsys.readouterr().err
    left = [name for name in contents(output.parent) if not name.startswith("output.png.partial")]
    assert left == []


def test_folders_are_whole_or_not_there(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="target"), all_or_nothing(tmp_path / "target") as folder:
        folder.mkdir()
        raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError), all_or_nothing(tmp_path / "target") as folder:
        folder.mkdir()
        raise RuntimeError
    monkeypatch.setattr(type(pair[1]), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_repository(pair[0], tmp_path / "target", "a/b", processor=pair[1])
    assert contents(tmp_path) == []


def test_pictures_and_results_are_whole_or_not_there(full: None, tmp_path: Path) -> None:
    from lotlip_hf.evaluation.evaluate import write_results

    (tmp_path / "plot.png").write_bytes(b"earlier")
    (tmp_path / "results.json").write_bytes(b"earlier")
    drawn = figure(8, 8)
    drawn.subplots().plot(range(100))
    with pytest.raises(OSError, match="plot.png"):
        save(drawn, tmp_path / "plot.png")
    with pytest.raises(OSError, match="results.json"):
        write_results({"a": "x" * 10_000}, tmp_path / "results.json")
    assert contents(tmp_path) == ["plot.png", "results.json"]
    assert (tmp_path / "plot.png").read_bytes() == (tmp_path / "results.json").read_bytes() == b"earlier"


@pytest.mark.slow
def test_the_command_as_a_process(photos: Path, official_checkpoint: Path) -> None:
    os.rename(photos / "a.png", photos / "gone\x1b[2J.png")
    command = [sys.executable, "-m", "lotlip_hf", "search", "--model", str(official_checkpoint), "--device", "cpu"]
    ended = subprocess.run([*command, "--images", str(photos), "x"], capture_output=True, text=True, check=True)
    assert "\\x1b[2J" in ended.stdout
    assert "\x1b[2J" not in ended.stdout + ended.stderr
