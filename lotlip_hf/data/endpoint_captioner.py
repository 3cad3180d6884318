"""
Captions from an endpoint that speaks OpenAI's protocol: vLLM, TGI, `transformers serve`, or one that is paid for.

A request that fails for the moment is sent again, with waits that grow. What fails for good is told apart by the same
request with a grey picture: if that is answered, the image is at fault and the run goes on without it; if not, the
endpoint is, and the run stops.
"""

import base64
import io
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient, get_token
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from PIL import Image

from .captioners import Answer, CaptionerConfig, EndpointError

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two tries; each wait is twice the one before
LONGEST_RETRY_AFTER = 600.0  # seconds that a server can ask for
PROBE_TRIES = 3
# huggingface_hub keeps one pool of connections for a process, with httpx's limit.
MOST_CONNECTIONS = 100
# Statuses after which the same request may succeed later; so it may after any of 5xx.
PASSING = (408, 409, 425, 429)
# The endpoint as such says no.
FATAL = (401, 402, 404, 405)
ADVICE = {
    401: "It wants a key: set OPENAI_API_KEY (for an endpoint of Hugging Face, `hf auth login`).",
    402: "Its account has nothing left to pay with.",
    403: "The key in OPENAI_API_KEY (for an endpoint of Hugging Face, the token) may not use this model.",
    404: "Look at the address, such as http://host:8000/v1, and at the model's name, {model!r}.",
    405: "Look at the address, such as http://host:8000/v1.",
    429: "Have fewer requests under way at a time (`concurrency`), or more tries (`max_retries`).",
}
REFUSED = (
    "It refuses the same request with a plain grey picture: look at the model's name, {model!r}, and the options."
)
TOO_LATE = "Have fewer requests under way at a time (`concurrency`), or more time (`timeout`)."
DOWN = "Look at its log, and whether its address is right."
# Hosts that the Hub's token is for; nobody else gets it.
HUB_DOMAINS = ("huggingface.co", "huggingface.cloud")
NO_KEY = "EMPTY"  # what servers without keys are sent by custom
FINISHED = {"length": False, **dict.fromkeys(("stop", "eos_token", "stop_sequence", "end_turn"), True)}


class _Failure(Exception):
    """
    A request without an answer.

    Args:
        reason: what a reader is told, the same whenever the same happens.
        status: of the answer; `None` without one.
        details: what else is known.
        retry_after: seconds that the server asks to be left alone.
        passes: whether the same request may succeed later.
        may_be_image: whether the image may be the cause.
        advice: what to do about it; may name `{model!r}`.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        details: str = "",
        retry_after: float | None = None,
        passes: bool = True,
        may_be_image: bool = True,
        advice: str = DOWN,
    ) -> None:
        super().__init__(reason)
        self.reason, self.status, self.details, self.retry_after = reason, status, details, retry_after
        self.passes, self.may_be_image, self.advice = passes, may_be_image, advice


class EndpointCaptioner:
    """
    Describes images by asking an endpoint that speaks OpenAI's protocol (`POST /v1/chat/completions`).

    An image is sent as a JPEG file of quality 95. `answer` is for many threads at once: as many requests are under
    way. The key is that in `OPENAI_API_KEY`; endpoints of Hugging Face get the Hub's token (`HF_TOKEN` or `hf auth
    login`), which nobody else is sent. `config.revision` is not sent: the endpoint decides what it runs.
    `transformers serve` draws tokens only for a checkpoint whose `generation_config.json` says so (`do_sample`); for
    others its answers are the same at any temperature.

    A request is sent again up to `config.max_retries` times, after waits that double from half a second to a minute,
    on 429, 5xx, 408, timeouts, broken connections, and answers that are cut off or are no JSON; `Retry-After` is
    honoured up to ten minutes. If there is no answer then, or the image was refused (400, 413, 422), the same request
    is sent with a grey picture: answered, it shows that the image is the cause, and the image's `Answer.error` says
    so. Where the endpoint itself refuses (401, 402, 404), is down, or has too much to do (429) after all the tries,
    the error is an [`EndpointError`].

    Args:
        config (`CaptionerConfig`): the captioner's options, with `endpoint`; its address may end in `/v1` or not.

    Raises:
        ValueError: if an option is not for endpoints, the address is none, or the key cannot be one.

    Example:

    ```python
    >>> from PIL import Image
    >>> from lotlip_hf.data.captioners import CaptionerConfig
    >>> from lotlip_hf.data.endpoint_captioner import EndpointCaptioner

    >>> config = CaptionerConfig("Qwen/Qwen2.5-VL-7B-Instruct", endpoint="http://localhost:8000/v1")
    >>> captioner = EndpointCaptioner(config)
    >>> [answer] = captioner.answer([Image.open("cat.jpg").convert("RGB")], config.settings(), seeds=[0])
    >>> answer.text, answer.finished
    ('A cat with grey fur sleeps on a red cushion. ...', True)
    ```
    """

    group_size = 1

    def __init__(self, config: CaptionerConfig) -> None:
        _check(config)
        self.config = config
        self.revision = config.revision
        self.concurrency = config.concurrency
        self._key = _api_key(str(config.endpoint))
        address = urlsplit(str(config.endpoint))
        self._secrets = [
            secret for secret in (self._key, address.password, address.query) if secret and secret != NO_KEY
        ]
        self._name = address._replace(netloc=address.netloc.rpartition("@")[2], query="").geturl()  # without secrets
        self._client = InferenceClient(base_url=config.endpoint, api_key=self._key, timeout=config.timeout)
        self._closed = threading.Event()
        self._jitter = random.Random()  # its own: what is drawn for waits changes nothing elsewhere
        self._probe_lock = threading.Lock()
        # For settings: when the last probe ended, and what it failed with.
        self._probes: dict[tuple[Any, ...], tuple[float, _Failure | None]] = {}

    def answer(self, images: Sequence[Image.Image], settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Answer]:
        """
        Describes images, one request each. Settings and seeds are as in [`Captioner`]; seeds are sent only where
        tokens are drawn.

        Raises:
            EndpointError: if the endpoint gives no answers, or `close` was called.
        """
        return [self._caption(image, settings, seed) for image, seed in zip(images, seeds, strict=True)]

    def close(self) -> None:
        """Lets all threads that wait in `answer` end at once, with an [`EndpointError`]."""
        self._closed.set()

    def _caption(self, image: Image.Image, settings: Mapping[str, Any], seed: int) -> Answer:
        try:
            url = _data_url(image)
        except (OSError, ValueError) as error:  # a side of more than 65535 pixels, or of none
            return Answer("", error=f"cannot be written as JPEG: {error}")
        tries = self.config.max_retries + 1
        try:
            return self._ask(url, settings, seed, tries)
        except _Failure as failure:
            cause = failure
        if not cause.may_be_image:
            raise self._error(cause)
        failure = self._probe(settings)
        if failure is not None:
            raise self._error(failure)
        return Answer(
            "", error=f"no answer, however often it was asked: {cause.reason}" if cause.passes else cause.reason
        )

    def _ask(self, url: str, settings: Mapping[str, Any], seed: int, tries: int) -> Answer:
        """One answer. Raises the last `_Failure` that may be the image's fault, if any, after all tries."""
        failures: list[_Failure] = []
        while True:
            try:
                return self._request(url, settings, seed)
            except _Failure as failure:
                failures.append(failure)
            last = failures[-1]
            if not last.passes:
                raise last
            if len(failures) == tries:
                raise next((one for one in reversed(failures) if one.may_be_image), last)
            seconds = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (len(failures) - 1)) * self._jitter.uniform(0.5, 1.0)
            if last.retry_after is not None:
                asked = min(last.retry_after, LONGEST_RETRY_AFTER)
                seconds = max(seconds, asked * self._jitter.uniform(1.0, 1.1))
            logger.log(
                logging.WARNING if seconds > 5 else logging.INFO,
                f"{self._name}: {last.reason}{last.details}; try {len(failures) + 1} of {tries} in {seconds:.1f} s.",
            )
            self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise self._stopped()

    def _request(self, url: str, settings: Mapping[str, Any], seed: int) -> Answer:
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
        if self.config.prompt:
            content.append({"type": "text", "text": self.config.prompt})
        draws = settings["temperature"] > 0
        penalty = settings["repetition_penalty"]
        options = {
            "messages": [{"role": "user", "content": content}],
            "model": self.config.model,
            "max_tokens": settings["max_new_tokens"],
            "temperature": settings["temperature"],
            "top_p": settings["top_p"] if draws else None,
            "seed": seed if draws else None,
            "extra_body": None if penalty == 1 else {"repetition_penalty": penalty},
        }
        try:
            return _read_answer(self._send(options))
        except (EndpointError, _Failure):
            raise
        except Exception as error:  # huggingface_hub lets AttributeError and others out where it cannot read an answer
            raise self._failure(error) from None

    def _send(self, options: dict[str, Any]) -> Any:
        """Sends a request from a thread that `close` can leave behind, for nothing wakes it until the answer comes."""
        if self._closed.is_set():
            raise self._stopped()
        outcome: Future[Any] = Future()

        def send() -> None:
            try:
                outcome.set_result(self._client.chat_completion(**options))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=send, daemon=True).start()
        while not wait([outcome], timeout=0.1).done:
            if self._closed.is_set():
                raise self._stopped()
        return outcome.result()

    def _failure(self, error: Exception) -> _Failure:
        """What an exception of huggingface_hub means."""
        if isinstance(error, OfflineModeIsEnabled):
            advice = "It sends nothing while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset them for this run."
            return _Failure("huggingface_hub is offline", passes=False, may_be_image=False, advice=advice)
        response = next(
            (found for one in _chain(error) if (found := getattr(one, "response", None)) is not None), None
        )
        details = f" ({self._safe(str(error) or type(error).__name__)})"
        if response is None:
            if any(isinstance(one, TimeoutError) for one in _chain(error)):
                return _Failure("no answer in time", details=f" ({self.config.timeout:g} s)", advice=TOO_LATE)
            if any(isinstance(one, ConnectionRefusedError | socket.gaierror) for one in _chain(error)):
                return _Failure("no connection", details=details, may_be_image=False)
            if isinstance(error, HTTPError | OSError):
                return _Failure("the connection broke", details=details)
            return _Failure("the answer is not in OpenAI's format", details=details)
        status = response.status_code
        reason = f"{status} {self._safe(_message(response))}".strip()
        if status in PASSING or status >= 500:
            return _Failure(
                reason,
                status=status,
                retry_after=_retry_after(response.headers),
                may_be_image=status != 429,
                advice=ADVICE.get(status, DOWN),
            )
        is_fatal = status in FATAL or status < 400
        advice = ADVICE.get(status, DOWN if is_fatal else REFUSED)
        return _Failure(reason, status=status, passes=False, may_be_image=not is_fatal, advice=advice)

    def _probe(self, settings: Mapping[str, Any]) -> _Failure | None:
        """What the request fails with, with a grey picture. Threads that ask at the same time share an answer."""
        asked = time.monotonic()
        key = tuple(settings.items())
        with self._probe_lock:
            if self._closed.is_set():
                raise self._stopped()
            ended, failure = self._probes.get(key, (-math.inf, None))
            if ended < asked:
                failure = None
                try:
                    self._ask(_data_url(Image.new("RGB", (224, 224), "grey")), settings, 0, PROBE_TRIES)
                except _Failure as error:
                    failure = error
                self._probes[key] = time.monotonic(), failure
            return failure

    def _error(self, failure: _Failure) -> EndpointError:
        advice = failure.advice.format(model=self.config.model)
        return EndpointError(
            f"The endpoint {self._name} gives no captions: {failure.reason}{failure.details}. {advice} What was done"
            " is kept; the same command goes on from there."
        )

    def _stopped(self) -> EndpointError:
        return EndpointError(f"The captions of the endpoint {self._name} were stopped.")

    def _safe(self, text: str) -> str:
        """A server's message on one line, not too long, and without the key."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join(text.split())
        return text.rstrip(".") if len(text) <= 300 else f"{text[:300]} ..."


def _check(config: CaptionerConfig) -> None:
    address = config.endpoint or ""
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError(f"`endpoint` must be an address such as http://host:8000/v1, got {config.endpoint!r}.")
    for settings in (config.settings(0), config.settings(1)):
        for name, only in (("num_beams", 1), ("min_new_tokens", 0)):
            if settings[name] != only:
                raise ValueError(
                    f"`{name}` must be {only} with an endpoint, which takes no other; got {settings[name]}."
                )
    if config.concurrency > MOST_CONNECTIONS:
        raise ValueError(
            f"`concurrency` must be {MOST_CONNECTIONS} at most, the connections that huggingface_hub opens in a"
            f" process, got {config.concurrency}. Start more processes for more requests at a time."
        )


def _api_key(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    is_hub = parts.scheme == "https" and any(host == one or host.endswith(f".{one}") for one in HUB_DOMAINS)
    key = (is_hub and get_token()) or os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds characters that no key has: set it to the endpoint's key.")
    return key


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read_answer(output: Any) -> Answer:
    """The answer in a `ChatCompletionOutput`, whose fields are whatever the server wrote."""
    if not isinstance(output.choices, list) or not output.choices:
        raise ValueError(f"no choices; error: {output.get('error')}")
    choice = output.choices[0]
    if choice.finish_reason in ("error", "abort"):
        raise ValueError(f"the answer ended with {choice.finish_reason!r}")
    text = _without_reasoning(_text(choice.message.content)).strip()
    reason = choice.finish_reason
    return Answer(text, finished=FINISHED.get(reason) if isinstance(reason, str) else None)


def _text(content: Any) -> str:
    """The text of a message: none, a string, or parts of which some are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content is a {type(content).__name__}")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part["text"] if part["type"] in ("text", "output_text") else ""
        if not isinstance(text, str):
            raise ValueError(f"a text of the content is a {type(text).__name__}")
        texts.append(text)
    return "".join(texts)


def _without_reasoning(text: str) -> str:
    """Drops `<think>...</think>` at the front; the template may have written its first tag, and it may be cut off."""
    reasoning, end, rest = text.partition("</think>")
    if end and (reasoning.lstrip().startswith("<think>") or "<think>" not in reasoning):
        return rest
    return "" if text.lstrip().startswith("<think>") else text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _message(response: Any) -> str:
    """What a server says of an error: OpenAI's `error.message`, FastAPI's `detail`, or the text if it is no page."""
    try:
        body = response.json()
    except (ValueError, RuntimeError):  # no JSON, or a body that was never read
        try:
            text = response.text
        except RuntimeError:
            text = ""
        return text if text and not text.lstrip().startswith("<") else response.reason_phrase
    for name in ("error", "detail", "message"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return body if isinstance(body, str) else str(body)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in a `Retry-After` header, which has seconds or a date; `None` without one that can be read."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            now = headers.get("date")  # by the server's clock, if it tells
            start = parsedate_to_datetime(now).timestamp() if now else time.time()
            seconds = parsedate_to_datetime(value).timestamp() - start
        except (TypeError, ValueError):
            return None
    return seconds if seconds >= 0 else None  # nan is neither
