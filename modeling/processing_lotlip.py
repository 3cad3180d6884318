"""LoTLIP's processor: prepares texts and images for the model."""

import copy
import os
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .calls_lotlip import for_one_call, free_of_calls

# By default, pad to the longest caption of the batch and truncate to the tokenizer's `model_max_length`.
TEXT_DEFAULTS: TextKwargs = {"padding": True, "truncation": True}


class LoTLIPProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults for transformers 5.17. Later versions read `LoTLIPProcessor.text_kwargs`."""

    _defaults = {"text_kwargs": TEXT_DEFAULTS}  # pyright: ignore[reportGeneralTypeIssues]


class LoTLIPProcessor(ProcessorMixin):
    """
    A LoTLIP tokenizer and a stock image processor, used like `CLIPProcessor`.

    By default, texts are padded to the longest and truncated to `tokenizer.model_max_length`. Images given as paths or
    URLs are rotated by their EXIF orientation, PIL images are not. As in the official code, transparency is dropped.

    Args:
        image_processor (`BaseImageProcessor`): Image processor of the image tower, such as `CLIPImageProcessor`. For
            SigLIP 2 NaFlex, `Siglip2ImageProcessor`.
        tokenizer (`LoTLIPTokenizer` or `CLIPTokenizer`): Tokenizer of the text tower.
        background (`str` or `list[int]`, *optional*, defaults to `"white"`): Colour behind the transparent pixels of
            image files that `lotlip_hf` reads, in a form that PIL accepts. `None` drops their transparency instead.
    ```python
    >>> from lotlip_hf import LoTLIPProcessor
    >>> processor = LoTLIPProcessor.from_pretrained("checkpoint")
    >>> sorted(processor(text=[["a cat", "A grey cat sleeps."]], images=["photos/cat.png"]))
    ['attention_mask', 'input_ids', 'pixel_values']
    ```
    """

    valid_processor_kwargs = LoTLIPProcessorKwargs
    text_kwargs = TEXT_DEFAULTS

    def __init__(self, image_processor: Any, tokenizer: Any, background: str | Sequence[int] | None = "white") -> None:
        free_of_calls(tokenizer)
        super().__init__(image_processor, tokenizer)
        self.background = background
        self.auto_map = {"AutoProcessor": "processing_lotlip.LoTLIPProcessor"}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LoTLIPProcessor":
        """Same as the stock method, but `trust_remote_code` defaults to `False` and the user is not asked."""
        processor = super().from_pretrained(*args, **{"trust_remote_code": False, **kwargs})
        tokenizer = (processor[0] if isinstance(processor, tuple) else processor).tokenizer
        # transformers treats a file that the Hub failed to send as a missing file.
        if tokenizer.pad_token is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
            missing = "tokenizer_config.json" if tokenizer.pad_token is None else "tokenizer.json"
            raise OSError(f"{tokenizer.name_or_path}: {missing} is missing or incomplete. Download or save it again.")
        return processor

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Same as the stock method, and saves the code that `auto_map` names."""
        free_of_calls(self.tokenizer)
        # `_auto_class` would write `auto_map` into the stock image processor's configuration as well.
        files = super().save_pretrained(save_directory)
        files += map(str, custom_object_save(self, save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or os.path.basename(save_directory), **kwargs)
        return files

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        **kwargs: Unpack[LoTLIPProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepares texts, images, or both. Further arguments go to the tokenizer and to the image processor.

        Args:
            images (`ImageInput`, *optional*): One or B images. They become `pixel_values` [B, 3, H, W]. For SigLIP 2
                NaFlex, they become padded patches `pixel_values` [B, P, 3 * patch_size * patch_size],
                `pixel_attention_mask` [B, P] and `spatial_shapes` [B, 2].
            text (`str` or `list[str]` or `list[list[str]]`, *optional*): One text, N texts, or T texts for each of B
                images, `[[short, long, ...], ...]`. They become `input_ids` and `attention_mask`, [N, L] or [B, T, L].
        """
        if images is not None:
            images = _opaque(self.image_processor.fetch_images(images))
        processor = copy.copy(self)
        processor.tokenizer = for_one_call(self.tokenizer)
        call = super(LoTLIPProcessor, processor).__call__
        pretokenized = kwargs.get("is_split_into_words") or kwargs.get("text_kwargs", {}).get("is_split_into_words")
        rows = list(text) if isinstance(text, (list, tuple)) else []
        if pretokenized or not any(isinstance(row, (list, tuple)) for row in rows):
            return call(images=images, text=rows if isinstance(text, tuple) else text, **kwargs)

        for index, row in enumerate(rows):
            is_texts = isinstance(row, (list, tuple)) and all(isinstance(one, str) for one in row)
            if not is_texts or not row or len(row) != len(rows[0]):
                raise ValueError(f"`text[{index}]` must be a list of one or more strings, as many as in `text[0]`.")
        encoding = call(images=images, text=[one for row in rows for one in row], **kwargs)
        if "overflow_to_sample_mapping" in encoding:
            raise ValueError("`return_overflowing_tokens` is not supported for lists of texts. Pass a flat list.")
        for name in encoding.keys() - set(self.image_processor.model_input_names):
            values, columns = encoding[name], len(rows[0])
            if isinstance(values, list):
                encoding[name] = [values[start : start + columns] for start in range(0, len(values), columns)]
            else:
                encoding[name] = values.reshape(-1, columns, *values.shape[1:])
        return encoding


def _opaque(images: Any) -> Any:
    """Drops transparency as the official code does. Newer versions of transformers use a white background."""
    if isinstance(images, (list, tuple)):
        return [_opaque(image) for image in images]
    if is_pil_image(images) and ("A" in images.getbands() or "transparency" in images.info):
        images = images.convert("RGB")
        images.info.pop("transparency", None)  # `convert` keeps it
    return images
