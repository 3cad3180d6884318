"""Measures commands at the prompt: `lotlip --help`, the first and further searches of a folder, each a new process.

    lotlip convert onnx --model checkpoint --output exported
    python benchmarks/prompt.py --model checkpoint exported --num-images 500 --runs 10

Prints one JSON object for each command, with the median, the least and the most seconds of wall time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lotlip_hf.scenes.dataset import long_captions, render, scene

LOTLIP = Path(sys.executable).with_name("lotlip")


def measured(name: str, words: Sequence[str], runs: int) -> dict[str, Any]:
    """Runs a command several times, and prints and returns how long it took."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([LOTLIP, *words], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    seconds.sort()
    result = {
        "command": name,
        "median_s": round(seconds[len(seconds) // 2], 3),
        "least_s": round(seconds[0], 3),
        "most_s": round(seconds[-1], 3),
        "runs": runs,
    }
    print(json.dumps(result), flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures the commands, and returns the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", required=True, help="checkpoints or exported folders")
    parser.add_argument("--num-images", type=int, default=500, help="number of drawings in the folder")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args(argv)
    results = [measured("lotlip --help", ["--help"], arguments.runs)]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.num_images):
            render(scene(number, split="test"), 224).save(Path(folder) / f"{number}.png")
        text = long_captions(scene(0, split="test"))[0]
        (Path(folder) / "queries.txt").write_text(f"{text}\n" * 100, encoding="utf-8")
        for model in arguments.model:
            words = ["search", "--model", model, "--images", folder]
            results.append(measured(f"{model}: first search", [*words, text], 1))
            results.append(measured(f"{model}: second search", [*words, text], arguments.runs))
            results.append(
                measured(f"{model}: search by an image", [*words, "--image", f"{folder}/0.png"], arguments.runs)
            )
            queries = [*words, "--queries", f"{folder}/queries.txt", "--json"]
            results.append(measured(f"{model}: 100 queries", queries, 1))
    return results


if __name__ == "__main__":
    main()
