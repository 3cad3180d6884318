"""LoTLIP on ONNX Runtime: what `lotlip convert onnx` wrote, with the feature functions of [`LoTLIPModel`]."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..files import one_line
from ..images import processed_size
from ..loading import fit_tokenizer, load_processor, naming_damage
from ..modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from ..modeling.modeling_lotlip import BaseModelOutputWithPoolingAndCorners, LoTLIPOutput
from .torch import TorchEngine

if TYPE_CHECKING:
    import onnxruntime

# A tower's file in the folder
FILES = {"text": "text_model.onnx", "vision": "vision_model.onnx"}
# Metadata of both files: the logarithm of the factor on the cosine similarities
LOGIT_SCALE = "logit_scale"
# What ONNX Runtime would do to a graph at loading that makes it slower on CPUs: its fused residual and norm runs
# several times as long as the addition and the norm by themselves, with the same result.
SLOW_ON_CPU = ["SkipLayerNormFusion"]


class LoTLIPOnnxModel(nn.Module):
    """
    A LoTLIP, or one of its towers, that ONNX Runtime runs. It has no weights in PyTorch and is for inference. What
    encodes with a [`LoTLIPModel`], such as [`~lotlip_hf.encoder.Encoder`], takes it as well.

    Made by [`LoTLIPOnnxModel.from_pretrained`].

    Args:
        config: Configuration of the exported model.
        sessions: By tower, `"text"` and `"vision"`, what runs it; one of them may be missing.
        folder: Where the files lie.
    """

    def __init__(
        self, config: PreTrainedConfig, sessions: "Mapping[str, onnxruntime.InferenceSession]", folder: Path
    ) -> None:
        super().__init__()
        self.config = config
        self.sessions = dict(sessions)
        self.folder = folder
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
        session_options: "onnxruntime.SessionOptions | None" = None,
    ) -> "LoTLIPOnnxModel":
        """
        Opens what `lotlip convert onnx` wrote.

        Args:
            folder: The folder, with `text_model.onnx`, `vision_model.onnx` or both, and `config.json`.
            providers: ONNX Runtime's execution providers, the preferred one first; by default
                `["CPUExecutionProvider"]`.
            session_options: ONNX Runtime's options; by default as many threads as PyTorch has
                (`torch.get_num_threads()`).

        Raises:
            ImportError: if onnxruntime is not installed.
            OSError: if there is no such folder, or no exported tower in it.
            ValueError: if a file or the configuration cannot be read, or a provider is not in this onnxruntime.

        Example:

        ```python
        >>> from transformers import AutoProcessor
        >>> from lotlip_hf import Encoder
        >>> from lotlip_hf.engines.onnx import LoTLIPOnnxModel

        >>> model = LoTLIPOnnxModel.from_pretrained("lotlip-onnx")  # doctest: +SKIP
        >>> processor = AutoProcessor.from_pretrained("lotlip-onnx")  # doctest: +SKIP
        >>> Encoder(model, processor).encode_texts(["a dog", "a cat"]).shape  # doctest: +SKIP
        torch.Size([2, 768])
        ```
        """
        missing = missing_packages("onnxruntime")
        if missing:
            raise ImportError(missing)
        import onnxruntime

        folder = Path(folder)
        files = {tower: folder / name for tower, name in FILES.items() if (folder / name).is_file()}
        if not files:
            raise FileNotFoundError(
                f"{folder}: no {' or '.join(FILES.values())} there; `lotlip convert onnx` makes them of a checkpoint."
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, (LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig)):
            raise ValueError(f"{folder}: config.json is of a {config.model_type!r} model, not of a LoTLIP one.")
        providers = ["CPUExecutionProvider"] if providers is None else list(providers)
        names = [one if isinstance(one, str) else one[0] for one in providers]
        known = onnxruntime.get_available_providers()
        for name in names:
            if name not in known:  # ONNX Runtime would go on without it
                raise ValueError(f"`providers`: {name} is not in this onnxruntime, which has {', '.join(known)}.")
        if session_options is None:
            session_options = onnxruntime.SessionOptions()
            session_options.intra_op_num_threads = torch.get_num_threads()
        disabled = SLOW_ON_CPU if names == ["CPUExecutionProvider"] else None
        sessions = {}
        for tower, file in files.items():
            try:
                sessions[tower] = onnxruntime.InferenceSession(
                    str(file), session_options, providers=providers, disabled_optimizers=disabled
                )
            except Exception as error:  # ONNX Runtime's own kinds, which share no class
                message = one_line(error)
                raise ValueError(f"{file}: ONNX Runtime cannot open it ({message}).") from error
        return cls(config, sessions, folder)

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs are: the CPU, whatever the providers compute on."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and outputs: float32, also of quantised towers."""
        return torch.float32

    @property
    def logit_scale(self) -> torch.Tensor:
        """Scalar: the logarithm of the factor on the cosine similarities, as it was trained."""
        for session in self.sessions.values():
            metadata = session.get_modelmeta().custom_metadata_map
            if LOGIT_SCALE in metadata:
                return torch.tensor(float(metadata[LOGIT_SCALE]))
        raise ValueError(f"{self.folder} was exported from a tower by itself, which has no `logit_scale`.")

    @property
    def image_shape(self) -> list[int | str]:
        """Channels, height and width of the images that the image tower takes; a size that may vary is its name."""
        return self._session("vision").get_inputs()[0].shape[1:]

    def to(self, *args: Any, **kwargs: Any) -> "LoTLIPOnnxModel":
        """
        Does nothing for the CPU and float32.

        Raises:
            ValueError: for anything else, which is chosen when the model is exported and opened.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            raise ValueError(
                f"An ONNX model takes and gives CPU tensors, not {device}; what computes is chosen when it is opened: "
                'LoTLIPOnnxModel.from_pretrained(folder, providers=["CUDAExecutionProvider"]).'
            )
        if dtype not in (None, torch.float32):
            raise ValueError(f"An ONNX model's precision is chosen when it is exported; it cannot become {dtype}.")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The towers' files by name, uint8 [bytes] and read when used: by them an index knows which model made it."""
        paths = [self.folder / f"{FILES[tower]}{end}" for tower in self.sessions for end in ("", ".data")]
        return {
            path.name: torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            for path in paths
            if path.is_file()
        }

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPoolingAndCorners:
        """
        Features of texts, as [`LoTLIPModel.get_text_features`] gives them.

        Args:
            input_ids: [B, L] or [B, T, L], padded on either side.
            attention_mask: shape of `input_ids`, 1 for text and 0 for padding. By default what is not `pad_token_id`;
                over CLIP everything.
            token_type_ids: shape of `input_ids`; zeros, which is what the exported model takes for granted.

        Returns:
            `pooler_output` [B, (T,) projection_dim], projected and not normalised, float32; nothing else.

        Raises:
            ValueError: on another segment than 0, and if the text tower was not exported.
        """
        session = self._session("text")
        config = getattr(self.config, "text_config", self.config)
        if attention_mask is None:
            attention_mask = config.family.text_mask(config.backbone_config, input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is not None and token_type_ids.any():
            raise ValueError("`token_type_ids` must be 0 or left out: the exported model takes one segment.")
        features = _run(
            session,
            input_ids=input_ids.reshape(-1, input_ids.shape[-1]).long(),
            attention_mask=attention_mask.reshape(-1, input_ids.shape[-1]).long(),
        )
        return BaseModelOutputWithPoolingAndCorners(pooler_output=features.unflatten(0, input_ids.shape[:-1]))

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """
        Features of images, as [`LoTLIPModel.get_image_features`] gives them.

        Args:
            pixel_values: [B, channels, height, width] of the size that was exported, normalised by the image
                processor. A DINOv2 takes any size, of at least one patch.

        Returns:
            `pooler_output` [B, projection_dim], projected and not normalised, float32; nothing else.

        Raises:
            ValueError: if the image tower was not exported.
        """
        session = self._session("vision")
        return BaseModelOutputWithPooling(pooler_output=_run(session, pixel_values=pixel_values.float()))

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> LoTLIPOutput:
        """
        Texts compared with images. Arguments and errors are those of `get_text_features` and `get_image_features`.

        Returns:
            `logits_per_image`, `logits_per_text`, `text_embeds` and `image_embeds` of [`LoTLIPOutput`], for I images.
        """
        text_embeds = self.get_text_features(input_ids, attention_mask, token_type_ids).pooler_output
        text_embeds = nn.functional.normalize(text_embeds, dim=-1)
        image_embeds = nn.functional.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.t()  # [B, (T,) I]
        return LoTLIPOutput(
            logits_per_image=logits_per_text.movedim(-1, 0),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
        )

    def _session(self, tower: str) -> "onnxruntime.InferenceSession":
        if tower not in self.sessions:
            raise ValueError(f"{self.folder} has no {FILES[tower]}: the {tower} tower was not exported.")
        return self.sessions[tower]


class OnnxEngine(TorchEngine):
    """Features by a [`LoTLIPOnnxModel`] and its processor."""

    libraries = ("onnxruntime",)

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.model.folder)


def is_onnx(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an exported tower."""
    return any(os.path.isfile(os.path.join(folder, file)) for file in FILES.values())


def load_onnx(folder: str, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto") -> OnnxEngine:
    """
    Opens what `lotlip convert onnx` wrote, on the CPU.

    Args:
        folder (`str`): the folder.
        device (`str` or `torch.device`, *optional*): `"cpu"` or left out.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): `"float32"` or `"auto"`.

    Returns:
        [`OnnxEngine`]: the engine.

    Raises:
        ValueError: if a file is damaged, the processor makes other images than the tower takes, or on another
            `device` or `dtype`.
        ImportError: if ONNX Runtime is not installed.
    """
    with naming_damage(folder):
        model, processor = LoTLIPOnnxModel.from_pretrained(folder), load_processor(folder)
    try:
        model.to(device=device or "cpu", dtype=None if dtype == "auto" else getattr(torch, str(dtype), dtype))
    except RuntimeError as error:
        raise ValueError(f"`device` {str(device)!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    if "vision" in model.sessions and hasattr(processor, "image_processor"):
        made, taken = processed_size(processor.image_processor), tuple(model.image_shape[1:])
        if made != taken and all(isinstance(side, int) for side in taken):
            raise ValueError(
                f"{folder}: the image tower takes {taken[0]} x {taken[1]} pixels, the processor makes {made[0]} x "
                f"{made[1]}: export the checkpoint again with `lotlip convert onnx`."
            )
    if hasattr(processor, "tokenizer"):
        fit_tokenizer(model, processor.tokenizer)
    return OnnxEngine(model, processor)


def missing_packages(*names: str) -> str | None:
    """What to install if one of the packages for ONNX is missing, in one line; `None` if all are there."""
    missing = [name for name in names if find_spec(name) is None]
    if not missing:
        return None
    return f"ONNX needs {', '.join(missing)}: pip install 'lotlip-hf[onnx]'"


def _run(session: "onnxruntime.InferenceSession", **inputs: torch.Tensor) -> torch.Tensor:
    (features,) = session.run(None, {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(features)
