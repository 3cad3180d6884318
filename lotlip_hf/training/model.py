"""The model of a run, from a checkpoint, two pretrained encoders or random weights, and its settings for training."""

import json
import math

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..backbones import from_backbones
from ..loading import fit_tokenizer, load_image_processor, load_model, max_text_length, skip_padding
from ..modeling.backbones_lotlip import CLIPTextBackbone
from ..modeling.configuration_lotlip import LoTLIPTextConfig
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from ..sentence_folder import read_sentence_folder
from .config import NEW_MODEL, SCENES, TrainingConfig

NUM_CORNER_TOKENS = 2
CONTEXT_LENGTH = 128  # positions of the released models, corner tokens included


def load_or_start_model(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """
    Loads the model of a run: a checkpoint, a new model from two pretrained encoders (LiT,
    https://arxiv.org/abs/2111.07991), or a new small model for Scenes with random weights.

    Args:
        config (`TrainingConfig`): Options of the run. Only the group "Model" and `seed` are used.

    Returns:
        `tuple[LoTLIPModel, LoTLIPProcessor]`: The model in float32 on the CPU, and its processor.

    Raises:
        `ValueError`: If options contradict each other or the checkpoint, or the checkpoint is not a LoTLIP model.
        `OSError`: If the checkpoint does not exist.
    """
    has_encoders = config.text_model is not None or config.image_model is not None
    if (config.model is None) != has_encoders or (config.text_model is None) != (config.image_model is None):
        raise ValueError(
            "The model to train is not set. Set either `model` (a checkpoint to train further, or "
            f"{SCENES!r} for a new small model), or both `text_model` and `image_model` (two pretrained encoders)."
        )
    for name in NEW_MODEL:
        if config.model is not None and getattr(config, name) is not None:
            raise ValueError(f"`{name}` is only for new models made from two encoders. Remove it for {config.model}.")
    if config.model is None:
        model, processor = _from_encoders(config)
    elif config.model == SCENES:
        from ..scenes.small import small_model

        num_corner_tokens = NUM_CORNER_TOKENS if config.num_corner_tokens is None else config.num_corner_tokens
        length = {} if config.max_text_length is None else {"max_text_length": config.max_text_length}
        options = {"seed": config.seed, "cleaning": config.cleaning or "official", **length}
        model, processor = small_model(num_corner_tokens, **options)
    else:
        model, processor = load_model(config.model, device="cpu", dtype="float32")
        if not isinstance(model, LoTLIPModel):
            raise ValueError(
                f"{config.model} is a {model.config.model_type!r} checkpoint, not a LoTLIP checkpoint. To make a new "
                "LoTLIP from two encoders, set `text_model` and `image_model`."
            )
        number = model.config.text_config.num_corner_tokens
        if config.num_corner_tokens not in (None, number):
            raise ValueError(
                f"`num_corner_tokens` is {config.num_corner_tokens}, but {config.model} has {number}. Remove the "
                "option, which is for new models."
            )
        cleaning = getattr(processor.tokenizer, "cleaning", None)
        if config.cleaning not in (None, cleaning):
            raise ValueError(
                f"`cleaning` is {config.cleaning}, but {config.model} has {cleaning}. Remove the option, which is for "
                "new models."
            )
    vision = model.config.vision_config
    if config.patch_dropout and vision.family.passing_embeddings is None:
        raise ValueError(f"`patch_dropout` does not fit {vision.backbone_config.model_type}. Remove it.")
    fit_tokenizer(model, processor.tokenizer, config.max_text_length)
    max_text_length(model, processor.tokenizer)  # raises an error if neither has a maximum length
    if config.temperature is not None:
        torch.nn.init.constant_(model.logit_scale, -math.log(config.temperature))
    return model, processor


def _from_encoders(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    number = NUM_CORNER_TOKENS if config.num_corner_tokens is None else config.num_corner_tokens
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # the GPUs draw nothing here
            model = from_backbones(
                config.text_model,
                config.image_model,
                number,
                text_pooling=config.text_pooling,
                text_attention=config.text_attention,
                vision_pooling=config.image_pooling,
                pooled_layers=config.image_layers or 1,
                vision_projection=config.lock_vision,
                projection_dim=config.projection_dim,
                text_projection=config.text_projection or "linear",
                text_projection_layers=config.text_projection_layers or 4,
                text_projection_expansion=config.text_projection_expansion or 2,
            ).float()
    except StrictDataclassError as error:  # an option that does not fit the encoder
        raise ValueError(str(error.__cause__ or error)) from error
    tokenizer = _tokenizer(config, model.config.text_config)
    return model, LoTLIPProcessor(load_image_processor(config.image_model), tokenizer)


def _tokenizer(config: TrainingConfig, text_config: LoTLIPTextConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model. CLIP's is used as it is."""
    tokenizer = AutoTokenizer.from_pretrained(config.text_model, trust_remote_code=False)
    has_separator, positions = tokenizer.sep_token is not None, text_config.max_position_embeddings
    folder = read_sentence_folder(config.text_model)
    longest = None if folder is None else folder.max_length or tokenizer.model_max_length
    if isinstance(text_config.family, CLIPTextBackbone) and config.prompt_template is not None:
        raise ValueError("`prompt_template` does not fit CLIP's tokenizer. Remove the option.")
    if not has_separator and config.cleaning is not None:
        raise ValueError(
            f"`cleaning` needs a tokenizer with a separator token, but the tokenizer of {config.text_model} has "
            "none. Remove the option."
        )
    if isinstance(text_config.family, CLIPTextBackbone):
        tokenizer.model_max_length = min(longest or positions, positions)
        return tokenizer
    # Decoders may lack a padding token, and pad on the left.
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    if text_config.pooling == "last" and folder is None:  # else, the start keeps its tokens
        append_end_token(tokenizer)
    template = "{}" if folder is None else f"{folder.prompt}{{}}"
    return LoTLIPTokenizer.from_backbone_tokenizer(
        tokenizer,
        model_max_length=min(longest or CONTEXT_LENGTH - text_config.num_corner_tokens, positions),
        split_sentences=has_separator,
        cleaning=config.cleaning or "official",
        prompt_template=config.prompt_template or template,
    )


def append_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds `eos_token` to the end of each text, unless the tokenizer ends texts with a special token."""
    backend, end = tokenizer.backend_tokenizer, str(tokenizer.eos_token)
    if tokenizer.eos_token is None or backend.encode("a").special_tokens_mask[-1]:
        return
    state = json.loads(backend.to_str())
    given = state["post_processor"] or {"type": "Sequence", "processors": []}
    processors = given["processors"] if given["type"] == "Sequence" else [given]
    templates = [one for one in processors if one["type"] == "TemplateProcessing"]
    if not templates:
        text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        templates = [{"type": "TemplateProcessing", "single": [text], "pair": [text, other], "special_tokens": {}}]
        processors += templates
    templates[0]["special_tokens"][end] = {"id": end, "ids": [tokenizer.eos_token_id], "tokens": [end]}
    for name in ("single", "pair"):
        templates[0][name].append({"SpecialToken": {"id": end, "type_id": 0}})
    state["post_processor"] = {"type": "Sequence", "processors": processors}
    backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor


def describe_text(model: LoTLIPModel, processor: LoTLIPProcessor) -> str:
    """Describes in a line the settings that a new model takes from its text encoder."""
    parts = [f"pooling {model.config.text_config.pooling!r}"]
    template = getattr(processor.tokenizer, "prompt_template", "{}")
    parts.append("no prompt" if template == "{}" else f"prompt {template!r}")
    return ", ".join([*parts, f"texts of up to {processor.tokenizer.model_max_length} tokens"])


def prepare_model(model: LoTLIPModel, config: TrainingConfig) -> None:
    """Applies `gradient_checkpointing` and `compile`; without `compile`, attention skips padding if possible."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        # An encoder has no cache, but with this flag transformers warns, and tracing stops, at every layer.
        model.config.text_config.backbone_config.use_cache = False
    if config.compile:
        # Tracing fails if layers with gradient checkpointing run twice in a graph, for short and for long texts.
        parts = (model.text_model, model.vision_model) if config.gradient_checkpointing else (model,)
        for part in parts:
            part.compile(dynamic=True)  # dynamic: the lengths of texts vary
    else:
        skip_padding(model)
