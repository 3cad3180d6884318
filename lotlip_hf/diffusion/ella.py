"""ELLA's connector: states of any text tower become those of a UNet, anew in each step of the denoising."""

import contextlib
import copy
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..files import read_tensors, write_tensors
from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPTextModelWithProjection
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .text_encoder import LoTLIPTextEncoder
from .tokenizers import prompt_tokenizer, text_end

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MAX_BYTES = 1 << 32
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of a file

# Names of modules and parameters are those of the authors' weights.


class _TimedNorm(nn.Module):
    """A LayerNorm whose shift and scale follow the timestep."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_width, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """[B, L, width], [B, 1, time_width] -> [B, L, width]"""
        shift, scale = self.linear(F.silu(time)).chunk(2, dim=-1)
        return F.layer_norm(states, states.shape[-1:], eps=1e-6) * (1 + scale) + shift


class _SquaredReLU(nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.relu(states).square()


class _Block(nn.Module):
    """Latents attend to themselves and to the text."""

    def __init__(self, width: int, num_heads: int, time_width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        inner = nn.Linear(width, 4 * width), _SquaredReLU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(zip(("c_fc", "sq_relu", "c_proj"), inner, strict=True)))
        self.ln_1, self.ln_2, self.ln_ff = (_TimedNorm(width, time_width) for _ in range(3))

    def forward(
        self, text: torch.Tensor, latents: torch.Tensor, time: torch.Tensor, is_padding: torch.Tensor | None
    ) -> torch.Tensor:
        """Text [B, L, width], latents [B, S, width], is_padding [B, S + L] -> [B, S, width]"""
        normed = self.ln_1(latents, time)
        seen = torch.cat([normed, self.ln_2(text, time)], dim=1)
        latents = latents + self.attn(normed, seen, seen, key_padding_mask=is_padding, need_weights=False)[0]
        return latents + self.mlp(self.ln_ff(latents, time))


class _Resampler(nn.Module):
    def __init__(
        self, text_width: int, width: int, num_layers: int, num_heads: int, size: int, time_width: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(width**-0.5 * torch.randn(size, width))
        self.time_aware_linear = nn.Linear(time_width, width)
        self.proj_in = nn.Linear(text_width, width)
        self.perceiver_blocks = nn.ModuleList(_Block(width, num_heads, time_width) for _ in range(num_layers))

    def forward(self, text: torch.Tensor, time: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, L, text_width], [B, 1, time_width], mask [B, L] -> [B, S, width]"""
        latents = self.latents + self.time_aware_linear(F.silu(time))
        text = self.proj_in(text)
        is_padding = None if mask is None else F.pad(~mask.bool(), (len(self.latents), 0), value=False)
        for block in self.perceiver_blocks:
            latents = block(text, latents, time, is_padding)
        return latents


class ELLA(nn.Module):
    """
    The timestep-aware semantic connector of ELLA (https://arxiv.org/abs/2403.05135, section 3.2): a resampler whose
    norms and first latents depend on the timestep. It has the authors' names of weights, so that [`load_ella`] reads
    theirs.

    Args:
        text_width (`int`): Width of the text tower's states. Theirs is 2048, that of T5-XL.
        width (`int`, *optional*, defaults to 768): Width of the latents, that of the UNet's `cross_attention_dim`.
        num_layers (`int`, *optional*, defaults to 6): Number of blocks.
        num_heads (`int`, *optional*, defaults to 8): Number of attention heads.
        num_latents (`int`, *optional*, defaults to 64): Number of states that the UNet gets.
        time_channels (`int`, *optional*, defaults to 320): Number of sinusoids of a timestep.
        time_width (`int`, *optional*, defaults to 768): Width of the embedding of a timestep.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.diffusion.ella import ELLA

    >>> ella = ELLA(text_width=32, width=64, num_layers=2, num_latents=16)
    >>> ella(torch.randn(2, 200, 32), torch.tensor([999, 10])).shape
    torch.Size([2, 16, 64])
    ```
    """

    def __init__(
        self,
        text_width: int,
        width: int = 768,
        num_layers: int = 6,
        num_heads: int = 8,
        num_latents: int = 64,
        time_channels: int = 320,
        time_width: int = 768,
    ) -> None:
        super().__init__()
        self.text_width, self.width, self.num_heads = text_width, width, num_heads
        self.position = Timesteps(time_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_channels, time_width)
        self.connector = _Resampler(text_width, width, num_layers, num_heads, num_latents, time_width)

    def forward(self, states: torch.Tensor, timesteps: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): States [B, L, text_width] of texts.
            timesteps (`torch.Tensor`): Timesteps [B], or one for all.
            mask (`torch.Tensor`, *optional*): 1 for text and 0 for padding [B, L]. The authors train without a mask.

        Returns:
            `torch.Tensor`: States [B, num_latents, width] for the UNet's cross-attention.
        """
        time = self.position(timesteps.reshape(-1).to(states.device)).to(states.dtype)
        time = self.time_embedding(time).unsqueeze(1).expand(len(states), -1, -1)
        return self.connector(states, time, mask)


def save_ella(ella: ELLA, file: str | os.PathLike) -> None:
    """
    Saves a connector.

    Args:
        ella (`ELLA`): The connector.
        file (`str` or `os.PathLike`): File, such as `ella.safetensors`. An existing file is replaced.
    """
    write_tensors(file, ella.state_dict(), {"num_heads": str(ella.num_heads)})


def load_ella(file: str | os.PathLike, num_heads: int | None = None) -> ELLA:
    """
    Loads a connector of [`save_ella`], or the authors' weights (`ella-sd1.5-tsc-t5xl.safetensors`).

    Args:
        file (`str` or `os.PathLike`): The file.
        num_heads (`int`, *optional*): Number of attention heads. Defaults to that in the file, or 8.

    Returns:
        `ELLA`: The connector, in the type of the weights and in evaluation mode.

    Raises:
        `ValueError`: If the file is not a connector of finite numbers, or larger than 4 GiB.
        `OSError`: If there is no such file.

    Example:

    ```python
    >>> from lotlip_hf.diffusion.ella import ELLA, load_ella, save_ella

    >>> save_ella(ELLA(text_width=32, width=64, num_layers=2), "ella.safetensors")
    >>> load_ella("ella.safetensors").text_width
    32
    ```
    """
    weights, metadata = read_tensors(file, MAX_BYTES)
    try:
        num_heads = num_heads or int(metadata.get("num_heads", 8))
        if len({one.dtype for one in weights.values()}) > 1 or weights["connector.latents"].dtype not in DTYPES:
            raise ValueError("its weights are not all of one floating point type of 16 to 64 bits")
        width, text_width = weights["connector.proj_in.weight"].shape
        time_width, time_channels = weights["time_embedding.linear_1.weight"].shape
        with torch.device("meta"):
            ella = ELLA(
                text_width,
                width,
                num_layers=sum(name.endswith("attn.in_proj_weight") for name in weights),
                num_heads=num_heads,
                num_latents=weights["connector.latents"].shape[:1].numel(),
                time_channels=time_channels,
                time_width=time_width,
            )
        ella.load_state_dict(weights, assign=True)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is no connector of ELLA ({error}). Pass a file of `save_ella`.") from error
    return ella.eval()


@contextlib.contextmanager
def connected(
    pipe: "DiffusionPipeline",
    ella: ELLA,
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
    is_masked: bool = True,
) -> "Iterator[DiffusionPipeline]":
    """
    Context in which a pipeline of Stable Diffusion 1.x or 2.x reads its prompts by another text tower, and its UNet
    gets what a connector makes of them for the timestep. `clip_skip` has no effect there.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        ella (`ELLA`): The connector.
        text_encoder (`PreTrainedModel`): LoTLIP, its text tower, or another text encoder with
            `last_hidden_state`, such as `T5EncoderModel`. Its width is the connector's `text_width`.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the text encoder.
        max_length (`int`, *optional*, defaults to 128): Length in tokens at which prompts are cut.
        is_masked (`bool`, *optional*, defaults to `True`): Whether the connector ignores padding. The authors' weights
            are trained without a mask.

    Returns:
        `DiffusionPipeline`: The pipeline.

    Raises:
        `ValueError`: If the pipeline has no UNet with one text encoder, or widths do not fit.

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf import LoTLIPTextModel, LoTLIPTokenizer
    >>> from lotlip_hf.diffusion.ella import ELLA, connected

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> tower = LoTLIPTextModel.from_pretrained("checkpoint")
    >>> ella = ELLA(tower.config.hidden_size, pipe.unet.config.cross_attention_dim)
    >>> with connected(pipe, ella, tower, LoTLIPTokenizer.from_pretrained("checkpoint")):
    ...     picture = pipe("A long description.").images[0]
    ```
    """
    slots = [name for name in pipe.components if name.startswith("text_encoder")]
    unet = pipe.components.get("unet")
    if unet is None or slots != ["text_encoder"]:
        raise ValueError(
            f"`pipe` {type(pipe).__name__} has no UNet, or several text encoders. Pass Stable Diffusion 1 or 2."
        )
    if isinstance(text_encoder, LoTLIPModel | LoTLIPTextModel | LoTLIPTextModelWithProjection):
        text_encoder = LoTLIPTextEncoder.from_text_model(text_encoder)
    width, needed = text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if (width, needed) != (ella.text_width, ella.width):
        raise ValueError(
            f"`ella` maps width {ella.text_width} to {ella.width}, but `text_encoder` has {width} and the UNet needs "
            f"{needed}."
        )
    if isinstance(tokenizer, CLIPTokenizer | LoTLIPTokenizer):
        tokenizer = prompt_tokenizer(tokenizer, max_length)
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = max_length

    def mask_of(ids: torch.Tensor) -> torch.Tensor:
        ends = [text_end(tokenizer, row) for row in ids.tolist()]
        return torch.arange(ids.shape[1], device=ids.device) <= torch.tensor(ends, device=ids.device)[:, None]

    def add_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args[:1], {**kwargs, "attention_mask": mask_of(args[0]).long()}

    def clear_padding(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Zeros tell the connector what is padding, because a pipeline passes no mask to its UNet.
        states = output.last_hidden_state
        return type(output)(last_hidden_state=states * mask_of(args[0]).unsqueeze(-1).to(states))

    def connect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = kwargs["encoder_hidden_states"]
        mask = states.ne(0).any(-1) if is_masked else None
        return args, {**kwargs, "encoder_hidden_states": ella(states, torch.as_tensor(args[1]), mask)}

    before = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer")}
    with contextlib.ExitStack() as stack:
        stack.callback(pipe.register_modules, **before)
        pipe.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        stack.callback(text_encoder.register_forward_pre_hook(add_mask, with_kwargs=True).remove)
        stack.callback(text_encoder.register_forward_hook(clear_padding).remove)
        stack.callback(unet.register_forward_pre_hook(connect, with_kwargs=True).remove)
        yield pipe
