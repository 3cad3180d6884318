"""
Models that write long captions: those of transformers, run here, and endpoints that speak OpenAI's protocol.

The first step of the LoTLIP paper relabels images with several of them; `relabel/captioning.py` asks them.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ...files import printable
from ...options import check, option

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "Describe the image in detail."
# The options of a captioner that say how it generates; `retry` may change them.
SETTINGS = ("max_new_tokens", "min_new_tokens", "num_beams", "temperature", "top_p", "repetition_penalty")
# The fields of a request that these become, by OpenAI's names.
REQUEST_FIELDS = ("max_tokens", "temperature", "top_p", "seed", "repetition_penalty")
# What models and processors raise of an image that does not suit them, such as one too long and thin
IMAGE_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
FIELD_OF = {"max_new_tokens": "max_tokens"}


def without_secrets(address: str) -> str:
    """An address as it may be shown: without user name, password, and query, which may hold a key."""
    scheme, mark, rest = address.partition("://")
    if not mark:
        scheme, rest = "", address
    return printable(f"{scheme}{mark}{rest.rpartition('@')[2].partition('?')[0].partition('#')[0]}")


def published_name(model: str) -> str:
    """A model as data sets name it: a Hub id, or the name of a folder without the folders above."""
    return os.path.basename(os.path.normpath(model)) if os.path.isabs(model) or os.path.isdir(model) else model


@dataclass(frozen=True)
class CaptionerConfig:
    """
    A captioner: which model, what it is asked, and how it generates. Greedy by default; the paper names its models
    (InstructBLIP, LLaVA, ShareGPT4V), not their settings.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:

    ```python
    >>> CaptionerConfig(model="llava-hf/llava-1.5-7b-hf").settings()["max_new_tokens"]
    256
    ```
    """

    model: str = option("Checkpoint folder or Hub id; with --endpoint, the model's name there", group="Captioners")
    revision: str | None = option("Revision of the model on the Hub (default: main)", None)
    prompt: str = option("Prompt of each image; empty for models without a prompt", PROMPT, metavar="TEXT")
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
    temperature: float = option("Temperature of sampling; 0 takes the most probable token", 0.0, at_least=0)
    top_p: float = option("Probability mass that tokens are sampled from", 1.0, above=0, at_most=1)
    repetition_penalty: float = option(
        "Penalty of repeated tokens, with many models also of the prompt's; sent to an endpoint only if it is not 1",
        1.0,
        above=0,
    )
    # Options of `SETTINGS` that change when a caption is requested again
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
        "Retries of a request that was refused for now (429, 5xx), timed out or got an invalid answer", 8, at_least=0
    )
    max_image_size: int = option(
        "Maximum width and height of a sent image, in pixels; larger images are resized", 672, at_least=1
    )
    max_answer_bytes: int = option("Maximum size of an answer, in bytes", 4 * 1024 * 1024, at_least=1)
    # Names of `REQUEST_FIELDS` at the endpoint; a field named `None` is not sent
    request_fields: Mapping[str, str | None] = field(default_factory=dict)
    # Further fields of each request, such as {"chat_template_kwargs": {"enable_thinking": False}}, which are published
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        if unknown := sorted(self.retry.keys() - set(SETTINGS)):
            raise ValueError(f"`retry` changes {', '.join(SETTINGS)}; it has {unknown[0]!r}.")
        for name, sent in self.request_fields.items():
            if name not in REQUEST_FIELDS or sent == "":
                raise ValueError(
                    f"`request_fields` renames {', '.join(REQUEST_FIELDS)} (`none`: not sent), got {name!r}: {sent!r}."
                )
        if self.retry:
            other = dataclasses.replace(self, retry={}, **self.retry)  # which is checked, too
            object.__setattr__(self, "retry", {name: getattr(other, name) for name in self.retry})

    def settings(self, attempt: int = 0) -> dict[str, Any]:
        """The options of `SETTINGS` for the first answer (0), or for one that is asked for again."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {**settings, **self.retry} if attempt else settings

    def published_settings(self, attempt: int = 0) -> str:
        """What a data set says of a caption, as JSON: [`settings`] less what is not sent, and `extra_body`."""
        unsent = {name for name, sent in self.request_fields.items() if sent is None}
        sent = {
            name: value for name, value in self.settings(attempt).items() if FIELD_OF.get(name, name) not in unsent
        }
        return json.dumps({**sent, **self.extra_body}, sort_keys=True)


@dataclass(frozen=True)
class Answer:
    """
    What a captioner said of an image.

    Args:
        text (`str`): the answer, without white space at either end and without the prompt.
        finished (`bool`, *optional*): whether the model ended it; `False` where it reached `max_new_tokens`; `None`
            where nobody said.
        error (`str`, *optional*): why this image cannot be captioned, whatever is tried; `text` is then empty.
    """

    text: str
    finished: bool | None = None
    error: str | None = None


class EndpointError(ConnectionError):
    """An endpoint that gives no answers. The message names it and says what it said last."""


class Captioner(Protocol):
    """What `relabel` asks of a captioner."""

    config: CaptionerConfig
    revision: str | None
    group_size: int  # images that it answers together
    concurrency: int  # calls of `answer` that may run at the same time

    def close(self) -> None:
        """Frees what it holds; calls of `answer` that wait for a server end at once, with an `EndpointError`."""
        ...

    def answer(
        self, images: "Sequence[Image.Image]", settings: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[Answer]:
        """
        Describes images. The same arguments get the same answers, whatever was asked before.

        Args:
            images (`Sequence[Image.Image]`): RGB images, `group_size` at most.
            settings (`Mapping[str, Any]`): as `CaptionerConfig.settings` gives them.
            seeds (`Sequence[int]`): one of each image, from 0 to 2^31 - 1, for settings that draw tokens.

        Returns:
            `list[Answer]`: one of each image.

        Raises:
            EndpointError: if an endpoint gives no answers.
            ArithmeticError, LookupError, RuntimeError, TypeError, ValueError:
                If an image does not suit the model: each is then asked about alone.
        """
        ...
