"""The command `lotlip`, from its arguments to its output, its exit status, and what an interruption leaves."""

import contextlib
import csv
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from lotlip_hf import Encoder, cli
from lotlip_hf.cli import main
from lotlip_hf.cli.model import ModelOptions
from lotlip_hf.cli.search import SearchOptions, title
from lotlip_hf.embed import check_texts, embed_texts, read_texts
from lotlip_hf.engines.torch import TorchEngine
from lotlip_hf.store import FILE
from processes import Started

Pair = tuple[Any, Any]

LONG_TEXT = "A tram, painted cream above, waits at a stop. Two passengers are getting on."


@pytest.fixture
def run(official_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `lotlip` in this process: exit status, standard output, standard error."""

    def run_lotlip(command: str, *arguments: object) -> tuple[int, str, str]:
        status = main([command, "--model", str(official_checkpoint), "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_lotlip


def rows(path: Path) -> tuple[list[str], np.ndarray]:
    table = pq.read_table(path)
    return table.column(0).to_pylist(), np.array(table.column("embedding").to_pylist(), dtype=np.float32)


# lotlip search


def test_search_prints_a_ranked_table(pair: Pair, photos: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    status, out, err = run("search", "--images", photos, "--top", 2, LONG_TEXT)
    assert status == 0
    assert "Encoding images: 100%" in err
    query = Encoder(*pair).encode_texts([LONG_TEXT], progress=False)[0]
    names = ["a.png", "b.png", "sub/c.png"]
    scores = Encoder(*pair).encode_images([photos / name for name in names], progress=False) @ query
    best = sorted(zip(scores.tolist(), names, strict=True), reverse=True)[:2]
    header, *lines = out.splitlines()
    assert header.split() == ["rank", "score", "file"]
    assert [line.split() for line in lines] == [
        [str(rank), f"{score:.4f}", str(photos / name)] for rank, (score, name) in enumerate(best, 1)
    ]
    again = run("search", "--images", photos, "--top", 2, LONG_TEXT)
    assert again == (0, out, "")
    grid, index = tmp_path / "grid.png", tmp_path / "index"
    status, elsewhere, err = run(
        "search", "--images", photos, "--top", 2, "--index", index, "--save-grid", grid, LONG_TEXT
    )
    assert (status, elsewhere) == (0, out)
    assert index.is_dir()
    assert str(grid) in err
    with Image.open(grid) as picture:
        assert picture.width > 600


def test_the_grid_says_what_was_searched_for() -> None:
    options = {"model": "x", "images": "photos"}
    assert title(SearchOptions(**options, text="A cat."), "A cat.") == "A cat."
    both = SearchOptions(**options, text="A cat.", without="A sofa.", unlike=["photos/dog.png"])
    assert title(both, "A cat.") == '"A cat.", unlike dog.png, without "A sofa."'


@pytest.mark.parametrize(
    ("words", "query"),
    [
        ("--like {like}", lambda text, like, unlike: like.mean(0)),
        ("--like {like} --unlike {unlike}", lambda text, like, unlike: like.mean(0) - unlike.mean(0)),
        ("{text} --unlike {unlike}", lambda text, like, unlike: text[0] - unlike.mean(0) / unlike.mean(0).norm()),
        ("--image {unlike}", lambda text, like, unlike: unlike[0]),
        ("{text} --image {unlike}", lambda text, like, unlike: text[0] + unlike[0]),
        ("{text} --without {text2}", lambda text, like, unlike: text[0] - text[0] @ text[1] * text[1]),
    ],
)
def test_search_by_other_images_and_without_a_text(
    words: str, query: Any, pair: Pair, photos: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    files = {"like": [photos / "sub" / "c.png", tmp_path / "outside.png"], "unlike": [photos / "a.png"]}
    Image.new("RGB", (30, 20), "red").save(files["like"][1])
    texts, grid = {"text": LONG_TEXT, "text2": "A dog."}, tmp_path / "grid.png"
    arguments = [
        *itertools.chain.from_iterable(
            files[word.strip("{}")] if word.strip("{}") in files else [texts.get(word.strip("{}"), word)]
            for word in words.split()
        ),
        *("--images", photos, "--save-grid", grid),
    ]
    status, out, err = run("search", *arguments)
    assert status == 0, err
    assert str(grid) in err
    encoder, names = Encoder(*pair), ["a.png", "b.png", "sub/c.png"]
    like, unlike, images = (
        encoder.encode_images(paths, progress=False)
        for paths in (files["like"], files["unlike"], [photos / name for name in names])
    )
    wanted = query(encoder.encode_texts([*texts.values()], progress=False), like, unlike)
    scores = (images @ (wanted / wanted.norm())).tolist()
    expected = [
        f"{score:.4f} {photos / name}" for score, name in sorted(zip(scores, names, strict=True), reverse=True)
    ]
    assert [" ".join(line.split()[1:]) for line in out.splitlines()[1:]] == expected


def near(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer whose scores need not have the same last digits."""
    results = [{**one, "score": pytest.approx(one["score"], abs=2e-5)} for one in answer["results"]]
    return {**answer, "results": results}


def test_search_answers_many_queries(photos: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    (photos / "cat\x1b \u732b.png").write_bytes((photos / "a.png").read_bytes())
    file = tmp_path / "queries.txt"
    file.write_bytes(b"\xef\xbb\xbfA dog.\r\n \n\xff\n" + b"word " * 300_000 + b"\n" + LONG_TEXT.encode())
    status, out, err = run("search", "--images", photos, "--queries", file, "--json", "--top", 2)
    assert status == 0
    assert out.isascii()
    first, broken, long, last = map(json.loads, out.splitlines())
    assert [first["query"], last["query"]] == ["A dog.", LONG_TEXT]
    assert "error" in broken
    assert "1,048,576" in long["error"]
    assert "Line 3" in err
    assert "Line 4" in err
    for answer in (first, last):
        assert json.loads(run("search", "--images", photos, "--json", "--top", 2, answer["query"])[1]) == near(answer)
        table = run("search", "--images", photos, "--top", 2, answer["query"])[1].splitlines()[1:]
        assert len(table) == len(answer["results"]) == 2
        for line, result in zip(table, answer["results"], strict=True):
            assert line.split()[0] == str(result["rank"])
            assert float(line.split()[1]) == pytest.approx(result["score"], abs=1e-4)
            assert Path(result["file"]).is_file()
    shown = run("search", "--images", photos, "--queries", file, "--top", 1)[1]
    one = run("search", "--images", photos, "--top", 1, LONG_TEXT)[1]
    assert shown.splitlines()[-3] == LONG_TEXT
    assert shown.splitlines()[-1].split()[2:] == one.splitlines()[-1].split()[2:]
    without = run("search", "--images", photos, "--queries", file, "--without", "A dog.", "--json", "--top", 2)[1]
    assert "cancel" in json.loads(without.splitlines()[0])["error"]
    alone = run("search", "--images", photos, "--without", "A dog.", "--json", "--top", 2, LONG_TEXT)[1]
    *_, last = map(json.loads, without.splitlines())
    assert json.loads(alone) == near(last)


def test_each_query_is_answered_before_the_next_is_read(
    photos: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal and from a pipe: what `tail -f` and a person need."""
    stdin = os.dup(0)
    answered = threading.Event()
    monkeypatch.setattr("lotlip_hf.cli.search.show", lambda results, query, options: answered.set())
    try:
        for open_both in (os.pipe, os.openpty):
            reader, writer = open_both()[:: 1 if open_both is os.pipe else -1]
            os.dup2(reader, 0)
            os.close(reader)

            def ask(writer: int = writer) -> None:
                for _ in range(2):
                    os.write(writer, b"A cat.\n")
                    assert answered.wait(60)
                    answered.clear()
                if os.isatty(writer):
                    os.write(writer, b"\x04")  # Ctrl-D
                else:
                    os.close(writer)

            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(ask)
                status, _, err = run("search", "--images", photos, "--queries", "-")
                asking.result()
            assert status == 0, err
            assert err.count("> ") == (0 if open_both is os.pipe else 3)
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)


@pytest.mark.slow
def test_search_with_an_exported_model_imports_no_torch(
    official_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    main(["convert", "onnx", "--model", str(official_checkpoint), "--output", str(tmp_path / "exported")])
    program = (
        tmp_path / "lotlip"
    )  # `import lotlip_hf` registers the Auto classes, but not for the command of this name
    program.write_text(
        """
import os, sys
sys.executable = os.path.join(os.path.dirname(sys.argv[0]), "python")
from lotlip_hf.cli import main
status = main(sys.argv[1:])
assert status == 0, status
heavy = {"torch", "transformers", "datasets", "scipy", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    )
    (tmp_path / "queries.txt").write_text("A cat.\nA dog.\n")
    (tmp_path / "exported" / "composer.safetensors").touch()  # which only a model in PyTorch uses
    for words in (
        [LONG_TEXT],  # embeds the images
        [LONG_TEXT, "--without", "A dog.", "--save-grid", tmp_path / "grid.png"],
        ["--image", photos / "a.png", "--json"],
        [LONG_TEXT, "--image", photos / "a.png"],
        ["--queries", tmp_path / "queries.txt", "--json"],
    ):
        command = [program, "search", "--model", tmp_path / "exported", "--images", photos, *words]
        subprocess.run([sys.executable, *map(str, command)], check=True)


def test_search_reports_what_it_skipped_and_cut(photos: Path, run: Callable[..., Any]) -> None:
    (photos / "text.jpg").write_text("no image")
    (photos / "line\nbreak.png").touch()
    for _ in range(2):
        status, out, err = run("search", "--images", photos, "word " * 500)
        assert status == 0
        assert len(out.splitlines()) == 4
        assert "1 of 1 texts were cut at 126 tokens." in err
        assert "2 images were skipped:\n  line\\nbreak.png: " in err
        assert "\n  text.jpg: " in err


def test_names_that_are_no_text_are_printed(photos: Path, run: Callable[..., Any]) -> None:
    os.rename(photos / "a.png", os.fsencode(photos) + b"/\xff.png")
    status, out, _ = run("search", "--images", photos, LONG_TEXT)
    assert status == 0
    assert "\\udcff.png" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("unheard-of", "unheard-of"),
        ("serch", "Did you mean 'search'"),
        ("export onnx", "convert"),
        ("convert --checkpoint x", "lotlip convert official"),
        ("convert gguf", "gguf"),
        ("convert onnx --output x", "--model"),
        ("search --images {photos} text", "--model"),
        ("search --model x --images {photos} --top 0 text", "top"),
        ("search --model x --images {photos} --dtype int8 text", "dtype"),
        ("search --model x --imges {photos} text", "Did you mean --images"),
        ("search --model x --images {photos} two words", "Quote texts"),
        ("search --model x --images {photos}", "--like"),
        ("search --model x --images {photos} --unlike {photos}/a.png", "--like"),
        ("search --model x --images {photos} --queries {photos}/no.txt", "no.txt"),
        ("search --model x --images {photos} --queries - text", "--queries"),
        ("search --model x --images {photos} --queries - --save-grid {tmp}/grid.png", "--save-grid"),
        ("search --model {model} --images {photos} --image {tmp}/no.png", "no.png"),
        ("search --model {model} --images {photos} --like {tmp}/no.png", "no.png"),
        ("search --model {model} --images {photos} text --without text", "--without"),
        ("search --model {model} --images {tmp}/empty text", "empty"),
        ("search --model {model} --images {tmp}/missing text", "missing"),
        ("search --model {model} --images {photos} --device nowhere text", "nowhere"),
        ("search --model {tmp}/no --images {photos} text", "no"),
        ("search --model x --images {photos} --save-grid {tmp}/grid.xyz text", "grid.xyz"),
        ("search --model x --images {photos} --save-grid {tmp}/no/grid.png text", "no"),
        ("embed --model x --output x", "--texts"),
        ("embed --model x --output x --images {photos} --texts x", "--texts"),
        ("embed --model x --output x --image-root {photos} --texts x", "--image-root"),
        ("embed --model x --images {photos} --output {tmp}/no/out.parquet", "out.parquet"),
        ("embed --model x --images {photos} --output {tmp}", "a folder"),
        ("embed --model x --images {photos}", "--pooled"),
        ("embed --model x --images {photos} --output x --cache x", "--cache"),
        ("embed --model x --texts {tmp}/no.txt --output {tmp}/out.parquet", "no.txt"),
        ("evaluate --model x", "--task"),
        ("report", "RESULTS"),
        ("push --private {photos}", "--repo-id"),
        ("relabel --data {photos} --output x", "--captioner"),
        ("train --batch-sise 3", "Did you mean --batch-size"),
        ("train --lr 1", "Did you mean --learning-rate"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: str,
    word: str,
    official_checkpoint: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    words = arguments.format(photos=photos, tmp=tmp_path, model=official_checkpoint).split()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lotlip")
    assert "error: " in err
    assert word in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--help", [*cli.COMMANDS, "Exit status"]),
        ("--version", ["lotlip 0.1.0"]),
        (
            "search --help",
            ["--images", "--top", "--queries", "--json", "--image", "--save-grid", "--index", "--device", "--dtype"],
        ),
        ("evaluate --help", ["--config", "--task", "--no-normalize"]),
        ("train --help", ["--grad-cache-chunk", "torchrun"]),
        ("relabel --help", ["--captioner", "--max-image-pixels"]),
        ("convert --help", ["official", "clip", "open-clip", "stock", "onnx"]),
        ("convert open-clip --help", ["--activation"]),
    ],
)
def test_help_and_version(arguments: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(arguments.split())
    assert exit_status.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)


def test_lotlip_alone_shows_commands_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    assert "lotlip --help" in shown
    assert "lotlip 0.1.0" in shown
    known = cli.parsers()
    lines = [shlex.split(line) for line in shown.splitlines() if line.startswith("  lotlip ")]
    for _, command, *words in lines[:-2]:
        name = " ".join([command, words.pop(0)]) if command == "convert" else command
        known[name].parse_args(words)
    assert {line[1] for line in lines[:-2]} == set(cli.COMMANDS)


def test_each_option_is_shown_once_in_a_titled_group() -> None:
    for name, parser in cli.parsers().items():
        groups = {group.title: group._group_actions for group in parser._action_groups if group._group_actions}
        actions = [action for group in groups.values() for action in group]
        assert len(actions) == len({id(action) for action in actions}) == len(parser._actions)
        assert list(groups)[-1] == "General"
        shown = parser.format_help()
        assert shown.startswith(f"Usage: lotlip {name} ")
        for action in actions:
            assert action.help
            assert action.help[0].isupper()
            flag = max(action.option_strings, key=len, default=action.metavar)
            assert len(re.findall(rf"^  (?:-h, )?{flag}(?: |$)", shown, re.MULTILINE)) == 1


def test_options_of_a_file(official_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": str(official_checkpoint), "task": "scenes", "num_images": 3, "bootstrap": 0, "no_cache": True}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({**options, "captions": "long", "device": "cpu"}))
    output = tmp_path / "results.json"
    arguments = ["--config", str(tmp_path / "options.yaml"), "--captions=short", f"--output={output}"]
    assert main(["evaluate", *arguments]) == 0
    assert json.loads(output.read_text())["protocol"]["captions"] == "short"
    assert "Scenes" in capsys.readouterr().out
    assert main(["evaluate", *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err


# lotlip embed


def test_embed_images(
    pair: Pair, photos: Path, run: Callable[..., Any], tmp_path: Path, official_checkpoint: Path
) -> None:
    output = tmp_path / "out.parquet"
    (photos / "bad.jpg").write_text("no image")
    status, out, err = run("embed", "--images", photos, "--output", output)
    assert status == 0
    assert out == f"3 embeddings in {output}.\n"
    assert "1 image was skipped:\n  bad.jpg: not an image" in err
    schema = pq.read_schema(output)
    assert schema.names == ["file", "embedding"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert schema.metadata[b"model"] == str(official_checkpoint).encode()
    assert schema.metadata[b"fingerprint"] == Encoder(*pair).fingerprint("image").encode()
    names, embeddings = rows(output)
    assert names == ["a.png", "b.png", "sub/c.png"]
    expected = Encoder(*pair).encode_images([photos / name for name in names], progress=False)
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=1e-6)
    assert not (tmp_path / "out.parquet.partial").exists()
    assert not (photos / ".lotlip").exists()


def write_texts(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "caption": text}) + "\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "caption"], *([1, text] for text in texts)])
    else:
        pq.write_table(pa.table({"id": list(range(len(texts))), "caption": texts}), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_embed_texts(pair: Pair, suffix: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lotlip_hf.embed.WRITE_BLOCK", 2)
    texts = ["a dog", "", "naïve, café \u2028 猫", 'quoted "words"', LONG_TEXT, "a dog", "word " * 30_000]
    output = tmp_path / "out.parquet"
    file = write_texts(tmp_path / f"texts{suffix}", texts)
    status, out, err = run("embed", "--texts", file, "--column", "caption", "--output", output)
    assert status == 0
    assert out == f"7 embeddings in {output}.\n"
    assert "1 of 7 texts were cut at 126 tokens." in err
    assert "6/6" in err
    schema = pq.read_schema(output)
    assert schema.names == ["text", "embedding"]
    assert schema.metadata[b"fingerprint"] == Encoder(*pair).fingerprint("text").encode()
    written, embeddings = rows(output)
    assert written == texts
    np.testing.assert_allclose(embeddings, Encoder(*pair).encode_texts(texts, progress=False).numpy(), atol=1e-5)
    assert not (tmp_path / "out.parquet.partial").exists()


def test_embed_does_not_replace_its_output_unasked(photos: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    output.write_text("precious")
    status, _, err = run("embed", "--images", photos, "--output", output)
    assert status == 2
    assert "out.parquet: exists already" in err
    assert output.read_text() == "precious"
    assert run("embed", "--images", photos, "--output", output, "--overwrite")[0] == 0
    assert rows(output)[0] == ["a.png", "b.png", "sub/c.png"]


def test_an_error_leaves_the_old_output_and_the_new_embeddings(
    photos: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    output.write_text("precious")
    with monkeypatch.context() as context:
        context.setattr(
            pq.ParquetWriter, "write_batch", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        status, _, err = run("embed", "--images", photos, "--output", output, "--overwrite")
    assert status == 2
    assert "No space left" in err
    assert output.read_text() == "precious"
    status, _, err = run("embed", "--images", photos, "--output", output, "--overwrite")
    assert status == 0
    assert "Encoding images" not in err  # all were kept
    assert rows(output)[0] == ["a.png", "b.png", "sub/c.png"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"other": 1}\n', "row 2.*--column"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("t.jsonl", b'["a"]\n', "line 1"),
        ("t.jsonl", b"[" * 100_000, "line 1"),
        ("t.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", "line 1"),
        ("t.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 2"),
        ("t.jsonl", b'{"text": 5}\n', "row 1"),
        ("t.jsonl", b'{"text": "\\ud800"}\n', "Unicode"),
        ("t.csv", b"id,caption\n1,a\n", "--column"),
        ("t.csv", b"id,text\n1,a\n2\n", "row 2"),
        ("t.csv", b"", "no texts"),
        ("t.csv", b"text\n\"['a', 'b']\"\n", "line 2"),
        ("t.txt", b"good\n\xff\xfe\n", "Unicode"),
        ("t.txt", b"", "no texts"),
        ("t.parquet", b"no parquet", "cannot be read"),
        ("t.docx", b"", "ends in"),
    ],
)
def test_wrong_text_files_are_named(name: str, content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{word}"):
        check_texts(tmp_path / name)
        list(read_texts(tmp_path / name))


def test_text_files_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("\ufeffone\r\n\r\n three \u2028\x0b\nlast".encode())
    assert list(read_texts(tmp_path / "t.txt")) == ["one", "", " three \u2028\x0b", "last"]
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_texts(tmp_path / "t.jsonl")) == ["a", "b"]


def test_texts_are_resumed_by_what_they_say(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*(f"text number {number}" for number in range(9)), "word " * 300]
    file, output = write_texts(tmp_path / "t.txt", texts), tmp_path / "out.parquet"
    encoded: list[str] = []
    iterate = Encoder.iterate_texts

    def interrupt(encoder: Encoder, texts: Iterator[str], **keywords: Any) -> Iterator[Any]:
        for number, item in enumerate(iterate(encoder, texts, **keywords)):
            if number == 4:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as context:
        encoder = Encoder(*pair)
        assert encoder.dim == 16
        context.setattr(Encoder, "iterate_texts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed_texts(encoder, file, output, progress=False)
    assert "Interrupted: 4 embeddings are kept" in caplog.text
    assert not output.exists()

    def spy(encoder: Encoder, texts: Iterator[str], **keywords: Any) -> Iterator[Any]:
        return iterate(encoder, (encoded.append(text) or text for text in texts), **keywords)

    monkeypatch.setattr(Encoder, "iterate_texts", spy)
    write_texts(file, ["another", *texts[::-1]])  # lines moved: what is encoded is found again
    assert embed_texts(encoder, file, output, progress=False) == 11
    assert len(encoded) == 7
    assert "word " * 300 not in encoded
    assert "1 of 11 texts were cut at 126 tokens." in caplog.text  # by the run before
    written, embeddings = rows(output)
    assert written == ["another", *texts[::-1]]
    np.testing.assert_allclose(embeddings, Encoder(*pair).encode_texts(written, progress=False).numpy(), atol=1e-5)


def test_text_files_that_change_meanwhile_are_named(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_texts(tmp_path / "t.txt", ["a", "b"])
    iterate = Encoder.iterate_texts

    def change(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        yield from iterate(*arguments, **keywords)
        write_texts(file, ["a", "b", "new"])

    encoder = Encoder(*pair)
    assert encoder.dim == 16
    monkeypatch.setattr(Encoder, "iterate_texts", change)
    with pytest.raises(ValueError, match="t.txt: changed"):
        embed_texts(encoder, file, tmp_path / "out.parquet", progress=False)


# Interruptions of the real command.


def slow_down() -> None:
    """Makes each batch take longer."""
    fetch = TorchEngine.fetch

    def slow_fetch(*arguments: Any) -> Any:
        time.sleep(0.1)
        return fetch(*arguments)

    TorchEngine.fetch = slow_fetch


def count_of(file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
        try:
            return connection.execute("SELECT count(block) FROM entries").fetchone()[0]
        except sqlite3.OperationalError:  # its tables are not there yet
            return 0


def interrupt_lotlip(arguments: list[object], folder: Path, signal_number: int, at_least: int) -> tuple[int, str, int]:
    """Starts `lotlip`, slowed down, and stops it when so many embeddings are kept: status, error output, kept."""

    def kept() -> int:
        files = [path for path in folder.rglob(FILE) if path.stat().st_size]
        return sum(count_of(file) for file in files)

    started = Started("lotlip_hf.cli", [str(one) for one in arguments], folder, 1, slow_down)
    started.wait_until(lambda: kept() >= at_least)
    started.send_signal(signal_number)
    ended = started.wait()
    return ended.codes[0], ended.stderr, kept()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "signal_number"),
    [
        ("search", signal.SIGINT),
        ("embed images", signal.SIGKILL),
        ("embed texts", signal.SIGINT),
    ],
)
def test_an_interrupted_command_loses_nothing(
    command: str,
    signal_number: int,
    run: Callable[..., Any],
    official_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    total = 40
    folder, output = tmp_path / "photos", tmp_path / "out.parquet"
    folder.mkdir()
    for number in range(total):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    texts = write_texts(tmp_path / "t.txt", [f"text {'word ' * number}" for number in range(total)])
    arguments: list[object] = {
        "search": ["search", "--images", folder, "--top", total, LONG_TEXT],
        "embed images": ["embed", "--images", folder, "--output", output],
        "embed texts": ["embed", "--texts", texts, "--output", output],
    }[command]
    expected = run(*arguments)
    if command == "search":
        shutil.rmtree(folder / ".lotlip")
    else:
        expected = rows(output)
        output.unlink()

    options = ["--model", official_checkpoint, "--device", "cpu", "--batch-size", 1]
    status, err, kept = interrupt_lotlip([*arguments, *options], tmp_path, signal_number, at_least=5)
    assert 0 < kept < total
    assert not output.exists()
    if signal_number == signal.SIGINT:
        assert status == 130
        assert f"Interrupted: {kept} embeddings are kept in " in err
        assert "Traceback" not in err
    else:
        assert status == -signal.SIGKILL

    encoded = 0
    fetch = TorchEngine.fetch

    def counting_fetch(engine: TorchEngine, batch: Any) -> Any:
        nonlocal encoded
        encoded += len(batch)
        return fetch(engine, batch)

    monkeypatch.setattr(TorchEngine, "fetch", counting_fetch)
    result = run(*arguments)
    assert result[0] == 0
    assert encoded == total - kept + 1  # a text, for the number of dimensions
    if command == "search":
        assert result[1] == expected[1]
    else:
        names, embeddings = rows(output)
        assert names == expected[0]
        np.testing.assert_allclose(embeddings, expected[1], atol=1e-5)
        assert not Path(f"{output}.partial").exists()


def test_an_interruption_before_the_work_is_no_traceback(
    run: Callable[..., Any], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruption: Any = KeyboardInterrupt()

    def interrupt(options: Any) -> None:
        raise interruption

    monkeypatch.setattr(ModelOptions, "load", interrupt)
    assert run("search", "--images", photos, LONG_TEXT) == (130, "", "lotlip: interrupted.\n")
    interruption.signum = signal.SIGTERM
    assert run("search", "--images", photos, LONG_TEXT)[0] == 143


def test_texts_of_lists_and_ways(tmp_path: Path) -> None:
    rows = [
        {"file_name": "0.png", "long_captions": ["a", "None"], "talk": [{"value": "x"}, {"value": "2023-01-01"}]},
        {"file_name": "1.png", "long_captions": [], "talk": [{"value": "y"}, {"value": "007"}]},
        {"file_name": "2.png", "long_captions": ["b"], "talk": [{"value": "z"}, {"value": "null"}]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        file = tmp_path / f"metadata.{suffix}"
        assert list(read_texts(file, "long_captions")) == ["a", "None", "b"]
        assert list(read_texts(file, "talk[1].value")) == ["2023-01-01", "007", "null"]
        with pytest.raises(ValueError, match="row 2: expected a text"):
            list(read_texts(file, "long_captions[0]"))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"t.{suffix}", "w", newline="") as table:
            writer = csv.writer(table, delimiter=delimiter)
            writer.writerows([["id", "text"], [1, '["a", "b"]'], [2, "NA"], [3, "[a, b]"]])
        assert list(read_texts(tmp_path / f"t.{suffix}")) == ["a", "b", "NA", "[a, b]"]


def test_texts_are_looked_at_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelOptions, "load", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "t.csv").write_text("id\na\n")
    assert main(["embed", "--model=m", f"--texts={tmp_path / 't.csv'}", f"--output={tmp_path / 'out.parquet'}"]) == 2
    assert "t.csv" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_error(photos: Path, official_checkpoint: Path) -> None:
    arguments = ["search", "--model", str(official_checkpoint), "--images", str(photos), "a"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lotlip_hf", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
    errors = process.stderr.read().decode()  # pyright: ignore[reportOptionalMemberAccess]
    assert process.wait() == 141
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
