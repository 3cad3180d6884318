"""Tokenizers for diffusion pipelines that log the words they truncate."""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import CLIPTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import BatchEncoding

from ..modeling.calls_lotlip import for_one_call, free_of_calls
from ..modeling.tokenization_lotlip import LoTLIPTokenizer

logger = logging.getLogger(__name__)


class _PromptTokenizer(PreTrainedTokenizerBase):
    """
    Logs the words that each call truncates; diffusers only does this for positive prompts. For its own warning,
    diffusers tokenizes a prompt a second time with `padding="longest"` and no `truncation`. This class also truncates
    in the second call, so that diffusers logs nothing. Pass `truncation=False` to get all tokens of a long text.

    With `fixed_length`, `model_max_length` replaces the `max_length` of a call. A resampler needs `fixed_length`:
    diffusers truncates a negative prompt to the number of states, which is not the number of tokens with a resampler.
    """

    saved_class: ClassVar[str]

    def __init__(self, *args: Any, fixed_length: bool = False, **kwargs: Any) -> None:
        if fixed_length:
            kwargs["fixed_length"] = True
        super().__init__(*args, **kwargs)
        self.fixed_length = fixed_length

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        if kwargs.get("padding") == "longest" and "truncation" not in kwargs:
            kwargs.update(truncation=True, verbose=False)
        return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> tuple[str, ...]:  # pyright: ignore
        """Saves the name of the parent class, which `AutoTokenizer` knows."""
        free_of_calls(self)
        files = super().save_pretrained(save_directory, **kwargs)
        path = Path(files[0])
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = self.saved_class
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    def _encode_plus(
        self, text: Any, *args: Any, verbose: bool = True, return_overflowing_tokens: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        # silence the parent's own truncation warnings
        kwargs.update(verbose=False, return_overflowing_tokens=return_overflowing_tokens)
        if self.fixed_length and kwargs.get("max_length") is not None:
            kwargs["max_length"] = self.model_max_length
        call: Any = super(_PromptTokenizer, for_one_call(self))
        encoding = call._encode_plus(text, *args, **kwargs)
        if verbose and not return_overflowing_tokens and encoding.encodings is not None:
            texts = [text] if isinstance(text, str) else text
            lost = [
                self._lost_words(text, prompt)
                for text, prompt in zip(texts, encoding.encodings, strict=True)
                if prompt.overflowing
            ]
            if lost:
                logger.warning(
                    f"{len(lost)} of {len(encoding.encodings)} prompts cut off at {kwargs.get('max_length')} tokens. "
                    f"Lost words: {'; '.join(map(repr, lost))}"
                )
        return encoding

    def _lost_words(self, text: Any, prompt: Any) -> str:
        """Returns the part of `text` after the kept tokens, including a word that was cut in the middle."""
        read = self._as_read(text)
        spans = [span for span, special in zip(prompt.offsets, prompt.special_tokens_mask, strict=True) if not special]
        if read is None or self.truncation_side != "right":
            ids = [token_id for part in prompt.overflowing for token_id in part.ids]
            return str(self.decode(ids, skip_special_tokens=True)).replace("</w>", " ").strip()
        start = max((end for _, end in spans), default=0)
        while 0 < start < len(read) and read[start - 1].isalnum() and read[start].isalnum():
            start -= 1
        return read[start:].strip()

    def _as_read(self, text: Any) -> str | None:
        """Returns the text that token offsets refer to, or `None` if it is unknown."""
        return text if isinstance(text, str) else None


class CLIPPromptTokenizer(_PromptTokenizer, CLIPTokenizer):
    """`CLIPTokenizer` that logs a warning with the words that it truncates."""

    saved_class = "CLIPTokenizer"


class LoTLIPPromptTokenizer(_PromptTokenizer, LoTLIPTokenizer):
    """[`LoTLIPTokenizer`] that logs a warning with the words that it truncates."""

    saved_class = "LoTLIPTokenizer"
    _auto_class = None  # save checkpoints without code, because this package provides the class

    def _as_read(self, text: Any) -> str | None:
        has_template = self.prompt_template != "{}"
        if not isinstance(text, str) or has_template or any(token in text for token in self.all_special_tokens):
            return None
        return str(self.sep_token or "").join(self.sentences(text))


def prompt_tokenizer(
    tokenizer: PreTrainedTokenizerBase, max_length: int, fixed_length: bool = False
) -> PreTrainedTokenizerBase:
    """
    Copies a pipeline's tokenizer to one that logs the words it truncates.

    Args:
        tokenizer (`CLIPTokenizer` or `LoTLIPTokenizer`): Tokenizer to copy.
        max_length (`int`): Maximum length of a prompt in tokens.
        fixed_length (`bool`, *optional*, defaults to `False`): Whether to truncate at `max_length` even if a call
            passes another `max_length`.

    Returns:
        `PreTrainedTokenizerBase`: The copy.
    """
    prompt_class = CLIPPromptTokenizer if isinstance(tokenizer, CLIPTokenizer) else LoTLIPPromptTokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        copied = prompt_class.from_pretrained(folder, model_max_length=max_length, fixed_length=fixed_length)
    free_of_calls(copied)
    copied.name_or_path = tokenizer.name_or_path
    return copied


def text_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """
    Finds the token that ends a text, behind which is only padding.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of a pipeline, which pads on the right.
        ids (`Sequence[int]`): Token ids of a text.

    Returns:
        `int`: Index of the token. In CLIP it is the first [EOT], because CLIP also pads with it, or with a token of
        the vocabulary. Otherwise it is the last token that is not padding.
    """
    if isinstance(tokenizer, CLIPTokenizer):
        return next((index for index, one in enumerate(ids) if index and one == tokenizer.eos_token_id), len(ids) - 1)
    return max((index for index, one in enumerate(ids) if one != tokenizer.pad_token_id), default=0)


# Saved pipelines name the package and class of each component. diffusers looks the class up in `lotlip_hf`.
CLIPPromptTokenizer.__module__ = LoTLIPPromptTokenizer.__module__ = "lotlip_hf"
