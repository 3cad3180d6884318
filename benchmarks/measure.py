"""Helpers of the benchmarks: measures time and memory, describes the machine, and saves results."""

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
# Instructions of a CPU for matrix products, as in /proc/cpuinfo
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")


def seconds_of(function: Callable[[], Any], device: str = "cpu") -> float:
    """Measures the wall-clock time of a call in seconds, including its work on the device."""
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
    Measures the median wall-clock time of several calls.

    The calls alternate, so that other load on the machine affects all of them. The first turn is a warm-up that is not
    timed.

    Args:
        calls (`Mapping[str, Callable[[], Any]]`): Calls by name.
        repeats (`int`): Number of timed turns.
        description (`str`, *optional*, defaults to `"Turns"`): Label of the progress bar.
        device (`str`, *optional*, defaults to `"cpu"`): Device of the calls.

    Returns:
        `dict[str, float]`: Median time of each call in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in trange(repeats + 1, desc=description, unit="turn"):
        for name, call in calls.items():
            needed = seconds_of(call, device)
            if turn:
                seconds[name].append(needed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def memory(name: str) -> int:
    """Returns a size of this process in bytes from Linux: VmRSS (current memory) or VmHWM (peak memory)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024


def peak_memory(make_call: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """
    Measures the peak memory of a call in a new process, minus the memory before the call.

    Args:
        make_call (`Callable`): Function at the top level of a module, which creates the call in the new process.
        args (`Any`): Arguments of `make_call`.

    Returns:
        `float`: Peak memory in MiB.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")  # makes glibc return freed memory at once
    with ProcessPoolExecutor(1, get_context("forkserver")) as process:
        return process.submit(_peak_memory, make_call, args).result()


def _peak_memory(make_call: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> float:
    call = make_call(*args)
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 2**20


def machine(*packages: str) -> dict[str, Any]:
    """
    Describes the hardware, versions and date of a result, without the name of the machine or its folders.

    Args:
        packages (`str`): Packages whose versions are added to those of lotlip-hf, torch and transformers.

    Returns:
        `dict[str, Any]`: `machine`, `versions` (`None` for packages that are not installed) and `date`.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split(":", 1)[1].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        cpu, flags = platform.processor() or platform.machine(), []
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "machine": {
            "cpu": cpu,
            "features": [flag for flag in FEATURES if flag in flags],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {**{name: _version(name) for name in (*PACKAGES, *packages)}, "commit": commit},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def keep(result: Mapping[str, Any], file: Path) -> None:
    """Appends a result to a JSON lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    append_json_line(file, result)
