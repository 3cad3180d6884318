"""Engine for exported towers, which need neither PyTorch nor transformers."""

import mmap
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..files import open_regular
from ..images import ImageSource
from . import Modality
from .plain import PlainInputs

if TYPE_CHECKING:
    import torch

    from .torch import ProcessorInputs

# End of the towers' files -> module of this package that runs them, and how to install what it needs. A module has:
#   FILES: dict[str, str]             tower, "text" or "vision" -> name of its file
#   LIBRARY: str                      package that runs the files
#   DTYPES: tuple[str, ...]           types of the computation, of which the first is that of "auto"
#   open_tower(folder, tower, dtype)  function of a batch's inputs by name that computes features [B, P] in float32
RUNTIMES = {
    ".xml": ("openvino", "pip install 'lotlip-hf[openvino]'"),
    ".onnx": ("onnx", "pip install 'lotlip-hf[onnx]'"),
}
TOWERS: dict[Modality, str] = {"text": "text", "image": "vision"}
# Ends of the files with weights beside a tower's file
WEIGHTS = {".xml": ".bin", ".onnx": ".onnx.data"}


class ExportedEngine:
    """
    Engine for a folder that `lotlip convert onnx` or `lotlip convert openvino` wrote, on the CPU. A tower is opened
    when it is first used, so that a search with an index opens only the text tower.

    Args:
        folder (`str`): Folder of the model.
        runtime (`ModuleType`): Module that runs the files: `lotlip_hf.engines.onnx` or `lotlip_hf.engines.openvino`.
        inputs (`PlainInputs` or `ProcessorInputs`): Prepares texts and images.
        dtype (`str`, *optional*, defaults to `"auto"`): Type of the computation.
    """

    revision = None
    device = "cpu"

    def __init__(
        self, folder: str, runtime: Any, inputs: "PlainInputs | ProcessorInputs", dtype: str = "auto"
    ) -> None:
        self.name = folder
        self.inputs = inputs
        self.runtime = runtime
        self.libraries: tuple[str, ...] = (runtime.LIBRARY,)
        self.dtype = runtime.DTYPES[0] if dtype == "auto" else dtype
        self.background = inputs.background
        self.pads_to_full_length = inputs.pads_to_full_length
        self.tower = cache(lambda modality: runtime.open_tower(Path(folder), TOWERS[modality], dtype))

    @property
    def max_text_length(self) -> int:
        """Maximum length of a text in tokens, special tokens included."""
        self._check("text")
        return self.inputs.max_text_length

    def tokenize(self, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]:
        """Tokenises texts without padding. Returns the model's inputs as lists, and whether each text was cut."""
        self._check("text")
        return self.inputs.tokenize(texts, max_length)

    def pad(self, encoded: dict[str, list[list[int]]]) -> dict[str, np.ndarray]:
        """Pads the tokens of B texts, as int64 [B, L]."""
        return self.inputs.pad(encoded)

    def open(self, image: ImageSource, name: str) -> Image.Image:
        """Loads an image in memory as RGB, in the size that `pixels` needs, or raises an `ImageError`."""
        self._check("image")
        return self.inputs.open(image, name)

    def pixels(self, image: ImageSource, name: str | None = None) -> dict[str, np.ndarray]:
        """Prepares the model's inputs [1, ...] for one image. Raises an `ImageError` if it cannot be read."""
        self._check("image")
        return self.inputs.pixels(image, name)

    def embed(self, modality: Modality, inputs: Mapping[str, np.ndarray], pooled: bool = False) -> np.ndarray:
        """Computes the embeddings [B, P] of a batch, normalised."""
        features = self.features(modality, inputs)
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def fetch(self, batch: np.ndarray) -> np.ndarray:
        """Returns its argument."""
        return batch

    def features(self, modality: Modality, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Computes features [B, P] of a batch, not normalised, in float32."""
        return self.tower(modality)(inputs)

    def settings(self, modality: Modality) -> dict[str, Any]:
        """Everything apart from the weights that determines a modality's features."""
        self._check(modality)
        return {"dtype": self.dtype, **self.inputs.settings(modality)}

    def weights(self, modality: Modality) -> Iterator[tuple[str, mmap.mmap]]:
        """Name and contents of the files of a tower."""
        file = self._check(modality)
        for path in (file, file.with_suffix(WEIGHTS[file.suffix])):
            if path.is_file():
                with open_regular(path) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    yield f"{path.name} {len(content)}", content

    def _check(self, modality: Modality) -> Path:
        """The file of a tower, or an error if it was not exported."""
        file = Path(self.name, self.runtime.FILES[TOWERS[modality]])
        if not file.is_file():
            raise ValueError(f"{self.name} has no {file.name}. Export both towers with `lotlip convert`.")
        return file


def _ending(folder: str | os.PathLike) -> str | None:
    """End of the names of the exported towers in a folder, or `None` if there are none."""
    names = [(ending, f"{tower}_model{ending}") for ending in RUNTIMES for tower in TOWERS.values()]
    return next((ending for ending, name in names if os.path.isfile(os.path.join(folder, name))), None)


def is_exported(folder: str | os.PathLike) -> bool:
    """Whether a folder contains an exported tower."""
    return _ending(folder) is not None


def load_exported(
    folder: str, device: "str | torch.device | None" = None, dtype: "str | torch.dtype" = "auto"
) -> ExportedEngine:
    """
    Loads a folder that `lotlip convert onnx` or `lotlip convert openvino` wrote, on the CPU.

    PyTorch and transformers are imported only for a tokenizer that is not a `LoTLIPTokenizer` over BERT's WordPiece,
    or an image processor that is not one of ViT, CLIP, SigLIP or BiT.

    Args:
        folder (`str`): Folder of the model.
        device (`str` or `torch.device`, *optional*): `"cpu"` or `None`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Type of the computation: `"float32"`, or for
            OpenVINO `"bfloat16"`.

    Returns:
        [`ExportedEngine`]: The engine.

    Raises:
        `FileNotFoundError`: If the folder has no exported tower.
        `ValueError`: If a file is damaged, or if `device` or `dtype` is not supported.
        `ImportError`: If the library that runs the files is not installed.
    """
    ending = _ending(folder)
    if ending is None:
        raise FileNotFoundError(f"{folder}: no exported tower. Export a checkpoint with `lotlip convert onnx`.")
    module, hint = RUNTIMES[ending]
    runtime: Any = import_module(f".{module}", __package__)
    if find_spec(runtime.LIBRARY) is None:
        raise ImportError(f"{folder} needs {runtime.LIBRARY}: {hint}")
    if device is not None and str(device) != "cpu":
        raise ValueError(f"`device` {str(device)!r} is not available: exported models run on the CPU. Leave it out.")
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("auto", *runtime.DTYPES):
        raise ValueError(f"{folder}: `dtype` {dtype} is not supported. Use one of: auto, {', '.join(runtime.DTYPES)}.")
    towers = [tower for tower, name in runtime.FILES.items() if Path(folder, name).is_file()]
    try:
        inputs = PlainInputs(Path(folder), towers)
    except Exception:  # another processor, or damage, which the tokenizers library reports by a plain `Exception`
        inputs = _processor_inputs(folder)
    return ExportedEngine(folder, runtime, inputs, dtype)


def _processor_inputs(folder: str) -> "ProcessorInputs":
    """Loads the tokenizer and the image processor of transformers, with its errors for damaged files."""
    from types import SimpleNamespace

    from transformers import AutoConfig

    from ..loading import fit_tokenizer, load_processor, naming_damage
    from .torch import ProcessorInputs

    with naming_damage(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        processor = load_processor(folder)
    if not config.model_type.startswith("lotlip"):
        raise ValueError(f"{folder}: config.json is of a {config.model_type!r} model. Export a LoTLIP checkpoint.")
    model: Any = SimpleNamespace(config=config, name_or_path=folder)
    if hasattr(processor, "tokenizer"):
        fit_tokenizer(model, processor.tokenizer)
    return ProcessorInputs(model, processor)
