"""Balancing over a list of entries, `lotlip curate`, and the records of a file of ids."""

import json
import math
import os
import signal
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from filelock import FileLock
from PIL import Image

from lotlip_hf.cli import main
from lotlip_hf.data import curation
from lotlip_hf.data.curation import Curation, Entries, curate, draw, keep_probability, probabilities, spaced
from lotlip_hf.data.kept import KeptIds, keep_records
from lotlip_hf.data.record import RecordError
from lotlip_hf.data.records import load_records
from processes import Started
from shards import write_shard

WORDS = ["cat", "dog", "red", "a", "of", "St", "new york", "", ",", ".", "猫", "it's", "\t", "\n", "car!", "(x)"]


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A folder of records without pictures."""
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{row['id']}.png", "long_captions": [], **row}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_shards(folder: Path, rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Path:
    """WebDataset shards."""
    folder.mkdir()
    left = iter(rows)
    for number, size in enumerate(sizes):
        write_shard(folder / f"{number:02}.tar", [(b"no picture", row) for row in islice(left, size)])
    return folder


def random_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = Random(seed)

    def text() -> str:
        return " ".join(generator.choices(["cat", "dog", "red", "the", "tram"], [50, 10, 20, 80, 1], k=4))

    return [
        {"id": f"r{index:04}", "short_caption": text(), "long_captions": [text(), text()]} for index in range(number)
    ]


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    file = tmp_path / "entries.txt"
    file.write_text("cat\ndog\nred cat\ntram\nzebra\n")
    return file


def ids(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "  "),
        ("A cat.", " A cat .  "),
        ("a,b;c:d?e!f`g.h", " a , b ; c : d ? e ! f ` g . h "),
        ("a\tb\nc\r\nd", " a b c  d "),
        ("it's (new) - x", " it's (new) - x "),
    ],
)
def test_spacing(text: str, expected: str) -> None:
    assert spaced(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat.", ["cat"]),
        ("cats", []),
        ("A Cat", []),
        ("cat", ["cat"]),
        ("new york", ["new york"]),
        ("in new york, new yorkers", ["new york"]),
        ("new  york", []),
        ("new\nyork!", ["new york"]),
        ("a, b", []),
        ("a ,b", ["a  , b"]),
        ("cat,cat", ["cat"]),
    ],
)
def test_matches_by_hand(text: str, expected: list[str]) -> None:
    entries = Entries(["cat", "new york", "a , b", "a  , b", "St. Louis", "cat"])
    assert [entries.names[number] for number in entries.matches(text)] == expected


def test_matches_are_those_of_a_search_for_substrings() -> None:
    generator = Random(0)
    names = [" ".join(generator.choices(WORDS, k=generator.randint(1, 4))) for _ in range(300)]
    entries = Entries(names)
    found = 0
    for _ in range(2000):
        text = generator.choice([" ", "", ". "]).join(generator.choices(WORDS, k=generator.randint(0, 12)))
        naive = [number for number, name in enumerate(entries.names) if f" {name} " in spaced(text)]
        assert entries.matches(text) == naive, repr(text)
        found += len(naive)
    assert found > 2000


def test_shares_are_those_of_the_formula(tmp_path: Path) -> None:
    """Counts of 10,000, 1,000 and 10 and t = 1,000; texts of two groups, and two texts of a record."""
    rows = [{"id": f"a{i}", "short_caption": "a cat"} for i in range(9_000)]
    rows += [{"id": f"b{i}", "short_caption": "a cat and a bird"} for i in range(1_000)]
    rows += [{"id": f"c{i}", "short_caption": "a bird", "long_captions": ["my bird"]} for i in range(3_000)]
    rows += [{"id": f"d{i}", "short_caption": "a tram"} for i in range(10)]
    rows += [{"id": f"e{i}", "short_caption": "nothing"} for i in range(5)]
    records = load_records(write(tmp_path / "data", rows))
    result = curate(records, Entries(["cat", "bird", "tram"]), tmp_path / "ids.txt", t=1_000)
    assert result.counts == [10_000, 7_000, 10]
    cat, bird = 1 / 10, 1 / 7
    kept = ids(tmp_path / "ids.txt")
    for group, size, share in (
        ("a", 9_000, cat),
        ("b", 1_000, 1 - (1 - cat) * (1 - bird)),
        ("c", 3_000, 1 - (1 - bird) ** 2),
        ("d", 10, 1),
        ("e", 5, 0),
    ):
        number = sum(one.startswith(group) for one in kept)
        assert abs(number - size * share) <= 4 * math.sqrt(size * share * (1 - share)), group
    assert result.records == {"kept": len(kept), "dropped": 13_010 - len(kept), "unmatched": 5, "broken": 0}
    assert result.kept_counts[2] == 10
    assert result.kept_counts[0] == sum(one[0] in "ab" for one in kept)


def test_the_draw_is_that_of_one_match_after_the_other() -> None:
    chances = probabilities([400, 50, 3], 100)
    assert chances == [0.25, 1, 1]
    assert keep_probability([[0], [0]], chances) == 1 - 0.75**2
    assert keep_probability([[0, 1], []], chances) == 1
    assert keep_probability([[], []], chances) == 0
    drawn = np.array([draw(0, str(number)) for number in range(10_000)])
    assert 0 <= drawn.min() < drawn.max() < 1
    assert abs(np.histogram(drawn, 10, (0, 1))[0] - 1000).max() < 150
    assert draw(1, "0") != draw(0, "0")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_order_and_processes_choose_the_same(num_workers: int, tmp_path: Path, entries: Path) -> None:
    rows = random_rows(200)
    table = load_records(write(tmp_path / "table", rows))
    expected = curate(table, Entries.read(entries), tmp_path / "expected.txt", t=20)
    wanted = ids(tmp_path / "expected.txt")
    assert 20 < len(wanted) < 180
    assert wanted == sorted(wanted)
    shuffled = list(rows)
    Random(1).shuffle(shuffled)
    for name, given, sizes in (("one", rows, [200]), ("some", rows, [90, 10, 100]), ("turned", shuffled, [150, 50])):
        stream = load_records(write_shards(tmp_path / name, given, sizes), image_root=tmp_path)
        output = tmp_path / f"{name}.txt"
        result = curate(stream, Entries.read(entries), output, t=20, num_workers=num_workers)
        assert sorted(ids(output)) == wanted
        assert name == "turned" or output.read_bytes() == (tmp_path / "expected.txt").read_bytes()
        assert result == expected
    curate(table, Entries.read(entries), tmp_path / "seed.txt", t=20, seed=1)
    assert ids(tmp_path / "seed.txt") != wanted


def kill_at(n: int) -> None:
    """Kills this process in place of the n-th result of a part; each one before is saved."""
    curation.SAVE_SECONDS = -1  # pyright: ignore[reportAttributeAccessIssue]
    add, calls = curation._State.add, [0]

    def counted(state: Any, part: Any) -> None:
        calls[0] += 1
        if calls[0] == n:
            state._ids.write(b"half an i")
            state._ids.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(state, part)

    curation._State.add = counted


def count_parts(file: Path) -> None:
    """Writes a letter for each part that is read."""
    add = curation._State.add

    def counted(state: Any, part: Any) -> None:
        with open(file, "a") as lines:
            lines.write("x")
        add(state, part)

    curation._State.add = counted


@pytest.mark.slow
@pytest.mark.parametrize(("n", "workers"), [(1, 0), (3, 0), (5, 2), (8, 0)])
def test_a_killed_run_continues_to_the_same_bytes(n: int, workers: int, tmp_path: Path, entries: Path) -> None:
    data = write_shards(tmp_path / "data", random_rows(80), [20] * 4)
    argv = ["curate", "--data", str(data), "--metadata", str(entries), "--t", "9", "--num-workers", str(workers)]
    assert main([*argv, "--output", str(tmp_path / "expected.txt")]) == 0
    output = tmp_path / "ids.txt"
    argv += ["--output", str(output)]
    assert Started("lotlip_hf.cli", argv, tmp_path, 1, kill_at, n).wait().codes == [-signal.SIGKILL]
    assert not output.exists()
    ended = Started("lotlip_hf.cli", argv, tmp_path, 1, count_parts, tmp_path / "parts").wait()
    assert ended.codes == [0], ended.text
    assert output.read_bytes() == (tmp_path / "expected.txt").read_bytes()
    assert (tmp_path / "ids.json").read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert len((tmp_path / "parts").read_text()) == 9 - n
    assert not (tmp_path / "ids.txt.partial").exists()


def test_an_interrupted_run_wants_the_same_options(tmp_path: Path, entries: Path) -> None:
    rows = [*random_rows(30), {"id": "broken", "short_caption": ""}]
    records = load_records(write(tmp_path / "data", rows))
    output = tmp_path / "ids.txt"
    with pytest.raises(RecordError, match="broken"):
        curate(records, Entries.read(entries), output, t=5)
    assert not output.exists()
    with pytest.raises(ValueError, match="`t`"):
        curate(records, Entries.read(entries), output, t=6)
    with pytest.raises(ValueError, match="`metadata`"):
        curate(records, Entries(["dog"]), output, t=5)
    with FileLock(tmp_path / "ids.txt.partial" / "lock"), pytest.raises(ValueError, match="another process"):
        curate(records, Entries.read(entries), output, t=5)
    state = tmp_path / "ids.txt.partial" / "state.json"
    whole = json.loads(state.read_text())
    for position in ([0, 0, 10**9], [0, -1, 0], ["0", 0, 0]):
        state.write_text(json.dumps({**whole, "position": position}))
        with pytest.raises(ValueError, match=r"state\.json"):
            curate(records, Entries.read(entries), output, t=5)
    for text in ("", '{"identity":', "[" * 100_000):
        state.write_text(text)
        with pytest.raises(ValueError, match=r"state\.json"):
            curate(records, Entries.read(entries), output, t=5)
    state.write_text(json.dumps(whole))
    assert curate(records, Entries.read(entries), output, t=5, on_error="skip").records["broken"] == 1


@pytest.mark.parametrize("make", [os.symlink, os.link, lambda _, path: os.mkfifo(path)])
def test_a_file_of_ids_of_others_is_not_written(make: Any, tmp_path: Path, entries: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "ids.txt.partial").mkdir()
    make(tmp_path / "precious", tmp_path / "ids.txt.partial" / "ids")
    records = load_records(write(tmp_path / "data", random_rows(30)))
    with pytest.raises(ValueError, match="ids"):
        curate(records, Entries.read(entries), tmp_path / "ids.txt", t=5)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_id_with_a_line_break_is_a_broken_record(streaming: bool, tmp_path: Path, entries: Path) -> None:
    rows = [{"id": "a\nb", "short_caption": "cat"}, {"id": "a\rb", "short_caption": "cat"}, *random_rows(5)]
    records = load_records(write(tmp_path / "data", rows), streaming=streaming)
    with pytest.raises(RecordError, match="line break"):
        curate(records, Entries.read(entries), tmp_path / "ids.txt")
    result = curate(records, Entries.read(entries), tmp_path / "others.txt", on_error="skip")
    assert result.records["broken"] == 2
    assert set(ids(tmp_path / "others.txt")) <= {row["id"] for row in rows[2:]}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no entries"),
        (b"\n \n\t\n", "no entries"),
        (b"caf\xe9\n", "UTF-8"),
        (b"a " * 65 + b"b\n", "words"),
    ],
)
def test_hostile_metadata_is_refused(content: bytes, word: str, tmp_path: Path) -> None:
    file = tmp_path / "entries.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=word):
        Entries.read(file)


def test_metadata_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nested = Entries([" ".join("a" * length) for length in range(1, 65)])  # each word of the text starts all of them
    assert len(nested.matches("a " * 20_000)) == 64
    monkeypatch.setattr(curation, "MAX_ENTRIES", 3)
    assert Entries("abca").names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="entries"):
        Entries("abcd")
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(ValueError, match=r"large\.txt"):
        Entries.read(tmp_path / "large.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        Entries.read(tmp_path / "pipe")


def test_the_command_writes_ids_a_report_and_a_plot(
    tmp_path: Path, entries: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", random_rows(100))
    argv = ["curate", "--data", str(data), "--metadata", str(entries), "--t", "20", "--output", f"{tmp_path}/ids.txt"]
    assert main([*argv, "--plot", f"{tmp_path}/plot.png"]) == 0
    out = capsys.readouterr().out
    numbers = json.loads((tmp_path / "ids.json").read_text())
    assert numbers["records"]["read"] == 100
    assert numbers["records"]["kept"] == len(ids(tmp_path / "ids.txt"))
    head = numbers["head"][0]
    assert head["entry"] == "cat"
    assert head["probability"] == 20 / head["matches"]
    assert f"{head['matches']:,}" in out
    tail = {one["t"]: one["tail"] for one in numbers["tail"]}
    assert (tail[0.2], tail[2000]) == (0, 4)
    assert numbers["entries"]["matched"] == 4
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 600
    assert main(argv) == 2
    assert "ids.txt" in capsys.readouterr().err
    assert main([*argv, "--overwrite", "--t", "0.5"]) in (0, 2)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--metadata", "no.txt"], "no.txt"),
        (["--t", "0"], "`t`"),
        (["--output", "x.json"], "output"),
        (["--output", "x.txt", "--plot", "x.json"], "plot"),
        (["--mapping", "no"], "mapping"),
        (["--short-column", "text"], "--short-column"),
        (["--plot", "x.xyz"], "x.xyz"),
        (["--metadata", "others.txt"], "metadata"),
    ],
)
def test_wrong_options(
    flags: list[str],
    word: str,
    tmp_path: Path,
    entries: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("others.txt").write_text("unheard-of\n")
    write(tmp_path / "data", random_rows(3))
    assert main(["curate", "--data", "data", "--metadata", entries.name, "--output", "ids.txt", *flags]) == 2
    assert word in capsys.readouterr().err
    assert not Path("ids.txt").exists()
    assert not Path("ids.txt.partial").exists()


def test_columns_are_those_of_training(tmp_path: Path, entries: Path) -> None:
    rows = [{"id": number, "caption": "a cat", "text": "a dog"} for number in range(4)]
    data = write(tmp_path / "data", rows)
    argv = ["curate", "--data", str(data), "--metadata", str(entries), "--short-column", "caption"]
    assert main([*argv, "--long-columns", "text", "--output", f"{tmp_path}/ids.txt"]) == 0
    assert ids(tmp_path / "ids.txt") == ["0", "1", "2", "3"]
    assert json.loads((tmp_path / "ids.json").read_text())["entries"]["matches"] == 8
    assert main([*argv, "--long-columns", "none", "--output", f"{tmp_path}/short.txt"]) == 0
    assert json.loads((tmp_path / "short.json").read_text())["entries"]["matches"] == 4


def test_scenes(tmp_path: Path) -> None:
    (tmp_path / "entries.txt").write_text("red\nblue\ncircle\n")
    argv = ["curate", "--data", "scenes", "--num-scenes", "40", "--metadata", f"{tmp_path}/entries.txt", "--t", "9"]
    assert main([*argv, "--output", f"{tmp_path}/ids.txt"]) == 0
    assert ids(tmp_path / "ids.txt")


# Records of a file of ids


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    file = tmp_path / "kept.txt"
    file.write_bytes(b"\xef\xbb\xbfr0003\r\nr0001\n\nr0017\nmissing")
    return file


def test_ids_of_a_file(kept: Path, tmp_path: Path) -> None:
    found = KeptIds(kept)
    assert len(found) == 4
    assert [one in found for one in ("r0003", "r0001", "r0017", "missing", "", "r0002")] == [True] * 4 + [False] * 2
    (tmp_path / "turned.txt").write_text("missing\nr0017\nr0001\nr0003\nr0001\n")
    assert KeptIds(tmp_path / "turned.txt").digest == found.digest
    (tmp_path / "fewer.txt").write_text("r0017\n")
    assert KeptIds(tmp_path / "fewer.txt").digest != found.digest
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"none\.txt"):
        KeptIds(tmp_path / "none.txt")


def test_records_of_a_file(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = random_rows(20)
    wanted = ["r0001", "r0003", "r0017"]
    table = load_records(write(tmp_path / "table", rows))
    with caplog.at_level("WARNING", "lotlip_hf"):
        chosen = keep_records(table, KeptIds(kept))
    assert isinstance(chosen, Dataset)
    assert [record["id"] for record in chosen] == wanted
    shards = write_shards(tmp_path / "shards", rows, [7, 7, 6])
    stream = keep_records(load_records(shards), KeptIds(kept))
    assert isinstance(stream, IterableDataset)
    assert stream.num_shards == 3
    assert [record["id"] for record in stream] == wanted
    (shards / "01.tar").write_bytes((shards / "01.tar").read_bytes()[:5000])
    damaged = list(keep_records(load_records(shards), KeptIds(kept)))
    assert [bool(record.get("is_shard")) for record in damaged] == [False, False, True, False]
    (tmp_path / "others.txt").write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"others\.txt"):
        keep_records(table, KeptIds(tmp_path / "others.txt"))


def test_a_curation_keeps_its_records(tmp_path: Path, entries: Path) -> None:
    records = load_records(write(tmp_path / "data", random_rows(100)))
    result = curate(records, Entries.read(entries), tmp_path / "ids.txt", t=10)
    chosen = keep_records(records, KeptIds(tmp_path / "ids.txt"))
    assert isinstance(chosen, Dataset)
    assert len(chosen) == result.records["kept"]
    again = curate(chosen, Entries.read(entries), tmp_path / "again.txt", t=10_000)
    assert again == Curation(result.entries, result.kept_counts, result.kept_counts, again.records)
