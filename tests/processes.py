"""Real processes whose imports, which take longer than most tests, are made already: forks of one that has them."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scripts import load_script

TIME_LIMIT = 150  # seconds; a hang fails
multiprocessing.set_forkserver_preload(
    [
        "lotlip_hf.cli",
        "lotlip_hf.relabel.run",
        "lotlip_hf.evaluation.evaluate",
        "lotlip_hf.training.loop",
        "lotlip_hf.training.objective",
        "lotlip_hf.training.model",
        "matplotlib.backends.backend_agg",
        "transformers.models.bert.modeling_bert",
        "transformers.models.clip.image_processing_pil_clip",
        "transformers.models.vit.modeling_vit",
        "lotlip_hf.training.trainer",
    ]
)


class Ended(NamedTuple):
    """Exit status of each process (below 0: by that signal), and what all of them wrote."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr


class Started:
    """
    Processes at work, joined as launchers do it.

    Args:
        program: A script, by its path in the repository, or a module; its `main(argv)` is called.
        argv: The arguments.
        folder: Where their outputs are kept.
        num_processes: How many there are.
        prepare: Called as `prepare(*args)` in the first of them, before the program.
    """

    def __init__(
        self,
        program: str,
        argv: Sequence[str],
        folder: Path,
        num_processes: int = 1,
        prepare: Callable[..., None] | None = None,
        *args: Any,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        name = uuid4().hex
        self.outputs = [folder / f"{name}.{stream}" for stream in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        self.processes = [
            context.Process(
                target=_process, args=(rank, num_processes, port, program, list(argv), self.outputs, prepare, args)
            )
            for rank in range(num_processes)
        ]
        for process in self.processes:
            process.start()

    def written(self) -> Ended:
        """What is known by now."""
        codes = [-1 if process.exitcode is None else process.exitcode for process in self.processes]
        return Ended(codes, *(file.read_text() if file.exists() else "" for file in self.outputs))

    def wait(self) -> Ended:
        """Waits for all; where one has failed the others are killed soon, as launchers do."""
        end = monotonic() + TIME_LIMIT
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                end = min(end, monotonic() + 15)
            if monotonic() > end:
                self.send_signal(signal.SIGKILL)
            sleep(0.02)
        return self.written()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Waits for something that they do."""
        end = monotonic() + TIME_LIMIT
        while not is_so():
            assert all(process.exitcode is None for process in self.processes), self.written().text
            if monotonic() > end:
                self.send_signal(signal.SIGKILL)
                pytest.fail(f"Not within {TIME_LIMIT} seconds: {self.written().text}")
            sleep(0.005)

    def send_signal(self, number: int) -> None:
        """To each of them."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)


def finish(program: str, argv: Sequence[str], folder: Path, num_processes: int = 1) -> Ended:
    """Runs to the end, which must be a good one."""
    ended = Started(program, argv, folder, num_processes).wait()
    assert ended.codes == [0] * num_processes, ended.text
    return ended


def run_processes(function: Callable[..., Any], num_processes: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(*args)` answers in each of a group of gloo processes."""
    arguments = (function, num_processes, str(folder), args)
    context = mp.start_processes(_call, arguments, num_processes, join=False, start_method="forkserver")
    end = monotonic() + TIME_LIMIT
    while not context.join(timeout=1):
        if monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{num_processes} processes did not end within {TIME_LIMIT} seconds.")
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(num_processes)]


def _call(index: int, function: Callable[..., Any], num_processes: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=index,
        world_size=num_processes,
        timeout=timedelta(seconds=TIME_LIMIT),
    )
    torch.save(function(*args), Path(folder) / f"{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _process(
    rank: int,
    num_processes: int,
    port: int,
    program: str,
    argv: list[str],
    outputs: list[Path],
    prepare: Callable[..., None] | None,
    args: tuple,
) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background would have it ignored
    multiprocessing.set_start_method("fork", force=True)  # as in a process that nobody forked
    if num_processes > 1:  # as launchers say it
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for descriptor, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    if prepare is not None and rank == 0:
        prepare(*args)
    module = load_script(program) if program.endswith(".py") else importlib.import_module(program)
    code = module.main(argv)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)  # some return what they have made
