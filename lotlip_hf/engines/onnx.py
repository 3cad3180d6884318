"""LoTLIP on ONNX Runtime: runs the files of `lotlip convert onnx`, with the feature methods of [`LoTLIPModel`]."""

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

# Tower -> its file in the folder.
FILES = {"text": "text_model.onnx", "vision": "vision_model.onnx"}
# Key of the metadata of both files: the logarithm of the factor on the cosine similarities.
LOGIT_SCALE = "logit_scale"
# Optimisers of ONNX Runtime that are slower on CPUs: the fused residual and norm takes several times as long as the
# two separate operators and gives the same result.
SLOW_ON_CPU = ["SkipLayerNormFusion"]


class LoTLIPOnnxModel(nn.Module):
    """
    A LoTLIP, or one of its towers, on ONNX Runtime, for inference only and without PyTorch weights. Create the model
    with [`LoTLIPOnnxModel.from_pretrained`] and pass it to [`~lotlip_hf.encoder.Encoder`], like a [`LoTLIPModel`].

    Args:
        config (`PreTrainedConfig`): Configuration of the exported model.
        sessions (`Mapping[str, InferenceSession]`): Sessions of the towers `"text"` and `"vision"`, or of one of them.
        folder (`Path`): Folder of the files.
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
        Loads a folder that `lotlip convert onnx` wrote.

        Args:
            folder (`str` or `os.PathLike`): Folder with `config.json` and `text_model.onnx`, `vision_model.onnx` or
                both.
            providers (`Sequence[str]`, *optional*): Execution providers of ONNX Runtime, the preferred one first.
                Defaults to `["CPUExecutionProvider"]`.
            session_options (`onnxruntime.SessionOptions`, *optional*): Options of ONNX Runtime. Defaults to as many
                threads as PyTorch has (`torch.get_num_threads()`).

        Raises:
            `ImportError`: If onnxruntime is not installed.
            `OSError`: If the folder does not exist or contains no exported tower.
            `ValueError`: If a file or the configuration cannot be read, or if a provider is not available.

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
                f"{folder}: no {' or '.join(FILES.values())}. Export a checkpoint with `lotlip convert onnx`."
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, (LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig)):
            raise ValueError(f"{folder}: config.json is of a {config.model_type!r} model. Export a LoTLIP checkpoint.")
        providers = ["CPUExecutionProvider"] if providers is None else list(providers)
        names = [one if isinstance(one, str) else one[0] for one in providers]
        known = onnxruntime.get_available_providers()
        for name in names:
            if name not in known:  # ONNX Runtime would silently continue without it
                raise ValueError(f"`providers`: {name} is not available. Use one of {', '.join(known)}.")
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
            except Exception as error:  # ONNX Runtime's errors have no common base class
                message = one_line(error)
                raise ValueError(f"{file}: ONNX Runtime cannot open it ({message}).") from error
        return cls(config, sessions, folder)

    @property
    def device(self) -> torch.device:
        """Device of inputs and outputs: the CPU, independent of the providers."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of inputs and outputs: float32, also for quantised towers."""
        return torch.float32

    @property
    def logit_scale(self) -> torch.Tensor:
        """Logarithm of the trained factor on the cosine similarities, a scalar."""
        for session in self.sessions.values():
            metadata = session.get_modelmeta().custom_metadata_map
            if LOGIT_SCALE in metadata:
                return torch.tensor(float(metadata[LOGIT_SCALE]))
        raise ValueError(f"{self.folder} has no `logit_scale`: only one tower was exported. Export the whole model.")

    @property
    def image_shape(self) -> list[int | str]:
        """Channels, height and width of the image tower's inputs. A variable size is a string."""
        return self._session("vision").get_inputs()[0].shape[1:]

    def to(self, *args: Any, **kwargs: Any) -> "LoTLIPOnnxModel":
        """Does nothing for the CPU and float32, and raises a `ValueError` for any other device or type."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            raise ValueError(
                f"An ONNX model has CPU tensors, not {device}. Choose the device of the computation by "
                'LoTLIPOnnxModel.from_pretrained(folder, providers=["CUDAExecutionProvider"]).'
            )
        if dtype not in (None, torch.float32):
            raise ValueError(f"An ONNX model cannot be converted to {dtype}. Export the checkpoint again.")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Files of the towers by name, as uint8 [bytes] that are read on use, to identify the model in an index."""
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
        Computes features of texts, as [`LoTLIPModel.get_text_features`] does.

        Args:
            input_ids (`torch.Tensor`): Token ids [B, L] or [B, T, L], padded on either side.
            attention_mask (`torch.Tensor`, *optional*): 1 for text and 0 for padding, in the shape of `input_ids`.
                Defaults to `input_ids != pad_token_id`, and to ones for CLIP.
            token_type_ids (`torch.Tensor`, *optional*): Segment ids in the shape of `input_ids`. All must be 0.

        Returns:
            `BaseModelOutputWithPoolingAndCorners`: Only `pooler_output`, features [B, (T,) projection_dim] in float32.

        Raises:
            `ValueError`: If a segment id is not 0, or if the text tower was not exported.
        """
        session = self._session("text")
        config = getattr(self.config, "text_config", self.config)
        if attention_mask is None:
            attention_mask = config.family.text_mask(config.backbone_config, input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is not None and token_type_ids.any():
            raise ValueError("`token_type_ids` must be 0: the exported model has one segment. Leave the argument out.")
        features = _run(
            session,
            input_ids=input_ids.reshape(-1, input_ids.shape[-1]).long(),
            attention_mask=attention_mask.reshape(-1, input_ids.shape[-1]).long(),
        )
        return BaseModelOutputWithPoolingAndCorners(pooler_output=features.unflatten(0, input_ids.shape[:-1]))

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """
        Computes features of images, as [`LoTLIPModel.get_image_features`] does.

        Args:
            pixel_values (`torch.Tensor`): Images [B, channels, height, width] of the exported size, normalised by the
                image processor. DINOv2 and DINOv3 accept any size of at least one patch.

        Returns:
            `BaseModelOutputWithPooling`: Only `pooler_output`, features [B, projection_dim] in float32.

        Raises:
            `ValueError`: If the image tower was not exported.
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
        Compares texts with images. Has the arguments and errors of `get_text_features` and `get_image_features`.

        Returns:
            [`LoTLIPOutput`]: Only `logits_per_image`, `logits_per_text`, `text_embeds` and `image_embeds`.
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
            raise ValueError(
                f"{self.folder} has no {FILES[tower]}. Export the {tower} tower with `lotlip convert onnx`."
            )
        return self.sessions[tower]


class OnnxEngine(TorchEngine):
    """Engine for a [`LoTLIPOnnxModel`] and its processor."""

    libraries = ("onnxruntime",)

    @property
    def name(self) -> str:
        """Folder of the model."""
        return str(self.model.folder)


def is_onnx(folder: str | os.PathLike) -> bool:
    """Whether a folder contains an exported tower."""
    return any(os.path.isfile(os.path.join(folder, file)) for file in FILES.values())


def load_onnx(folder: str, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto") -> OnnxEngine:
    """
    Loads a folder that `lotlip convert onnx` wrote, on the CPU.

    Args:
        folder (`str`): Folder of the model.
        device (`str` or `torch.device`, *optional*): `"cpu"` or `None`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): `"float32"` or `"auto"`.

    Returns:
        [`OnnxEngine`]: The engine.

    Raises:
        `ValueError`: If a file is damaged, if the processor makes images of a size that the tower does not accept, or
            if `device` is not the CPU or `dtype` is not float32.
        `ImportError`: If ONNX Runtime is not installed.
    """
    with naming_damage(folder):
        model, processor = LoTLIPOnnxModel.from_pretrained(folder), load_processor(folder)
    try:
        model.to(device=device or "cpu", dtype=None if dtype == "auto" else getattr(torch, str(dtype), dtype))
    except RuntimeError as error:
        raise ValueError(f"`device` {str(device)!r} is not available ({str(error).splitlines()[0]}).") from error
    if "vision" in model.sessions and hasattr(processor, "image_processor"):
        made, taken = processed_size(processor.image_processor), tuple(model.image_shape[1:])
        if made != taken and all(isinstance(side, int) for side in taken):
            raise ValueError(
                f"{folder}: the image tower accepts {taken[0]} x {taken[1]} pixels, the processor makes {made[0]} x "
                f"{made[1]}. Export the checkpoint again with `lotlip convert onnx`."
            )
    if hasattr(processor, "tokenizer"):
        fit_tokenizer(model, processor.tokenizer)
    return OnnxEngine(model, processor)


def missing_packages(*names: str) -> str | None:
    """Install hint for the packages that are missing, or `None` if all are installed."""
    missing = [name for name in names if find_spec(name) is None]
    if not missing:
        return None
    return f"ONNX needs {', '.join(missing)}: pip install 'lotlip-hf[onnx]'"


def _run(session: "onnxruntime.InferenceSession", **inputs: torch.Tensor) -> torch.Tensor:
    (features,) = session.run(None, {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(features)
