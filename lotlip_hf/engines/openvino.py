"""Towers on OpenVINO: a runtime of [`~lotlip_hf.engines.exported.ExportedEngine`]."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME

from ..files import one_line, own_folder, read_regular

# Tower -> its file in the folder. The weights are in a file beside it that ends in .bin.
FILES = {"text": "text_model.xml", "vision": "vision_model.xml"}
# Package that runs the files.
LIBRARY = "openvino"
# Types of the computation, of which the first is that of `dtype="auto"`. The features are float32 in all cases.
DTYPES = ("float32", "bfloat16")
# What a quantised tower has, and no other.
QUANTISED = b'type="FakeQuantize"'


def open_tower(
    folder: Path, tower: str, dtype: str = "auto", is_kept: bool = True
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """
    Opens a tower that `lotlip convert openvino` wrote, on the CPU.

    OpenVINO keeps what it derives from the graph (0.5 MB, without weights) in `$HF_HOME/lotlip/openvino`, which halves
    the time of the next start. `OMP_NUM_THREADS` limits the threads, as for PyTorch.

    Args:
        folder (`Path`): Folder of the file.
        tower (`str`): `"text"` or `"vision"`.
        dtype (`str`, *optional*, defaults to `"auto"`): Type of the computation: `"float32"` or `"bfloat16"`. Without
            a type, it is float32. In a tower that is quantised to int8, all other operators compute in bfloat16.
            Processors without bfloat16 compute in float32.
        is_kept (`bool`, *optional*, defaults to `True`): Whether the folder stays, so that the cache pays.

    Returns:
        `Callable`: Function of the inputs of a batch by name (`input_ids` and `attention_mask` [B, L], or
        `pixel_values` [B, channels, height, width]) that computes the features [B, P] in float32, not normalised.

    Raises:
        `ValueError`: If the file cannot be read. The function raises it for inputs that do not fit the tower.
    """
    file = folder / FILES[tower]
    in_bfloat16 = dtype == "bfloat16" or QUANTISED in read_regular(file)
    # OpenVINO's own default on processors with bfloat16 is bfloat16.
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if in_bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS") or 0),  # 0: all cores
        **(_cache(file) if is_kept else {}),
    }
    try:
        request = core().compile_model(str(file), "CPU", options).create_infer_request()
    except RuntimeError as error:
        raise ValueError(f"{file}: OpenVINO cannot open it ({one_line(error)}).") from error
    names = [one.get_any_name() for one in request.model_inputs]

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            outputs = request.infer({name: np.ascontiguousarray(inputs[name]) for name in names}, share_inputs=True)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{file}: OpenVINO cannot run it ({one_line(error)}). Export the checkpoint again."
            ) from error
        return np.asarray(outputs[0], dtype=np.float32)

    return run


@cache
def core() -> Any:
    """
    OpenVINO's `Core`, which lives as long as the process. Each `Core` gives the thread a stack for signals. Deleting
    two in the order of their creation leaves the thread without one, and the next signal, such as that of a data
    loader's worker that ends, kills the process.
    """
    with without_telemetry():
        import openvino

    return openvino.Core()


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Context in which OpenVINO and NNCF send nothing to the Internet, as in continuous integration. Otherwise each
    import of them reports itself to Intel."""
    before = {name: os.environ.get(name) for name in ("CI", "NNCF_CI")}
    os.environ.update(dict.fromkeys(before, "true"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _cache(file: Path) -> dict[str, str]:
    """Options for a cache of the compiled graph, or none if its folder cannot be written."""
    # OpenVINO knows a tower by path, the seconds of its graph's time and options. With other weights in the same .bin,
    # it would combine them with what it derived from the old ones.
    stamps = [
        (one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns)
        for one in (path.stat() for path in (file, file.with_suffix(".bin")) if path.exists())
    ]
    name = hashlib.blake2b(repr(stamps).encode(), digest_size=16).hexdigest()
    try:
        folder = own_folder(Path(HF_HOME), "lotlip", "openvino", name)
    except OSError:
        return {}
    if not os.access(folder, os.W_OK):
        return {}
    return {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SIZE"}
