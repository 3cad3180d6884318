"""A small model for Scenes, from random weights, with a processor that needs no file."""

import re
import string
from typing import Literal

import torch

from ..images import official_image_processor
from ..modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .dataset import BACKGROUNDS, COLOURS, GRID, PLACES, SHAPES, WORDS

# Words of the captions beside those that name things and places.
OTHER_WORDS = (
    "a above all and are background be below between biggest can circles crosses diamonds drawing eight eleven five "
    "four front has inside is it its largest lies nine nothing picture plain see seen seven shape shapes shows six "
    "squares stars ten the there thirteen three to triangles twelve two with you"
)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
IMAGE_SIZE = 64
# A patch is a cell of the pictures' grid: the tower need not learn which patches make one object.
PATCH_SIZE = IMAGE_SIZE // GRID
# How much larger than other weights those start that hand on what a text's words say: an average of many is small.
ATTENTION_GAIN = 1.7
LONGEST_PERIOD = 100  # in tokens, times 2 pi, of the first position embeddings


def small_model(
    num_corner_tokens: int = 2,
    max_text_length: int = 192,
    seed: int = 0,
    hidden_size: int = 96,
    num_hidden_layers: int = 2,
    cleaning: Literal["official", "sentences"] = "official",
) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """
    A new model from random weights, a BERT and a ViT of a few hundred thousand parameters, made to learn Scenes
    (`lotlip_hf.scenes.dataset`) in minutes on a CPU. Its vocabulary is that of the captions of Scenes; of other words
    it sees the letters. With whole captions for long texts (`num_sentences=0`), 700 steps of 64 of 5,000 scenes
    reached a long-text R@1 of 69 % in both directions over 500 held-out scenes.

    From the usual weights such towers learn nothing for hundreds of steps, and how many depends on the seed. These
    start so that the embeddings tell pictures and texts apart from the first step; all of it is trained further.

    - Weights have a deviation of one over the square root of the width, at which a layer hands on what it reads, and
      the text's attention a larger one.
    - The text's position embeddings are the sinusoids of Vaswani et al. (2017, section 3.5), by which a word finds its
      neighbours, also at positions that training never reaches.
    - The filters of the patches see colours, not brightness, which the background decides on, and the positions of
      the patches are as large as what these see.

    Args:
        num_corner_tokens: Corner tokens m.
        max_text_length: Tokens of a text, [CLS] and [SEP] included, that it is cut at. The captions of Scenes have at
            most about 160.
        seed: The same one gives the same weights. The global random number generator is left as it is.
        hidden_size: Width of both towers, and of the space that they share; a multiple of 4.
        num_hidden_layers: Layers of either tower.
        cleaning: Where the tokenizer ends sentences, see [`LoTLIPTokenizer`].

    Returns:
        The model, in evaluation mode, and its processor.

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
    """The special tokens, the words of Scenes, and every letter, digit and mark, alone and inside a word."""
    names = [*COLOURS, *BACKGROUNDS, *SHAPES, *(name for names in (*WORDS.values(), *PLACES) for name in names)]
    words = {word for phrase in (*names, OTHER_WORDS) for word in re.findall("[a-z]+", phrase)}
    characters = string.ascii_lowercase + string.digits + string.punctuation
    return [*SPECIAL_TOKENS, *sorted(words.union(characters)), *(f"##{character}" for character in characters)]


def _start_text(tower: LoTLIPTextModel) -> None:
    for layer in tower.backbone.encoder.layer:
        layer.attention.self.value.weight.mul_(ATTENTION_GAIN)
        layer.attention.output.dense.weight.mul_(ATTENTION_GAIN)
    positions = tower.backbone.embeddings.position_embeddings.weight
    # of the deviation of the word embeddings that they are added to
    positions.copy_(tower.config.initializer_range * 2**0.5 * _sinusoids(*positions.shape))


def _start_vision(tower: LoTLIPVisionModel) -> None:
    embeddings = tower.backbone.embeddings
    embeddings.position_embeddings.normal_(std=0.5)
    filters = embeddings.patch_embeddings.projection.weight  # [hidden_size, 3, PATCH_SIZE, PATCH_SIZE]
    # of a patch in one colour, the colour all over a filter makes twice as much as the differences within
    filters.normal_().add_(2 / PATCH_SIZE * torch.randn(len(filters), 3, 1, 1))
    filters.sub_(filters.mean(1, keepdim=True)).div_(filters[0].numel() ** 0.5)


def _sinusoids(num_positions: int, size: int) -> torch.Tensor:
    """[num_positions, size]: sines in the even columns, cosines in the odd ones, from short periods to long ones."""
    frequencies = LONGEST_PERIOD ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(num_positions)[:, None] * frequencies  # [num_positions, size / 2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
