"""Captions from an endpoint with OpenAI's protocol: what is asked, what goes wrong, and what comes of it."""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor

from lotlip_hf.relabel.captioners.base import Answer, CaptionerConfig, EndpointError
from lotlip_hf.relabel.captioners.endpoint import EndpointCaptioner, _api_key
from openai_server import (
    MODEL,
    OpenAIServer,
    describe,
    digest,
    each_image_first,
    is_probe,
    openai_server,
    use_in_process,
)
from tiny_captioners import save_llava

COLOURS = ("red", "green", "blue", "yellow", "brown", "violet", "white", "black")


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process(monkeypatch)


def picture(colour: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 3, size[1] // 2), "orange")
    return image


def as_sent(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return Image.open(file).convert("RGB")


def captioner(server: OpenAIServer | str, **options: Any) -> EndpointCaptioner:
    address = server if isinstance(server, str) else server.url
    return EndpointCaptioner(CaptionerConfig(**{"model": MODEL, "endpoint": address, "timeout": 30.0, **options}))


def ask(one: EndpointCaptioner, image: Image.Image, seed: int = 0, attempt: int = 0) -> Answer:
    [answer] = one.answer([image], one.config.settings(attempt), [seed])
    return answer


def expected(image: Image.Image, prompt: str | None = None) -> Answer:
    """What an undisturbed server says of an image."""
    prompt = CaptionerConfig(MODEL).prompt if prompt is None else prompt
    return Answer(describe(as_sent(image), prompt, MODEL), finished=True)


def probes(server: OpenAIServer) -> int:
    return sum(request.size == (224, 224) for request in server.requests)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# What is asked


def test_an_image_is_described() -> None:
    with openai_server() as server:
        one = captioner(server, prompt="What is there?", revision="v2", concurrency=5)
        assert (one.group_size, one.concurrency, one.revision) == (1, 5, "v2")
        answers = one.answer([picture("red"), picture("blue")], one.config.settings(), [0, 1])
    assert answers == [expected(picture("red"), "What is there?"), expected(picture("blue"), "What is there?")]
    assert answers[0].text != answers[1].text
    request = server.requests[0]
    assert request.options == {"model": MODEL, "max_tokens": 256, "temperature": 0.0}
    assert request.parts == ("image_url", "text")
    assert not server.malformed


@pytest.mark.parametrize("ending", ["", "/v1/?key=word", "/v1/chat/completions"])
def test_the_address_may_end_as_people_write_it(ending: str) -> None:
    with openai_server() as server:
        one = captioner(server.url.removesuffix("/v1") + ending, prompt="")
        assert ask(one, picture("red")) == expected(picture("red"), "")
    assert server.requests[0].parts == ("image_url",)


def test_seeds_are_sent_where_tokens_are_drawn() -> None:
    with openai_server() as server:
        one = captioner(server, retry={"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1})
        answers = [ask(one, picture("red"), seed, attempt=1) for seed in (3, 4, 3)]
    assert answers[0] == answers[2] != answers[1]
    drawn = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.1}
    assert server.requests[0].options == {"model": MODEL, "max_tokens": 256, **drawn}


def test_an_image_that_is_no_jpeg_is_an_error_of_its_own() -> None:
    with openai_server() as server:
        one = captioner(server, max_image_size=70_000)
        wide = ask(one, Image.new("RGB", (70_000, 1)))
        assert ask(one, picture("red")) == expected(picture("red"))
    assert wide.text == ""
    assert "JPEG" in str(wide.error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("size", "largest", "sent"),
    [
        ((4032, 3024), None, (672, 504)),
        ((20_000, 1), 100, (100, 1)),
        ((60, 40), 64, (60, 40)),
    ],
)
def test_large_images_are_sent_smaller(size: tuple[int, int], largest: int | None, sent: tuple[int, int]) -> None:
    image = picture("red", size)
    with openai_server() as server:
        one = captioner(server, **({} if largest is None else {"max_image_size": largest}))
        assert not ask(one, image).error
    assert [request.size for request in server.requests] == [sent]
    assert image.size == size


@pytest.mark.parametrize(
    ("names", "extra", "sent"),
    [
        ({"max_tokens": "max_completion_tokens"}, {}, {"max_completion_tokens": 256, "temperature": 0.0}),
        (
            {"max_tokens": None, "repetition_penalty": None},
            {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 3},
            {"temperature": 0.0, "top_k": 3, "chat_template_kwargs": {"enable_thinking": False}},
        ),
    ],
)
def test_fields_of_the_request_go_by_other_names(
    names: dict[str, str | None], extra: dict[str, Any], sent: dict[str, Any]
) -> None:
    with openai_server() as server:
        one = captioner(server, request_fields=names, extra_body=extra, repetition_penalty=1.5 if extra else 1.0)
        assert ask(one, picture("red")) == expected(picture("red"))
    assert server.requests[0].options == {"model": MODEL, **sent}
    assert not server.malformed
    said = json.loads(one.config.published_settings())
    assert ("temperature" in said, said.get("top_k")) == ("temperature" in sent, sent.get("top_k"))
    assert ("max_new_tokens" in said) == ("max_tokens" in sent or "max_completion_tokens" in sent)


# What is answered


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("  A cat.\n", "A cat."),
        (None, ""),
        (
            [{"type": "text", "text": "A cat"}, " sat", {"type": "image", "url": "x"}, {"type": "text", "text": "."}],
            "A cat sat.",
        ),
        ([{"type": "thinking", "text": "Hm."}, {"type": "output_text", "text": "A cat."}], "A cat."),
        ("<think>\nHm, a cat.</think>\n\nA cat.", "A cat."),
        ("Hm, a cat.\n</think>A cat.", "A cat."),
        ("<think>Hm, a ca", ""),
        ("The sign says <think>.", "The sign says <think>."),
        ("A sign: <think>hard</think>.", "A sign: <think>hard</think>."),
    ],
)
def test_texts_are_found_in_what_servers_send(content: Any, text: str) -> None:
    fault = f"content:{json.dumps(content)}"
    with openai_server(fault=lambda *_: fault) as server:
        assert ask(captioner(server), picture("red")) == Answer(text, finished=True)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reason", "finished"),
    [("length", False), ("content_filter", None), (None, None)],
)
def test_the_server_says_whether_an_answer_is_finished(reason: Any, finished: bool | None) -> None:
    body = {"choices": [{"message": {"content": "A cat."}, "finish_reason": reason}]}
    with openai_server(fault=lambda *_: f"body:{json.dumps(body)}") as server:
        assert ask(captioner(server), picture("red")) == Answer("A cat.", finished=finished)


# What fails for the moment

PASSING = [
    *("429", "503:0.01", "cut", "cut-json", "html", "garbage", "reset", "late:8", "drip:0.05"),
    *("body:", "body:[]", "body:null", 'body:{"choices": []}', 'body:{"choices": [null]}'),
    *('body:{"choices": [{"message": "A cat."}]}', 'body:{"error": {"message": "busy"}}'),
    'body:{"choices": [{"message": {"content": "A"}, "finish_reason": "abort"}]}',
    *("content:5", "content:[5]", 'content:[{"type": "text", "text": null}]', "body:" + "[" * 100_000),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault[:40])
def test_a_request_that_fails_is_sent_again(fault: str) -> None:
    with openai_server(fault=each_image_first(fault)) as server:
        one = captioner(server, timeout=1.5 if fault.startswith(("late", "drip")) else 30.0)
        assert ask(one, picture("red")) == expected(picture("red"))
    assert [request.fault for request in server.requests] == [fault, None]


# Whose fault it is


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_one_image_that_is_never_answered_is_an_error_of_its_own(fault: str) -> None:
    images = [picture(colour) for colour in COLOURS]
    bad = digest(as_sent(images[2]))
    with openai_server(fault=lambda number, image, body: fault if digest(image) == bad else None) as server:
        one = captioner(server, max_retries=3, concurrency=4)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda image: ask(one, image), images))
    assert server.per_image[bad] == 4
    assert probes(server) == 1
    error = answers.pop(2)
    assert (error.text, error.finished) == ("", None)
    assert error.error
    assert server.url not in error.error  # what is written does not depend on the address
    del images[2]
    assert answers == [expected(image) for image in images]


@pytest.mark.parametrize("status", [400, 403])
def test_one_image_that_is_refused_is_not_sent_again(status: int) -> None:
    with openai_server(fault=lambda number, image, body: None if is_probe(image) else str(status)) as server:
        answer = ask(captioner(server), picture("red"))
    assert f"{status} fault {status}" in str(answer.error)
    assert [request.fault for request in server.requests] == [str(status), None]
    assert server.requests[0].options == server.requests[1].options  # the probe is the same request


@pytest.mark.parametrize(
    ("fault", "options", "word", "requests"),
    [
        ("422", {}, "'tiny'", 2),  # the image and the grey picture
        ("429", {"max_retries": 3}, "`concurrency`", 4),  # no image can be the cause: no grey one is sent
        ("503", {"max_retries": 2}, "503", 3 + 3),
        ("late:2", {"timeout": 0.2, "max_retries": 1}, "`timeout`", 2 + 3),
        (None, {"temperature": 3.0}, "temperature", 0),  # both are malformed
        (None, {"model": "huge"}, "'huge'", 0),
    ],
)
def test_an_endpoint_that_answers_nothing_stops_the_run(
    fault: str | None, options: dict[str, Any], word: str, requests: int
) -> None:
    with openai_server(fault=lambda *_: fault) as server:
        one = captioner(server, **options)
        with pytest.raises(EndpointError, match=word) as caught:
            ask(one, picture("red"))
        assert server.url in str(caught.value)
        assert len(server.requests) == requests
        if fault:
            server.fault = None  # it is up again
            server.requests.clear()
            assert ask(captioner(server), picture("red")) == expected(picture("red"))


def test_what_is_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with openai_server(api_key="sk-other") as server:
        with pytest.raises(EndpointError, match="401.*OPENAI_API_KEY") as caught:
            ask(captioner(f"{server.url}?key=query-secret"), picture("red"))
        address = server.url.replace("http://", "http://ada:secret@").replace("/v1", "/v2") + "?key=secret"
        with pytest.raises(EndpointError, match="404") as other:
            ask(captioner(address), picture("red"))
    for error in (caught.value, other.value):
        assert not any(one in str(error) for one in ("secret", "ada"))
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None


def test_an_endpoint_that_is_not_there_stops_the_run(free_port: int) -> None:
    with pytest.raises(EndpointError, match=f"127.0.0.1:{free_port} .*no connection"):
        ask(captioner(f"http://127.0.0.1:{free_port}", max_retries=3), picture("red"))


def test_an_endpoint_that_comes_back_is_forgiven() -> None:
    down = lambda number, image, body: "503" if number < 6 else None  # noqa: E731
    with openai_server(fault=down) as server:  # the image's tries and two of the probe
        one = captioner(server, max_retries=3)
        assert "503" in str(ask(one, picture("red")).error)
        assert ask(one, picture("blue")) == expected(picture("blue"))
    assert probes(server) == 3


# Many at once


def finishes(thread: threading.Thread) -> bool:
    thread.join(timeout=20)
    return not thread.is_alive()


@pytest.mark.parametrize("fault", ["429:60", "late:60"])
def test_close_wakes_those_that_wait(fault: str) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            ask(one, picture("red"))
        except EndpointError as error:
            raised.append(error)

    with openai_server(fault=lambda *_: fault) as server:
        one = captioner(server, timeout=600.0)
        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(server.requests) < 3:
            time.sleep(0.01)
        one.close()
        assert all(finishes(thread) for thread in threads)
        with pytest.raises(EndpointError, match="stopped"):
            ask(one, picture("blue"))
    assert len(raised) == 3
    assert len(server.requests) == 3


INTERRUPTED = """
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from lotlip_hf.relabel.captioners.base import CaptionerConfig
from lotlip_hf.relabel.captioners.endpoint import EndpointCaptioner

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
config = CaptionerConfig("tiny", endpoint=sys.argv[1], timeout=600.0)
captioner = EndpointCaptioner(config)
with ThreadPoolExecutor(2) as pool:
    try:
        futures = [pool.submit(captioner.answer, [Image.new("RGB", (8, 8))], config.settings(), [0]) for _ in range(2)]
        print(futures[0].result())
    finally:
        captioner.close()
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_waits_for_answers() -> None:
    with openai_server(fault=lambda *_: "late:120") as server:
        environment = {**os.environ, "NO_PROXY": "*"}
        with subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, server.url], env=environment, stderr=subprocess.PIPE
        ) as process:
            while len(server.requests) < 2 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert b"KeyboardInterrupt" in stderr


# What is not for endpoints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"min_new_tokens": 20}, "min_new_tokens"),
        ({"retry": {"num_beams": 5}}, "num_beams"),
        ({"request_fields": {"max_new_tokens": "n"}}, "request_fields"),
        ({"endpoint": None}, "endpoint"),
        ({"endpoint": "localhost:8000"}, "endpoint"),
        ({"endpoint": "http://host:port/v1"}, "endpoint"),
    ],
)
def test_options_that_are_not_for_endpoints_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        captioner("http://127.0.0.1:8000/v1", **options)


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-se\u010dret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        captioner("http://127.0.0.1:8000/v1")
    assert "sk-" not in str(caught.value)


# Keys


def test_the_token_of_the_hub_is_not_sent_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with openai_server() as server:
        ask(captioner(server), picture("red"))
        monkeypatch.setenv("OPENAI_API_KEY", " sk-key\n")
        ask(captioner(server), picture("red"))
    assert [request.authorization for request in server.requests] == ["Bearer EMPTY", "Bearer sk-key"]


@pytest.mark.parametrize(
    ("endpoint", "key"),
    [
        ("https://router.huggingface.co/v1", "hf_token"),
        ("https://abc.us-east-1.aws.endpoints.huggingface.cloud/v1", "hf_token"),
        ("http://router.huggingface.co/v1", "sk-key"),
        ("https://nothuggingface.co/v1", "sk-key"),
        ("https://huggingface.co.example/v1", "sk-key"),
    ],
)
def test_whom_the_token_of_the_hub_is_for(endpoint: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key")
    assert _api_key(endpoint) == key


# A real one

MISSING = [name for name in ("fastapi", "pydantic", "uvicorn") if importlib.util.find_spec(name) is None]


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health"):
            return True
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"`transformers serve` needs {', '.join(MISSING)}")
def test_transformers_serve(tmp_path: Path, free_port: int) -> None:
    folder, log = str(tmp_path / "llava"), tmp_path / "log.txt"
    model = save_llava(folder)
    images = [picture(colour) for colour in COLOURS[:4]]
    prompt = "describe the picture in detail ."
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    local = []
    for image in images:
        inputs = processor(text=text, images=as_sent(image), return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        local.append(Answer(processor.decode(tokens, skip_special_tokens=True).strip(), finished=len(tokens) < 24))

    address = f"http://127.0.0.1:{free_port}"
    options = {"model": folder, "prompt": prompt, "max_new_tokens": 24, "concurrency": 2}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(free_port)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            while not is_up(address):
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            one = captioner(address, **options)
            with ThreadPoolExecutor(one.concurrency) as pool:
                assert list(pool.map(lambda image: ask(one, image), images)) == local
            with pytest.raises(EndpointError, match="400.*'another'"):
                ask(captioner(address, **{**options, "model": "another"}), images[0])
            with pytest.raises(EndpointError, match="422.*repetition_penalty"):
                ask(captioner(address, **options, repetition_penalty=1.2), images[0])
        finally:
            process.kill()
    assert len({answer.text for answer in local}) > 1
