"""A run's log: no line is lost or half read, whenever the run is killed; and the curve shows what it holds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lotlip_hf.training.log import LOG_NAME, RECALLS, RunLog, draw_curve, read_log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LOG_NAME


def written(path: Path, *steps: int) -> RunLog:
    log = RunLog(path)
    for step in steps:
        log.write({"step": step, "loss": step / 8})
    return log


def steps_of(path: Path) -> list[int]:
    return [entry["step"] for entry in read_log(path)]


def a_run(path: Path, num_evaluations: int = 4, shares: Sequence[str] = ("infonce_short", "infonce_long")) -> None:
    """The log of a run as the trainer writes it."""
    log = RunLog(path)
    noise = np.random.default_rng(0)
    for step in range(10, 1010, 10):
        levels = [(1 + i) * (0.2 + np.exp(-step / 300)) + 0.05 * noise.standard_normal() for i in range(len(shares))]
        losses = {f"loss_{name}": level for name, level in zip(shares, levels, strict=True)}
        log.write({"step": step, "epoch": 0.1, "loss": sum(levels), **losses})
        if num_evaluations and step % (1000 // num_evaluations) == 0:
            recalls = zip(RECALLS, (0.6, 0.58, 0.2, 0.19), strict=True)
            log.write({"step": step, "epoch": 0.1, **{name: value * step / 1000 for name, value in recalls}})


def test_lines_are_read_as_written(path):
    log = RunLog(path)
    log.write({"step": 10, "loss": 0.5, "name": "ä\n", "none": None})
    log.write({"step": 20, "loss": float("nan"), "rate": float("inf")})
    assert read_log(path) == [
        {"step": 10, "loss": 0.5, "name": "ä\n", "none": None},
        {"step": 20, "loss": None, "rate": None},
    ]
    assert read_log(path.parent) == read_log(path)
    for line in path.read_text().splitlines():  # JSON as others read it, without NaN
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("cut", [1, 2, 9, 23])
def test_half_a_line_at_the_end(path, cut):
    written(path, 10, 20)
    os.truncate(path, path.stat().st_size - cut)
    assert steps_of(path) == [10]
    log = RunLog(path)
    log.write({"step": 30})
    assert steps_of(path) == [10, 30]


@pytest.mark.slow
def test_a_killed_process_loses_no_whole_line(path):
    program = """
import sys
from lotlip_hf.training.log import RunLog
log = RunLog(sys.argv[1])
step = 0
while True:
    step += 1
    log.write({"step": step, "text": "x" * 300})
    print(step, flush=True)
"""
    run = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    told = [int(run.stdout.readline()) for _ in range(50)]
    run.send_signal(signal.SIGKILL)
    told += [int(line) for line in run.stdout.read().splitlines() if line]
    run.wait()
    run.stdout.close()
    RunLog(path).write({"step": 10**6})
    steps = steps_of(path)
    assert steps[-1] == 10**6
    assert steps[:-1] == list(range(1, len(steps)))
    assert len(steps) - 1 >= told[-1] >= 50


@pytest.mark.parametrize(("step", "left"), [(100, [10, 20, 30]), (30, [10, 20, 30]), (29, [10, 20]), (-1, [])])
def test_truncate(path, step, left):
    log = written(path, 10, 20, 30)
    log.truncate(step)
    assert steps_of(path) == left
    log.write({"step": 31})
    assert steps_of(path) == [*left, 31]
    assert [file.name for file in path.parent.iterdir()] == [LOG_NAME]


@pytest.mark.slow
def test_a_full_disk(path):
    program = """
import resource, sys
from lotlip_hf.training.log import RunLog
log = RunLog(sys.argv[1])
log.write({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as if the disk were full after 100 bytes
try:
    log.write({"step": 2, "text": "x" * 300})
except OSError:
    print("refused")
log.write({"step": 3})
"""
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert run.stdout == "refused\n", run.stderr
    assert steps_of(path) == [1, 3]


@pytest.mark.parametrize("damage", ['{"step": 15, "lo', "[1]", '{"loss": 2}', '{"step": "x"}', ""])
def test_damage_is_named(path, damage):
    written(path, 10)
    with open(path, "a") as file:
        file.write(damage + "\n")
    written(path, 20)
    with pytest.raises(ValueError, match=f"{LOG_NAME}, line 2"):
        read_log(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        RunLog(path).truncate(10)
    assert path.read_bytes() == content


def test_no_log(tmp_path):
    with pytest.raises(FileNotFoundError, match=LOG_NAME):
        read_log(tmp_path)


def colours_of(picture: Path) -> set[tuple[int, int, int]]:
    """The colours that the picture has much of."""
    with Image.open(picture) as image:
        return {colour for number, colour in image.convert("RGB").getcolors(1 << 24) if number > 40}


BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)


@pytest.mark.parametrize(
    ("shares", "shown"),
    [
        (["infonce_short", "infonce_long"], {BLUE, ORANGE}),
        (["short", "long"], {BLUE, ORANGE}),  # an older log
        (["infonce_short", "infonce_long", "of_my_own"], {BLUE, ORANGE, GREEN}),
        (["infonce_short"], set()),  # it is the loss
    ],
)
def test_curve(path: Path, tmp_path: Path, shares: list[str], shown: set[tuple[int, int, int]]) -> None:
    a_run(path, num_evaluations=0, shares=shares)
    draw_curve(path.parent, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (720, 480)
    assert colours_of(tmp_path / "curve.png") & {BLUE, ORANGE, GREEN} == shown


@pytest.mark.parametrize(
    "entry",
    [
        {"step": 1, "loss": 2.0, "loss_short": 1.0, "loss_long": 1.0},
        {"step": 0, "long_image_to_text_r1": 0.5},
    ],
)
def test_curve_of_one_line(path, tmp_path, entry):
    RunLog(path).write(entry)
    draw_curve(path, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize("entry", [{"step": 0, "note": "started"}, {"step": 1, "loss": float("nan")}])
def test_curve_of_nothing(path, tmp_path, entry):
    RunLog(path).write(entry)
    with pytest.raises(ValueError, match="loss"):
        draw_curve(path, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_curve_without_matplotlib(path, tmp_path, monkeypatch):
    written(path, 10)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="train"):
        draw_curve(path, tmp_path / "curve.png")
