"""A small model for Scenes with random weights, and its processor, made without downloads."""

import re
import string
from typing import Literal

import torch

from ..images import official_image_processor
from ..modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .dataset import BACKGROUNDS, CELL_NAMES, COLOURS, GRID, SHAPES, WORDS

# Words of the captions that are not in the constants of `dataset`.
OTHER_WORDS = (
    "a above all and are background be below between biggest can circles crosses diamonds drawing eight eleven five "
    "four front has inside is it its largest lies nine nothing picture plain see seen seven shape shapes shows six "
    "squares stars ten the there thirteen three to triangles twelve two with you"
)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
IMAGE_SIZE = 64
# Each patch is one cell of a picture, so that the tower need not learn which patches form an object.
PATCH_SIZE = IMAGE_SIZE // GRID
# Gain of the value and output weights of attention at initialisation, because uniform attention shrinks the values.
ATTENTION_GAIN = 1.7
LONGEST_PERIOD = 100  # longest period of the position embeddings, in tokens divided by 2 pi


def small_model(
    num_corner_tokens: int = 2,
    max_text_length: int = 192,
    seed: int = 0,
    hidden_size: int = 96,
    num_hidden_layers: int = 2,
    cleaning: Literal["official", "sentences"] = "official",
) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """
    Creates a model with random weights that learns Scenes (`lotlip_hf.scenes.dataset`) in minutes on a CPU: a BERT and
    a ViT with a few hundred thousand parameters. The vocabulary has the words of Scenes, and other words are split
    into letters. After 700 steps of batch size 64 on whole captions (`num_sentences=0`) of 5,000 scenes, the model
    reached a long-text R@1 of 69 % in both directions over 500 held-out scenes.

    With the usual initialisation, towers of this size learn nothing for hundreds of steps, depending on the seed. With
    the initialisation below, the embeddings of different pictures and texts differ from the first step. All weights
    are trained.

    - The standard deviation of weights is one over the square root of the width, which preserves the scale of hidden
      states. The attention weights of the text tower are larger.
    - The position embeddings of the text tower are the sinusoids of Vaswani et al. (2017, section 3.5). Sinusoids
      relate neighbouring words, also at positions that training never reaches.
    - The patch filters respond to colours and not to brightness, which depends mostly on the background. The position
      embeddings of the image tower have the same scale as the patch embeddings.

    Args:
        num_corner_tokens (`int`, *optional*, defaults to 2): Number of corner tokens.
        max_text_length (`int`, *optional*, defaults to 192): Maximum length of a text in tokens, with [CLS] and [SEP].
            The captions of Scenes have at most about 160.
        seed (`int`, *optional*, defaults to 0): Seed of the weights. The global random generator is not changed.
        hidden_size (`int`, *optional*, defaults to 96): Width of both towers and of the embeddings, a multiple of 4.
        num_hidden_layers (`int`, *optional*, defaults to 2): Number of layers of each tower.
        cleaning (`str`, *optional*, defaults to `"official"`): How the tokenizer ends sentences (see
            [`LoTLIPTokenizer`]).

    Returns:
        `tuple[LoTLIPModel, LoTLIPProcessor]`: The model, in evaluation mode, and its processor.

    Example:

    ```python
    >>> from lotlip_hf.scenes.small import small_model

    >>> model, processor = small_model(num_corner_tokens=2)
    >>> processor.tokenizer.tokenize("A large red star")
    ['a', 'large', 'red', 'star']
    ```
    """
    tokenizer = LoTLIPTokenizer(
        vocab={token: number for number, token in enumerate(_vocabulary())},
        model_max_length=max_text_length,
        cleaning=cleaning,
    )
    size = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": hidden_size**-0.5,
    }
    text_config = LoTLIPTextConfig(
        backbone_config={
            "model_type": "bert",
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max_text_length + num_corner_tokens,
            **size,
        },
        num_corner_tokens=num_corner_tokens,
        pooling="cls",
        projection_dim=hidden_size,
    )
    vision_config = LoTLIPVisionConfig(
        backbone_config={"model_type": "vit", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **size},
        pooling="cls",
        projection_dim=hidden_size,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LoTLIPModel(LoTLIPConfig(text_config=text_config, vision_config=vision_config))
        _start_text(model.text_model)
        _start_vision(model.vision_model)
    return model.eval(), LoTLIPProcessor(official_image_processor(IMAGE_SIZE), tokenizer)


def _vocabulary() -> list[str]:
    """Returns the special tokens, the words of Scenes, and all characters, both at the start of and inside words."""
    names = [*COLOURS, *BACKGROUNDS, *SHAPES, *(name for names in (*WORDS.values(), *CELL_NAMES) for name in names)]
    words = {word for phrase in (*names, OTHER_WORDS) for word in re.findall("[a-z]+", phrase)}
    characters = string.ascii_lowercase + string.digits + string.punctuation
    return [*SPECIAL_TOKENS, *sorted(words.union(characters)), *(f"##{character}" for character in characters)]


def _start_text(tower: LoTLIPTextModel) -> None:
    for layer in tower.backbone.encoder.layer:
        layer.attention.self.value.weight.mul_(ATTENTION_GAIN)
        layer.attention.output.dense.weight.mul_(ATTENTION_GAIN)
    positions = tower.backbone.embeddings.position_embeddings.weight
    # Position embeddings get the standard deviation of the word embeddings.
    positions.copy_(tower.config.initializer_range * 2**0.5 * _sinusoids(*positions.shape))


def _start_vision(tower: LoTLIPVisionModel) -> None:
    embeddings = tower.backbone.embeddings
    embeddings.position_embeddings.normal_(std=0.5)
    filters = embeddings.patch_embeddings.projection.weight  # [hidden_size, 3, PATCH_SIZE, PATCH_SIZE]
    # For a patch of one colour, the constant part of a filter contributes twice as much as the random part.
    filters.normal_().add_(2 / PATCH_SIZE * torch.randn(len(filters), 3, 1, 1))
    filters.sub_(filters.mean(1, keepdim=True)).div_(filters[0].numel() ** 0.5)


def _sinusoids(num_positions: int, size: int) -> torch.Tensor:
    """Returns [num_positions, size]: sines in even columns, cosines in odd ones, from short to long periods."""
    frequencies = LONGEST_PERIOD ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(num_positions)[:, None] * frequencies  # [num_positions, size / 2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
