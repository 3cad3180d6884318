"""The base class of terms that compare the model's embeddings of images and texts with the teacher's."""

from typing import Literal

import torch
from torch import nn

from .views import Views

Of = Literal["image", "text", "both"]


class Taught(nn.Module):
    """
    The base class of terms with a teacher.

    Args:
        of (`str`, *optional*, defaults to `"text"`): Which embeddings to compare: `"text"`, `"image"` or `"both"`.
    """

    def __init__(self, of: Of = "text") -> None:
        super().__init__()
        self.kinds = ("image", "text") if of == "both" else (of,)
        self.needs = frozenset(f"{prefix}{kind}_embeds" for kind in self.kinds for prefix in ("", "teacher_"))

    def compared(self, views: Views, gathered: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Returns the embeddings of the model and of the teacher, both [n, T', dim]: a pair for images, with T' = 1, and
        a pair for texts, where T' is the number of texts that the teacher embeds, the short one first. n is the number
        of samples of this process, or with `gathered` of all processes.
        """
        pairs = []
        for kind in self.kinds:
            names = (f"{kind}_embeds", f"teacher_{kind}_embeds")
            student, teacher = (views.all(name) if gathered else views[name] for name in names)
            if kind == "image":
                student, teacher = student.unsqueeze(1), teacher.unsqueeze(1)
            pairs.append((student[:, : teacher.shape[1]], teacher))
        return pairs
