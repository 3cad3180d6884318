"""
Captions from an endpoint that speaks OpenAI's protocol: vLLM, TGI, `transformers serve`, or one that is paid for.

A request that fails for the moment is sent again, with waits that grow. What fails for good is told apart by the same
request with a grey picture: if that is answered, the image is at fault and the run goes on without it; if not, the
endpoint is, and the run stops.
"""

import base64
import io
import json
import logging
import math
import os
import random
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import httpx
from huggingface_hub import get_token
from PIL import Image

from ...files import parse_json, printable
from .base import Answer, CaptionerConfig, EndpointError, without_secrets

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two tries; each wait is twice the one before
LONGEST_RETRY_AFTER = 600.0  # seconds that a server can ask for
PROBE_TRIES = 3
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
    "It refuses the same request with a plain grey picture: look at the model's name, {model!r}, and the options "
    "(`request_fields` renames a field or leaves it out)."
)
MOVED = "Redirects are not followed: if you trust that address, give it as `endpoint`."
TOO_LATE = "Have fewer requests under way at a time (`concurrency`), or more time (`timeout`)."
TOO_LONG = "Look at its log; raise `max_answer_bytes` if its answers are so long."
DOWN = "Look at its log, and whether its address is right."
# Hosts that the Hub's token is for; nobody else gets it.
HUB_DOMAINS = ("huggingface.co", "huggingface.cloud")
NO_KEY = "EMPTY"  # what servers without keys are sent by custom
LEAST_SECRET = 8  # characters of a secret that is taken out of captions: a shorter one may be a word
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

    An image is sent as a JPEG file of quality 95, its longer side `config.max_image_size` at most. `answer` is for
    many threads at once: as many requests are under way. The key is that in `OPENAI_API_KEY`; endpoints of Hugging
    Face get the Hub's token (`HF_TOKEN` or `hf auth login`), and no other server does; an address with a user name
    gets that and the password instead. Neither is shown or written. `config.revision` is not sent: the endpoint
    decides what it runs. `transformers serve` draws tokens only for a checkpoint whose `generation_config.json` says
    so (`do_sample`); for others its answers are the same at any temperature.

    Of an answer `config.max_answer_bytes` are read at most, in `config.timeout` seconds. Redirects are not followed.

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
    >>> from lotlip_hf.relabel.captioners.base import CaptionerConfig
    >>> from lotlip_hf.relabel.captioners.endpoint import EndpointCaptioner

    >>> config = CaptionerConfig("Qwen/Qwen2.5-VL-7B-Instruct", endpoint="http://localhost:8000/v1")
    >>> captioner = EndpointCaptioner(config)
    >>> [answer] = captioner.answer([Image.open("cat.jpg").convert("RGB")], config.settings(), seeds=[0])
    >>> answer.text, answer.finished
    ('A cat with grey fur sleeps on a red cushion. ...', True)
    ```
    """

    group_size = 1

    def __init__(self, config: CaptionerConfig) -> None:
        address = _address(config)
        self.config = config
        self.revision = config.revision
        self.concurrency = config.concurrency
        self._name = without_secrets(str(config.endpoint))
        signs_in = bool(address.username)
        user, password = unquote(address.username or ""), unquote(address.password or "")
        key = NO_KEY if signs_in else _api_key(str(config.endpoint))
        pair = base64.b64encode(f"{user}:{password}".encode()).decode() if signs_in else ""
        self._secrets = _spellings("" if key == NO_KEY else key, password or user, pair, address.query)
        self._url = address._replace(netloc=address.netloc.rpartition("@")[2], path=_path(address.path)).geturl()
        self._client = httpx.Client(
            # a few sentences need no compression
            headers={"Accept-Encoding": "identity", **({} if signs_in else {"Authorization": f"Bearer {key}"})},
            auth=(user, password) if signs_in else None,
            timeout=config.timeout,
            follow_redirects=False,  # they would make a GET of the request
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
        )
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
            url = _data_url(image, self.config.max_image_size)
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
        fields = {
            "max_tokens": settings["max_new_tokens"],
            "temperature": settings["temperature"],
            "top_p": settings["top_p"] if draws else None,
            "seed": seed if draws else None,
            "repetition_penalty": None if penalty == 1 else penalty,
        }
        names = {name: self.config.request_fields.get(name, name) for name in fields}
        body = {"model": self.config.model, "messages": [{"role": "user", "content": content}], "stream": False}
        body |= {sent: fields[name] for name, sent in names.items() if sent and fields[name] is not None}
        reply = self._send(json.dumps(body | dict(self.config.extra_body)).encode())
        if not 200 <= reply.status < 300:
            raise self._refused(reply)
        try:
            text, finished = _read_answer(reply)
        except ValueError as error:
            details = f" ({self._safe(str(error))})"
            raise _Failure("the answer is not in OpenAI's format", details=details) from None
        return Answer(self._hide(text, shortest=LEAST_SECRET), finished)

    def _send(self, body: bytes) -> "_Reply":
        """Sends a request from a thread that can be left behind: nothing wakes it until the server says something."""
        if self._closed.is_set():
            raise self._stopped()
        outcome: Future[_Reply] = Future()
        deadline = time.monotonic() + self.config.timeout

        def send() -> None:
            try:
                outcome.set_result(self._post(body, deadline))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=send, daemon=True).start()
        while not wait([outcome], timeout=max(0.0, min(0.1, deadline - time.monotonic()))).done:
            if self._closed.is_set():
                raise self._stopped()
            if time.monotonic() > deadline:
                raise self._late()
        try:
            return outcome.result()
        except httpx.TimeoutException:
            raise self._late() from None
        except (httpx.HTTPError, OSError) as error:
            details = f" ({self._safe(str(error) or type(error).__name__)})"
            if isinstance(error, httpx.ConnectError):
                raise _Failure("no connection", details=details, may_be_image=False) from None
            raise _Failure("the connection broke", details=details) from None

    def _post(self, body: bytes, deadline: float) -> "_Reply":
        """Sends a request, and reads at most `max_answer_bytes` of the reply."""
        limit = self.config.max_answer_bytes
        headers = {"Content-Type": "application/json"}
        content = bytearray()
        with self._client.stream("POST", self._url, content=body, headers=headers) as response:
            for part in response.iter_raw():
                content += part
                if len(content) > limit:
                    raise _too_long(limit)
                if time.monotonic() > deadline:
                    raise self._late()
            content = _decoded(bytes(content), response.headers.get("Content-Encoding", ""), limit)
            return _Reply(response.status_code, response.reason_phrase, response.headers, content)

    def _late(self) -> _Failure:
        return _Failure("no answer in time", details=f" ({self.config.timeout:g} s)", advice=TOO_LATE)

    def _refused(self, reply: "_Reply") -> _Failure:
        """The failure that a reply without an answer stands for."""
        status = reply.status
        reason = f"{status} {self._safe(_message(reply))}".strip()
        if status < 400:
            new = without_secrets(urljoin(self._url, reply.headers.get("Location", "")))
            reason = f"{status} redirects to {self._safe(new)}"
            return _Failure(reason, status=status, passes=False, may_be_image=False, advice=MOVED)
        if status in PASSING or status >= 500:
            return _Failure(
                reason,
                status=status,
                retry_after=_retry_after(reply.headers),
                may_be_image=status != 429,
                advice=ADVICE.get(status, DOWN),
            )
        return _Failure(
            reason,
            status=status,
            passes=False,
            may_be_image=status not in FATAL,
            advice=ADVICE.get(status, REFUSED),
        )

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
                    self._ask(_data_url(Image.new("RGB", (224, 224), "grey"), 224), settings, 0, PROBE_TRIES)
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

    def _hide(self, text: str, shortest: int = 1) -> str:
        """A server's text without the key and the password, which it knows."""
        for secret in self._secrets:
            if len(secret) >= shortest:
                text = text.replace(secret, "***")
        return text

    def _safe(self, text: str) -> str:
        """A server's message on one line, not too long, without secrets."""
        text = printable(" ".join(self._hide(text).split()))
        return text.rstrip(".") if len(text) <= 300 else f"{text[:300]} ..."


class _Reply(NamedTuple):
    """A server's reply to a request."""

    status: int
    phrase: str
    headers: Mapping[str, str]
    content: bytes


def _address(config: CaptionerConfig) -> SplitResult:
    """Checks the endpoint's address and options, and returns the parts of the address."""
    try:
        parts = urlsplit(config.endpoint or "")
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(parts.geturl())
    except (ValueError, httpx.InvalidURL):
        is_address = False
    if not is_address:
        got = config.endpoint and without_secrets(config.endpoint)
        raise ValueError(f"`endpoint` must be an address such as http://host:8000/v1, got {got!r}.")
    for settings in (config.settings(0), config.settings(1)):
        for name, only in (("num_beams", 1), ("min_new_tokens", 0)):
            if settings[name] != only:
                raise ValueError(
                    f"`{name}` must be {only} with an endpoint, which takes no other; got {settings[name]}."
                )
    return parts


def _path(path: str) -> str:
    """The path of chat completions, for an address with or without `/v1`."""
    path = path.rstrip("/")
    if path.endswith("/chat/completions"):
        return path
    return f"{path}{'' if path.endswith('/v1') else '/v1'}/chat/completions"


def _spellings(*secrets: str | None) -> list[str]:
    """Secrets plain and quoted for addresses, the longest first."""
    ways = (str, quote, unquote, lambda one: quote(one, safe=""))
    return sorted({way(one) for one in secrets if one for way in ways}, key=len, reverse=True)


def _api_key(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    is_hub = parts.scheme == "https" and any(host == one or host.endswith(f".{one}") for one in HUB_DOMAINS)
    key = (is_hub and get_token()) or os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds characters that no key has: set it to the endpoint's key.")
    return key


def shrunk(image: Image.Image, largest: int) -> Image.Image:
    """
    An image whose longer side has `largest` pixels at most.

    Args:
        image (`PIL.Image.Image`): of any size; left unchanged.
        largest (`int`): pixels.

    Returns:
        `PIL.Image.Image`: the image itself if it is no larger.
    """
    if max(image.size) <= largest:
        return image
    image = image.copy()
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return image


def _data_url(image: Image.Image, largest: int) -> str:
    file = io.BytesIO()
    shrunk(image.convert("RGB"), largest).save(file, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _too_long(limit: int) -> _Failure:
    return _Failure("the answer is too long", details=f" (more than {limit:,} bytes)", advice=TOO_LONG)


def _decoded(content: bytes, encoding: str, limit: int) -> bytes:
    """The body of a reply, decompressed: some servers compress unasked."""
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return content  # which no JSON parser takes
    try:
        content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, limit + 1)
    except zlib.error as error:
        raise _Failure("the answer is not in OpenAI's format", details=f" ({error})") from None
    if len(content) > limit:
        raise _too_long(limit)
    return content


def _read_answer(reply: _Reply) -> tuple[str, bool | None]:
    """The text of a chat completion, whose fields are what the server wrote, and whether the model ended it."""
    body = parse_json(reply.content)
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ValueError(f"no choice with a message: {_message(reply)}")
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else ""
    if reason in ("error", "abort"):
        raise ValueError(f"the answer ended with {reason!r}")
    return _without_reasoning(_text(message.get("content"))).strip(), FINISHED.get(reason)


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
        if isinstance(part, dict):
            part = part.get("text") if part.get("type") in ("text", "output_text") else "" if "type" in part else None
        if not isinstance(part, str):
            raise ValueError(f"a text of the content is a {type(part).__name__}")
        texts.append(part)
    return "".join(texts)


def _without_reasoning(text: str) -> str:
    """Drops `<think>...</think>` at the front; the template may have written its first tag, and it may be cut off."""
    reasoning, end, rest = text.partition("</think>")
    if end and (reasoning.lstrip().startswith("<think>") or "<think>" not in reasoning):
        return rest
    return "" if text.lstrip().startswith("<think>") else text


def _message(reply: _Reply) -> str:
    """What a server says of an error: OpenAI's `error.message`, FastAPI's `detail`, or the text if it is no page."""
    text = reply.content.decode(errors="replace").strip()
    try:
        body = parse_json(reply.content)
    except ValueError:
        body = None
    for name in ("error", "detail", "message"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    if isinstance(body, str):
        return body
    return text if text and not text.startswith("<") else reply.phrase


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
        except (OSError, OverflowError, TypeError, ValueError):
            return None
    return seconds if seconds >= 0 else None  # nan is neither
