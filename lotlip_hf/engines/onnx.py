"""Towers on ONNX Runtime: a runtime of [`~lotlip_hf.engines.exported.ExportedEngine`]."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..files import one_line

# Tower -> its file in the folder.
FILES = {"text": "text_model.onnx", "vision": "vision_model.onnx"}
# Package that runs the files.
LIBRARY = "onnxruntime"
# Types of the computation, of which the first is that of `dtype="auto"`. A quantised tower has float32 features, too.
DTYPES = ("float32",)
# Optimisers of ONNX Runtime that are slower on CPUs: the fused residual and norm takes several times as long as the
# two separate operators and gives the same result.
SLOW_ON_CPU = ["SkipLayerNormFusion"]


def open_tower(folder: Path, tower: str, dtype: str = "auto") -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """
    Opens a tower that `lotlip convert onnx` wrote, on the CPU.

    Args:
        folder (`Path`): Folder of the file.
        tower (`str`): `"text"` or `"vision"`.
        dtype (`str`, *optional*, defaults to `"auto"`): Only float32 is supported.

    Returns:
        `Callable`: Function of the inputs of a batch by name (`input_ids` and `attention_mask` [B, L], or
        `pixel_values` [B, channels, height, width]) that computes the features [B, P] in float32, not normalised.

    Raises:
        `ValueError`: If the file cannot be read. The function raises it for inputs that do not fit the tower.
    """
    import onnxruntime

    file = folder / FILES[tower]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)  # 0: all cores
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_ON_CPU
        )
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise ValueError(f"{file}: ONNX Runtime cannot open it ({one_line(error)}).") from error
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            (features,) = session.run(None, {name: inputs[name] for name in names})
        except Exception as error:  # as above
            raise ValueError(
                f"{file}: ONNX Runtime cannot run it ({one_line(error)}). Export the checkpoint again."
            ) from error
        return np.asarray(features)

    return run
