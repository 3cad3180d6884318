"""A new benchmark is a file with its `TASK` and `rows`, and a line in the registry: this file is one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lotlip_hf import cli
from lotlip_hf.evaluation.benchmarks.collect import Row, Source, Task
from lotlip_hf.evaluation.benchmarks.registry import TASKS
from processes import finish


def rows(source: Source) -> Iterator[Row]:
    """A picture in one colour for each line of `colours.txt`, and a caption that says it."""
    for colour in source.file("colours.txt").read_text().split():
        yield Row(colour, load=lambda colour=colour: Image.new("RGB", (40, 32), colour), texts=[f"A {colour} wall."])


TASK = Task(
    key="colours",
    name="Colours",
    id="me/colours",
    description="walls in one colour",
    source="it is written by hand.",
    rows=rows,
    options=("num_images", "normalize"),
)


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the benchmark."""
    TASKS[TASK.key] = TASK
    return cli.main(argv)


@pytest.mark.slow
def test_one_process_and_two_score_it(official_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "colours.txt").write_text("red green blue white black gray")
    results = []
    for num_processes in (1, 2):
        output = tmp_path / f"{num_processes}.json"
        words = ["--task", TASK.key, "--data", str(tmp_path), "--no-cache", "--output", str(output)]
        finish(__name__, ["evaluate", "--model", str(official_checkpoint), *words], tmp_path, num_processes)
        results.append({**json.loads(output.read_text()), "date": None})
    assert results[0] == results[1]
    assert results[0]["dataset"]["id"] == TASK.id
    assert results[0]["protocol"]["num_images"] == 6
