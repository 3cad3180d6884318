"""The tag term of HQ-CLIP: a linear head on the image embedding predicts the tags of a record."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ...data.record import distinct, texts_digest
from ...distributed import sum_over_ranks, world_size
from ...files import FileError, read_regular
from .views import Views

MAX_TAGS, MAX_BYTES = 100_000, 1 << 24  # of a file


class Tags(nn.Module):
    """
    The tag classification of HQ-CLIP (https://arxiv.org/abs/2507.22431): binary cross entropy of each tag of a
    vocabulary, averaged over the vocabulary and over those samples of all processes that have tags. Tags are equal if
    they differ only in case and white space; tags of a record that are not in the vocabulary are ignored.

    Args:
        vocabulary (`Path`): Text file in UTF-8 with one tag a line, at most 100,000 tags and 16 MiB.
        projection_dim (`int`, *optional*, defaults to 512): Size of the image embeddings.

    Raises:
        `ValueError`: If there is no vocabulary, or the file is too large, empty or not UTF-8.
    """

    needs = frozenset({"image_embeds", "tags"})
    digests: torch.Tensor
    classes: torch.Tensor

    def __init__(self, vocabulary: Path | None = None, projection_dim: int = 512) -> None:
        super().__init__()
        if vocabulary is None:
            raise ValueError("`vocabulary` is missing. Set it to a file with one tag a line.")
        digests = torch.tensor([texts_digest([tag]) for tag in read_vocabulary(vocabulary)])
        self.head = nn.Linear(projection_dim, len(digests))  # tags in the order of the file
        digests, classes = digests.sort()
        # Saved with the head, which belongs to the file that the run started with.
        self.register_buffer("digests", digests)
        self.register_buffer("classes", classes)

    def forward(self, views: Views) -> torch.Tensor:
        has_tags = (views["tags"] != 0).any(1)
        logits = self.head(views["image_embeds"])
        losses = F.binary_cross_entropy_with_logits(logits, self.targets(views["tags"]), reduction="none").mean(1)
        return (losses * has_tags).sum() * world_size() / sum_over_ranks(has_tags.sum()).clamp(min=1)

    def targets(self, tags: torch.Tensor) -> torch.Tensor:
        """Returns 1 for the tags [b, K] of each sample and 0 for the others of the vocabulary, [b, V]."""
        size = len(self.digests)
        indices = torch.searchsorted(self.digests, tags).clamp(max=size - 1)
        classes = torch.where(self.digests[indices] == tags, self.classes[indices], size)
        targets = self.head.weight.new_zeros(len(tags), size + 1)
        return targets.scatter_(1, classes, 1.0)[:, :size]


def read_vocabulary(path: Path) -> list[str]:
    """Returns the different tags of a file, without empty lines."""
    return distinct(read_lines(path, "vocabulary"))


def read_lines(path: Path, option: str) -> list[str]:
    """Returns the lines of the file of an option that are not empty, at least one."""
    try:
        lines = read_regular(path, MAX_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise FileError(path, error.strerror or type(error).__name__) from error
    except UnicodeDecodeError as error:
        raise FileError(path, "not UTF-8") from error
    lines = [line for line in lines if line.strip()]
    if not 0 < len(lines) <= MAX_TAGS:
        raise FileError(path, f"`{option}` must have 1 to {MAX_TAGS:,} lines that are not empty, has {len(lines):,}")
    return lines
