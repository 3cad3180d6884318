"""An endpoint with OpenAI's protocol on loopback, for the tests: a real HTTP server that describes images.

```python
with openai_server(fault=each_image_first("429")) as server:
    captioner = EndpointCaptioner(CaptionerConfig("tiny", endpoint=server.url))
    ...
    assert server.highest_at_once <= 4
```

A request may also be a text without an image. Its captions are a function of the decoded image, the prompt, the
model's name and, where tokens are drawn, the seed; so two runs can be compared byte for byte. What it does wrong is
up to `fault(number, image, body)`, which gets the number of the request, from 0, the decoded image and the request's
JSON, and returns one of these, or None:

| fault | what the server does |
| --- | --- |
| `late:2` | sleeps 2 seconds, then answers |
| `429`, `503:7`, `400`, ... | answers with this status; after the colon is `Retry-After` |
| `cut` | promises more bytes than it sends |
| `cut-json` | sends the first half of its JSON |
| `html`, `garbage` | sends a page, or bytes that are no text, with status 200 |
| `reset` | resets the connection instead of answering |
| `body:{...}`, `content:...` | sends this JSON; this JSON is the content of the message, with the reason `stop` |
| `redirect:308 http://...` | redirects to this address, with this status |
| `huge:9000000`, `gzip:9000000` | sends an answer of as many bytes (`OpenAIServer.sent`: read so far); compressed |
| `encoded:br` | sends an answer that is said to be compressed in this way |
| `drip:0.1` | sends an answer, one byte each 0.1 seconds, that does not end |
"""

import base64
import gzip
import hashlib
import io
import itertools
import json
import random
import socket
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

Fault = Callable[[int, Image.Image | None, dict[str, Any]], str | None]

MODEL = "tiny"
COLOURS = ("black", "white", "red", "green", "blue", "yellow")
THINGS = ("cat", "lamp", "boat", "bottle", "bicycle", "flower", "chair", "kite")
PLACES = ("garden", "street", "kitchen", "harbour", "forest", "workshop", "library", "field", "station", "cave")


@dataclass(frozen=True)
class Request:
    """A request that was well-formed: its number, whose image it was, the options and what went wrong with it."""

    number: int
    image: str  # digest of the decoded image; empty without one
    size: tuple[int, int]
    options: dict[str, Any]  # the JSON but for its messages and `stream`
    prompt: str
    parts: tuple[str, ...]  # the kinds of the parts of the message, in their order
    authorization: str | None
    fault: str | None


def digest(image: Image.Image | None) -> str:
    """Identifies an image, as the server decoded it."""
    if image is None:
        return ""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]


def is_probe(image: Image.Image | None) -> bool:
    """Whether this is a plain picture: what a client sends to learn whether the endpoint works."""
    return image is not None and all(low == high for low, high in image.convert("RGB").getextrema())


def describe(image: Image.Image | None, prompt: str, model: str, seed: int | None = None) -> str:
    """Four sentences about an image; those of other models, prompts and seeds are others."""
    draw = random.Random(f"{digest(image)} {prompt} {model} {seed}")
    things = [f"A {draw.choice(COLOURS)} {draw.choice(THINGS)}" for _ in range(4)]
    places = draw.sample(PLACES, 4)
    return " ".join(f"{thing} is in the {place}." for thing, place in zip(things, places, strict=True))


def each_image_first(fault: str, times: int = 1) -> Fault:
    """A fault of the first requests with each image."""
    asked: Counter[str] = Counter()

    def choose(number: int, image: Image.Image | None, body: dict[str, Any]) -> str | None:
        name = digest(image)
        asked[name] += 1  # the server calls this with its lock held
        return fault if asked[name] <= times else None

    return choose


class Malformed(Exception):
    """A request that OpenAI's protocol does not know."""


def read_request(body: Any) -> tuple[Image.Image | None, str]:
    """The image, if there is one, and the prompt of a chat completion.

    Raises:
        Malformed: if there are not a text, or one image and one text at most, or an option is none.
    """
    options = {
        **{"model": str, "messages": list, "max_tokens": int, "temperature": (int, float), "top_p": (int, float)},
        **{"seed": int, "repetition_penalty": (int, float), "stream": bool, "max_completion_tokens": int},
        **{"chat_template_kwargs": dict, "top_k": int},
    }
    for name, value in body.items():
        if name not in options or not isinstance(value, options[name]):
            raise Malformed(f"{name} is unknown or of a wrong type")
    if not 0 <= body.get("temperature", 1) <= 2:
        raise Malformed("temperature must be from 0 to 2")
    try:
        [message] = body["messages"]
        assert message["role"] == "user"
        if isinstance(message["content"], str):
            return None, message["content"]
        first, *texts = message["content"]
        data = first["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
        assert len(texts) <= 1
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["JPEG"])
        return image.convert("RGB"), texts[0]["text"] if texts else ""
    except (AssertionError, KeyError, TypeError, ValueError, OSError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from error


class OpenAIServer(ThreadingHTTPServer):
    """The server: what it is asked and how, and what it answered."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, fault: Fault | None, api_key: str | None, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.api_key, self.seconds = fault, api_key, seconds
        self.lock = threading.Lock()
        self.requests: list[Request] = []
        self.malformed: list[str] = []
        self.errors: list[str] = []  # defects of this server
        self.at_once = self.highest_at_once = self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def per_image(self) -> Counter[str]:
        """How many requests there were with each image."""
        return Counter(request.image for request in self.requests)

    def record(
        self, image: Image.Image | None, prompt: str, body: dict[str, Any], authorization: str | None
    ) -> Request:
        with self.lock:
            number = len(self.requests)
            fault = self.fault(number, image, body) if self.fault is not None else None
            options = {name: value for name, value in body.items() if name not in ("messages", "stream")}
            content = body["messages"][0]["content"]
            parts = () if isinstance(content, str) else tuple(part["type"] for part in content)
            size = (0, 0) if image is None else image.size
            request = Request(number, digest(image), size, options, prompt, parts, authorization, fault)
            self.requests.append(request)
            return request

    @contextmanager
    def under_way(self) -> Iterator[None]:
        with self.lock:
            self.at_once += 1
            self.highest_at_once = max(self.highest_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients may go away
            self.errors.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    server: OpenAIServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets

    def do_POST(self) -> None:
        with self.server.under_way():
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            authorization = self.headers.get("Authorization")
            if urlsplit(self.path).path != "/v1/chat/completions":
                return self.send_problem(404, f"nothing at {self.path}")
            if self.server.api_key is not None and authorization != f"Bearer {self.server.api_key}":
                return self.send_problem(401, f"Incorrect API key provided: {authorization}")
            try:
                body = json.loads(content)
                image, prompt = read_request(body)
            except (ValueError, Malformed) as error:
                self.server.malformed.append(str(error))
                return self.send_problem(400, str(error))
            if body.get("model") != MODEL:
                return self.send_problem(404, f"The model `{body.get('model')}` does not exist.")
            request = self.server.record(image, prompt, body, authorization)
            time.sleep(self.server.seconds)
            self.answer(request, image)

    def answer(self, request: Request, image: Image.Image | None) -> None:
        fault, _, argument = (request.fault or "").partition(":")
        options = request.options
        seed = options.get("seed") if options.get("temperature", 1) > 0 else None
        words = describe(image, request.prompt, options["model"], seed).split(" ")
        limit = options.get("max_tokens", len(words))  # a word is a token
        message: dict[str, Any] = {"role": "assistant", "content": " ".join(words[:limit])}
        reason = "length" if len(words) > limit else "stop"
        if fault == "content":
            message, reason = {"role": "assistant", "content": json.loads(argument)}, "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": options["model"], "choices": [choice]}
        data = json.dumps(body).encode()
        if fault in ("", "content"):
            self.send(200, data)
        elif fault == "late":
            time.sleep(float(argument))
            with suppress(OSError):  # the client did not wait
                self.send(200, data)
        elif fault.isdigit():
            headers = {"Retry-After": argument} if argument else {}
            self.send_problem(int(fault), f"fault {fault}", headers)
        elif fault == "cut":
            self.send(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
            self.drop()
        elif fault == "cut-json":
            self.send(200, data[: len(data) // 2])
        elif fault in ("html", "garbage", "body"):
            bodies = {"html": b"<html><body>Welcome</body></html>", "garbage": b"\x80\xff\x00" * 40}
            self.send(200, bodies.get(fault, argument.encode()))
        elif fault == "redirect":
            status, _, address = argument.partition(" ")
            self.send(int(status), b"", {"Location": address})
        elif fault == "gzip":
            data = gzip.compress(b" " * int(argument) + data, 1)
            self.send(200, data, {"Content-Encoding": "gzip"})
        elif fault == "encoded":
            self.send(200, data, {"Content-Encoding": argument})
        elif fault in ("huge", "drip"):
            self.close_connection = True
            pieces = itertools.repeat(b" ") if fault == "drip" else [b" " * 65_536] * (int(argument) // 65_536)
            self.send(200, b"", {"Content-Length": str(1 << 40 if fault == "drip" else int(argument))})
            with suppress(OSError):  # the client has had enough
                for piece in pieces:
                    self.wfile.write(piece)
                    self.server.sent += len(piece)
                    time.sleep(float(argument) if fault == "drip" else 0)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            raise ValueError(f"unknown fault {request.fault!r}")

    def send_problem(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(
            status, json.dumps({"error": {"message": message, "type": "fault", "code": status}}).encode(), headers
        )

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing; `requests` has it all."""


@contextmanager
def openai_server(
    fault: Fault | None = None,
    *,
    api_key: str | None = None,
    seconds: float = 0.0,
) -> Iterator[OpenAIServer]:
    """Run the server.

    Args:
        fault: what it does wrong, see above; called with the server's lock held, by one thread at a time.
        api_key: what it wants as `Authorization: Bearer ...`; None for no matter what.
        seconds: how long it takes for each answer.

    Raises:
        AssertionError: at the end, if a request could not be carried out because of a defect of this server.
    """
    server = OpenAIServer(fault, api_key, seconds)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not server.errors, "The test's endpoint failed:\n" + "\n".join(server.errors)


def use_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process ask loopback: not through a proxy, without keys, and without waits between tries."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
