"""
Captions by an endpoint with OpenAI's protocol: vLLM, TGI, `transformers serve`, or a commercial service.

The `openai` client sends the requests and retries transient failures. After a permanent failure the same request is
sent with a grey test image. If the endpoint answers, the run continues without the image; if not, the run stops.
"""

import asyncio
import base64
import io
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urljoin, urlsplit

import httpx
from huggingface_hub import get_token
from PIL import Image

from ...files import parse_json, printable
from .base import Answer, CaptionerConfig, EndpointError, without_secrets

PROBE_RETRIES = 2
# HTTP statuses of failures that no image causes
FATAL = (401, 402, 404, 405, 429)
ADVICE = {
    **dict.fromkeys((401, 403), "Set OPENAI_API_KEY, or run `hf auth login` for an endpoint of Hugging Face."),
    **dict.fromkeys(
        (404, 405), "Check the address, such as http://host:8000/v1, and the name of the model, {model!r}."
    ),
    429: "Send fewer requests at the same time (`concurrency`), or allow more retries (`max_retries`).",
}
REFUSED = (
    "The endpoint also rejects a grey test image. Check the name of the model, {model!r}, and the options "
    "(`request_fields` renames or omits a field)."
)
MOVED = "Redirects are not followed. If you trust that address, pass it as `endpoint`."
DOWN = "Check the address and the log of the server."
# Hosts that receive the Hub's token
HUB_DOMAINS = ("huggingface.co", "huggingface.cloud")
NO_KEY = "EMPTY"  # conventional key for servers that need none
LEAST_SECRET = 8  # minimum length of a secret that is removed from captions; shorter secrets may be words
ENCODINGS = ("identity", "gzip", "deflate")
FINISHED = {"length": False, **dict.fromkeys(("stop", "eos_token", "stop_sequence", "end_turn"), True)}


class _Failure(httpx.TransportError):
    """A failed request. `_Client` raises it to trigger a retry. `reason` is recorded for the image."""

    def __init__(self, reason: str, details: object = "", *, may_be_image: bool = True, advice: str = DOWN) -> None:
        super().__init__(reason)
        self.reason, self.details, self.may_be_image, self.advice = reason, details, may_be_image, advice


class _Client(httpx.AsyncClient):
    """Reads at most `limit` bytes of a response, for at most `seconds`; raises a `_Failure` if there is no answer."""

    def __init__(self, limit: int, seconds: float) -> None:
        super().__init__(timeout=seconds, follow_redirects=False, limits=httpx.Limits(max_connections=None))
        self._limit, self._seconds = limit, seconds

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        try:
            response = await asyncio.wait_for(self._read(request, **options), self._seconds)
            if response.is_success:
                _read_answer(response.content)
            return response
        except _Failure:
            raise
        except (asyncio.TimeoutError, httpx.TimeoutException):
            failure = _Failure("no answer in time", f"(`timeout` {self._seconds:g} s)")
        except httpx.ConnectError as error:
            failure = _Failure("no connection", f"({error})", may_be_image=False)
        except (httpx.HTTPError, OSError) as error:
            failure = _Failure("the connection broke", f"({error})")
        except ValueError as error:
            failure = _Failure("the answer is not in OpenAI's format", f"({error})")
        raise failure

    async def _read(self, request: httpx.Request, **options: Any) -> httpx.Response:
        response = await super().send(request, stream=True, **options)
        content, headers = bytearray(), response.headers.copy()
        encoding = headers.pop("Content-Encoding", "identity")  # removed, because `content` is decoded below
        try:
            if encoding.lower() not in ENCODINGS:  # other and nested encodings can expand a packet to gigabytes
                raise _Failure(f"the answer is compressed ({encoding})")
            async for part in response.aiter_bytes():
                content += part
                if len(content) > self._limit:
                    raise _Failure("the answer is too long", f"(`max_answer_bytes` {self._limit:,})")
        finally:
            await response.aclose()
        return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=request)


class EndpointCaptioner:
    """
    A captioner that sends images to an endpoint with OpenAI's protocol (`POST /v1/chat/completions`).

    Several threads may call `answer` at the same time. The API key is `OPENAI_API_KEY`. Only endpoints of Hugging Face
    receive the Hub's token (`HF_TOKEN` or `hf auth login`). If the address contains user name and password, these are
    sent instead of a key. Keys and passwords are never shown or saved.

    `config.revision` is not sent; the endpoint chooses the revision. `transformers serve` draws tokens only if
    `do_sample` is set in the `generation_config.json` of the checkpoint.

    A request is retried up to `config.max_retries` times after the statuses 408, 409, 429 and 5xx, timeouts, broken
    connections, and answers in another format. The waits grow, or follow the header `Retry-After`.

    Args:
        config (`CaptionerConfig`): Options of the captioner, with `endpoint`.

    Raises:
        `ImportError`: If the `openai` client is not installed.
        `ValueError`: If an option is not available for endpoints, or the address or the key is invalid.

    Example:

    ```python
    >>> from lotlip_hf.images import load_image
    >>> from lotlip_hf.relabel.captioners.base import CaptionerConfig
    >>> from lotlip_hf.relabel.captioners.endpoint import EndpointCaptioner

    >>> config = CaptionerConfig("Qwen/Qwen2.5-VL-7B-Instruct", endpoint="http://localhost:8000/v1")
    >>> captioner = EndpointCaptioner(config)
    >>> [answer] = captioner.answer([load_image("photos/cat.png")], config.settings(), seeds=[0])  # doctest: +SKIP
    >>> answer.text, answer.finished  # doctest: +SKIP
    ('A cat with grey fur sleeps on a red cushion. ...', True)
    ```
    """

    group_size = 1

    def __init__(self, config: CaptionerConfig) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise ImportError("The openai client is not installed. Run pip install 'lotlip-hf[relabel]'") from error

        address = _address(config)
        self.config, self.revision, self.concurrency = config, config.revision, config.concurrency
        self._name = without_secrets(str(config.endpoint))
        user, password = unquote(address.username or ""), unquote(address.password or "")
        key = NO_KEY if user else _api_key(str(config.endpoint))
        pair = base64.b64encode(f"{user}:{password}".encode()).decode() if user else ""
        self._secrets = _spellings("" if key == NO_KEY else key, password or user, pair, address.query)
        self._client = AsyncOpenAI(
            api_key=key,
            base_url=address._replace(
                netloc=address.netloc.rpartition("@")[2], path=_path(address.path), query=""
            ).geturl(),
            default_query=dict(parse_qsl(address.query, keep_blank_values=True)),
            # Answers are short, so compression is not needed.
            default_headers={"Accept-Encoding": "identity", **({"Authorization": f"Basic {pair}"} if user else {})},
            timeout=config.timeout,
            max_retries=config.max_retries,
            http_client=_Client(config.max_answer_bytes, config.timeout),
        )
        # Requests run in an event loop, so that `close` can cancel them.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=lambda: (self._loop.run_forever(), self._loop.close()), daemon=True).start()
        self._lock, self._is_closed = threading.Lock(), False

    def answer(
        self,
        images: Sequence[Image.Image | None],
        settings: Mapping[str, Any],
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """
        Sends one request for each image or text; see [`Captioner`]. Seeds are sent only if tokens are drawn.

        Raises:
            `EndpointError`: If the endpoint does not answer, or `close` was called.
        """
        asked = zip(images, prompts or [self.config.prompt] * len(images), seeds, strict=True)
        return [self._caption(image, prompt, settings, seed) for image, prompt, seed in asked]

    def close(self) -> None:
        """Cancels all requests. Threads that wait in `answer` raise an [`EndpointError`]."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                asyncio.run_coroutine_threadsafe(self._end(), self._loop)

    async def _end(self) -> None:
        # Cancels repeatedly, because `wait_for` may swallow a cancellation before Python 3.12.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.1)
        await self._client.close()
        self._loop.stop()

    def _caption(self, image: Image.Image | None, prompt: str, settings: Mapping[str, Any], seed: int) -> Answer:
        try:
            url = None if image is None else _data_url(image, self.config.max_image_size)
        except (OSError, ValueError) as error:  # no pixels, or a side of more than 65,535 pixels
            return Answer("", error=f"cannot be saved as JPEG: {error}")
        try:
            with self._lock:
                if self._is_closed:
                    raise CancelledError
                future = asyncio.run_coroutine_threadsafe(self._describe(url, prompt, settings, seed), self._loop)
            return future.result()
        except CancelledError:
            raise EndpointError(f"The requests to the endpoint {self._name} were stopped.") from None

    async def _describe(self, url: str | None, prompt: str, settings: Mapping[str, Any], seed: int) -> Answer:
        """Returns the answer. After a failure, finds out whether the record or the endpoint is the cause."""
        try:
            return await self._ask(self._client, url, prompt, settings, seed)
        except _Failure as failure:
            cause = failure
        if blamed := await self._probe(settings) if cause.may_be_image else cause:
            reason = self._safe(f"{blamed.reason} {blamed.details}")
            advice = blamed.advice.format(model=self.config.model)
            raise EndpointError(
                f"The endpoint {self._name} does not answer: {reason}. {advice} "
                "The captions so far are saved; run the same command to resume."
            )
        return Answer("", error=f"no answer: {self._safe(cause.reason)}")

    async def _probe(self, settings: Mapping[str, Any]) -> _Failure | None:
        client = self._client.with_options(max_retries=PROBE_RETRIES)
        url = None if self.config.input == "text" else _data_url(Image.new("RGB", (224, 224), "grey"), 224)
        try:
            await self._ask(client, url, self.config.test_prompt, settings, 0)
        except _Failure as failure:
            return failure
        return None

    async def _ask(self, client: Any, url: str | None, prompt: str, settings: Mapping[str, Any], seed: int) -> Answer:
        from openai import APIConnectionError, APIStatusError

        content: Any = prompt  # as a text, because some servers of language models do not accept parts
        if url is not None:
            content = [{"type": "image_url", "image_url": {"url": url}}]
            content += [{"type": "text", "text": prompt}] if prompt else []
        draws, penalty = settings["temperature"] > 0, settings["repetition_penalty"]
        fields = {
            "max_tokens": settings["max_new_tokens"],
            "temperature": settings["temperature"],
            "top_p": settings["top_p"] if draws else None,
            "seed": seed if draws else None,
            "repetition_penalty": None if penalty == 1 else penalty,
        }
        names = {name: self.config.request_fields.get(name, name) for name in fields}
        body = {sent: fields[name] for name, sent in names.items() if sent and fields[name] is not None}
        try:
            reply = await client.chat.completions.with_raw_response.create(
                model=self.config.model,
                messages=[{"role": "user", "content": content}],
                stream=False,
                extra_body=body | dict(self.config.extra_body),
            )
        except APIStatusError as error:
            raise _refused(error.response) from None
        except APIConnectionError as error:
            failure = error.__cause__
            raise failure if isinstance(failure, _Failure) else _Failure("the connection broke", error) from None
        text, finished = _read_answer(reply.content)
        return Answer(self._hide(text, shortest=LEAST_SECRET), finished)

    def _hide(self, text: str, shortest: int = 1) -> str:
        for secret in self._secrets:
            if len(secret) >= shortest:
                text = text.replace(secret, "***")
        return text

    def _safe(self, text: str) -> str:
        """Shortens a message of a server to one line of at most 300 characters, without secrets."""
        return printable(" ".join(self._hide(text).split()))[:300].rstrip(".")


def _refused(response: httpx.Response) -> _Failure:
    status = response.status_code
    if status < 400:
        new = without_secrets(urljoin(str(response.url), response.headers.get("Location", "")))
        return _Failure(f"{status} redirects to {new}", may_be_image=False, advice=MOVED)
    advice = ADVICE.get(status, DOWN if status >= 500 else REFUSED)
    return _Failure(f"{status} {_message(response.content)}", may_be_image=status not in FATAL, advice=advice)


def _address(config: CaptionerConfig) -> SplitResult:
    """Checks the endpoint's address and options, and returns the parts of the address."""
    try:
        parts = urlsplit(config.endpoint or "")
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(parts.geturl())
    except (ValueError, httpx.InvalidURL):
        is_address = False
    if not is_address:
        raise ValueError("`endpoint` must be an address such as http://host:8000/v1.")
    for name, only in (("num_beams", 1), ("min_new_tokens", 0)):
        if {config.settings(attempt)[name] for attempt in (0, 1)} != {only}:
            raise ValueError(f"`{name}` must be {only} with an endpoint, also in `retry`.")
    return parts


def _path(path: str) -> str:
    """Returns the path above `/chat/completions`, for addresses with and without this ending and `/v1`."""
    path = path.rstrip("/")
    base = path.removesuffix("/chat/completions")
    return base if base != path or path.endswith("/v1") else f"{path}/v1"


def _spellings(*secrets: str) -> list[str]:
    """Returns secrets in plain and URL-quoted form, longest first."""
    ways = (str, quote, unquote, lambda one: quote(one, safe=""))
    return sorted({way(one) for one in secrets if one for way in ways}, key=len, reverse=True)


def _api_key(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    is_hub = parts.scheme == "https" and any(host == one or host.endswith(f".{one}") for one in HUB_DOMAINS)
    key = (is_hub and get_token()) or os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY contains invalid characters. Set it to the key of the endpoint.")
    return key


def shrunk(image: Image.Image, largest: int) -> Image.Image:
    """Returns the image if it fits, or else a copy with a longer side of `largest` pixels."""
    if max(image.size) <= largest:
        return image
    image = image.copy()
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return image


def _data_url(image: Image.Image, largest: int) -> str:
    file = io.BytesIO()
    shrunk(image.convert("RGB"), largest).save(file, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read_answer(content: bytes) -> tuple[str, bool | None]:
    """Returns the text of a chat completion without reasoning, and whether the model ended it (`None` if unknown)."""
    try:
        choice = parse_json(content)["choices"][0]
        text, reason = choice["message"].get("content") or "", choice.get("finish_reason")
        if isinstance(text, list):
            kinds = ("text", "output_text")
            parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in text]
            text = "".join(part["text"] for part in parts if part.get("type") in kinds)
        if reason in ("error", "abort"):
            raise ValueError(f"the finish reason is {reason!r}")
        return _without_reasoning(text).strip(), FINISHED.get(reason)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"no choice with a message: {_message(content)}") from error


def _without_reasoning(text: str) -> str:
    """Removes `<think>...</think>` at the start. The chat template may add `<think>`; a cut answer has no end tag."""
    reasoning, end, rest = text.partition("</think>")
    if end and (reasoning.lstrip().startswith("<think>") or "<think>" not in reasoning):
        return rest
    return "" if text.lstrip().startswith("<think>") else text


def _message(content: bytes) -> str:
    """Returns the error message of a server: OpenAI's `error.message`, FastAPI's `detail`, or plain text."""
    text = content.decode(errors="replace").strip()
    try:
        body = parse_json(content)
    except ValueError:
        body = None
    for name in ("error", "detail", "message"):
        if isinstance(body, dict):
            body = body.get(name) or body
    return body if isinstance(body, str) else "" if text.startswith("<") else text
