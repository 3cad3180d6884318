"""open_clip's models beside transformers': with their own tokenizers and image transforms, by the same functions."""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, CLIPImageProcessorPil, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..encoder import OPEN_CLIP, cached_commit
from ..modeling.loading_lotlip import checked_download
from ..modeling.processing_lotlip import is_thin, resized_middle

logger = logging.getLogger(__name__)

# How open_clip begins names that are not of its own architectures
HUB, FOLDER = "hf-hub:", "local-dir:"


class OpenClipConfig(PreTrainedConfig):
    """
    What open_clip's configuration of a model says: `vision_config` and `text_config` hold its settings of the towers,
    by open_clip's names, each beside those that are of both.
    """

    model_type = "open_clip"

    def __init__(self, model_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        model_cfg = dict(model_cfg or {})
        both = {name: value for name, value in model_cfg.items() if not isinstance(value, dict)}
        self.vision_config = PreTrainedConfig(**both, **model_cfg.get("vision_cfg", {}))
        self.text_config = PreTrainedConfig(**both, **model_cfg.get("text_cfg", {}))


class OpenClipModel(nn.Module):
    """
    An open_clip model with the feature functions of transformers' dual encoders.

    Args:
        model: open_clip's model, which is `self.open_clip`.
        config: Its configuration.
    """

    def __init__(self, model: nn.Module, config: OpenClipConfig) -> None:
        super().__init__()
        self.open_clip = model
        self.config = config
        self.eval()

    @property
    def name_or_path(self) -> str:
        """What it was loaded by."""
        return self.config._name_or_path

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def logit_scale(self) -> torch.Tensor:
        """The logarithm of the factor on the cosine similarities."""
        return cast(torch.Tensor, self.open_clip.logit_scale)

    def get_text_features(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        """
        Features of texts.

        Args:
            input_ids: [B, L], padded to the full length, as [`OpenClipTokenizer.pad`] does.

        Returns:
            `pooler_output` [B, P], projected and not normalised; nothing else.
        """
        return BaseModelOutputWithPooling(pooler_output=self.open_clip.encode_text(input_ids, normalize=False))

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """
        Features of images.

        Args:
            pixel_values: [B, 3, height, width], from [`OpenClipImageProcessor`].

        Returns:
            `pooler_output` [B, P], projected and not normalised; nothing else.
        """
        return BaseModelOutputWithPooling(pooler_output=self.open_clip.encode_image(pixel_values, normalize=False))


class OpenClipTokenizer:
    """
    One of open_clip's tokenizers, called as transformers' are where texts are encoded.

    open_clip's own give rows that are cut and padded. Here they come without the padding, and [`pad`] puts it back.

    Args:
        tokenizer: open_clip's tokenizer.

    Attributes:
        model_max_length: The tokens that the model takes, special ones included.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.model_max_length: int = tokenizer.context_length
        # transformers' tokenizer inside, where there is one
        inner = getattr(tokenizer, "tokenizer", None)
        if getattr(inner, "padding_side", "right") != "right":
            raise ValueError("the tokenizer pads on the left; expected one that pads on the right, as open_clip's do")
        self.pad_token_id: int = getattr(inner, "pad_token_id", None) or 0
        # In this mode the last place is the class token's, behind the padding.
        self._ends_in_class_token = getattr(tokenizer, "tokenizer_mode", None) == "clips"
        self.deprecation_warnings: dict[str, bool] = {}

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        truncation: bool = True,
        max_length: int | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """
        Token ids of texts, without padding.

        Args:
            text: One text, or B.
            truncation: Whether to cut texts that are too long.
            max_length: At how many tokens, special ones included; by default at `model_max_length`.
            verbose: As transformers' tokenizers take it. This one says nothing.

        Returns:
            `input_ids`, B lists; and as `encodings`, B objects that hold as `overflowing` whether the text was cut.
        """
        texts = [text] if isinstance(text, str) else list(text)
        length = max_length or self.model_max_length
        input_ids, was_cut = self._cut(texts, length)
        while not truncation and any(was_cut):
            length *= 2
            input_ids, was_cut = self._cut(texts, length)
        encodings = [SimpleNamespace(overflowing=cut) for cut in was_cut]
        return BatchEncoding({"input_ids": input_ids}, encoding=encodings, n_sequences=1)  # pyright: ignore[reportArgumentType]

    def _cut(self, texts: list[str], length: int) -> tuple[list[list[int]], list[bool]]:
        """Token ids of texts, and which were cut: those that have another token where there is room for one."""
        input_ids = self._token_ids(texts, length)
        was_cut = [False] * len(texts)
        # one less where the end is the token that pads
        full = [place for place, ids in enumerate(input_ids) if len(ids) >= length - 1]
        for place, longer in zip(full, self._token_ids([texts[place] for place in full], length + 1), strict=True):
            was_cut[place] = longer != input_ids[place]
        return input_ids, was_cut

    def _token_ids(self, texts: list[str], length: int) -> list[list[int]]:
        if not texts:
            return []
        token_ids = []
        for row in self.tokenizer(texts, context_length=length).tolist():
            end = [row.pop()] if self._ends_in_class_token else []
            while row and row[-1] == self.pad_token_id:
                row.pop()
            token_ids.append(row + end)
        return token_ids

    def pad(self, encoded_inputs: Mapping[str, Sequence[Sequence[int]]], **kwargs: Any) -> dict[str, torch.Tensor]:
        """
        Pads to `model_max_length`, whatever the keyword arguments of transformers' tokenizers say: open_clip's models
        take no other length.

        Args:
            encoded_inputs: `input_ids`, B lists.

        Returns:
            `input_ids` [B, model_max_length].
        """
        input_ids = encoded_inputs["input_ids"]
        rows = torch.full((len(input_ids), self.model_max_length), self.pad_token_id)
        for row, ids in zip(rows, input_ids, strict=True):
            words = len(ids) - self._ends_in_class_token
            row[:words] = torch.tensor(ids[:words], dtype=row.dtype)
            if self._ends_in_class_token:
                row[-1] = ids[-1]
        return {"input_ids": rows}

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The settings that decide on the token ids."""
        own = {name: value for name, value in vars(self.tokenizer).items() if isinstance(value, bool | int | str)}
        own["tokenizer_class"] = type(self.tokenizer).__name__
        own["cleaning"] = getattr(getattr(self.tokenizer, "clean_fn", None), "__name__", None)
        return {**getattr(getattr(self.tokenizer, "tokenizer", None), "init_kwargs", {}), **own}

    @property
    def backend_tokenizer(self) -> Any:
        """That of transformers' tokenizer inside; without one an `AttributeError`."""
        return self.tokenizer.tokenizer.backend_tokenizer

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens."""
        return self.tokenizer.encoder if hasattr(self.tokenizer, "encoder") else self.tokenizer.tokenizer.get_vocab()


class OpenClipImageProcessor:
    """
    open_clip's image transform, called as transformers' image processors are.

    Args:
        transform: open_clip's transform of one image.
        settings: What it was made by: open_clip's `preprocess_cfg` of the model.
    """

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], settings: Mapping[str, Any]) -> None:
        self.transform = transform
        self.settings = dict(settings)
        size = self.settings["size"]
        side = size if isinstance(size, int) else min(size)
        # transformers' processor that resizes and crops likewise, for thin images
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
        """
        Transforms images.

        Args:
            images: B images.
            return_tensors: `"pt"`; there are no others.

        Returns:
            `pixel_values` [B, 3, height, width].
        """
        return {"pixel_values": torch.stack([self.transform(self._middle(image)) for image in images])}

    def _middle(self, image: Image.Image) -> Image.Image:
        if self.shortest is None or not is_thin(image.size, self.shortest):
            return image
        return resized_middle(image, self.shortest)

    def to_dict(self) -> dict[str, Any]:
        """The settings."""
        return {"image_processor_type": type(self).__name__, **self.settings}


class OpenClipProcessor:
    """
    Prepares texts and images for an open_clip model.

    Args:
        image_processor: For images.
        tokenizer: For texts.
    """

    def __init__(self, image_processor: OpenClipImageProcessor, tokenizer: OpenClipTokenizer) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer


def load_open_clip(
    name: str, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> tuple[OpenClipModel, OpenClipProcessor]:
    """
    Loads a model by open_clip.

    Args:
        name: One of

            - `"open_clip:ViT-B-32/laion2b_s34b_b79k"`: an architecture and pretrained weights of open_clip's, which
              need not be named where there are no others;
            - `"open_clip:ViT-B-32/path/to/checkpoint.pt"`: an architecture and a file of weights;
            - `"open_clip:hf-hub:org/name"`: a repository on the Hub with `open_clip_config.json`;
            - `"open_clip:local-dir:path/to/folder"`: a folder with such files.
        device: Where to put the model.
        dtype: Of the weights; `"auto"` is float32, as open_clip loads them.

    Returns:
        The model in evaluation mode and its processor, for what encodes by transformers' models.

    Raises:
        ImportError: if open_clip cannot be imported; the message says what to install.
        OSError: if the folder is not there.
        ValueError: if there is no such architecture or weights, if they do not fit, or were trained with another
            activation than the architecture has (`ViT-B-32` and `ViT-B-32-quickgelu`).
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
        download = checked_download(repository) if repository else nullcontext()
        with download, _as_own_log():
            model_cfg = open_clip.get_model_config(architecture)
            _refuse_code(model_cfg, architecture)
            # without a text tower's own weights, which would be fetched where there are none of the model
            model, transform = open_clip.create_model_from_pretrained(architecture, pretrained, pretrained_text=False)
            tokenizer = OpenClipTokenizer(open_clip.get_tokenizer(architecture))
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    except Exception as error:  # open_clip raises every kind, on damaged and on missing files too
        message = " ".join(str(error).split())
        message = f"{message[:500]} ..." if len(message) > 500 else message
        raise ValueError(f"{name}: open_clip cannot load it ({message}).") from error
    config = OpenClipConfig(model_cfg, name_or_path=name)
    config._commit_hash = None if repository is None else cached_commit(repository)
    processor = OpenClipProcessor(OpenClipImageProcessor(transform, model.visual.preprocess_cfg), tokenizer)
    wrapped = OpenClipModel(model, config).to(device)
    if dtype != "auto":
        wrapped = wrapped.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return wrapped, processor


def _refuse_code(model_cfg: Mapping[str, Any], architecture: str) -> None:
    """A `ValueError` where open_clip would run a repository's code by transformers, or ask for it on the terminal."""
    text_cfg = model_cfg.get("text_cfg", {})
    if "trust_remote_code" in text_cfg.get("tokenizer_kwargs", {}):
        raise ValueError("its `tokenizer_kwargs` hold `trust_remote_code`, which is for the user to say")
    if text_cfg.get("hf_model_name"):
        AutoConfig.from_pretrained(text_cfg["hf_model_name"], trust_remote_code=False)
    if text_cfg.get("hf_tokenizer_name"):
        is_folder = architecture.startswith(FOLDER)  # with the tokenizer in it
        source = architecture.removeprefix(FOLDER) if is_folder else text_cfg["hf_tokenizer_name"]
        AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision of another torch gives any of them
        raise ImportError(
            f"{OPEN_CLIP}... needs open_clip and a torchvision that fits torch {torch.__version__}: "
            f"pip install 'lotlip-hf[open-clip]' ({type(error).__name__}: {error})"
        ) from error
    return open_clip


@contextmanager
def _as_own_log() -> Iterator[None]:
    """
    Says what open_clip warns of by this package's log. Its calls of the root logger would else set that up to print
    all that anybody logs from then on, a second time where there is a handler already.
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
    """What open_clip calls the architecture, and the weights."""
    model = name.removeprefix(OPEN_CLIP)
    if model.startswith(FOLDER):
        folder = model.removeprefix(FOLDER)
        for path, there in ((folder, os.path.isdir), (os.path.join(folder, "open_clip_config.json"), os.path.isfile)):
            if not there(path):
                raise FileNotFoundError(f"{name}: no {path}; expected open_clip's configuration and weights there.")
        return model, None
    if model.startswith(HUB):
        return model, None
    # As ViT-B/32, too, open_clip knows ViT-B-32; and the weights may be a path.
    parts = model.split("/")
    names = ("-".join(parts[:count]) for count in range(1, len(parts) + 1))
    known = open_clip.list_models()
    count, architecture = next(((i, one) for i, one in enumerate(names, 1) if one in known), (0, None))
    if architecture is None:
        close = difflib.get_close_matches(parts[0], known, n=5)
        raise ValueError(
            f"{name}: open_clip {open_clip.__version__} has no architecture {parts[0]!r}"
            f"{'; did you mean ' + ' or '.join(close) if close else ''}. `open_clip.list_models()` has them all."
        )
    pretrained = "/".join(parts[count:]) or None
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None and len(tags) == 1:
        pretrained = tags[0]
    tag = {} if pretrained is None else open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag and (pretrained is None or not os.path.isfile(pretrained)):
        problem = "which weights?" if pretrained is None else f"no weights and no file {pretrained!r}."
        raise ValueError(
            f"{name}: {problem} Expected {OPEN_CLIP}{architecture}/WEIGHTS, a file or one of: "
            f"{', '.join(tags) or 'open_clip has none for it'}."
        )
    if tag and tag.get("quick_gelu", False) != open_clip.get_model_config(architecture).get("quick_gelu", False):
        # open_clip warns and goes on: it would be evaluated as another model
        suffix = "-quickgelu"
        other = architecture.removesuffix(suffix) if architecture.endswith(suffix) else architecture + suffix
        raise ValueError(
            f"{name}: these weights were trained with another activation than {architecture} has; take "
            f"{OPEN_CLIP}{other}/{pretrained}."
        )
    return architecture, pretrained
