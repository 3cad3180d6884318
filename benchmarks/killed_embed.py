"""
Kills a `torchrun` of `lotlip embed --data` and checks that the next one ends in the rows of an undisturbed run.

    python benchmarks/killed_embed.py --model checkpoint --folder killed --images 5000

All processes of the first run get SIGKILL when half of the shards are written. The second run has one process more.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from lotlip_hf.cli import main as lotlip
from lotlip_hf.scenes.dataset import render, scene

BROKEN = 7  # index of a broken picture


def write_pictures(folder: Path, count: int) -> None:
    """Writes drawn pictures, one of them broken, and their table."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as table:
        for number in range(count):
            render(scene(number), image_size=64).save(folder / f"{number:06}.jpg")
            table.write(json.dumps({"file_name": f"{number:06}.jpg", "number": number}) + "\n")
    (folder / f"{BROKEN:06}.jpg").write_bytes(b"broken")


def start(argv: Sequence[str], num_processes: int) -> subprocess.Popen:
    """Starts the command in several processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return subprocess.Popen([sys.executable, "-m", *launcher, "-m", "lotlip_hf", *argv])


def kill(process: subprocess.Popen) -> None:
    """Kills a launcher and all its processes at once."""
    launcher = psutil.Process(process.pid)
    for one in (*launcher.children(recursive=True), launcher):
        one.send_signal(signal.SIGKILL)
    process.wait()


def rows(folder: Path) -> tuple[list[str], list[int], np.ndarray]:
    """Reads the ids, kept numbers and embeddings of all shards, in order."""
    table = pq.read_table(sorted(folder.glob("*.parquet")))
    return table["id"].to_pylist(), table["number"].to_pylist(), np.stack(table["embedding"].to_numpy())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the check, prints what it found and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Checkpoint folder")
    parser.add_argument("--folder", required=True, type=Path, help="New folder for the pictures and shards")
    parser.add_argument("--images", type=int, default=5000, help="Number of pictures (default: 5000)")
    parser.add_argument("--shard-size", type=int, default=100, help="Records in a shard (default: 100)")
    parser.add_argument("--processes", type=int, default=2, help="Processes of the killed run (default: 2)")
    options = parser.parse_args(argv)
    write_pictures(options.folder / "pictures", options.images)
    command = ["embed", "--model", options.model, "--data", str(options.folder / "pictures"), "--device", "cpu"]
    command += ["--keep", "number:int64", "--shard-size", str(options.shard_size), "--output"]
    killed, whole = options.folder / "killed", options.folder / "whole"
    half = math.ceil(options.images / options.shard_size) // 2

    process = start([*command, str(killed)], options.processes)
    while len(list(killed.glob("part-*.parquet"))) < half:
        if process.poll() is not None:
            raise RuntimeError(f"The run ended with {process.returncode} before it was killed.")
        time.sleep(0.01)
    kill(process)
    at_kill = {path.name: path.stat().st_mtime_ns for path in killed.glob("part-*.parquet")}
    if start([*command, str(killed)], options.processes + 1).wait() or lotlip([*command, str(whole)]):
        raise RuntimeError("A run failed.")
    ids, numbers, embeddings = rows(killed)
    expected_ids, expected_numbers, expected = rows(whole)
    found = {
        "images": options.images,
        "rows": len(ids),
        "shards_at_kill": len(at_kill),
        "shards": len(list(killed.glob("part-*.parquet"))),
        "kept_shards": sum((killed / name).stat().st_mtime_ns == written for name, written in at_kill.items()),
        "same_ids": ids == expected_ids and numbers == expected_numbers,
        "largest_difference": float(np.abs(embeddings - expected).max()),
        "skipped": [one.read_text() for one in killed.glob("*.jsonl")],
        "leftovers": [path.name for path in killed.iterdir() if path.name.startswith(".")],
    }
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
