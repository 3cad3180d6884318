"""Where a text is in a picture: score maps of patches and texts, and heat maps."""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attribution import eager, relevance
from .encoder import Encoder
from .engines.torch import TorchEngine, evaluating
from .images import ImageSource
from .modeling.modeling_lotlip import LoTLIPModel, LoTLIPVisionModel

HeatMethod = Literal["auto", "gradient", "calibrated", "patches"]
CALIBRATED_LAYERS = 5  # as in ExCEL
MAX_ROUNDS = 100  # of k-means
HEAT_LAYERS = 2  # the last ones are as good as the last four, and better than all twelve, at less cost


def score_maps(
    encoder: Encoder,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    *,
    calibrated: bool = False,
    batch_size: int = 32,
) -> Tensor:
    """
    Computes the cosine similarities of the patches of images with texts.

    Args:
        encoder (`Encoder`): A LoTLIP.
        images (`Sequence[ImageSource]`): I images, with patches on the same grid of h rows and w columns.
        texts (`Sequence[str]`): C texts.
        calibrated (`bool`, *optional*, defaults to `False`): Whether to compute patches in [`calibrated`].
        batch_size (`int`, *optional*, defaults to 32): Maximum number of images in a batch.

    Returns:
        `torch.Tensor`: [I, C, h, w] in float32 on the CPU. The grid covers the part of the image that the image
        processor keeps.

    Raises:
        `ValueError`: If the model is not a LoTLIP, if the grids of the images differ, or if `calibrated` does not fit
            the image tower.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.dense import score_maps

    >>> maps = score_maps(load_encoder("checkpoint"), ["photos/cat.png"], ["a cat", "a sofa"])
    >>> maps.shape[:2]
    torch.Size([1, 2])
    ```
    """
    text_embeds = encoder.encode_texts(texts, progress=False)
    maps = list(iterate_patches(encoder, images, calibrated=calibrated, batch_size=batch_size))
    grids = sorted({tuple(one.shape[:2]) for one in maps})
    if len(grids) > 1:
        raise ValueError(f"`images` have patches on the grids {grids}. Pass images with the same grid.")
    return torch.stack([one @ text_embeds.T for one in maps]).permute(0, 3, 1, 2)


def iterate_patches(
    encoder: Encoder, images: Sequence[ImageSource], *, calibrated: bool = False, batch_size: int = 32
) -> Iterator[Tensor]:
    """Yields the normalised embeddings [h, w, D] of the patches of each image. The arguments are those of
    [`score_maps`]."""
    engine, model = encoder.lotlip()
    for start in range(0, len(images), batch_size):
        inputs = [
            _pixels(engine, image, start + index) for index, image in enumerate(images[start : start + batch_size])
        ]
        for _, group in itertools.groupby(inputs, key=lambda one: one["pixel_values"].shape):
            one_size = list(group)
            batch = {name: np.concatenate([one[name] for one in one_size]) for name in one_size[0]}
            with evaluating(model), torch.no_grad(), _calibrated_if(calibrated, model):
                patches = model(**engine.on_device(batch), output_patch_embeds=True).patch_embeds.float().cpu()
            for one, embeds in zip(one_size, patches, strict=True):
                height, width = _grid(one, len(embeds))
                yield embeds[: height * width].unflatten(0, (height, width))


def heat_maps(encoder: Encoder, image: ImageSource, texts: Sequence[str], *, method: HeatMethod = "auto") -> Tensor:
    """
    Computes where each text is in an image.

    Args:
        encoder (`Encoder`): A LoTLIP.
        image (`ImageSource`): The image.
        texts (`Sequence[str]`): S texts, such as the sentences of a description.
        method (`str`, *optional*, defaults to `"auto"`): `"gradient"`, the relevance of patches in the last two layers
            of the image tower ([`~lotlip_hf.attribution.relevance`]) for the similarity of image and text;
            `"calibrated"` or `"patches"`, the cosine similarities of [`score_maps`] above their mean over the image;
            or `"auto"`, which is `"gradient"` for image towers with attention and `"patches"` for others.

    Returns:
        `torch.Tensor`: [S, h, w] in float32 on the CPU, from 0 to 1, the warmest patch of each text. A map is 0 if no
        patch speaks for the text.

    Raises:
        `ValueError`: If the model is not a LoTLIP, or if `method` is unknown or does not fit its image tower.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.dense import heat_maps

    >>> maps = heat_maps(load_encoder("checkpoint"), "photos/cat.png", ["A cat lies on a sofa.", "It is night."])
    >>> len(maps)
    2
    ```
    """
    _, model = encoder.lotlip()
    if method not in get_args(HeatMethod):
        raise ValueError(f"`method` must be one of {', '.join(get_args(HeatMethod))}, got {method!r}.")
    if method == "auto":
        method = "gradient" if can_calibrate(model) else "patches"
    if method == "gradient":
        maps = _relevance_maps(encoder, image, texts)
    else:
        maps = score_maps(encoder, [image], texts, calibrated=method == "calibrated")[0]
        maps = maps - maps.mean((1, 2), keepdim=True)
    maps = maps.clamp(min=0)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def _relevance_maps(encoder: Encoder, image: ImageSource, texts: Sequence[str]) -> Tensor:
    """The relevance [S, h, w] of the patches for the similarity of an image with each text."""
    engine, model = encoder.lotlip()
    _check_attentions(model.vision_model)
    text_embeds = encoder.encode_texts(texts, progress=False).to(model.device)
    inputs = _pixels(engine, image, 0)
    with evaluating(model), eager(model), torch.enable_grad():
        on_device = engine.on_device(inputs)
        on_device["pixel_values"].requires_grad_()  # so that frozen towers have a graph
        outputs = model.get_image_features(**on_device, output_attentions=True)
        embeds = F.normalize(outputs.pooler_output[0].float(), dim=-1)
        tokens = torch.stack(
            [_pooled_row(model, relevance(embeds @ text, outputs.attentions[-HEAT_LAYERS:])) for text in text_embeds]
        )
    first = model.config.vision_config.family.num_prefix_tokens(model.vision_model.backbone)
    patches = tokens[:, first:].detach().float().cpu()
    height, width = _grid(inputs, patches.shape[1])
    return patches[:, : height * width].unflatten(1, (height, width))


def _pooled_row(model: LoTLIPModel, relevances: Tensor) -> Tensor:
    """[1, L, L] -> [L]: the row of the class token if it is pooled alone, and the mean of all rows otherwise."""
    config = model.config.vision_config
    is_class_token = config.family.has_class_token and "mean" not in config.pooling
    return relevances[0, 0] if is_class_token else relevances[0].mean(0)


@contextlib.contextmanager
def calibrated(model: LoTLIPModel | LoTLIPVisionModel) -> Iterator[None]:
    """
    Context in which patches are computed by the training-free calibration of ExCEL (https://arxiv.org/abs/2503.20826):
    their features are the states before the last five layers, plus the outputs of the attention of these layers with
    other weights: the mean of softmax(qq'), softmax(kk') and softmax(vv'), added up over the heads. The feed-forward
    layers are left out. Other tokens, such as the class token, do not change.

    Args:
        model (`LoTLIPModel` or `LoTLIPVisionModel`): The model, with an image tower whose layers have `q_proj`,
            `k_proj` and `v_proj`: ViT, CLIP, SigLIP, DINOv2, DINOv3.

    Raises:
        `ValueError`: For other image towers.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf import LoTLIPModel
    >>> from lotlip_hf.dense import calibrated

    >>> model = LoTLIPModel.from_pretrained("checkpoint")
    >>> with calibrated(model), torch.no_grad():
    ...     features = model.get_image_features(torch.zeros(1, 3, 64, 64), output_patch_embeds=True)
    ```
    """
    tower = model if isinstance(model, LoTLIPVisionModel) else model.vision_model
    _check_attentions(tower)
    layers = tower.config.family.layers(tower.backbone)[-CALIBRATED_LAYERS:]
    prefix, patches = tower.config.family.num_prefix_tokens(tower.backbone), []

    def start(layer: nn.Module, args: tuple[Any, ...]) -> None:
        patches[:] = [args[0]]

    def add(layer: nn.Module, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        update = _calibrated_attention(attention, states, **kwargs)
        patches[0] = patches[0] + (layer.layer_scale1(update) if hasattr(layer, "layer_scale1") else update)

    def end(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> Tensor | None:
        if kwargs.get("pooled_tokens") is not None:  # patches are not computed
            return None
        return torch.cat([states[:, :prefix], patches.pop()[:, prefix:]], 1)

    hooks = [layers[0].register_forward_pre_hook(start)]
    for layer in layers:
        hooks.append(_attention(layer).register_forward_hook(partial(add, layer), with_kwargs=True))
    hooks.append(layers[-1].register_forward_hook(end, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _calibrated_attention(attention: Any, states: Tensor, **kwargs: Any) -> Tensor:
    """Output [N, L, hidden_size] of a module of attention for `states` [N, L, hidden_size]."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (one(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for one in projections)
    if kwargs.get("position_embeddings") is not None:  # rotary
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *kwargs["position_embeddings"])
    weights = calibrated_weights(query, key, value, kwargs.get("attention_mask"))
    output = (weights.unsqueeze(1) @ value).transpose(1, 2).flatten(2)
    return (attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)(output)


def calibrated_weights(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    Computes the attention weights of [`calibrated`].

    Args:
        query, key, value (`torch.Tensor`): States [N, heads, L, head_dim] of the heads.
        mask (`torch.Tensor`, *optional*): Mask [N, 1, L, L], boolean or to be added.

    Returns:
        `torch.Tensor`: [N, L, L]. The sum of a row is the number of heads.
    """
    parts = []
    for states in (query, key, value):
        scores = states @ states.mT * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        parts.append(scores.softmax(-1, dtype=torch.float32).to(states.dtype))
    return torch.stack(parts).mean(0).sum(1)


def enrich_classes(class_embeds: Tensor, description_embeds: Tensor, centres: int) -> Tensor:
    """
    Enriches the embeddings of classes by descriptions of all classes, as ExCEL (https://arxiv.org/abs/2503.20826):
    descriptions are clustered, and each class adds up the centres, weighted by the softmax of their similarities to
    the class. The least similar tenth is left out.

    Args:
        class_embeds (`torch.Tensor`): Normalised embeddings [C, D] of the classes.
        description_embeds (`torch.Tensor`): Normalised embeddings [N, D] of descriptions.
        centres (`int`): Number of clusters, at most N. ExCEL has 112 for 20 classes.

    Returns:
        `torch.Tensor`: [C, D], normalised.
    """
    bank = _cluster(description_embeds, centres)
    scores = class_embeds @ bank.T
    kept = scores.topk(centres - centres // 10, dim=-1)
    weights = torch.zeros_like(scores).scatter(1, kept.indices, kept.values.softmax(-1))
    return F.normalize(class_embeds + weights @ bank, dim=-1)


def _cluster(points: Tensor, number: int) -> Tensor:
    """Centres [number, D] of k-means, which starts from points that are far from each other."""
    distance = torch.full((len(points),), math.inf)
    chosen = [int(points.norm(dim=-1).argmax())]
    while len(chosen) < number:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=-1))
        chosen.append(int(distance.argmax()))
    centres = points[chosen]
    for _ in range(MAX_ROUNDS):
        members = F.one_hot(torch.cdist(points, centres).argmin(1), number).to(points.dtype)  # [N, number]
        means = members.T @ points / members.sum(0).clamp(min=1).unsqueeze(1)
        before, centres = centres, torch.where(members.any(0).unsqueeze(1), means, centres)
        if torch.equal(before, centres):
            break
    return centres


def _calibrated_if(is_calibrated: bool, model: LoTLIPModel) -> Any:
    return calibrated(model) if is_calibrated else contextlib.nullcontext()


def _pixels(engine: TorchEngine, image: ImageSource, index: int) -> dict[str, np.ndarray]:
    return engine.pixels(image, None if isinstance(image, str) or hasattr(image, "__fspath__") else f"images[{index}]")


def _grid(inputs: dict[str, np.ndarray], num_patches: int) -> tuple[int, int]:
    """Rows and columns of the patches of one image."""
    if "spatial_shapes" in inputs:  # NaFlex, whose patches are padded
        height, width = inputs["spatial_shapes"][0].tolist()
        return height, width
    height, width = inputs["pixel_values"].shape[-2:]
    rows = [count for count in range(1, num_patches + 1) if num_patches % count == 0]
    best = min(rows, key=lambda count: abs(math.log(count * count / num_patches * width / height)))
    return best, num_patches // best


def _attention(layer: nn.Module) -> Any:
    """The module of a layer with the projections of queries, keys and values, or `None`."""
    module = getattr(layer, "attention", getattr(layer, "self_attn", None))
    return module if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj")) else None


def can_calibrate(model: LoTLIPModel | LoTLIPVisionModel) -> bool:
    """Whether [`calibrated`] and `"gradient"` heat maps fit the image tower."""
    tower = model if isinstance(model, LoTLIPVisionModel) else model.vision_model
    layers = tower.config.family.layers(tower.backbone)
    return bool(layers) and all(_attention(layer) is not None for layer in layers)


def _check_attentions(tower: LoTLIPVisionModel) -> None:
    if not can_calibrate(tower):
        name = tower.config.backbone_config.model_type
        raise ValueError(f"The layers of {name} have no attention of patches to patches. Use the method 'patches'.")
    if tower.config.image_token_centers is not None:
        raise ValueError("Maps need all patches. Set `image_token_centers` to None.")
