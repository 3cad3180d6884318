"""Tuned image towers: visual prompts, norms and class embeddings in a small file, beside an unchanged model."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .encoder import Encoder
from .engines.torch import TorchEngine
from .files import FileError, parse_json, printable, read_tensors, write_tensors
from .modeling.backbones_lotlip import VISION_BACKBONES, NaFlexBackbone

MAX_TUNING_BYTES = 1 << 27
NORM = "norm "  # before the names of norms in a file


@dataclass
class ImageTuning:
    """
    What `examples/tune_without_labels.py` learns. The embeddings of images with it fit its classes.

    Args:
        class_names (`list[str]`): Names of C classes.
        classes (`torch.Tensor`): Class embeddings [C, P], not normalised.
        prompts (`torch.Tensor`): Visual prompts [n, width].
        norms (`dict[str, torch.Tensor]`): Weights and biases of the norms of the image tower, by their names in it.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.image_tuning import load_tuning

    >>> encoder = load_encoder("checkpoint")
    >>> tuning = load_tuning("tuning.safetensors", encoder)  # doctest: +SKIP
    >>> with tuning.applied(encoder):  # doctest: +SKIP
    ...     images = encoder.encode_images(["photos/cat.png"])
    >>> scores = images @ tuning.classes.T  # doctest: +SKIP
    ```
    """

    class_names: list[str]
    classes: Tensor
    prompts: Tensor
    norms: dict[str, Tensor]

    @contextlib.contextmanager
    def applied(self, encoder: Encoder) -> Iterator[None]:
        """
        Context in which the image tower of an encoder is tuned. Its fingerprint is then another, so that caches keep
        both embeddings of an image apart.

        Args:
            encoder (`Encoder`): Encoder of the model that was tuned.
        """
        parameters = norm_parameters(encoder)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(self.norms[name])
            with visual_prompts(encoder, self.prompts):
                yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])

    def save(self, file: str | os.PathLike, encoder: Encoder) -> None:
        """
        Writes the tuning to a safetensors file.

        Args:
            file (`str` or `os.PathLike`): The file. An existing one is replaced.
            encoder (`Encoder`): Encoder of the model, without the tuning. [`load_tuning`] refuses other models.
        """
        tensors = {"classes": self.classes, "prompts": self.prompts}
        tensors |= {f"{NORM}{name}": value for name, value in self.norms.items()}
        metadata = {"class_names": json.dumps(self.class_names), "model": encoder.fingerprint("image")}
        write_tensors(file, tensors, metadata)


def load_tuning(file: str | os.PathLike, encoder: Encoder) -> ImageTuning:
    """
    Reads a tuning of a model.

    Args:
        file (`str` or `os.PathLike`): File that [`ImageTuning.save`] wrote.
        encoder (`Encoder`): Encoder of the model that was tuned, with the same dtype.

    Returns:
        [`ImageTuning`]: The tuning, in float32 on the CPU.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If the file is damaged, larger than 128 MiB or of another model, or if the image tower takes no
            visual prompts.
    """
    tensors, metadata = read_tensors(file, MAX_TUNING_BYTES)
    shapes = {name: parameter.shape for name, parameter in norm_parameters(encoder).items()}
    try:
        tensors = {name: value.float() for name, value in tensors.items()}
        class_names, model = parse_json(metadata["class_names"]), metadata["model"]
        classes, prompts = tensors.pop("classes"), tensors.pop("prompts")
        norms = {name.removeprefix(NORM): value for name, value in tensors.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(file, f"not a tuning of an image tower ({printable(error)})") from error
    if model != encoder.fingerprint("image"):
        raise ValueError(
            f"{printable(file)} was made for another model than {encoder.name}, or for another dtype of it. Load the "
            "model that was tuned."
        )
    fits = {name: value.shape for name, value in norms.items()} == shapes and classes.shape[1:] == (encoder.dim,)
    has_names = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    if not (fits and has_names and len(class_names) == len(classes)) or prompts.shape[1:] != (_width(encoder),):
        raise FileError(file, "damaged: shapes that do not fit the model")
    return ImageTuning(class_names, classes, prompts, norms)


@contextlib.contextmanager
def visual_prompts(encoder: Encoder, vectors: Tensor) -> Iterator[None]:
    """
    Context in which the image tower reads vectors before the patches, behind the class token, as in visual prompt
    tuning (https://arxiv.org/abs/2203.12119). Gradients reach the vectors.

    Args:
        encoder (`Encoder`): Encoder of a LoTLIP, CLIP, SigLIP or another dual encoder of transformers whose image
            tower is a ViT. NaFlex, ConvNeXt and models of timm do not fit.
        vectors (`torch.Tensor`): Vectors [n, width] of the width of the image tower.

    Raises:
        `ValueError`: If the image tower takes no visual prompts, or has some.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.image_tuning import visual_prompts

    >>> encoder = load_encoder("checkpoint")
    >>> vectors = torch.zeros(4, encoder.engine.model.config.vision_config.hidden_size, requires_grad=True)
    >>> with visual_prompts(encoder, vectors):
    ...     pixels = encoder.engine.on_device(encoder.engine.pixels("photos/cat.png"))
    ...     features = encoder.engine.model.get_image_features(**pixels).pooler_output
    ```
    """
    tower, backbone = image_tower(encoder)
    prefix = VISION_BACKBONES[backbone.config.model_type].num_prefix_tokens(backbone)
    module = getattr(backbone, "pre_layrnorm", backbone.embeddings)
    if hasattr(module, "visual_prompts"):
        raise ValueError(f"The image tower of {encoder.name} has visual prompts. Leave their context first.")

    def insert(module: Any, args: Any, states: Tensor) -> Tensor:
        prompts = module.visual_prompts.to(states).expand(len(states), -1, -1)
        return torch.cat([states[:, :prefix], prompts, states[:, prefix:]], dim=1)

    def refuse(module: Any, args: Any, options: dict[str, Any]) -> None:
        for name in ("kept_patches", "output_patch_embeds"):
            if options.get(name) is not None and options[name] is not False:
                raise ValueError(f"Visual prompts do not fit `{name}`. Leave it out.")

    # In the state dict, the vectors are part of the fingerprint.
    module.register_buffer("visual_prompts", vectors)
    handles = module.register_forward_hook(insert), tower.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del module.visual_prompts


def image_tower(encoder: Encoder) -> tuple[nn.Module, Any]:
    """
    Returns the image tower of a model, and its encoder, which are the same but for LoTLIP.

    Raises:
        `ValueError`: If the image tower takes no visual prompts.
    """
    tower = getattr(encoder.engine.model, "vision_model", None) if isinstance(encoder.engine, TorchEngine) else None
    backbone = getattr(tower, "backbone", tower)
    family = None if backbone is None else VISION_BACKBONES.get(backbone.config.model_type)
    if tower is None or family is None or family.passing_embeddings is None or isinstance(family, NaFlexBackbone):
        raise ValueError(
            f"The image tower of {encoder.name} takes no visual prompts. Use a checkpoint of transformers with a ViT, "
            "such as a LoTLIP, CLIP or SigLIP that is not exported."
        )
    if getattr(tower.config, "image_token_centers", None) is not None:
        raise ValueError("Visual prompts would be clustered like patches. Unset `image_token_centers` of the model.")
    return tower, backbone


def norm_parameters(encoder: Encoder) -> dict[str, nn.Parameter]:
    """
    Returns the weights and biases of the norms of an image tower, by their names in it.

    Raises:
        `ValueError`: If the image tower takes no visual prompts.
    """
    tower, _ = image_tower(encoder)
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in tower.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False)
    }


def new_prompts(encoder: Encoder, number: int, generator: torch.Generator) -> Tensor:
    """
    Draws visual prompts from the uniform distribution of visual prompt tuning.

    Args:
        encoder (`Encoder`): The encoder.
        number (`int`): Number n of vectors.
        generator (`torch.Generator`): Random generator.

    Returns:
        `torch.Tensor`: [n, width] in float32 on the CPU.
    """
    sides = image_tower(encoder)[1].config.patch_size
    height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
    bound = (6 / (3 * height * width + _width(encoder))) ** 0.5
    return torch.empty(number, _width(encoder)).uniform_(-bound, bound, generator=generator)


def _width(encoder: Encoder) -> int:
    return image_tower(encoder)[1].config.hidden_size
