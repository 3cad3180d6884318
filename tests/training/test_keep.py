"""`lotlip train --keep`: only the records of a file of ids, from tables and streams, in one and several processes."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_training import TRAIN, arguments, config, finish, log_of, make_checkpoint, make_folder, make_shards

from lotlip_hf.data.record import RecordError
from lotlip_hf.training.data import load_data
from scripts import load_script

pytestmark = pytest.mark.usefixtures("alone")

IDS = [f"r{index:03}" for index in (1, 2, 3, 5, 8, 9, 11, 13, 17, 20)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`, a model, `records`, `shards`, and `chosen`, the records of `ids.txt` alone. Read-only."""
    folder = tmp_path_factory.mktemp("keep")
    make_checkpoint(folder / "plain")
    make_folder(folder / "records")
    make_shards(folder / "shards")
    make_folder(folder / "chosen")
    lines = (folder / "chosen" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "chosen" / "metadata.jsonl").write_text("".join(one for one in lines if json.loads(one)["id"] in IDS))
    (folder / "ids.txt").write_text("".join(f"{one}\n" for one in reversed(IDS)))
    return folder


def options(start: Path, data: str = "records", **others: Any) -> dict[str, Any]:
    return {"model": str(start / "plain"), "data": str(start / data), "keep": str(start / "ids.txt"), **others}


def ids(records: Any) -> list[str]:
    return [record["id"] for record in records]


def test_tables_and_streams_have_only_these_records(start: Path, tmp_path: Path) -> None:
    for others in ({}, {"data": "shards", "streaming": True}, {"streaming": True}):
        records, _ = load_data(config(tmp_path, **options(start, **others)))
        assert ids(records) == IDS
    records, held_out = load_data(config(tmp_path, **options(start, eval_share=0.3)))
    assert sorted(ids(records) + ids(held_out)) == IDS
    assert len(ids(held_out)) == 3
    same = config(tmp_path, **options(start, "chosen", keep=None, eval_share=0.3))
    assert list(map(ids, load_data(same))) == [ids(records), ids(held_out)]
    _, others = load_data(config(tmp_path, **options(start, eval_data=str(start / "records"))))
    assert len(ids(others)) == 24
    scenes = config(tmp_path, model="scenes", data="scenes", num_scenes=20)
    (tmp_path / "scenes.txt").write_text("\n".join(wanted := ids(load_data(scenes)[0])[3:6]))
    kept = config(tmp_path, model="scenes", data="scenes", num_scenes=20, keep=str(tmp_path / "scenes.txt"))
    assert ids(load_data(kept)[0]) == wanted


def test_broken_records_that_are_not_kept_do_not_stop_the_run(start: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    lines = (data / "metadata.jsonl").read_text().splitlines(keepends=True)
    (data / "metadata.jsonl").write_text("".join([*lines[:4], "{\n", *lines[5:]]))
    records, _ = load_data(config(tmp_path, **options(start, keep=str(start / "ids.txt"), data=str(data))))
    assert ids(records) == IDS
    with pytest.raises(RecordError, match="line 5"):
        load_data(config(tmp_path, **options(start, keep=None, data=str(data))))


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_of_other_data_are_an_error(streaming: bool, start: Path, tmp_path: Path) -> None:
    (tmp_path / "others.txt").write_text("x\ny\n")
    made = config(tmp_path, **options(start, keep=str(tmp_path / "others.txt"), streaming=streaming))
    with pytest.raises(ValueError, match=r"`keep`.*others\.txt"):
        load_data(made)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_data(config(tmp_path, **options(start, keep=str(tmp_path / "missing.txt"))))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_is_that_on_these_records_alone(num_processes: int, start: Path, tmp_path: Path) -> None:
    given = {"batch_size": 2, "max_steps": 4, "on_error": "raise"}
    for name, others in (("kept", {}), ("alone", {"data": "chosen", "keep": None})):
        finish(arguments(tmp_path / name, **options(start, **others), **given), tmp_path, num_processes)
    assert log_of(tmp_path / "kept") == log_of(tmp_path / "alone")


@pytest.mark.slow
def test_a_resumed_run_wants_the_same_ids(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_script(TRAIN).main
    for data in ("records", "shards"):
        file, output = tmp_path / f"{data}.txt", tmp_path / data
        file.write_text((start / "ids.txt").read_text())
        assert main(arguments(output, **options(start, data, keep=file), max_steps=2)) == 0
        resume = ["--output", str(output), "--resume"]
        file.write_text("".join(f"{one}\n" for one in IDS))  # in another order
        assert main(resume) == 0
        file.write_text("".join(f"{one}\n" for one in ["r000", *IDS[1:]]))  # as many
        capsys.readouterr()
        assert main(resume) == 2
        assert "`keep`" in capsys.readouterr().err
        assert main([*resume, "--keep", str(start / "ids.txt")]) == 0  # a file that was moved
