"""What the benchmarks share: times taken in turns, the machine that they were taken on, results that are kept."""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from lotlip_hf.files import append_json_line

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("lotlip-hf", "torch", "transformers")


def seconds_of(function: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock time of a call, to its end on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, description: str = "Turns", device: str = "cpu"
) -> dict[str, float]:
    """
    Median wall-clock time of each call.

    They take turns, so that what else the machine does meets all of them; the first turn warms up and does not count.

    Args:
        calls: What to time, by name.
        repeats: Turns that count.
        description: Of the progress bar.
        device: `"cuda"` waits for the device to finish.

    Returns:
        Seconds of each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in trange(repeats + 1, desc=description, unit="turn"):
        for name, call in calls.items():
            needed = seconds_of(call, device)
            if turn:
                seconds[name].append(needed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def memory(name: str) -> int:
    """A size [bytes] that Linux keeps of this process: VmRSS, what it holds; VmHWM, the most it has held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, f"Linux says nothing about {name}"
    return int(found[1]) * 1024


def peak_memory(make_call: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """
    MiB that a call needs at its peak beyond what was held before it, in a new process.

    Args:
        make_call: `make_call(*args)` gives the call in that process. It is a function of a module.
        args: What it takes.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")  # of glibc: what is freed goes back at once
    with ProcessPoolExecutor(1, get_context("forkserver")) as process:
        return process.submit(_peak_memory, make_call, args).result()


def _peak_memory(make_call: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> float:
    call = make_call(*args)
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 2**20


def machine(*packages: str) -> dict[str, Any]:
    """
    What a result was computed with, and when; nothing that names the machine or its folders.

    Args:
        packages: Whose versions to name beside this package's, torch's and transformers'; `None` if not installed.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {**{name: _version(name) for name in (*PACKAGES, *packages)}, "commit": commit},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def keep(result: Mapping[str, Any], file: Path) -> None:
    """Adds a line of JSON to a file of results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    append_json_line(file, result)
