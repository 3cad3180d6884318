"""Keeps the truncation and padding of a tokenizer's call from later calls and from the saved files."""

# transformers is imported where it is used: `cleaning_lotlip` works without it, because it takes seconds to import.
from typing import Any, TypeVar

from tokenizers import Tokenizer

# Arguments of the last call, which transformers saves as settings of the tokenizer. A processor would pass them in
# every call, where they override `model_max_length`.
CALL_SETTINGS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")

AnyTokenizer = TypeVar("AnyTokenizer")


def free_of_calls(tokenizer: Any) -> None:
    """Removes the settings of earlier calls from a tokenizer, so that `model_max_length` applies."""
    from transformers import PreTrainedTokenizerBase
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        for name in CALL_SETTINGS:
            tokenizer.init_kwargs.pop(name, None)
    if isinstance(tokenizer, TokenizersBackend):
        tokenizer._tokenizer.no_truncation()
        tokenizer._tokenizer.no_padding()


def own_backend(shared: Tokenizer) -> Tokenizer:
    """Copies a backend without truncation and padding. The copy shares its vocabulary, so that it takes only 10 us."""
    backend = Tokenizer(shared.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(shared, name)
        if part is not None:
            setattr(backend, name, part)
    # Add tokens in the order of their ids, because tokens outside the vocabulary are numbered again.
    backend.add_tokens([token for _, token in sorted(shared.get_added_tokens_decoder().items())])
    return backend


def for_one_call(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """Copies a tokenizer and its backend, on which transformers sets the truncation and padding of a call."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend):
        return tokenizer
    copy = object.__new__(type(tokenizer))
    copy.__dict__.update(tokenizer.__dict__, _tokenizer=own_backend(tokenizer._tokenizer))
    return copy
