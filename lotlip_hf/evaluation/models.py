"""Which model it was: what results say of it beside its fingerprint."""

import sys

from transformers import PreTrainedModel

from ..engines.onnx import LoTLIPOnnxModel
from ..engines.open_clip import OpenClipModel


def model_revision(model: PreTrainedModel) -> str | None:
    """
    The commit on the Hub that a model was loaded from.

    Args:
        model: A model that [`~lotlip_hf.encoder.load_model`] loaded.

    Returns:
        40 hexadecimal digits; `None` for a model from a folder, and for one that something else loaded: transformers
        itself does not keep the commit any more.

    Example:

    ```python
    >>> from lotlip_hf.encoder import load_model
    >>> from lotlip_hf.evaluation.models import model_revision

    >>> model, _ = load_model("openai/clip-vit-base-patch32")  # doctest: +SKIP
    >>> model_revision(model)  # doctest: +SKIP
    ```
    """
    return getattr(model.config, "_commit_hash", None)


def model_versions(model: PreTrainedModel) -> dict[str, str]:
    """
    Versions of what computes a model's features beside PyTorch and transformers.

    Args:
        model: A model that [`~lotlip_hf.encoder.load_model`] loaded.

    Returns:
        Versions by name: of open_clip and what it is made of, or of ONNX Runtime; of other models none.
    """
    names: tuple[str, ...] = ()
    if isinstance(model, OpenClipModel):
        names = ("open_clip", "timm", "torchvision")
    elif isinstance(model, LoTLIPOnnxModel):
        names = ("onnxruntime",)
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules}
