"""Calls of a tokenizer that leave no state behind: settings of one call neither hold for the next nor are saved."""

from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

# The names under which transformers keeps the settings of the last call before saving, as those of the tokenizer.
# A processor passes them on in every call, where they win over `model_max_length`.
CALL_SETTINGS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")

AnyTokenizer = TypeVar("AnyTokenizer")


def free_of_calls(tokenizer: Any) -> None:
    """Removes the settings of earlier calls from a tokenizer: `model_max_length` alone decides then."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        for name in CALL_SETTINGS:
            tokenizer.init_kwargs.pop(name, None)
    if isinstance(tokenizer, TokenizersBackend):
        tokenizer._tokenizer.no_truncation()
        tokenizer._tokenizer.no_padding()


def own_backend(shared: Tokenizer) -> Tokenizer:
    """A backend without truncation and padding that shares vocabulary and pipeline; made in ten microseconds."""
    backend = Tokenizer(shared.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(shared, name)
        if part is not None:
            setattr(backend, name, part)
    # in the order of their ids, for those that the vocabulary does not hold are numbered anew
    backend.add_tokens([token for _, token in sorted(shared.get_added_tokens_decoder().items())])
    return backend


def for_one_call(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """A copy with a backend of its own, on which transformers sets a call's truncation and padding."""
    if not isinstance(tokenizer, TokenizersBackend):
        return tokenizer
    copy = object.__new__(type(tokenizer))
    copy.__dict__.update(tokenizer.__dict__, _tokenizer=own_backend(tokenizer._tokenizer))
    return copy
