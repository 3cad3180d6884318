"""The model of a run: a checkpoint, two encoders, or a small new one; and how it computes while it is trained."""

from transformers import AutoTokenizer

# transformers 5.17 exports it only where torchvision is installed
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..backbones import from_backbones
from ..loading import check_image_sizes, fit_tokenizer, load_model, max_text_length
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .config import SCENES, TrainingConfig

NUM_CORNER_TOKENS = 2
# Positions of the released models, corner tokens included.
CONTEXT_LENGTH = 128


def load_or_start_model(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """
    The model that `config` names: a checkpoint, or a new one from two pretrained encoders (LiT,
    https://arxiv.org/abs/2111.07991) or, for Scenes, from random weights.

    Args:
        config (`TrainingConfig`): its part "The model".

    Returns:
        `tuple[LoTLIPModel, LoTLIPProcessor]`: the model, on the CPU, in float32, and its processor.

    Raises:
        ValueError: if options contradict each other or the checkpoint, or the checkpoint is not a LoTLIP model.
        OSError: if there is no such checkpoint.
    """
    has_encoders = config.text_model is not None or config.image_model is not None
    if (config.model is None) != has_encoders or (config.text_model is None) != (config.image_model is None):
        raise ValueError(
            f"Set `model` (a checkpoint to train further, or {SCENES!r} for a new small one), or both `text_model` "
            "and `image_model` (two encoders to start from)."
        )
    for name in ("projection_dim", "text_pooling"):
        if config.model is not None and getattr(config, name) is not None:
            raise ValueError(f"`{name}` is for new models made of two encoders; {config.model} has its own.")
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
                f"{config.model} is a {model.config.model_type!r} checkpoint, not one of LoTLIP. `text_model` and "
                "`image_model` make a new LoTLIP of two encoders."
            )
        number = model.config.text_config.num_corner_tokens
        if config.num_corner_tokens not in (None, number):
            raise ValueError(
                f"`num_corner_tokens` is for new models: {config.model} has {number}, not {config.num_corner_tokens}."
            )
        cleaning = getattr(processor.tokenizer, "cleaning", None)
        if config.cleaning not in (None, cleaning):
            raise ValueError(f"`cleaning` is for new models: {config.model} has {cleaning}, not {config.cleaning}.")
    fit_tokenizer(model, processor.tokenizer, config.max_text_length)
    max_text_length(model, processor.tokenizer)  # complains if there is no limit
    return model, processor


def _from_encoders(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    number = NUM_CORNER_TOKENS if config.num_corner_tokens is None else config.num_corner_tokens
    model = from_backbones(
        config.text_model,
        config.image_model,
        number,
        text_pooling=config.text_pooling,
        projection_dim=config.projection_dim,
    ).float()
    positions = model.config.text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(config.text_model, trust_remote_code=False)
    if tokenizer.sep_token is None:
        if config.cleaning is not None:
            raise ValueError(
                f"`cleaning` is for text encoders with a separator token between sentences, which CLIP's has not: "
                f"leave it out for {config.text_model}."
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
    """Sets how the model computes in training: layers computed again, compiled, texts in one row without padding."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        # an encoder has none, but transformers would warn, and tracing stop, at every layer
        model.config.text_config.backbone_config.use_cache = False
    if config.compile:
        # Tracing fails where checkpointed layers run twice in one graph, for the short and for the long texts.
        parts = (model.text_model, model.vision_model) if config.gradient_checkpointing else (model,)
        for part in parts:
            part.compile(dynamic=True)  # texts of every length
    elif (
        model.text_model.backbone.config._attn_implementation == "sdpa" and model.config.text_config.family.takes_rows
    ):
        model.text_model.set_attn_implementation("unpadded")
