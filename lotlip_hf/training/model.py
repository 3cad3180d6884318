"""The model of a run, from a checkpoint, two pretrained encoders or random weights, and its settings for training."""

from transformers import AutoTokenizer

# transformers 5.17 exports `AutoImageProcessor` only if torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..backbones import from_backbones
from ..loading import check_image_sizes, fit_tokenizer, load_model, max_text_length
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .config import SCENES, TrainingConfig

NUM_CORNER_TOKENS = 2
CONTEXT_LENGTH = 128  # positions of the released models, corner tokens included


def load_or_start_model(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """
    Loads the model of a run: a checkpoint, a new model from two pretrained encoders (LiT,
    https://arxiv.org/abs/2111.07991), or a new small model for Scenes with random weights.

    Args:
        config (`TrainingConfig`): Options of the run. Only the group "The model" is used.

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
    for name in ("projection_dim", "text_pooling", "text_projection", "text_projection_layers"):
        if config.model is not None and getattr(config, name) is not None:
            raise ValueError(f"`{name}` is only for new models made from two encoders. Remove it for {config.model}.")
    if config.model is None:
        model, processor = _from_encoders(config)
    elif config.model == SCENES:
        from ..scenes.small import small_model

        num_corner_tokens = NUM_CORNER_TOKENS if config.num_corner_tokens is None else config.num_corner_tokens
        length = {} if config.max_text_length is None else {"max_text_length": config.max_text_length}
        return small_model(num_corner_tokens, seed=config.seed, cleaning=config.cleaning or "official", **length)
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
    fit_tokenizer(model, processor.tokenizer, config.max_text_length)
    max_text_length(model, processor.tokenizer)  # raises an error if neither has a maximum length
    return model, processor


def _from_encoders(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    number = NUM_CORNER_TOKENS if config.num_corner_tokens is None else config.num_corner_tokens
    model = from_backbones(
        config.text_model,
        config.image_model,
        number,
        text_pooling=config.text_pooling,
        projection_dim=config.projection_dim,
        text_projection=config.text_projection or "linear",
        text_projection_layers=config.text_projection_layers or 4,
    ).float()
    positions = model.config.text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(config.text_model, trust_remote_code=False)
    if tokenizer.sep_token is None:
        if config.cleaning is not None:
            raise ValueError(
                f"`cleaning` needs a tokenizer with a separator token, but the tokenizer of {config.text_model} has "
                "none. Remove the option."
            )
        tokenizer.model_max_length = positions
    else:
        tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(
            tokenizer,
            model_max_length=min(CONTEXT_LENGTH - number, positions),
            cleaning=config.cleaning or "official",
        )
    image_processor = AutoImageProcessor.from_pretrained(config.image_model, trust_remote_code=False)
    check_image_sizes(image_processor, str(config.image_model))
    return model, LoTLIPProcessor(image_processor, tokenizer)


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
    elif (
        model.text_model.backbone.config._attn_implementation == "sdpa" and model.config.text_config.family.takes_rows
    ):
        model.text_model.set_attn_implementation("unpadded")
