"""`examples/embed_with_ray.py`, run as it is on a real local Ray with two processes, one of which is killed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lotlip_hf.cli import main

pytestmark = pytest.mark.slow
pytest.importorskip("ray")
TIME_LIMIT = 300  # seconds


def picture(number: int) -> bytes:
    """A PNG file of its own for each number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def start(repository: Path, *argv: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, str(repository / "examples" / "embed_with_ray.py"), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def actors(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The actors that embed, as processes."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + TIME_LIMIT
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_actor_loses_nothing(repository: Path, official_checkpoint: Path, tmp_path: Path) -> None:
    total, output = 240, tmp_path / "out"
    images = [picture(number) for number in range(total)]
    images[7] = b"broken"
    ids = [f"{number:03}" for number in range(total)]
    table = pa.table({"id": ids, "image": [{"bytes": one, "path": None} for one in images], "year": range(total)})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=40)

    arguments = ["--model", official_checkpoint, "--data", tmp_path / "data.parquet", "--keep", "year"]
    process = start(repository, *arguments, "--output", output, "--actors", 1, "--batch-size", 4)
    try:
        wait_until(process, lambda: any(output.glob("_skipped/*.jsonl")))  # the actor is at work
        (actor,) = actors(process)
        actor.send_signal(signal.SIGKILL)
        text, _ = process.communicate(timeout=TIME_LIMIT)
    finally:
        left = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in left:
            with contextlib.suppress(psutil.Error):
                child.kill()
    assert process.returncode == 0, text
    assert "1 images were skipped" in text

    command = ["embed", "--data", str(tmp_path / "data.parquet"), "--keep", "year:int64", "--device", "cpu"]
    assert main([*command, "--model", str(official_checkpoint), "--output", str(tmp_path / "alone")]) == 0
    expected = pq.read_table(tmp_path / "alone" / "part-00000-00000.parquet")
    found = pq.read_table(output).sort_by("id")
    assert found.schema.equals(expected.schema)
    for key in (b"model", b"revision", b"fingerprint"):
        assert found.schema.metadata[key] == expected.schema.metadata[key]
    assert found["id"].to_pylist() == expected["id"].to_pylist()
    assert found["year"].to_pylist() == expected["year"].to_pylist()
    vectors = np.stack(found["embedding"].to_pylist())
    np.testing.assert_allclose(vectors, np.stack(expected["embedding"].to_pylist()), atol=1e-5)
    (listed,) = (output / "_skipped").iterdir()
    assert json.loads(listed.read_text())["id"] == "007"
