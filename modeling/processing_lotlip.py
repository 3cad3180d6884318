"""LoTLIP's processor: texts and images in, everything the model takes out."""

import copy
import os
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, CLIPImageProcessorPil
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .calls_lotlip import for_one_call, free_of_calls

# Where transformers' image processors have the resizing that most of them share
BACKENDS = "transformers.image_processing_backends"
# Longest side over shortest, beyond which an image is thin. Resized to a shortest edge of 224 one of this ratio has
# 224 x 14,336 pixels.
MAX_ASPECT_RATIO = 64
# No image tower takes more pixels a side; larger settings are an error, or fill the memory on purpose.
MAX_SIDE = 4096
# Arguments of a call that have an image resized otherwise than by the image processor's settings
RESIZING = {"size", "crop_size", "resample", "do_resize", "do_center_crop", "do_convert_rgb", "images_kwargs"}

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
    taken as it lies. Either way transparency is dropped, as `Image.convert("RGB")` does and as in the official code;
    where `lotlip_hf` itself reads image files, it shows the `background`. Of a PIL image with one side more than 64
    times the other only what the centre crop leaves is resized.

    Args:
        image_processor (`CLIPImageProcessor` or `CLIPImageProcessorPil`):
            The image processor, with either backend. See `official_image_processor` for the released models' settings.
        tokenizer (`LoTLIPTokenizer` or `CLIPTokenizer`):
            The tokenizer; CLIP's own for a model over CLIP's text tower.
        background (`str` or `list[int]`, *optional*, defaults to `"white"`):
            What `lotlip_hf` lays under transparent pictures in files, for training, search and evaluation alike: a
            colour as PIL takes it. `None` drops transparency there too.

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

    def __init__(self, image_processor: Any, tokenizer: Any, background: str | Sequence[int] | None = "white") -> None:
        free_of_calls(tokenizer)
        super().__init__(image_processor, tokenizer)
        self.background = background
        self.auto_map = {"AutoProcessor": "processing_lotlip.LoTLIPProcessor"}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "LoTLIPProcessor":
        """
        As [`~transformers.ProcessorMixin.from_pretrained`]; what came from the Hub is checked, and a tokenizer's or an
        image processor's own code does not run without `trust_remote_code=True`.

        Raises:
            OSError: if there is no such checkpoint, or a file is missing or came damaged.
            ValueError: if the image processor's sizes are no sizes of images.
        """
        kwargs.setdefault("trust_remote_code", False)  # left out, transformers asks on the terminal
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        loaded = processor[0] if isinstance(processor, tuple) else processor  # with `return_unused_kwargs`
        check_image_sizes(loaded.image_processor, str(pretrained_model_name_or_path))
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
            own_resizing = self.image_processor if RESIZING.isdisjoint(kwargs) else None
            images = _prepared(self.image_processor.fetch_images(images), own_resizing)
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


def check_image_sizes(image_processor: Any, name: str) -> None:
    """Refuses an image processor that would make images of absurd sizes.

    Args:
        image_processor: The image processor.
        name: The checkpoint, for the error.

    Raises:
        ValueError: a side of `size` or `crop_size` is not a whole number from 1 to 4096; names it and the value.
    """
    for setting in ("size", "crop_size"):
        for side, value in dict(getattr(image_processor, setting, None) or {}).items():
            if value is not None and not (type(value) is int and 1 <= value <= MAX_SIDE):
                raise ValueError(
                    f"{name}: `{setting}` in its processor_config.json or preprocessor_config.json has "
                    f"{side}={value!r}, which is no whole number of pixels from 1 to {MAX_SIDE}."
                )


def resized_size(size: tuple[int, int], image_processor: Any) -> tuple[int, int] | None:
    """The size that an image has after an image processor's resizing.

    Args:
        size: Width and height of the image.
        image_processor: The image processor.

    Returns:
        Width and height; `None` if the processor does not resize, or not in the way that most of transformers' do, or
        if the size depends on which side is up.
    """
    methods = (getattr(type(image_processor), name, None) for name in ("resize", "_preprocess"))
    if not all(getattr(method, "__module__", None) == BACKENDS for method in methods):
        return None
    if not image_processor.do_resize or not isinstance(image_processor.resample, int):
        return None
    wanted = {name: value for name, value in dict(image_processor.size or {}).items() if value is not None}
    if wanted.keys() == {"shortest_edge"}:
        short, long = wanted["shortest_edge"], int(wanted["shortest_edge"] * max(size) / min(size))
        return (short, long) if size[0] <= size[1] else (long, short)
    if wanted.keys() == {"height", "width"} and wanted["height"] == wanted["width"]:
        return wanted["width"], wanted["height"]
    return None


def is_thin(size: tuple[int, int], image_processor: Any) -> bool:
    """Whether an image grows out of bounds as its shortest edge is resized.

    Args:
        size: Width and height of the image.
        image_processor: The image processor.

    Returns:
        `True` if one side is more than 64 times the other and the processor resizes by the shortest edge alone.
    """
    wanted = dict(getattr(image_processor, "size", None) or {})
    return bool(
        max(size) > MAX_ASPECT_RATIO * min(size)
        and getattr(image_processor, "do_resize", False)
        and wanted.get("shortest_edge")
        and not wanted.get("longest_edge")
    )


def resized_middle(image: Any, image_processor: Any) -> Any:
    """What an image processor's resizing makes of the middle of a thin image, which its centre crop leaves.

    The processor gives the same `pixel_values` for the result as for the whole image, but for one step of 255 in less
    than a hundredth of them.

    Args:
        image: A PIL image for which [`is_thin`] is true.
        image_processor: The image processor.

    Returns:
        A smaller PIL image, which the processor's resizing leaves as it is; `None` if the processor does not crop, or
        resizes in its own way.
    """
    resized = resized_size(image.size, image_processor)
    crop = getattr(image_processor, "crop_size", None)
    if resized is None or crop is None or not getattr(image_processor, "do_center_crop", False):
        return None
    if image.mode not in ("RGB", "L") and not image_processor.do_convert_rgb:
        return None
    axis = 0 if image.width > image.height else 1
    length, kept = resized[axis], max(min(resized), crop["width" if axis == 0 else "height"])
    # the centre stays where it is, for those too that round half a pixel to even
    kept = min(length, kept + (length - kept) % 4)
    scale = image.size[axis] / length
    start, end = scale * (length - kept) / 2, scale * (length + kept) / 2
    # cut out first, with what a filter sees around it: `resize` reads its box in single precision
    margin = 4 * max(1.0, scale)
    first, last = max(0, int(start - margin)), min(image.size[axis], int(end + margin) + 1)
    cut, box, size = [0, 0, *image.size], [0.0, 0.0, *image.size], list(resized)
    cut[axis], cut[axis + 2] = first, last
    box[axis], box[axis + 2] = start - first, end - first
    size[axis] = kept
    image = image.crop(cut)
    if image_processor.do_convert_rgb:
        image = image.convert("RGB")
    return image.resize(tuple(size), image_processor.resample, box=tuple(box))


def _prepared(images: Any, image_processor: Any) -> Any:
    """The opaque pictures, with the colours that lie under what is transparent; of thin ones the middle.

    Newer versions of transformers lay a PIL image with an alpha channel, or with one colour declared transparent, on
    white; older ones and the official code drop the transparency.
    """
    if isinstance(images, (list, tuple)):
        return [_prepared(image, image_processor) for image in images]
    if not is_pil_image(images):
        return images
    if "A" in images.getbands() or "transparency" in images.info:
        images = images.convert("RGB")
        images.info.pop("transparency", None)  # which `convert` keeps
    if image_processor is not None and is_thin(images.size, image_processor):
        middle = resized_middle(images, image_processor)
        images = images if middle is None else middle
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
