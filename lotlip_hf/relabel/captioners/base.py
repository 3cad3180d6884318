"""The interface and the options of captioners: local models of transformers, and endpoints with OpenAI's protocol."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ...files import printable
from ...options import check, option

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "Describe the image in detail."
PLACEHOLDER = re.compile(r"\{captions?\}")
# The field of a record that the answers of a role go to
ROLES = {"long": "long_captions", "rewrite": "rewrites", "negative": "negatives", "tags": "tags"}
# Generation options of a captioner; `retry` may change them for further attempts.
SETTINGS = ("max_new_tokens", "min_new_tokens", "num_beams", "temperature", "top_p", "repetition_penalty")
# Fields of a request, by OpenAI's names
REQUEST_FIELDS = ("max_tokens", "temperature", "top_p", "seed", "repetition_penalty")
# Errors that models and processors raise for unsuitable images, such as very thin ones
IMAGE_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
FIELD_OF = {"max_new_tokens": "max_tokens"}


def without_secrets(address: str) -> str:
    """Removes user name, password and query, which may contain a key, from an address."""
    scheme, mark, rest = address.partition("://")
    if not mark:
        scheme, rest = "", address
    return printable(f"{scheme}{mark}{rest.rpartition('@')[2].partition('?')[0].partition('#')[0]}")


def fill(prompt: str, caption: str, captions: str) -> str:
    """Replaces `{caption}` and `{captions}` in a prompt by texts, in which braces have no meaning."""
    return PLACEHOLDER.sub(lambda found: caption if found[0] == "{caption}" else captions, prompt)


def published_name(model: str) -> str:
    """Returns the published name of a model: its Hub id, or the name of its folder without the folders above."""
    return os.path.basename(os.path.normpath(model)) if os.path.isabs(model) or os.path.isdir(model) else model


@dataclass(frozen=True)
class CaptionerConfig:
    """
    Model, prompt and settings of a captioner.

    The default is greedy decoding. The paper names its models (InstructBLIP, LLaVA, ShareGPT4V), but not their
    settings.

    Raises:
        `ValueError`: If an option is out of range.

    Example:

    ```python
    >>> CaptionerConfig(model="llava-hf/llava-1.5-7b-hf").settings()["max_new_tokens"]
    256
    ```
    """

    model: str = option("Checkpoint folder or Hub id; with --endpoint, the name that it uses", group="Captioners")
    revision: str | None = option("Revision of the model on the Hub (default: main)", None)
    prompt: str = option(
        "Prompt of each image; empty for models without a prompt. With --input text or both, {caption} stands for the "
        "raw caption, and {captions} for the long captions of the data and of the captioners before, one a line",
        PROMPT,
        metavar="TEXT",
    )
    input: Literal["image", "text", "both"] = option(
        "What the model reads: the image (and the prompt), texts of the record in the prompt, or both",
        "image",
    )
    role: Literal["long", "rewrite", "negative", "tags"] = option(
        "Field of the answers: long_captions, rewrites, negatives or tags. All but long may be lists, one a line",
        "long",
    )
    batch_size: int = option("Images per batch; not for endpoints", 8, at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Type of the weights; auto keeps the checkpoint's", "bfloat16"
    )
    device_map: str | None = option(
        "Device map of transformers, such as auto (default: all on the device of the process)", None
    )

    max_new_tokens: int = option("Maximum length of a caption, in tokens", 256, at_least=1, group="Generation")
    min_new_tokens: int = option("Minimum length of a caption, in tokens; not for endpoints", 0, at_least=0)
    num_beams: int = option("Beams of a beam search; not for endpoints", 1, at_least=1)
    temperature: float = option("Temperature of sampling; 0 always picks the most probable token", 0.0, at_least=0)
    top_p: float = option("Top-p sampling: probability mass of the tokens to sample from", 1.0, above=0, at_most=1)
    repetition_penalty: float = option(
        "Penalty of repeated tokens, in many models also of the prompt's; sent to an endpoint only if it is not 1",
        1.0,
        above=0,
    )
    # Options of `SETTINGS` that change for further attempts
    retry: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.7, "top_p": 0.9})

    endpoint: str | None = option(
        "Address of a server with the OpenAI API that runs the model (vLLM, TGI, `transformers serve`), such as "
        "http://host:8000/v1, or http://user:password@host/v1 to sign in",
        None,
        repr=False,
        group="Endpoint",
        metavar="URL",
    )
    concurrency: int = option("Simultaneous requests", 16, at_least=1)
    timeout: float = option("Time limit of a request, in seconds", 120.0, above=0)
    max_retries: int = option(
        "Retries of a request after a temporary error (429, 5xx), a timeout or an invalid answer", 8, at_least=0
    )
    max_image_size: int = option(
        "Maximum width and height of a sent image, in pixels; larger images are resized", 672, at_least=1
    )
    max_answer_bytes: int = option("Maximum size of an answer, in bytes", 4 * 1024 * 1024, at_least=1)
    # The endpoint's names of `REQUEST_FIELDS`; a field named `None` is not sent
    request_fields: Mapping[str, str | None] = field(default_factory=dict)
    # Further fields of each request, published in the card: {"chat_template_kwargs": {"enable_thinking": False}}
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        if (self.input == "image") == bool(PLACEHOLDER.search(self.prompt)):
            raise ValueError(
                "`prompt` must contain {caption} or {captions} if `input` is text or both, and must not if `input` is "
                f"image. `input` is {self.input}."
            )
        if self.role in ("negative", "tags") and self.prompt == PROMPT:
            raise ValueError(f"`prompt` must ask for an answer with the `role` {self.role}.")
        if unknown := sorted(self.retry.keys() - set(SETTINGS)):
            raise ValueError(f"`retry` has the unknown option {unknown[0]!r}. Use {', '.join(SETTINGS)}.")
        for name, sent in self.request_fields.items():
            if name not in REQUEST_FIELDS or sent == "":
                raise ValueError(
                    f"`request_fields` must not map {name!r} to {sent!r}. It maps {', '.join(REQUEST_FIELDS)} to the "
                    "endpoint's name, or to `none` to omit the field."
                )
        if self.retry:
            other = dataclasses.replace(self, retry={}, **self.retry)  # checks the values
            object.__setattr__(self, "retry", {name: getattr(other, name) for name in self.retry})

    def settings(self, attempt: int = 0) -> dict[str, Any]:
        """Returns the options of `SETTINGS` for the first attempt (0) or a further attempt."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {**settings, **self.retry} if attempt else settings

    @property
    def test_prompt(self) -> str:
        """A prompt like those of the run, with an example text."""
        return fill(self.prompt, "A grey picture.", "A grey picture.")

    def published_settings(self, attempt: int = 0) -> str:
        """Returns the published settings as JSON: [`settings`] without omitted fields, and `extra_body`."""
        unsent = {name for name, sent in self.request_fields.items() if sent is None}
        sent = {
            name: value for name, value in self.settings(attempt).items() if FIELD_OF.get(name, name) not in unsent
        }
        return json.dumps({**sent, **self.extra_body}, sort_keys=True)


@dataclass(frozen=True)
class Answer:
    """
    The answer of a captioner for one image.

    Args:
        text (`str`): Answer, without the prompt and without white space at both ends.
        finished (`bool`, *optional*): Whether the model ended the answer; `False` if it reached `max_new_tokens`,
            `None` if the server did not report a finish reason.
        error (`str`, *optional*): Reason why this image cannot be captioned at all; `text` is then empty.
    """

    text: str
    finished: bool | None = None
    error: str | None = None


class EndpointError(ConnectionError):
    """Raised if an endpoint does not answer. The message contains its last error."""


class Captioner(Protocol):
    """The interface of a captioner, as `relabel` uses it."""

    config: CaptionerConfig
    revision: str | None
    group_size: int  # number of images in one call of `answer`
    concurrency: int  # maximum number of calls of `answer` at the same time

    def close(self) -> None:
        """Frees the model or the connections. Pending calls of `answer` raise an `EndpointError`."""
        ...

    def answer(
        self,
        images: "Sequence[Image.Image | None]",
        settings: Mapping[str, Any],
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """
        Describes images. The answers depend only on the arguments, not on earlier calls.

        Args:
            images (`Sequence[Image.Image | None]`): At most `group_size` RGB images; `None` for each if
                `config.input` is `"text"`.
            settings (`Mapping[str, Any]`): Settings from `CaptionerConfig.settings`.
            seeds (`Sequence[int]`): Seed of each image, from 0 to 2^31 - 1, for settings that draw tokens.
            prompts (`Sequence[str]`, *optional*): Prompt of each image. Defaults to `config.prompt`; `relabel` passes
                prompts only if `config.input` is not `"image"`.

        Returns:
            `list[Answer]`: The answer for each image.

        Raises:
            `EndpointError`: If an endpoint does not answer.
            `ArithmeticError`, `LookupError`, `RuntimeError`, `TypeError`, `ValueError`: If an image does not suit the
                model. `relabel` then sends each image separately.
        """
        ...
