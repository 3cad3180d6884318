"""Relabelling what strangers wrote: endpoints, data sets and output folders that mean harm or are damaged."""

import json
import os
import re
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from lotlip_hf import plots
from lotlip_hf.cli import main
from lotlip_hf.data.records import load_records
from lotlip_hf.relabel import card as relabel_card
from lotlip_hf.relabel.captioners.base import Answer, CaptionerConfig, EndpointError
from lotlip_hf.relabel.captioners.endpoint import EndpointCaptioner
from lotlip_hf.relabel.config import RelabelConfig
from lotlip_hf.relabel.quality import QualityRules
from lotlip_hf.relabel.run import relabel
from openai_server import MODEL, OpenAIServer, each_image_first, openai_server, use_in_process
from tiny_captioners import counting_tokenizer

COLOURS = ("red", "green", "blue", "yellow")
SECRET = "pa:ss/w@rd"
SPELT = "pa%3Ass%2Fw%40rd"


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process(monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (32 + number, 24), colour).save(folder / f"{number}.png")
    return folder


class Speaker:
    """Says one thing of every picture, and does something first."""

    group_size, concurrency, revision = 1, 1, None

    def __init__(self, text: str = "", before: Callable[[Image.Image], object] = lambda image: None) -> None:
        self.text = text or "A picture shows a plain ground with some small things. They lie about in the sun."
        self.before = before

    def answer(self, images: Sequence[Image.Image], settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Answer]:
        for image in images:
            self.before(image)
        return [Answer(self.text, True)] * len(images)

    def close(self) -> None:
        pass


def options(data: Path, model: str = "one", **more: Any) -> RelabelConfig:
    output = str(more.pop("output", data.parent / "out"))
    more = {"tokenizer": counting_tokenizer(), "captioners": [CaptionerConfig(model)], **more}
    return RelabelConfig(data=str(data), output=output, **more)


def run(config: RelabelConfig, speaker: Speaker | None = None) -> dict[str, Any]:
    statistics = relabel(config, make_captioner=lambda _: speaker or Speaker(), progress=False)
    assert statistics is not None
    return statistics


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((output / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


# Servers


def captioner(server: OpenAIServer | str, **more: Any) -> EndpointCaptioner:
    address = server if isinstance(server, str) else server.url
    return EndpointCaptioner(CaptionerConfig(**{"model": MODEL, "endpoint": address, "timeout": 30.0, **more}))


def ask(one: EndpointCaptioner) -> Answer:
    [answer] = one.answer([Image.new("RGB", (40, 30), "red")], one.config.settings(), [0])
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["huge:400000000", "gzip:200000000"])
def test_answers_are_read_up_to_a_limit(fault: str) -> None:
    with openai_server(fault=each_image_first(fault)) as server:
        tracemalloc.start()
        try:
            assert ask(captioner(server)).text
            peak = tracemalloc.get_traced_memory()[1] if fault.startswith("huge") else 0
        finally:
            tracemalloc.stop()
    assert len(server.requests) == 2
    assert peak < 50_000_000
    assert server.sent < 50_000_000  # what the sockets hold


def test_a_compressed_answer_is_read_and_a_bomb_is_not() -> None:
    with openai_server(fault=each_image_first("gzip:1000")) as server:
        assert ask(captioner(server)).text
        assert len(server.requests) == 1
        server.fault = lambda *_: "gzip:10000"
        with pytest.raises(EndpointError, match="max_answer_bytes"):
            ask(captioner(server, max_answer_bytes=5_000, max_retries=0))
        for encoding in ("br", "zstd", "gzip, gzip"):
            server.fault = lambda *_, encoding=encoding: f"encoded:{encoding}"
            with pytest.raises(EndpointError, match=encoding):
                ask(captioner(server, max_retries=0))


@pytest.mark.parametrize(
    ("status", "to"),
    [
        (301, "{url}/chat/completions"),
        (302, "/v2/chat?key=hidden"),
        (307, "http://ada:hidden@elsewhere/v1"),
    ],
)
def test_redirects_are_refused(status: int, to: str) -> None:
    with openai_server() as other, openai_server(fault=lambda *_: f"redirect:{status} {to}") as server:
        to = to.format(url=other.url)
        with pytest.raises(EndpointError, match="`endpoint`") as caught:
            ask(captioner(server))
    assert to.split("?")[0].rpartition("@")[2] in str(caught.value)
    assert str(caught.value).isprintable()
    assert "hidden" not in str(caught.value)
    assert not other.requests
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("body", ['{"error": ' * 20_000, "\x1b[2J\x07", "9" * 5_000])
def test_messages_of_a_server_are_shown_on_one_line(status: int, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai_server.Handler.send_problem", lambda self, *_: self.send(status, body.encode()))
    with openai_server(fault=lambda *_: "400") as server, pytest.raises(EndpointError) as caught:
        ask(captioner(server, max_retries=1))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("user", "hidden"),
    [(f"ada:{SPELT}", (SECRET, SPELT)), ("hf_012345", ("hf_012345",)), ("a:b-0123456", ("b-0123456",))],
)
def test_a_password_in_an_address_signs_in_and_is_not_shown(
    user: str,
    hidden: tuple[str, ...],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fault(number: int, image: Image.Image, body: dict[str, Any]) -> str | None:
        texts = [
            f"content:{json.dumps(f'A sign says {one} in large letters, and a cat sits on it.')}" for one in hidden
        ]
        return texts[number] if number < len(texts) else f"body:{json.dumps({'error': f'{hidden}'})}"

    with openai_server(fault=fault) as server:
        address = server.url.replace("http://", f"http://{user}@")
        assert not any(one in repr(CaptionerConfig(MODEL, endpoint=address)) for one in hidden)
        arguments = [f"--data={pictures}", f"--output={tmp_path / 'out'}", f"--tokenizer={counting_tokenizer()}"]
        arguments += [f"--captioner={MODEL}", f"--endpoint={address}", "--max-retries=0", "--concurrency=1"]
        assert main(["relabel", *arguments]) == 2
    assert server.requests[0].authorization is not None
    assert server.requests[0].authorization.startswith("Basic ")
    output, error = capsys.readouterr()
    kept = [path.read_bytes().decode(errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert "A sign says" in "".join(kept)
    for text in (output, error, *kept):
        assert not any(one in text for one in hidden)


@pytest.mark.parametrize(
    "address",
    [
        "http://ada:hidden@host:port/v1",
        "ada:hidden@host/v1",
        "http://ada:hid#den@h",
    ],
)
def test_a_password_in_a_wrong_address_is_not_shown(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="`endpoint`") as caught:
        captioner(address)
    assert "hid" not in str(caught.value)
    for text in (f"captioners: [{{modl: a, endpoint: '{address}'}}]", f"captioners: [{{endpoint: '{address}'"):
        (tmp_path / "options.yaml").write_text(text)
        assert main(["relabel", "--data=d", "--output=o", f"--config={tmp_path / 'options.yaml'}"]) == 2
        assert "hid" not in capsys.readouterr().err


def test_captions_hold_no_control_characters(pictures: Path) -> None:
    run(
        options(pictures),
        Speaker("A \u202ecat\u202c\x1b[31m sits\x00\x07 on a wide mat.\r\n\r\nIt sleeps in\tthe sun."),
    )
    kept = "A  cat [31m sits  on a wide mat.\n\nIt sleeps in\tthe sun."
    assert {row["long_captions"][0] for row in rows(pictures.parent / "out")} == {kept}


def test_captions_that_are_too_long_are_dropped(pictures: Path) -> None:
    most = 200
    config = options(pictures, rules=QualityRules(max_characters=most))
    statistics = run(config, Speaker("A cat sits on a mat. " * (most // 10)))
    assert statistics["captions"][1]["dropped_for"] == {"too_long": len(COLOURS)}
    for entry in lines(pictures.parent / "out" / "skipped.jsonl"):
        assert entry["captions"][0]["reasons"] == ["too_long"]
        assert len(entry["captions"][0]["dropped"]) == most


# Data


@pytest.mark.parametrize("form", [{"format": "webdataset"}, {}])
def test_what_is_no_picture_is_listed_and_not_read(form: dict[str, Any], pictures: Path) -> None:
    os.mkfifo(pictures / "pipe.png")
    (pictures / "zero.png").symlink_to("/dev/zero")
    (pictures / "folder.png").mkdir()
    with open(pictures / "giant.png", "wb") as file:
        file.truncate(1 << 40)
    names = [f"{number}.png" for number in range(len(COLOURS))]
    bad = ["pipe.png", "zero.png", "folder.png", "giant.png", "none.png"]
    table = [{"file_name": name, "short_caption": "a"} for name in [*bad, *names]]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in table))
    statistics = run(options(pictures, **form))
    assert (statistics["images"], statistics["skipped"]) == (len(names), len(bad))
    skipped = lines(pictures.parent / "out" / "skipped.jsonl")
    assert [entry["id"] for entry in skipped] == bad
    (pictures / "metadata.jsonl").unlink()
    statistics = run(options(pictures, output=pictures.parent / "folder", **form))
    assert statistics["images"] == len(names)
    assert {entry["id"] for entry in lines(pictures.parent / "folder" / "skipped.jsonl")} >= {"pipe.png", "giant.png"}


@pytest.mark.parametrize("is_allowed", [False, True])
def test_links_out_of_the_folder_are_read_if_that_is_allowed(is_allowed: bool, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (pictures / "3.png").rename(tmp_path / "private" / "3.png")
    (pictures / "3.png").symlink_to(tmp_path / "private" / "3.png")
    more = {"image_root": str(tmp_path)} if is_allowed else {}
    seen: list[Image.Image] = []
    statistics = run(options(pictures, embed_images=True, **more), Speaker(before=seen.append))
    assert statistics["images"] == len(seen) == len(COLOURS) - 1 + is_allowed
    assert [entry["id"] for entry in lines(tmp_path / "out" / "skipped.jsonl")] == ([] if is_allowed else ["3.png"])


def test_the_size_of_files_has_a_limit(pictures: Path) -> None:
    assert run(options(pictures, max_image_bytes=50))["images"] == 0


@pytest.mark.parametrize("form", [{"format": "webdataset"}, {"embed_images": True}])
def test_the_bytes_that_were_captioned_are_those_that_are_kept(form: dict[str, Any], pictures: Path) -> None:
    def change(image: Image.Image) -> None:
        Image.new("RGB", (9, 9)).save(pictures / "0.png")
        (pictures / "1.png").write_bytes(b"private")
        (pictures / "2.png").unlink(missing_ok=True)
        (pictures / "2.png").symlink_to("/dev/zero")

    statistics = run(options(pictures, **form), Speaker(before=change))
    output = pictures.parent / "out"
    assert statistics["images"] == 1
    assert [entry["id"] for entry in lines(output / "skipped.jsonl")] == ["0.png", "1.png", "2.png"]
    (record,) = load_records(output)
    assert record["image"]["bytes"] == (pictures / "3.png").read_bytes()


# What is published


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "form"),
    [
        *((source, {}) for source in ("pattern", "image folder")),
        ("folder", {"format": "webdataset"}),
        ("table", {"embed_images": True}),
    ],
)
def test_nothing_says_where_the_data_lie(source: str, form: dict[str, Any], pictures: Path) -> None:
    place = pictures.parent
    (pictures / "broken.png").write_bytes(b"no image")
    data, more = str(pictures), {}
    if source != "folder":
        names = [str(path) if source == "table" else path.name for path in sorted(pictures.iterdir())]
        names += [str(pictures / "gone.png"), "../out.png"]
        table = [{"image": name, "short_caption": "a"} for name in names]
        folder = place / "tables" if source == "image folder" else pictures
        folder.mkdir(exist_ok=True)
        (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in table))
        data = str(folder / ("*.jsonl" if source == "pattern" else "a.jsonl"))
        more = {"image_folder": str(pictures)} if source == "image folder" else {}
    model = place / "models" / "captioner"
    model.mkdir(parents=True)
    config = options(Path(data), str(model), output=place / "out", **more, **form)
    statistics = run(config)
    output = place / "out"
    assert (statistics["images"], statistics["captions"][1]["name"]) == (len(COLOURS), "captioner")
    found = {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    found |= {"rows": json.dumps(rows(output), default=repr).encode()}
    for name, content in found.items():
        assert str(place).encode() not in content, name
    entries = lines(output / "skipped.jsonl")
    assert [entry["image"] for entry in entries] == (
        ["broken.png"] if source == "folder" else ["broken.png", "gone.png", None]
    )
    assert all("captioner" in row["captions"][0]["model"] for row in rows(output))
    kept = [record["image"] for record in load_records(output, image_folder=str(pictures))]
    assert len(kept) == len(COLOURS)
    for image in kept:
        assert os.path.isfile(image) if isinstance(image, str) else image["bytes"] or os.path.isfile(image["path"])


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "![x](http://tracker/x.png)", "a|b|c", "`x` $\\frac$"]
)
def test_the_card_shows_names_and_does_not_act_on_them(text: str, pictures: Path) -> None:
    captioners = [CaptionerConfig(text, prompt=f"\n# {text}\n", extra_body={"name": text})]
    output = pictures.parent / "out"
    run(options(pictures, captioners=captioners, embed_images=True))
    card = (output / "README.md").read_text()
    assert "histograms.png" in card
    assert "<img" not in re.sub("`[^`]*`", "", card)
    assert "![x]" not in re.sub("`[^`]*`", "", card)
    assert "\n# <" not in card
    tables = [line for line in card.splitlines() if line.startswith("| ")]
    wide = [line for line in tables if "transformers" in line]
    assert len(wide) == 1
    assert len(re.findall(r"(?<!\\)\|", wide[0])) == 7  # six cells
    assert plots.wrapped(text, 40)
    assert relabel_card.statistics_table(json.loads((output / "statistics.json").read_text())).count("\n") == 4


# Output folders

DEEP = "[" * 100_000


@pytest.mark.slow
@pytest.mark.parametrize("content", [DEEP, "[]", '{"records": true, "options": 1}'])
@pytest.mark.parametrize("name", ["config.json", "part-00000.json", "00000-00000.json"])
def test_damaged_files_of_a_run_are_named(name: str, content: str, pictures: Path) -> None:
    run(options(pictures))
    (pictures.parent / "out" / ".relabel" / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*--output"):
        run(options(pictures))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("statistics", "raw", "tokens"), {"many": 1}),
        (("statistics", "captioners"), []),
        (("revisions",), [None, None]),
        (("skipped",), ["a"]),
    ],
)
def test_damaged_statistics_are_named(keys: tuple[Any, ...], value: Any, pictures: Path) -> None:
    run(options(pictures))
    file = pictures.parent / "out" / ".relabel" / "00000-00000.json"
    sidecar = json.loads(file.read_text())
    inner = sidecar
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match="00000-00000.json.*--output"):
        run(options(pictures))


class Stop(Exception):
    """Ends a run in the middle."""


def interrupted(pictures: Path) -> Path:
    """The journal of a run that was stopped after two of four pictures."""
    seen: list[Image.Image] = []

    def stop(image: Image.Image) -> None:
        seen.append(image)
        if len(seen) > 2:
            raise Stop

    with pytest.raises(Stop):
        run(options(pictures), Speaker(before=stop))
    (journal,) = (pictures.parent / "out" / ".relabel").glob("*.partial")
    return journal


CAPTION = {"text": "a", "attempts": 1, "reasons": [], "earlier_reasons": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        "[]",
        '{"group": 1, "captions": {}}',
        '{"group": 1, "captions": [5]}',
        json.dumps({"group": 1, "captions": [{**CAPTION, "text": 5}]}),
        json.dumps({"group": 1, "captions": [{"text": "a"}]}),
    ],
    ids=lambda line: line[:40],
)
def test_a_damaged_line_of_a_journal_ends_what_is_kept(line: str, pictures: Path) -> None:
    journal = interrupted(pictures)
    kept = journal.read_text().splitlines()
    kept[0 if line == "[]" else 1] = line
    journal.write_text("\n".join(kept) + "\n")
    assert run(options(pictures))["images"] == len(COLOURS)
    assert len({row["long_captions"][0] for row in rows(pictures.parent / "out")}) == 1


@pytest.mark.parametrize("groups", [[(0, 1), (9, 1)], [(0, 1), (1, 2)]])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_journal_of_other_groups_is_refused(is_whole: bool, groups: list[tuple[int, int]], pictures: Path) -> None:
    journal = interrupted(pictures)
    header = journal.read_text().splitlines()[0]
    written = [json.dumps({"group": number, "captions": [CAPTION] * size}) for number, size in groups]
    journal.write_text("\n".join([header, *written]) + "\n")
    if is_whole:
        journal.rename(journal.with_suffix(".jsonl"))
    with pytest.raises(ValueError, match="captioner-0.*--output"):
        run(options(pictures))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "link") for name in ("lock-0", "lock-finish", "config.json", "part-00000.json")),
        *(("{journal}", kind) for kind in ("link", "hard link", "dangling")),
    ],
)
def test_links_in_an_output_folder_are_refused(name: str, kind: str, pictures: Path, tmp_path: Path) -> None:
    journal = interrupted(pictures)
    thesis = tmp_path / "thesis.txt"
    if kind != "dangling":
        thesis.write_bytes(journal.read_bytes())
    before = thesis.exists() and thesis.read_bytes()
    path = journal.with_name(name.format(journal=journal.name))
    path.unlink(missing_ok=True)
    if kind == "hard link":
        os.link(thesis, path)
    else:
        path.symlink_to(thesis)
    with pytest.raises(ValueError, match="--output"):
        run(options(pictures))
    assert (thesis.exists() and thesis.read_bytes()) == before


@pytest.mark.parametrize("name", [".relabel", "data"])
def test_folders_that_lead_out_of_an_output_folder_are_refused(name: str, pictures: Path, tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (output / ".relabel").mkdir(parents=True)
    elsewhere.mkdir()
    if name == ".relabel":
        (output / name).rmdir()
    (output / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match="--output"):
        run(options(pictures))
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["README.md", "histograms.png", "skipped.jsonl", "data/00000-00000.parquet"])
def test_links_in_place_of_results_are_replaced(name: str, pictures: Path, tmp_path: Path) -> None:
    interrupted(pictures)
    (tmp_path / "thesis.txt").write_text("Chapter 1")
    path = tmp_path / "out" / name
    path.symlink_to(tmp_path / "thesis.txt")
    if name.startswith("data"):  # it would stand for work that is done
        with pytest.raises(ValueError, match="--output"):
            run(options(pictures))
    else:
        run(options(pictures))
        assert not path.is_symlink()
    assert (tmp_path / "thesis.txt").read_text() == "Chapter 1"


def test_names_of_locks_are_a_fixed_form(pictures: Path) -> None:
    journal = interrupted(pictures)
    for name in ("lock-0x1", "lock-99999999999999", "lock-1 2"):
        journal.with_name(name).touch()
    run(options(pictures))
