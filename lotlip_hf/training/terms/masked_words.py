"""The term of GA-DMS and LightCLIP: a head predicts the masked words of a text from its tokens and the image."""

import torch
from torch import nn
from torch.nn import functional as F

from ...data.masking import IGNORED
from ...distributed import sum_over_ranks, world_size
from .views import PATCHES, Views, mask_of_patches


class MaskedWords(nn.Module):
    """
    The prediction of masked words of GA-DMS (https://arxiv.org/abs/2509.09118): cross entropy of the tokens that are
    masked in a text of an image, averaged over the masked tokens of all processes. The head adds to each token what it
    sees by attention to the patches. Layers of attention between tokens and a classifier follow. GA-DMS has no
    residual connection around the first attention. With it the head learns sooner, and makes more use of the image.

    Words are masked by their scores with `--word-scores`, else uniformly, as LightCLIP does
    (https://arxiv.org/abs/2312.00674). GA-DMS has weight 0.3.

    Args:
        num_layers (`int`, *optional*, defaults to 4): Number of layers.
        projection_dim (`int`, *optional*, defaults to 512): Size of the embeddings.
        vocab_size (`int`, *optional*, defaults to 30522): Number of tokens.

    Raises:
        `ValueError`: If `num_layers` is below 1.
    """

    needs = frozenset({"patch_embeds", "masked_token_embeds", "masked_token_mask", "masked_labels", *PATCHES})

    def __init__(self, num_layers: int = 4, projection_dim: int = 512, vocab_size: int = 30522) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {num_layers}.")
        dim = projection_dim
        heads = next(number for number in range(max(1, dim // 64), 0, -1) if dim % number == 0)
        self.token_norm, self.patch_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, vocab_size))

    def forward(self, views: Views) -> torch.Tensor:
        labels = views["masked_labels"].squeeze(1)
        patches, tokens = self.patch_norm(_filled(views["patch_embeds"])), _filled(views["masked_token_embeds"])
        padding, mask = ~_filled(views["masked_token_mask"]), mask_of_patches(views)
        tokens = self.token_norm(tokens)
        seen = tokens + self.attention(tokens, patches, patches, None if mask is None else ~mask)[0]
        is_masked = labels != IGNORED
        logits = self.head(self.layers(seen, src_key_padding_mask=padding)[: len(labels)][is_masked])
        loss = F.cross_entropy(logits, labels[is_masked], reduction="sum")
        return loss * world_size() / sum_over_ranks(is_masked.sum()).clamp(min=1)


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    """Adds a sample to a batch without samples, which attention refuses."""
    return tensor if len(tensor) else torch.cat([tensor, tensor.new_ones(1, *tensor.shape[1:])])
