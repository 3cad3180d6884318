"""Tokenizers of diffusion pipelines, which report the words that they cut off."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from transformers import CLIPTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import BatchEncoding

from ..modeling.calls_lotlip import for_one_call, free_of_calls
from ..modeling.tokenization_lotlip import LoTLIPTokenizer

logger = logging.getLogger(__name__)


class _PromptTokenizer(PreTrainedTokenizerBase):
    """
    Logs the words that truncation cuts off, in every call: diffusers does so for positive prompts alone, in the words
    of the tokens. To find them, diffusers tokenises a prompt a second time, with `padding="longest"` and no
    `truncation`; such a call truncates here too, so that nothing is logged twice. Pass `truncation=False` for all
    tokens of a long text.

    Args:
        fixed_length: Whether every text has `model_max_length` tokens at most, whatever `max_length` a call gives.
            Diffusers cuts a negative prompt to as many tokens as the prompt has states, and a resampler gives out
            another number than it reads.
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
        """As the class that it adds its warnings to, which `AutoTokenizer` knows."""
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
        # What the other classes would say is said here, and better.
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
        """What of `text` lies beyond the tokens that were kept, from the beginning of its first word."""
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
        """The text that offsets count in, where it can be told."""
        return text if isinstance(text, str) else None


class CLIPPromptTokenizer(_PromptTokenizer, CLIPTokenizer):
    """`CLIPTokenizer` that logs a warning with the words that it cuts off."""

    saved_class = "CLIPTokenizer"


class LoTLIPPromptTokenizer(_PromptTokenizer, LoTLIPTokenizer):
    """[`LoTLIPTokenizer`] that logs a warning with the words that it cuts off."""

    saved_class = "LoTLIPTokenizer"
    _auto_class = None  # it is of this package, and not saved with its code

    def _as_read(self, text: Any) -> str | None:
        if not isinstance(text, str) or any(token in text for token in self.all_special_tokens):
            return None
        return str(self.sep_token or "").join(self.sentences(text))


def prompt_tokenizer(
    tokenizer: PreTrainedTokenizerBase, max_length: int, fixed_length: bool = False
) -> PreTrainedTokenizerBase:
    """
    A copy of a pipeline's tokenizer that reports what it cuts off.

    Args:
        tokenizer: A `CLIPTokenizer` or [`LoTLIPTokenizer`].
        max_length: Longest prompt in tokens.
        fixed_length: See [`CLIPPromptTokenizer`].
    """
    prompt_class = CLIPPromptTokenizer if isinstance(tokenizer, CLIPTokenizer) else LoTLIPPromptTokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        copied = prompt_class.from_pretrained(folder, model_max_length=max_length, fixed_length=fixed_length)
    free_of_calls(copied)
    copied.name_or_path = tokenizer.name_or_path
    return copied


# Saved pipelines name a component's package and class; diffusers looks both up in `lotlip_hf` itself.
CLIPPromptTokenizer.__module__ = LoTLIPPromptTokenizer.__module__ = "lotlip_hf"
