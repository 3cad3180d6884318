"""Regions of images: their boxes, and heads that turn boxes into embeddings and embeddings into boxes."""

import os
from io import BytesIO
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .files import FileError, one_line, read_regular

STATE = "state/objective.pt"  # in a checkpoint of a run
HEAD_WIDTH = 64  # of attention, in wide heads
MIN_HEADS = 4  # with one head, a narrow pooler does not learn to locate texts
NUM_WAVES = 6  # wavelengths of a coordinate: 2, 1, 1/2, ...
MAX_ORDERS = 200_000


class RegionPooler(nn.Module):
    """
    The prompter of CLOC (https://arxiv.org/abs/2410.02746): a layer of attention reads the embedding of a region from
    the patches of an image, given its box. With `locates`, a second layer reads the box of a region, given its text.

    Args:
        dim (`int`): Size of the embeddings of the model.
        width (`int`, *optional*, defaults to 256): Width of the layer, a multiple of its number of heads: 4, or
            `width // 64` if that is more.
        locates (`bool`, *optional*, defaults to `False`): Whether [`~RegionPooler.locate`] can be called.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.regions import RegionPooler

    >>> pooler = RegionPooler(dim=32)
    >>> patches, boxes = torch.rand(2, 49, 32), torch.tensor([[[0.0, 0.0, 0.5, 0.5]]] * 2)
    >>> pooler(patches, boxes).shape
    torch.Size([2, 1, 32])
    ```
    """

    def __init__(self, dim: int, width: int = 256, locates: bool = False) -> None:
        super().__init__()
        self.patches = nn.Linear(dim, width)
        self.norm = nn.LayerNorm(width)  # the patches are unit vectors: without it, attention is uniform
        self.box = nn.Sequential(nn.Linear(8 * NUM_WAVES, width), nn.GELU(), nn.Linear(width, width))
        self.reader = _Reader(width)
        self.embedding = nn.Linear(width, dim)
        self.text = nn.Linear(dim, width) if locates else None
        self.locator = _Reader(width) if locates else None  # with the reader of boxes it would learn later
        self.corners = _box_head(width) if locates else None

    def forward(
        self, patch_embeds: torch.Tensor, boxes: torch.Tensor, patch_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Returns the normalised embeddings [B, R, dim] of regions.

        Args:
            patch_embeds (`torch.Tensor`): Patches [B, P, dim] of the images, as
                `model(pixel_values=..., output_patch_embeds=True).patch_embeds`.
            boxes (`torch.Tensor`): Boxes [B, R, 4], x0, y0, x1, y1 in [0, 1] from the top left corner of the image as
                the model sees it, after the centre crop of its image processor.
            patch_mask (`torch.Tensor`, *optional*): Mask [B, P], `False` for padding: `pixel_attention_mask` of
                SigLIP 2 NaFlex.
        """
        states = self.reader(self.box(_waves(boxes)), self.norm(self.patches(patch_embeds)), patch_mask)
        return F.normalize(self.embedding(states), dim=-1)

    def locate(
        self, patch_embeds: torch.Tensor, text_embeds: torch.Tensor, patch_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Returns the boxes [B, R, 4] of texts: centre x, centre y, width and height in [0, 1]. See [`to_corners`].

        Args:
            patch_embeds (`torch.Tensor`): Patches [B, P, dim] of the images.
            text_embeds (`torch.Tensor`): Normalised embeddings [B, R, dim] of texts.
            patch_mask (`torch.Tensor`, *optional*): Mask [B, P], `False` for padding: `pixel_attention_mask` of
                SigLIP 2 NaFlex.
        """
        if self.text is None or self.locator is None or self.corners is None:
            raise ValueError("This `RegionPooler` has no part that locates texts. Train it with a weight `grounding`.")
        states = self.locator(self.text(text_embeds), self.norm(self.patches(patch_embeds)), patch_mask)
        return self.corners(states).sigmoid()


class RegionQueries(nn.Module):
    """
    The region queries of GRAIN (https://arxiv.org/abs/2412.04429): a decoder turns the patches of an image into a
    fixed number of boxes with embeddings. GRAIN's decoder has a further query for the whole image; here the image
    embedding is that of the model.

    Args:
        dim (`int`): Size of the embeddings of the model.
        queries (`int`, *optional*, defaults to 5): Number of boxes.
        layers (`int`, *optional*, defaults to 6): Number of layers of the decoder.
        width (`int`, *optional*, defaults to 512): Width of the decoder, a multiple of its number of heads: 4, or
            `width // 64` if that is more.
    """

    def __init__(self, dim: int, queries: int = 5, layers: int = 6, width: int = 512) -> None:
        super().__init__()
        if queries < 1 or layers < 1:
            raise ValueError(f"`queries` and `layers` must be at least 1, got {queries} and {layers}.")
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.patches = nn.Linear(dim, width, bias=False)
        self.patch_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, _num_heads(width), 4 * width, **options) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.boxes = _box_head(width)
        self.embedding = nn.Linear(width, dim, bias=False)

    def forward(
        self, patch_embeds: torch.Tensor, patch_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the boxes [B, Q, 4] of images (centre x, centre y, width and height in [0, 1], see [`to_corners`]), and
        their normalised embeddings [B, Q, dim].

        Args:
            patch_embeds (`torch.Tensor`): Patches [B, P, dim] of the images.
            patch_mask (`torch.Tensor`, *optional*): Mask [B, P], `False` for padding: `pixel_attention_mask` of
                SigLIP 2 NaFlex.
        """
        patches = self.patch_norm(self.patches(patch_embeds))
        states = self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            states = layer(states, patches, memory_key_padding_mask=_inverse(patch_mask))
        states = self.norm(states)
        return self.boxes(states).sigmoid(), F.normalize(self.embedding(states), dim=-1)


def load_pooler(checkpoint: str | os.PathLike) -> RegionPooler:
    """
    Loads the head that a run with the term `region_text` trained.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder `checkpoint-N` of the run. The published model has no heads.

    Raises:
        `FileError`: If the folder has no such head.
    """
    weights = _head(Path(checkpoint), "terms.region_text.pooler.")
    pooler = RegionPooler(
        dim=weights["patches.weight"].shape[1],
        width=weights["patches.weight"].shape[0],
        locates="text.weight" in weights,
    )
    pooler.load_state_dict(weights)
    return pooler.eval()


def load_queries(checkpoint: str | os.PathLike) -> RegionQueries:
    """
    Loads the head that a run with the term `regions` trained.

    Args:
        checkpoint (`str` or `os.PathLike`): See [`load_pooler`].

    Raises:
        `FileError`: If the folder has no such head.
    """
    weights = _head(Path(checkpoint), "terms.regions.head.")
    width, dim = weights["patches.weight"].shape
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    head = RegionQueries(dim, queries=len(weights["queries"]), layers=layers, width=width)
    head.load_state_dict(weights)
    return head.eval()


def to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """Converts boxes [..., 4] from centre x, centre y, width and height to x0, y0, x1, y1."""
    centres, sizes = boxes.split(2, dim=-1)
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)


def to_centres(boxes: torch.Tensor) -> torch.Tensor:
    """Converts boxes [..., 4] from x0, y0, x1, y1 to centre x, centre y, width and height."""
    first, last = boxes.split(2, dim=-1)
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def overlaps(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the intersection over union, and the generalised one (https://arxiv.org/abs/1902.09630), of boxes.

    Args:
        boxes, others (`torch.Tensor`): Boxes [..., 4], x0, y0, x1, y1, of shapes that broadcast.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.regions import overlaps

    >>> overlaps(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.5, 1.0]))
    (tensor(0.5000), tensor(0.5000))
    ```
    """
    (a0, a1), (b0, b1) = boxes.split(2, dim=-1), others.split(2, dim=-1)
    area = _area(torch.minimum(a1, b1) - torch.maximum(a0, b0))
    union = _area(a1 - a0) + _area(b1 - b0) - area
    hull = _area(torch.maximum(a1, b1) - torch.minimum(a0, b0))
    least = torch.finfo(union.dtype).eps  # boxes without an area
    iou = area / union.clamp(min=least)
    return iou, iou - (hull - union) / hull.clamp(min=least)


def match(costs: torch.Tensor) -> torch.Tensor:
    """
    Assigns a different query to each region, with the least sum of costs. All assignments are compared.

    Args:
        costs (`torch.Tensor`): Costs [B, Q, R], Q >= R.

    Returns:
        `torch.Tensor`: Indices [B, R] of the queries.

    Raises:
        `ValueError`: If there are fewer queries than regions, or too many assignments.
    """
    num_queries, num_regions = costs.shape[1:]
    number = 1
    for each in range(num_queries - num_regions + 1, num_queries + 1):
        number *= each
    if not 0 < number <= MAX_ORDERS:
        raise ValueError(
            f"{num_regions} regions cannot be matched with {num_queries} `queries`: there must be as many queries, "
            f"and at most {MAX_ORDERS:,} assignments. Change --num-regions or --term-options regions.queries=N."
        )
    orders = torch.tensor([*permutations(range(num_queries), num_regions)], device=costs.device)  # [M, R]
    totals = costs[:, orders, torch.arange(num_regions, device=costs.device)].sum(2)  # [B, M]
    return orders[totals.argmin(1)]


class _Reader(nn.Module):
    """Attention of prompts [B, R, width] to patches [B, P, width]. Prompts do not see each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, _num_heads(width), batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, prompts: torch.Tensor, patches: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        seen = self.attention(self.norm(prompts), patches, patches, _inverse(mask), need_weights=False)[0]
        states = prompts + seen
        return states + self.mlp(states)


def _inverse(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else ~mask.bool()


def _num_heads(width: int) -> int:
    number = max(MIN_HEADS, width // HEAD_WIDTH)
    if width < 1 or width % number:
        raise ValueError(f"`width` must be a multiple of {number}, its number of heads, got {width}.")
    return number


def _box_head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def _waves(boxes: torch.Tensor) -> torch.Tensor:
    """Returns sines and cosines [..., 8 * NUM_WAVES] of the corners of boxes [..., 4]."""
    frequencies = torch.pi * 2.0 ** torch.arange(NUM_WAVES, device=boxes.device, dtype=boxes.dtype)
    angles = (boxes.unsqueeze(-1) * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _area(sizes: torch.Tensor) -> torch.Tensor:
    return sizes.clamp(min=0).prod(-1)


def _head(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Reads the weights of a head of the objective. Only tensors are loaded, so that a file cannot run code."""
    file = checkpoint / STATE
    try:
        saved = torch.load(BytesIO(read_regular(file)), map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(file, error.strerror or type(error).__name__) from error
    except Exception as error:  # torch raises many classes on a damaged file
        raise FileError(file, one_line(error)) from error
    weights = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    if not weights:
        raise FileError(file, f"no head of the term {prefix.split('.')[1]}")
    return weights
