"""
Converts CLIP to LoTLIP: adds corner tokens and, on request, positions to a checkpoint of transformers, open_clip,
OpenAI or Long-CLIP. The outputs stay those of the CLIP.

    lotlip convert clip --clip openai/clip-vit-large-patch14 --num-corner-tokens 2 \
        --max-positions 248 --stretch knowledge-preserved --output lotlip-clip-vit-l-14
    lotlip convert clip --clip stable-diffusion/text_encoder --output lotlip-text-encoder
    lotlip convert clip --clip open_clip_model.safetensors --open-clip-config open_clip_config.json \
        --tokenizer clip-tokenizer --output lotlip-open-clip
    lotlip convert clip --clip longclip-L.pt --output lotlip-long-clip
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# transformers 5.17 exports this class only if torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPProcessor,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPVisionConfig,
)
from lotlip_hf.diffusion.stretch import KEPT_POSITIONS, Stretch, stretch_positions, stretch_text_model
from lotlip_hf.files import all_or_nothing
from lotlip_hf.loading import checkpoint_name, fit_tokenizer, load_strict, load_tokenizer, naming_damage, quiet
from lotlip_hf.options import Parser
from lotlip_hf.terminal import run

from .common import ConversionError, building, check_output, read_json, same_bits
from .open_clip import LEGACY_EOS_TOKEN_ID, Activation, read_open_clip

# Stock class of a CLIP -> LoTLIP class.
MODELS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    CLIPModel: LoTLIPModel,
    CLIPTextModel: LoTLIPTextModel,
    CLIPTextModelWithProjection: LoTLIPTextModelWithProjection,
}
# Class name in a configuration -> stock class. `lotlip_hf.diffusion.swap` saves `CLIPTextEncoder` in pipelines, which
# has the weights of `CLIPTextModel`.
STOCK_CLASSES = {**{stock_class.__name__: stock_class for stock_class in MODELS}, "CLIPTextEncoder": CLIPTextModel}
TOKENIZER_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast")
# Model type -> stock class, for configurations without a class name.
DEFAULT_CLASSES = {"clip": CLIPModel, "clip_text_model": CLIPTextModel}

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# Files of open_clip and OpenAI contain no tokenizer. All of them use this tokenizer.
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"

# Largest accepted difference of a state or feature from CLIP's, relative to its norm. Rounding in float32, which
# depends on the CPU and on memory addresses, causes 1e-7 at the sizes of real CLIPs and up to 1e-6 at a width of 24.
TOLERANCE = 1e-5
SAMPLE_TEXTS = [
    "",
    "a photo of a cat",
    "Two passengers, 3 dogs & a RED car: isn't that naïve? <|x|> 漢字 🙂",
    "A page of a sketchbook shows six studies of the same teapot. " * 20,
]


@dataclass
class _Source:
    """A CLIP in stock classes. A text tower has no `image_processor`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any


def convert(
    clip: str | Path,
    output: str | Path,
    num_corner_tokens: int = 2,
    max_positions: int | None = None,
    stretch: Stretch | None = None,
    tokenizer: str | Path | None = None,
    open_clip_config: str | Path | None = None,
    activation: Activation | None = None,
    subfolder: str = "",
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """
    Converts a CLIP into a LoTLIP folder for `AutoModel`, `AutoTokenizer` and `AutoProcessor`. A `CLIPModel` becomes a
    [`LoTLIPModel`], and a text encoder, such as a diffusion pipeline's, a [`LoTLIPTextModel`] or
    [`LoTLIPTextModelWithProjection`]. Tokenizer and image processor are copied.

    The saved folder is loaded and compared with the CLIP: weights bit by bit, outputs for random inputs to 1e-5 of
    their norm. (If positions are added, texts are compared only up to 20 tokens, or not at all with
    `stretch="linear"`.) The folder is created only if all checks pass.

    Args:
        clip (`str` or `Path`): Folder or Hub id of a `CLIPModel`, `CLIPTextModel` or `CLIPTextModelWithProjection`, or
            of an open_clip model (`open_clip_config.json` and its weights); or a file in the layout of open_clip,
            OpenAI or Long-CLIP.
        output (`str` or `Path`): Folder to create. It must not exist or must be empty.
        num_corner_tokens (`int`, *optional*, defaults to 2): Number of corner tokens. Corner tokens start as small
            random numbers and must be trained. They do not change CLIP's outputs.
        max_positions (`int`, *optional*): New number of positions, not below the old number. Defaults to the old.
        stretch (`str`, *optional*): How to add positions, see [`~lotlip_hf.diffusion.stretch.stretch_positions`].
            Defaults to `"knowledge-preserved"`. It requires `max_positions`.
        tokenizer (`str` or `Path`, *optional*): Folder or Hub id of a tokenizer. Defaults to the checkpoint's, in a
            diffusion pipeline to the folder `tokenizer` next to `text_encoder`, and for files to CLIP's from the Hub.
            (CLIP's gives the same ids as open_clip's and OpenAI's tokenizers, but does not repair broken encodings
            and HTML entities.)
        open_clip_config (`str` or `Path`, *optional*): Configuration of a file in open_clip's layout.
        activation (`str`, *optional*): `"gelu"` or `"quick_gelu"`, for a file without a configuration.
        subfolder (`str`, *optional*, defaults to `""`): Folder of the model in the folder or repository, such as
            `"text_encoder_2"`.
        seed (`int`, *optional*, defaults to 0): Seed of the corner tokens' random numbers.
        report (`Callable`, *optional*): Function that is called with each line of the summary.

    Returns:
        `Path`: The folder.

    Raises:
        `ConversionError`: If the checkpoint cannot be converted exactly.
    """
    target = check_output(output)
    if stretch is not None and max_positions is None:
        raise ConversionError(f"--stretch {stretch} adds positions. Pass their new number with --max-positions.")
    stretch = stretch or "knowledge-preserved"
    clip = str(clip)
    source = _read(
        clip, tokenizer and str(tokenizer), open_clip_config and str(open_clip_config), activation, subfolder
    )
    for name, tensor in source.model.state_dict().items():
        if not tensor.isfinite().all():
            raise ConversionError(
                f"{_Location(clip, subfolder)}: {name} (transformers' name) contains NaN or infinite numbers. Use "
                "another checkpoint."
            )
    text_config = source.model.config.get_text_config()
    _check_tokenizer(source.tokenizer, text_config)
    old_positions = text_config.max_position_embeddings
    new_positions = old_positions if max_positions is None else max_positions
    with building(clip):
        model = _to_lotlip(source.model, source.tokenizer, num_corner_tokens, seed)
    compared_tokens = old_positions
    if new_positions != old_positions:
        stretch_text_model(model, new_positions, stretch)
        compared_tokens = KEPT_POSITIONS if stretch == "knowledge-preserved" else 0
    fit_tokenizer(model, source.tokenizer, new_positions)

    with all_or_nothing(target) as folder:
        with quiet():
            model.save_pretrained(folder)
        if source.image_processor is None:
            source.tokenizer.save_pretrained(folder)
        else:
            processor = LoTLIPProcessor(image_processor=source.image_processor, tokenizer=source.tokenizer)
            processor.save_pretrained(folder)
        num_parameters, dtype = model.num_parameters(), model.dtype
        del model
        difference = _check_saved(folder, source, new_positions, stretch, compared_tokens)
    checked = f"outputs differ from CLIP's by at most {difference:.1e} of their norm"
    if new_positions > old_positions:
        limit = f", outputs for texts of up to {compared_tokens} tokens{checked.removeprefix('outputs')}"
        checked = (
            f"{old_positions} positions stretched to {new_positions} ({stretch}){limit if compared_tokens else ''}"
        )
    pictures = ""
    if source.image_processor is not None:
        size = source.model.config.vision_config.image_size
        pictures = f", images of {size} x {size} pixels"
    report(f"{num_parameters:,} parameters in {str(dtype).removeprefix('torch.')}; {checked}")
    report(f"{num_corner_tokens} corner tokens, texts of up to {new_positions} tokens{pictures}")
    return Path(output)


# Reading


class _Location(NamedTuple):
    """A folder, a Hub repository, or a folder in a Hub repository."""

    source: str
    subfolder: str = ""

    def __str__(self) -> str:
        return f"{self.source}/{self.subfolder}" if self.subfolder else self.source

    def find(self, *names: str) -> Path | None:
        """Returns the first of these files that exists."""
        for name in names:
            if Path(self.source).is_dir():
                path = Path(self.source, self.subfolder, name)
                if path.is_file():
                    return path
                continue
            try:
                return Path(hf_hub_download(self.source, name, subfolder=self.subfolder or None))
            except EntryNotFoundError:
                continue
        return None


def _read(
    clip: str, tokenizer: str | None, open_clip_config: str | None, activation: Activation | None, subfolder: str
) -> _Source:
    path, location = Path(clip), _Location(clip, subfolder)
    unused = {"--open-clip-config": open_clip_config, "--activation": activation}
    for option, value in ({"--subfolder": subfolder} if path.is_file() else unused).items():
        if value:
            kind = "a file of weights" if path.is_file() else "not a file of weights"
            raise ConversionError(f"{option} {value}: --clip {clip} is {kind}. Leave {option} out.")
    if path.is_file():
        return _read_open_clip(None, path, open_clip_config, activation, tokenizer)
    checkpoint_name(clip)
    config = location.find("config.json", "model_index.json", OPEN_CLIP_CONFIG)
    if config is None:
        raise ConversionError(
            f"{location}: no config.json or {OPEN_CLIP_CONFIG} (offline: in the cache). Pass a CLIP."
        )
    if config.name == "config.json":
        return _read_transformers(location, read_json(config), tokenizer)
    if config.name == "model_index.json":
        raise ConversionError(
            f"{location} is a whole diffusion pipeline. Pass --subfolder text_encoder or another text encoder."
        )
    weights = location.find(*OPEN_CLIP_WEIGHTS)
    if weights is None:
        raise ConversionError(f"{location}: no {' or '.join(OPEN_CLIP_WEIGHTS)}. Add the weights.")
    return _read_open_clip(location, weights, str(config), None, tokenizer)


def _read_transformers(location: _Location, config: Mapping[str, Any], tokenizer: str | None) -> _Source:
    model_type, names = config.get("model_type"), config.get("architectures") or []
    stock_class = STOCK_CLASSES.get(names[0]) if names else DEFAULT_CLASSES.get(str(model_type))
    what = f"{names[0]} ({model_type!r})" if names else repr(model_type)
    if stock_class is None or model_type not in DEFAULT_CLASSES:
        raise ConversionError(
            f"{location} is a checkpoint of {what}. Pass a {', '.join(stock.__name__ for stock in MODELS)}, or a CLIP "
            "or Long-CLIP of open_clip or OpenAI. (To add positions to a LoTLIP over CLIP's text tower, use "
            "lotlip_hf.diffusion.stretch.stretch_text_model.)"
        )
    model = load_strict(stock_class, location.source, subfolder=location.subfolder)
    image_processor = None
    if stock_class is CLIPModel:
        with naming_damage(str(location)), quiet():
            image_processor = AutoImageProcessor.from_pretrained(
                location.source, subfolder=location.subfolder, trust_remote_code=False
            )
    return _Source(model, _load_tokenizer(_tokenizer_location(location, tokenizer)), image_processor)


def _tokenizer_location(location: _Location, tokenizer: str | None) -> _Location:
    """The given tokenizer, the model's own, or the one of a pipeline (`tokenizer_2` for `text_encoder_2`)."""
    if tokenizer is not None:
        return _Location(tokenizer)
    if location.find(*TOKENIZER_FILES):
        return location
    if location.subfolder:
        *above, last = location.subfolder.split("/")
        return _Location(location.source, "/".join([*above, last.replace("text_encoder", "tokenizer")]))
    folder = Path(location.source).resolve()
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    return _Location(str(beside)) if beside.is_dir() else location


def _read_open_clip(
    location: _Location | None, weights: Path, config: str | None, activation: Activation | None, tokenizer: str | None
) -> _Source:
    """Reads weights and their tokenizer. For a single file, `location` is `None`."""
    model, image_processor, hf_tokenizer_name = read_open_clip(weights, config, activation)
    tokenizer_location = _Location(tokenizer or hf_tokenizer_name or CLIP_TOKENIZER)
    if tokenizer is None and location is not None and location.find(*TOKENIZER_FILES):
        tokenizer_location = location
    return _Source(model, _load_tokenizer(tokenizer_location), image_processor)


def _load_tokenizer(location: _Location) -> PreTrainedTokenizerBase:
    advice = "pass a folder or the Hub id of a CLIP with --tokenizer"
    described = None
    with contextlib.suppress(OSError):  # `load_tokenizer` raises the error
        described = location.find("tokenizer_config.json")
    name = None if described is None else read_json(described).get("tokenizer_class")
    tokenizer_class = CLIPTokenizer if name in TOKENIZER_CLASSES else AutoTokenizer
    return load_tokenizer(location.source, advice, tokenizer_class=tokenizer_class, subfolder=location.subfolder)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, text_config: Any) -> None:
    """Checks that the token ids fit the model and that texts end with the token at which the model pools."""
    ids, name = tokenizer("a")["input_ids"], tokenizer.name_or_path
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    read_at = text_config.eos_token_id
    if read_at == LEGACY_EOS_TOKEN_ID:
        read_at = tokenizer.vocab_size - 1  # the highest id, without added tokens
    problem = None
    if first is None or last is None or (ids[0], ids[-1]) != (first, last) or tokenizer.pad_token_id is None:
        problem = "it cannot pad, or does not put texts between [SOT] and [EOT] as CLIP's does"
    elif len(tokenizer) > text_config.vocab_size:
        problem = f"it has {len(tokenizer)} tokens, but the text tower has {text_config.vocab_size}"
    elif last != read_at:
        problem = f"its texts end with id {last}, but the model pools at id {read_at}"
    if problem is not None:
        raise ConversionError(f"--tokenizer {name}: {problem}. Pass the tokenizer of this CLIP.")


# Building


def _own_name(name: str, stock_class: type[PreTrainedModel]) -> str:
    """Name of a stock class's tensor in the LoTLIP class."""
    if stock_class is CLIPTextModel:
        return f"backbone.{name}"
    for tower in ("text_model.", "vision_model."):
        if name.startswith(tower):
            return f"{tower}backbone.{name[len(tower) :]}"
    return name


def _backbone_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings of a CLIP's configuration, without the names of its folder and class."""
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "architectures")}


def _to_lotlip(
    clip: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_corner_tokens: int, seed: int
) -> PreTrainedModel:
    """Creates a LoTLIP with the weights of a CLIP and new corner tokens."""
    backbone_config = {
        **_backbone_settings(clip.config.get_text_config()),
        # Old configurations have wrong ids or lack them.
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    projection = getattr(clip, "text_projection", None)
    projection_dim = None if projection is None else projection.out_features
    config = LoTLIPTextConfig(
        backbone_config=backbone_config, num_corner_tokens=num_corner_tokens, projection_dim=projection_dim
    )
    corner_size = (num_corner_tokens, config.hidden_size)
    corners = "corner_embeds" if type(clip) is CLIPTextModel else "text_model.corner_embeds"
    initializer_range = config.initializer_range
    if isinstance(clip, CLIPModel):
        config = LoTLIPConfig(
            text_config=config,
            vision_config=LoTLIPVisionConfig(
                backbone_config=_backbone_settings(clip.config.vision_config),
                pooling="pooler",
                projection_dim=projection_dim,
            ),
            projection_dim=projection_dim,
            logit_scale_init_value=clip.config.logit_scale_init_value,
        )
    with torch.device("meta"):
        model = MODELS[type(clip)](config)
    state_dict = {_own_name(name, type(clip)): tensor.clone() for name, tensor in clip.state_dict().items()}
    if num_corner_tokens:
        generator = torch.Generator().manual_seed(seed)
        state_dict[corners] = torch.randn(corner_size, generator=generator).mul(initializer_range).to(clip.dtype)
    model.load_state_dict(state_dict, assign=True)
    return model


# Checking


def _check_saved(folder: Path, source: _Source, max_positions: int, stretch: Stretch, compared_tokens: int) -> float:
    """Compares the saved weights, token ids and outputs with the CLIP's. Returns the largest difference of outputs."""
    stock_class, clip = type(source.model), source.model
    model = load_strict(MODELS[stock_class], folder)
    saved = model.state_dict()
    positions = "text_model.embeddings.position_embedding.weight"
    if stock_class is CLIPTextModel:
        positions = positions.removeprefix("text_model.")
    differing = []
    for name, tensor in clip.state_dict().items():
        if name == positions:
            tensor = stretch_positions(tensor, max_positions, stretch)
        if not same_bits(saved[_own_name(name, stock_class)], tensor):
            differing.append(name)
    if differing:
        raise ConversionError(f"These tensors differ from the CLIP's after saving and loading: {differing}")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = [one(SAMPLE_TEXTS, truncation=True)["input_ids"] for one in (tokenizer, source.tokenizer)]
    if ids[0] != ids[1]:
        raise ConversionError("After saving and loading, the token ids differ from those of the CLIP's tokenizer.")
    difference = _largest_difference(model.float(), clip.float(), tokenizer, compared_tokens)
    if not difference <= TOLERANCE:  # also for NaN
        raise ConversionError(
            f"The outputs for random inputs differ from CLIP's by {difference:.1e} of their norm after saving and "
            f"loading. At most {TOLERANCE} is expected."
        )
    return difference


@torch.inference_mode()
def _largest_difference(
    model: PreTrainedModel, clip: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> float:
    """
    Largest difference of outputs, relative to the norm of each output, for random images and for random texts of up to
    `max_length` tokens, padded, with and without an attention mask.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = []
    if max_length:
        first, last = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        lengths = [round(2 + (max_length - 2) * part) for part in (0, 0.3, 0.6, 1)]
        input_ids = torch.full((len(lengths), max_length), int(tokenizer.pad_token_id))
        attention_mask = torch.zeros_like(input_ids)
        for row, length in enumerate(lengths):
            # Draw ids below [EOT]: a config with the legacy `eos_token_id` pools at the highest id of a text.
            input_ids[row, :length] = torch.randint(max(1, last), (length,), generator=generator)
            input_ids[row, 0], input_ids[row, length - 1], attention_mask[row, :length] = first, last, 1
        for mask in (None, attention_mask):
            own, theirs = _text_answers(model, input_ids, mask), _text_answers(clip, input_ids, mask)
            pairs += zip(own, theirs, strict=True)
    if isinstance(clip, CLIPModel):
        vision = clip.config.vision_config
        pixel_values = torch.randn(2, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
        pairs.append(tuple(one.get_image_features(pixel_values).pooler_output for one in (model, clip)))
    largest = [((own - theirs) / theirs.norm(dim=-1, keepdim=True)).abs().max().item() for own, theirs in pairs]
    return math.nan if any(map(math.isnan, largest)) else max(largest, default=0.0)


def _text_answers(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and features (projected, if the model has a projection)."""
    if hasattr(model, "get_text_features"):
        outputs = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    else:
        outputs = model(input_ids=input_ids, attention_mask=attention_mask)
    features = outputs.text_embeds if "text_embeds" in outputs else outputs.pooler_output
    return outputs.last_hidden_state, features


DESCRIPTION = """\
Convert a CLIP of transformers, open_clip, OpenAI or Long-CLIP, or its text encoder, to LoTLIP.

  lotlip convert clip --clip openai/clip-vit-base-patch32 --max-positions 248 --output lotlip-clip
  lotlip convert open-clip --clip longclip-L.pt --output lotlip-long-clip
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in the module's docstring. Returns the exit status: 0, or 2 after a printed error."""
    return run("lotlip convert clip", lambda: _main(argv))


def parser(prog: str = "lotlip convert clip") -> Parser:
    """Returns the parser of the command."""
    flags = Parser(prog=prog, description=DESCRIPTION)
    group = flags.add_argument_group("Conversion")
    group.add_argument(
        "--clip", required=True, metavar="NAME", help="Folder, Hub id or file of a CLIP or its text encoder (required)"
    )
    group.add_argument("--output", required=True, metavar="FOLDER", help="Folder to write (required)")
    group.add_argument("--subfolder", default="", metavar="NAME", help="Subfolder of --clip, such as text_encoder")
    group.add_argument(
        "--tokenizer", metavar="NAME", help=f"Folder or Hub id (default: the CLIP's own; for files {CLIP_TOKENIZER})"
    )
    group = flags.add_argument_group("New weights")
    group.add_argument(
        "--num-corner-tokens", type=int, default=2, metavar="N", help="Corner tokens to add (default: %(default)s)"
    )
    group.add_argument(
        "--max-positions", type=int, metavar="N", help="New number of text positions (default: unchanged)"
    )
    group.add_argument(
        "--stretch",
        choices=get_args(Stretch),
        help="How positions are added: knowledge-preserved keeps the first 20 and interpolates the others, linear "
        "interpolates all (default: knowledge-preserved)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="Seed of the corner tokens (default: %(default)s)"
    )
    group = flags.add_argument_group("Files of open_clip, OpenAI and Long-CLIP")
    group.add_argument("--open-clip-config", metavar="FILE", help="Configuration of the file, as open_clip writes it")
    group.add_argument(
        "--activation", choices=get_args(Activation), help="Activation of a file without a configuration"
    )
    return flags


def _main(argv: Sequence[str] | None) -> None:
    arguments = parser().parse_args(argv)
    lines: list[str] = []
    written = convert(**vars(arguments), report=lines.append)
    print("\n  ".join([f"Wrote {written}", *lines]))


if __name__ == "__main__":
    raise SystemExit(main())
