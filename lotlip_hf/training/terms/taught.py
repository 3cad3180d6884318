"""What terms with a teacher compare: the model's embeddings of images and texts with the teacher's."""

from typing import Literal

import torch

from .views import Views

Of = Literal["image", "text", "both"]


def needs_of(of: Of) -> frozenset[str]:
    """Returns the names of the tensors that [`compared`] reads."""
    return frozenset(f"{prefix}{kind}_embeds" for kind in _kinds(of) for prefix in ("", "teacher_"))


def compared(views: Views, of: Of, gathered: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Returns the embeddings of the model and of the teacher, both [n, T', dim]: one pair for images, with T' = 1, and
    one for texts, where T' is the number of texts that the teacher embeds, the short one first.

    Args:
        views (`Views`): The tensors.
        of (`str`): `"image"`, `"text"` or `"both"`.
        gathered (`bool`, *optional*, defaults to `False`): Whether to return the samples of all processes.
    """
    pairs = []
    for kind in _kinds(of):
        names = (f"{kind}_embeds", f"teacher_{kind}_embeds")
        student, teacher = (views.all(name) if gathered else views[name] for name in names)
        if kind == "image":
            student, teacher = student.unsqueeze(1), teacher.unsqueeze(1)
        pairs.append((student[:, : teacher.shape[1]], teacher))
    return pairs


def _kinds(of: Of) -> tuple[str, ...]:
    return ("image", "text") if of == "both" else (of,)
