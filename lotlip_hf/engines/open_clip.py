"""Engine for models of open_clip, with their own tokenizers and image transforms."""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil

from ..files import one_line
from ..images import WHITE, ImageSource, is_thin, load_image, load_pixels, resized_middle
from ..loading import cached_commit, usable_device
from . import OPEN_CLIP, Modality
from .torch import SIMILARITY_WEIGHTS, described, tokenizer_settings

logger = logging.getLogger(__name__)

# Prefixes of open_clip's names for Hub repositories and folders.
HUB, FOLDER = "hf-hub:", "local-dir:"


class OpenClipEngine:
    """
    Engine for a model of open_clip.

    Args:
        model (`torch.nn.Module`): Model of open_clip.
        tokenizer (`Callable`): Tokenizer of the model, a function of texts and `context_length` that returns padded
            rows [B, L].
        image_processor (`OpenClipImageProcessor`): Image transform of the model.
        model_cfg (`Mapping`): open_clip's configuration of the model.
        name (`str`): Name that was passed to [`load_open_clip`].
        revision (`str`, *optional*): Commit on the Hub.
    """

    libraries = ("open_clip", "timm", "torchvision")
    background = WHITE
    pads_to_full_length = True  # open_clip's models require all positions

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        image_processor: "OpenClipImageProcessor",
        model_cfg: Mapping[str, Any],
        name: str,
        revision: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.model_cfg = dict(model_cfg)
        self.name = name
        self.revision = revision
        self.max_text_length: int = tokenizer.context_length
        inner = getattr(tokenizer, "tokenizer", None)  # open_clip may wrap a tokenizer of transformers
        if getattr(inner, "padding_side", "right") != "right":
            raise ValueError("its tokenizer pads on the left. Use a tokenizer that pads on the right")
        self.pad_token_id: int = getattr(inner, "pad_token_id", None) or 0
        # In the mode "clips", the class token is at the last position, after the padding.
        self._ends_in_class_token = getattr(tokenizer, "tokenizer_mode", None) == "clips"

    @property
    def device(self) -> str:
        """Device of the model."""
        return str(next(self.model.parameters()).device)

    @property
    def dtype(self) -> str:
        """Type of the weights."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def tokenize(self, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]:
        """Tokenises texts without padding. Returns the model's inputs as lists, and whether each text was cut."""
        input_ids = self._token_ids(texts, max_length)
        was_cut = [False] * len(texts)
        # A text was cut if its ids change with a longer limit. (Its end is no sign: it may equal the padding token.)
        full = [index for index, ids in enumerate(input_ids) if len(ids) >= max_length - 1]
        longer = self._token_ids([texts[index] for index in full], max_length + 1)
        for index, ids in zip(full, longer, strict=True):
            was_cut[index] = ids != input_ids[index]
        return {"input_ids": input_ids}, was_cut

    def _token_ids(self, texts: list[str], length: int) -> list[list[int]]:
        token_ids = []
        for row in self.tokenizer(texts, context_length=length).tolist() if texts else []:
            end = [row.pop()] if self._ends_in_class_token else []
            while row and row[-1] == self.pad_token_id:
                row.pop()
            token_ids.append(row + end)
        return token_ids

    def pad(self, encoded: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, np.ndarray]:
        """Pads the tokens of B texts to [B, max_text_length]."""
        input_ids = encoded["input_ids"]
        rows = np.full((len(input_ids), self.max_text_length), self.pad_token_id, np.int64)
        for row, ids in zip(rows, input_ids, strict=True):
            words = len(ids) - self._ends_in_class_token
            row[:words] = ids[:words]
            if self._ends_in_class_token:
                row[-1] = ids[-1]
        return {"text": rows}

    def open(self, image: ImageSource, name: str) -> Image.Image:
        """Loads an image in memory as RGB. Raises an `ImageError` if it is damaged."""
        return load_image(image, name, image_processor=self.image_processor, background=WHITE)

    def pixels(self, image: ImageSource, name: str | None = None) -> dict[str, np.ndarray]:
        """Prepares the model's inputs [1, ...] for one image. Raises an `ImageError` if it cannot be read."""
        pixels = load_pixels(image, name, image_processor=self.image_processor, background=WHITE)
        return {key: np.asarray(values) for key, values in pixels.items()}

    def embed(self, modality: Modality, inputs: Mapping[str, np.ndarray], pooled: bool = False) -> torch.Tensor:
        """Starts to compute the embeddings [B, P] of a batch, normalised, on the device of the model."""
        return nn.functional.normalize(self._run(modality, inputs), dim=-1)

    def fetch(self, batch: torch.Tensor) -> np.ndarray:
        """Waits for a batch that `embed` started, and copies it to the CPU."""
        return batch.cpu().numpy()

    def features(self, modality: Modality, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Computes features [B, P] of a batch, not normalised, in float32 on the CPU."""
        return self.fetch(self._run(modality, inputs))

    def _run(self, modality: Modality, inputs: Mapping[str, np.ndarray]) -> torch.Tensor:
        model: Any = self.model
        device = next(model.parameters())
        with torch.inference_mode():
            if modality == "text":
                texts = torch.from_numpy(inputs["text"]).to(device.device)
                return model.encode_text(texts, normalize=False).float()
            images = torch.from_numpy(inputs["pixel_values"]).to(device)
            return model.encode_image(images, normalize=False).float()

    def settings(self, modality: Modality) -> dict[str, Any]:
        """Everything apart from the weights that determines a modality's features."""
        both = {name: value for name, value in self.model_cfg.items() if not isinstance(value, dict)}
        if modality == "image":
            preparation = {**self.image_processor.settings, "background": WHITE}
            return {"config": {**both, **self.model_cfg.get("vision_cfg", {})}, "preparation": preparation}
        own = {name: value for name, value in vars(self.tokenizer).items() if isinstance(value, bool | int | str)}
        own["tokenizer_class"] = type(self.tokenizer).__name__
        own["cleaning"] = getattr(getattr(self.tokenizer, "clean_fn", None), "__name__", None)
        inner = getattr(self.tokenizer, "tokenizer", None)
        own["vocabulary"] = self.tokenizer.encoder if inner is None else tokenizer_settings(inner)
        return {"config": {**both, **self.model_cfg.get("text_cfg", {})}, "preparation": own}

    def weights(self, modality: Modality) -> Iterator[tuple[str, np.ndarray]]:
        """Name, type and shape, and bytes of each weight of a tower, sorted by name."""
        for name, tensor in sorted(self.model.state_dict().items()):
            if name not in SIMILARITY_WEIGHTS and name.startswith("visual.") == (modality == "image"):
                yield described(name, tensor)


class OpenClipImageProcessor:
    """
    open_clip's image transform with the call of transformers' image processors.

    Args:
        transform (`Callable`): open_clip's transform of one image.
        settings (`Mapping`): open_clip's `preprocess_cfg` of the model, from which the transform was made.
    """

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], settings: Mapping[str, Any]) -> None:
        self.transform = transform
        self.settings = dict(settings)
        size = self.settings["size"]
        side = size if isinstance(size, int) else min(size)
        # A processor of transformers with the same resizing and cropping, for thin images.
        self.shortest = None
        if self.settings["resize_mode"] == "shortest":
            resample = (
                Image.Resampling.BILINEAR
                if self.settings.get("interpolation") == "bilinear"
                else Image.Resampling.BICUBIC
            )
            self.shortest = CLIPImageProcessorPil(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=resample
            )

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Transforms B images. Returns `pixel_values` [B, 3, height, width] as PyTorch tensors."""
        return {"pixel_values": torch.stack([self.transform(self._middle(image)) for image in images])}

    def _middle(self, image: Image.Image) -> Image.Image:
        if self.shortest is None or not is_thin(image.size, self.shortest):
            return image
        return resized_middle(image, self.shortest)


def load_open_clip(
    name: str, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
) -> OpenClipEngine:
    """
    Loads a model with open_clip.

    Args:
        name (`str`): Name in one of these forms:

            - `"open_clip:ViT-B-32/laion2b_s34b_b79k"`: an architecture and pretrained weights of open_clip. The
              weights can be left out if there is only one set.
            - `"open_clip:ViT-B-32/path/to/checkpoint.pt"`: an architecture and a file of weights.
            - `"open_clip:hf-hub:org/name"`: a repository on the Hub with `open_clip_config.json`.
            - `"open_clip:local-dir:path/to/folder"`: a folder with the same files.
        device (`str` or `torch.device`, *optional*): Device of the model. Defaults to the accelerator, or the CPU.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Type of the weights. `"auto"` is float32, the
            type in which open_clip loads them.

    Returns:
        [`OpenClipEngine`]: The model in evaluation mode.

    Raises:
        `ImportError`: If open_clip cannot be imported.
        `OSError`: If the folder does not exist.
        `ValueError`: If the architecture or the weights are unknown, if they do not fit, or if the weights were
            trained with another activation than the architecture's (`ViT-B-32` and `ViT-B-32-quickgelu`).
    """
    open_clip = _import_open_clip()
    architecture, pretrained = _parse(name, open_clip)
    repository = None
    if architecture.startswith(HUB):
        repository = architecture.removeprefix(HUB)
    elif pretrained is not None:
        tag = open_clip.get_pretrained_cfg(architecture, pretrained)  # empty for a file
        repository = "/".join(tag.get("hf_hub", "").split("/")[:2]) or None
    try:
        with _as_own_log():
            model_cfg = open_clip.get_model_config(architecture)
            _refuse_code(model_cfg, architecture)
            # `pretrained_text=False`: do not download separate weights of the text tower.
            model, transform = open_clip.create_model_from_pretrained(architecture, pretrained, pretrained_text=False)
            tokenizer = open_clip.get_tokenizer(architecture)
            image_processor = OpenClipImageProcessor(transform, model.visual.preprocess_cfg)
            revision = None if repository is None else cached_commit(repository)
            engine = OpenClipEngine(model, tokenizer, image_processor, model_cfg, name, revision)
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    except Exception as error:  # open_clip raises errors of any class for damaged and missing files
        message = one_line(error)
        message = f"{message[:500]} ..." if len(message) > 500 else message
        raise ValueError(f"{name}: open_clip cannot load it ({message}).") from error
    model.to(usable_device(device))
    if dtype != "auto":
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return engine


def _refuse_code(model_cfg: Mapping[str, Any], architecture: str) -> None:
    """Raises an error if open_clip would run code of a repository, or ask on the terminal whether to do so."""
    text_cfg = model_cfg.get("text_cfg", {})
    if "trust_remote_code" in text_cfg.get("tokenizer_kwargs", {}):
        raise ValueError("its `tokenizer_kwargs` set `trust_remote_code`, which only the user may set")
    if text_cfg.get("hf_model_name"):
        AutoConfig.from_pretrained(text_cfg["hf_model_name"], trust_remote_code=False)
    if text_cfg.get("hf_tokenizer_name"):
        is_folder = architecture.startswith(FOLDER)  # a folder also contains its tokenizer
        source = architecture.removeprefix(FOLDER) if is_folder else text_cfg["hf_tokenizer_name"]
        AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision that does not fit torch raises any of these
        raise ImportError(
            f"{OPEN_CLIP}... needs open_clip and a torchvision for torch {torch.__version__}. Run "
            f"pip install 'lotlip-hf[open-clip]' ({type(error).__name__}: {error})"
        ) from error
    return open_clip


@contextmanager
def _as_own_log() -> Iterator[None]:
    """
    Context in which warnings of open_clip go to this package's logger. open_clip logs by `logging.warning(...)`, which
    sets up the root logger to print all messages of the process, some of them twice.
    """
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record) if record.name == "root" else None
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        for record in records:
            logger.log(record.levelno, "open_clip: %s", record.getMessage())


def _parse(name: str, open_clip: ModuleType) -> tuple[str, str | None]:
    """Names of the architecture and of the weights for open_clip."""
    model = name.removeprefix(OPEN_CLIP)
    if model.startswith(FOLDER):
        folder = model.removeprefix(FOLDER)
        for path, there in ((folder, os.path.isdir), (os.path.join(folder, "open_clip_config.json"), os.path.isfile)):
            if not there(path):
                raise FileNotFoundError(f"{name}: {path} does not exist. Pass a folder that open_clip saved.")
        return model, None
    if model.startswith(HUB):
        return model, None
    # open_clip also accepts ViT-B/32 for ViT-B-32, and the weights may be a path.
    parts = model.split("/")
    names = ("-".join(parts[:count]) for count in range(1, len(parts) + 1))
    known = open_clip.list_models()
    count, architecture = next(((i, one) for i, one in enumerate(names, 1) if one in known), (0, None))
    if architecture is None:
        close = difflib.get_close_matches(parts[0], known, n=5)
        raise ValueError(
            f"{name}: open_clip {open_clip.__version__} has no architecture {parts[0]!r}"
            f"{'. Did you mean ' + ' or '.join(close) + '?' if close else '.'} See `open_clip.list_models()`."
        )
    pretrained = "/".join(parts[count:]) or None
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None and len(tags) == 1:
        pretrained = tags[0]
    tag = {} if pretrained is None else open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag and (pretrained is None or not os.path.isfile(pretrained)):
        problem = "which weights?" if pretrained is None else f"no weights and no file {pretrained!r}."
        raise ValueError(
            f"{name}: {problem} Use {OPEN_CLIP}{architecture}/WEIGHTS with a file or one of: "
            f"{', '.join(tags) or '(open_clip has none for this architecture)'}."
        )
    if tag and tag.get("quick_gelu", False) != open_clip.get_model_config(architecture).get("quick_gelu", False):
        # open_clip would log a warning and compute wrong features.
        suffix = "-quickgelu"
        other = architecture.removesuffix(suffix) if architecture.endswith(suffix) else architecture + suffix
        raise ValueError(
            f"{name}: these weights were trained with another activation than {architecture} has. Use "
            f"{OPEN_CLIP}{other}/{pretrained}."
        )
    return architecture, pretrained
