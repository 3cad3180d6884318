"""Checks text towers whose adapter was made from the signature of their encoder's class in transformers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call

from .modeling.backbones_lotlip import TEXT_BACKBONES, unsupported
from .modeling.modeling_lotlip import LoTLIPTextModel

LENGTHS = (9, 6, 4)  # of the random texts, in tokens
TOLERANCE = 1e-4  # largest accepted difference, relative to the largest state


@torch.no_grad()
def check_adapter(tower: LoTLIPTextModel) -> None:
    """
    Checks a text tower of a family without an entry in `TEXT_BACKBONES` on small random inputs: its features are those
    of the stock encoder, and corner tokens obey the rule of `masking_lotlip`.

    Args:
        tower (`LoTLIPTextModel`): Tower in float32, with the weights of its encoder.

    Raises:
        `ValueError`: If the encoder cannot have corner tokens. The message names its `model_type` and the reason.
    """
    model_type = tower.config.backbone_config.model_type
    if model_type in TEXT_BACKBONES:
        return
    with _evaluation(tower):
        try:
            reason = _failure(tower)
        except Exception as error:  # encoders raise any class of error for inputs that they do not support
            message = str(error).strip().partition("\n")[0]
            raise unsupported(model_type, f"it raises {type(error).__name__}: {message}") from error
    if reason is not None:
        raise unsupported(model_type, reason)


def _failure(tower: LoTLIPTextModel) -> str | None:
    """Reason of the first check that fails, or `None`."""
    generator = torch.Generator().manual_seed(0)
    backbone, width = tower.backbone, tower.config.hidden_size
    size = (len(LENGTHS), max(LENGTHS))
    start = min(10, tower.config.vocab_size // 2)  # the first tokens are often special
    ids = torch.randint(start, tower.config.vocab_size, size, generator=generator)
    mask = (torch.arange(size[1]) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    text = mask.bool()

    known = {"full_attention", "sliding_attention"}
    if other := set(getattr(backbone.config, "layer_types", None) or ()) - known:
        return f"it has layers of type {', '.join(sorted(other))}"
    stock = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    scale = stock[text].abs().max()

    def differ(one: Tensor, other: Tensor) -> bool:
        return not bool((one - other).abs().max() <= TOLERANCE * scale)  # also for NaN

    def states(ids: Tensor, mask: Tensor, corners: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        own = {} if corners is None else {"corner_embeds": corners}
        options = {"attention_mask": mask, "output_corner_embeds": corners is not None}
        outputs = functional_call(tower, own, (ids,), options)
        return outputs.last_hidden_state, outputs.corner_embeds

    if stock.shape[-1] != width:
        return f"its states have the width {stock.shape[-1]}, not {width}"
    if not stock[text].isfinite().all():
        return "its states are not finite"
    plain, _ = states(ids, mask)
    if differ(plain[text], stock[text]):
        return "its features with `inputs_embeds` and positions from 0 differ from those with `input_ids`"
    changed_padding = torch.where(text, ids, ids.flip(0).roll(1, 1))
    if differ(states(changed_padding, mask)[0][text], plain[text]):
        return "it does not obey the mask of padding"
    if tower.corner_embeds is None:
        return None

    deviation = tower.get_input_embeddings().weight.std()
    corners = torch.randn(tower.corner_embeds.shape, generator=generator) * deviation.clamp(min=0.02)
    with_corners, corner_states = states(ids, mask, corners)
    assert corner_states is not None
    if differ(with_corners[text], plain[text]):
        return "words see corner tokens"
    _, changed = states(ids, mask, torch.cat([corners[:1], corners[1:].flip(-1)]))
    if differ(changed[:, 0], corner_states[:, 0]):
        return "corner tokens see each other"
    _, changed = states(changed_padding, mask, corners)
    if differ(changed, corner_states):
        return "corner tokens see padding"
    for row, length in enumerate(LENGTHS):
        _, alone = states(ids[row : row + 1, :length], mask[row : row + 1, :length], corners)
        if differ(alone, corner_states[row : row + 1]):
            return "corner tokens depend on the length of the batch"
    _, changed = states(ids.roll(1, 0), mask, corners)
    if not differ(changed, corner_states):
        return "corner tokens do not see the words"
    return None


@contextmanager
def _evaluation(tower: LoTLIPTextModel) -> Iterator[None]:
    """Evaluation mode, with sliding windows that are shorter than the texts."""
    config, was_training = tower.backbone.config, tower.training
    window = getattr(config, "sliding_window", None)
    tower.eval()
    try:
        if window:
            config.sliding_window = min(window, 3)
        yield
    finally:
        if window:
            config.sliding_window = window
        tower.train(was_training)
