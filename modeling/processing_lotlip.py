"""LoTLIP's processor: texts and images in, everything the model takes out."""

import copy
import os
from typing import Any

from transformers import BatchFeature, CLIPImageProcessorPil
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .calls_lotlip import for_one_call, free_of_calls
from .loading_lotlip import checked_download

# Captions are padded to the longest of the batch and cut at the tokenizer's `model_max_length`, unless told otherwise.
TEXT_DEFAULTS: TextKwargs = {"padding": True, "truncation": True}


class LoTLIPProcessorKwargs(ProcessingKwargs, total=False):
    # For transformers 5.17; later versions read `LoTLIPProcessor.text_kwargs`.
    _defaults = {"text_kwargs": TEXT_DEFAULTS}  # pyright: ignore[reportGeneralTypeIssues]


class LoTLIPProcessor(ProcessorMixin):
    """
    A LoTLIP tokenizer and a stock CLIP image processor as one, used like `CLIPProcessor`.

    `text` is a string, a list of strings, or one list of strings for each image (`[[short, long, ...], ...]`, the same
    number for each), which gives `input_ids` and `attention_mask` of shape [B, T, L]. Texts are padded to the longest
    and cut at `tokenizer.model_max_length`; `padding`, `truncation` and `max_length` in a call win, for that call.

    `images` is what any image processor of transformers takes: PIL images, arrays, tensors, or paths and URLs. A path
    or URL is opened as `transformers.image_utils.load_image` does, with its EXIF orientation applied; a PIL image is
    taken as it lies. Either way transparency is dropped, as `Image.convert("RGB")` does and as in the official code.

    Args:
        image_processor (`CLIPImageProcessor` or `CLIPImageProcessorPil`):
            The image processor, with either backend. See `official_image_processor` for the released models' settings.
        tokenizer (`LoTLIPTokenizer` or `CLIPTokenizer`):
            The tokenizer; CLIP's own for a model over CLIP's text tower.

    Example:

    ```python
    >>> processor = LoTLIPProcessor(official_image_processor(), tokenizer)
    >>> batch = processor(text=[["a cat", "A cat sleeps. It is grey."]], images=["cat.jpg"], return_tensors="pt")
    >>> batch["input_ids"].shape, batch["pixel_values"].shape
    (torch.Size([1, 2, 9]), torch.Size([1, 3, 224, 224]))
    ```
    """

    valid_processor_kwargs = LoTLIPProcessorKwargs
    text_kwargs = TEXT_DEFAULTS

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        free_of_calls(tokenizer)
        super().__init__(image_processor, tokenizer)
        self.auto_map = {"AutoProcessor": "processing_lotlip.LoTLIPProcessor"}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "LoTLIPProcessor":
        """
        As [`~transformers.ProcessorMixin.from_pretrained`]; what came from the Hub is checked.

        Raises:
            OSError: if there is no such checkpoint, or a file is missing or came damaged.
        """
        with checked_download(pretrained_model_name_or_path, kwargs.get("cache_dir")):
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        loaded = processor[0] if isinstance(processor, tuple) else processor  # with `return_unused_kwargs`
        # transformers takes a file that the Hub did not give for one that is not there
        for missing, file in (
            (loaded.tokenizer.pad_token is None, "tokenizer_config.json"),
            (len(loaded.tokenizer) <= len(loaded.tokenizer.all_special_tokens), "tokenizer.json"),
        ):
            if missing:
                what = "no padding token" if file == "tokenizer_config.json" else "no words"
                raise OSError(
                    f"{pretrained_model_name_or_path}: its tokenizer has {what}; its {file} is missing, or the Hub "
                    "did not give it."
                )
        return processor

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As [`~transformers.ProcessorMixin.save_pretrained`], with the code that `auto_map` names."""
        free_of_calls(self.tokenizer)
        files = super().save_pretrained(save_directory)
        files += map(str, custom_object_save(self, save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or os.path.basename(save_directory), **kwargs)
        return files

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Does nothing: the code is saved in any case, and the stock way writes `auto_map` into the stock image
        processor's configuration as well."""

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        **kwargs: Unpack[LoTLIPProcessorKwargs],
    ) -> BatchFeature:
        """Prepare texts, images, or both.

        Args:
            images: An image or a list of B images.
            text: A text, a list of texts, or for each of B images a list of T texts.
            kwargs: Arguments of the tokenizer and of the image processor, as for every processor of transformers.

        Returns:
            `input_ids` and `attention_mask` ([N, L] for N texts, [B, T, L] for nested ones; one text gives [L], with
            `return_tensors` [1, L]) and `pixel_values` [B, 3, H, W], each where its input was given.

        Raises:
            ValueError: neither texts nor images were given, or the lists of texts differ in length.
        """
        if images is not None:
            images = _without_alpha(self.image_processor.fetch_images(images))
        call = super(LoTLIPProcessor, self if text is None else self._for_one_call()).__call__
        pretokenized = kwargs.get("is_split_into_words") or kwargs.get("text_kwargs", {}).get("is_split_into_words")
        rows = list(text) if isinstance(text, (list, tuple)) else []
        if pretokenized or not any(isinstance(row, (list, tuple)) for row in rows):
            return call(images=images, text=rows if isinstance(text, tuple) else text, **kwargs)

        texts_per_image = _texts_per_image(rows)
        encoding = call(images=images, text=[one for row in rows for one in row], **kwargs)
        if "overflow_to_sample_mapping" in encoding:
            raise ValueError("Lists of texts do not go with `return_overflowing_tokens`: their number would differ.")
        for name in encoding.keys() - set(self.image_processor.model_input_names):
            encoding[name] = _in_rows(encoding[name], texts_per_image)
        return encoding

    def _for_one_call(self) -> "LoTLIPProcessor":
        """A copy whose call leaves a stock tokenizer as it is; LoTLIP's own leaves itself so."""
        if not type(self.tokenizer).__module__.startswith("transformers."):
            return self
        processor = copy.copy(self)
        processor.tokenizer = for_one_call(self.tokenizer)
        return processor


def official_image_processor(image_size: int = 224) -> CLIPImageProcessorPil:
    """The preprocessing of the released LoTLIP models: bicubic to `image_size`, centre crop, mean and deviation 0.5.

    Saved, it is a plain `CLIPImageProcessor`, which loads with whichever backend is installed.

    Args:
        image_size: The shortest edge and the side of the crop, in pixels.

    Returns:
        An image processor that gives `pixel_values` [B, 3, image_size, image_size].
    """
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _without_alpha(images: Any) -> Any:
    """The opaque pictures, with the colours that lie under what is transparent.

    Newer versions of transformers lay a PIL image with an alpha channel, or with one colour declared transparent, on
    white; older ones and the official code drop the transparency.
    """
    if isinstance(images, (list, tuple)):
        return [_without_alpha(image) for image in images]
    if is_pil_image(images) and ("A" in images.getbands() or "transparency" in images.info):
        images = images.convert("RGB")
        images.info.pop("transparency", None)  # which `convert` keeps
    return images


def _texts_per_image(text: list[Any]) -> int:
    """T, if every row of `text` holds T texts."""
    for index, row in enumerate(text):
        if not isinstance(row, (list, tuple)):
            raise ValueError(
                f"`text[{index}]` is a {type(row).__name__} where others are lists: give every image a list of texts."
            )
        if not row or not all(isinstance(one, str) for one in row):
            raise ValueError(f"`text[{index}]` must be a list of one or more strings.")
        if len(row) != len(text[0]):
            raise ValueError(
                f"`text[{index}]` holds {len(row)} texts and `text[0]` {len(text[0])}: "
                "every image needs the same number of texts."
            )
    return len(text[0])


def _in_rows(values: Any, columns: int) -> Any:
    """[rows * columns, ...] -> [rows, columns, ...], for a tensor, an array or a list."""
    if isinstance(values, list):
        return [values[start : start + columns] for start in range(0, len(values), columns)]
    return values.reshape(-1, columns, *values.shape[1:])


__all__ = ["LoTLIPProcessor"]
