"""LoTLIP's processor: texts and images in, everything the model takes out."""

import copy
import os
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .calls_lotlip import for_one_call, free_of_calls

# Captions are padded to the longest of the batch and cut at the tokenizer's `model_max_length`, unless told otherwise.
TEXT_DEFAULTS: TextKwargs = {"padding": True, "truncation": True}


class LoTLIPProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults for transformers 5.17; later versions read `LoTLIPProcessor.text_kwargs`."""

    _defaults = {"text_kwargs": TEXT_DEFAULTS}  # pyright: ignore[reportGeneralTypeIssues]


class LoTLIPProcessor(ProcessorMixin):
    """
    A LoTLIP tokenizer and a stock CLIP image processor as one, used like `CLIPProcessor`.

    Texts are padded to the longest and cut at `tokenizer.model_max_length`; `padding`, `truncation` and `max_length`
    in a call win, for that call. The EXIF orientation of a path or URL is applied, that of a PIL image is not.
    Transparency is dropped, as by `Image.convert("RGB")` and in the official code; where `lotlip_hf` itself reads
    image files, it shows the `background`.

    Args:
        image_processor (`CLIPImageProcessor` or `CLIPImageProcessorPil`):
            The image processor, with either backend; see `lotlip_hf.images.official_image_processor`.
        tokenizer (`LoTLIPTokenizer` or `CLIPTokenizer`): The tokenizer; CLIP's own over CLIP's text tower.
        background (`str` or `list[int]`, *optional*, defaults to `"white"`):
            Colour, as PIL takes it, that `lotlip_hf` lays under transparent pictures in files, for training, search
            and evaluation alike. `None` drops transparency there too.

    ```python
    >>> processor = LoTLIPProcessor(official_image_processor(), tokenizer)
    >>> batch = processor(text=[["a cat", "A cat sleeps. It is grey."]], images=["cat.jpg"], return_tensors="pt")
    >>> batch["input_ids"].shape, batch["pixel_values"].shape
    (torch.Size([1, 2, 9]), torch.Size([1, 3, 224, 224]))
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
        """
        As [`~transformers.ProcessorMixin.from_pretrained`], without a question on the terminal: a tokenizer's or an
        image processor's own code does not run unless `trust_remote_code=True`.
        """
        processor = super().from_pretrained(*args, **{"trust_remote_code": False, **kwargs})
        # with `return_unused_kwargs` there are two
        tokenizer = (processor[0] if isinstance(processor, tuple) else processor).tokenizer
        # transformers takes a file that the Hub did not give for one that is not there
        if tokenizer.pad_token is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
            missing = "tokenizer_config.json" if tokenizer.pad_token is None else "tokenizer.json"
            raise OSError(f"{tokenizer.name_or_path}: {missing} is missing or incomplete, or the Hub did not give it.")
        return processor

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As [`~transformers.ProcessorMixin.save_pretrained`], with the code that `auto_map` names."""
        free_of_calls(self.tokenizer)
        # not by `_auto_class`, which would write `auto_map` into the stock image processor's configuration as well
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
        Prepares texts, images, or both, with arguments of the tokenizer and of the image processor.

        Args:
            images (`ImageInput`, *optional*): one or B images; gives `pixel_values` [B, 3, H, W].
            text (`str`, `list[str]` or `list[list[str]]`, *optional*):
                One or N texts, or for each of B images a list of T (`[[short, long, ...], ...]`); gives `input_ids`
                and `attention_mask` [N, L] or [B, T, L].
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
                raise ValueError(f"`text[{index}]` must be a list of one or more strings, as many as every other.")
        encoding = call(images=images, text=[one for row in rows for one in row], **kwargs)
        if "overflow_to_sample_mapping" in encoding:
            raise ValueError("Lists of texts do not go with `return_overflowing_tokens`: their number would differ.")
        for name in encoding.keys() - set(self.image_processor.model_input_names):
            values, columns = encoding[name], len(rows[0])
            if isinstance(values, list):
                encoding[name] = [values[start : start + columns] for start in range(0, len(values), columns)]
            else:
                encoding[name] = values.reshape(-1, columns, *values.shape[1:])
        return encoding


def _opaque(images: Any) -> Any:
    """Without transparency, as in the official code; newer versions of transformers lay it on white."""
    if isinstance(images, (list, tuple)):
        return [_opaque(image) for image in images]
    if is_pil_image(images) and ("A" in images.getbands() or "transparency" in images.info):
        images = images.convert("RGB")
        images.info.pop("transparency", None)  # which `convert` keeps
    return images
