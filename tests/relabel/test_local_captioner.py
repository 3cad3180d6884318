"""Captions from models of transformers: what `generate` answers to each image alone, in batches, by the settings."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    LlamaConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
)
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

import tiny_captioners
from hub_server import WRITE_TOKEN, hub_server, use_in_process
from lotlip_hf.relabel.captioners.base import Answer, CaptionerConfig
from lotlip_hf.relabel.captioners.local import LocalCaptioner, _model_class
from tiny_captioners import WORDS

# Of other lengths; the model's end token stands behind none
SHORT, LONG = "the image shows", "describe the picture of the red car in detail ."
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "blip": (tiny_captioners.save_blip, {"seed": 3}),
    "blip2": (tiny_captioners.save_blip2, {"seed": 1}),
    "blip2_t5": (tiny_captioners.save_blip2, {"kind": "t5", "seed": 2}),
    "instructblip": (tiny_captioners.save_instructblip, {"seed": 1}),
    "instructblip_opt": (tiny_captioners.save_instructblip, {"kind": "opt", "seed": 2}),
    "instructblip_t5": (tiny_captioners.save_instructblip, {"kind": "t5", "seed": 0}),
    "llava": (tiny_captioners.save_llava, {"seed": 2}),
    "idefics3": (tiny_captioners.save_idefics3, {"seed": 0}),
    "git": (tiny_captioners.save_git, {"seed": 0}),
    "vit_gpt2": (tiny_captioners.save_vit_gpt2, {"seed": 2}),
}
PROMPTED = [kind for kind in KINDS if kind not in tiny_captioners.NO_PROMPT]
# With an empty prompt; the others' answers are compared to the same with a text of no words.
ALONE = ("blip", "blip2", "git", "vit_gpt2")
GREEDY = {"max_new_tokens": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `KINDS`, which nobody writes to."""
    root = tmp_path_factory.mktemp("captioners")

    def built(kind: str) -> Path:
        if not (root / kind).exists():
            build, options = KINDS[kind]
            build(root / kind, **options)
        return root / kind

    return built


@pytest.fixture
def copy(folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of such a folder, to write to."""

    def copied(kind: str) -> Path:
        return Path(shutil.copytree(folder(kind), tmp_path / kind))

    return copied


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Three, of other sizes."""
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 64), (64, 30))]
    return [*map(Image.fromarray, noise), Image.new("RGB", (33, 33), "red")]


def captioner(folder: Path | str, prompt: str = SHORT, **options: Any) -> LocalCaptioner:
    settings = {"dtype": "float32", **GREEDY, **options}
    return LocalCaptioner(CaptionerConfig(str(folder), prompt=prompt, **settings), device="cpu")


# One of each model and prompt, in all tests that leave its folder as it was
shared = cache(captioner)


def ask(asked: LocalCaptioner, images: list[Image.Image], **options: Any) -> list[Answer]:
    return asked.answer(images, {**asked.config.settings(), **options}, range(len(images)))


@cache
def stock(folder: Path) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def plain(kind: str, folder: Path, image: Image.Image, prompt: str, **options: Any) -> Answer:
    """One image as transformers documents it for each model, with `generate`'s own options."""
    model, processor = stock(folder)
    is_encoder_decoder = getattr(model, "language_model", model).config.is_encoder_decoder
    family = kind.partition("_")[0]
    if family == "vit":
        tokenizer = processor  # all that AutoProcessor finds
        inputs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    else:
        tokenizer = processor.tokenizer
        if processor.chat_template:
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        elif family == "git" and prompt:
            inputs = processor(images=image, return_tensors="pt")
            words = tokenizer(prompt, add_special_tokens=False).input_ids
            inputs["input_ids"] = torch.tensor([[tokenizer.bos_token_id, *words]])
        elif prompt:
            inputs = processor(images=image, text=prompt, return_tensors="pt")
        else:
            inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, **options)[0].tolist()
    if is_encoder_decoder or not prompt:
        begun = 5 if family == "blip2" and not is_encoder_decoder else 1  # 4 of the image before the first
    else:
        begun = inputs["input_ids"].shape[1] - (family == "blip")  # which leaves the prompt's [SEP] out
    new = tokens[begun:]
    is_finished = tokenizer.eos_token_id in new
    if is_finished:
        new = new[: new.index(tokenizer.eos_token_id)]
    return Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), is_finished)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [SHORT, LONG])
@pytest.mark.parametrize("kind", PROMPTED)
def test_answers_are_what_each_image_alone_is_answered(
    kind: str, prompt: str, folder: Callable[[str], Path], images: list[Image.Image]
) -> None:
    answers = ask(shared(folder(kind), *([] if prompt == SHORT else [prompt])), images)
    assert answers == [plain(kind, folder(kind), image, prompt, **GREEDY) for image in images]
    assert len({answer.text for answer in answers}) >= 2
    for answer in answers:
        assert set(answer.text.replace(".", " . ").replace(",", " , ").replace("?", " ? ").split()) <= set(WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALONE)
def test_images_without_a_prompt(kind: str, folder: Callable[[str], Path], images: list[Image.Image]) -> None:
    answers = ask(shared(folder(kind), ""), images)
    assert answers == [plain(kind, folder(kind), image, "", **GREEDY) for image in images]
    assert len({answer.text for answer in answers}) == 3


@pytest.mark.parametrize("kind", ["instructblip", "llava"])
def test_an_empty_prompt_leaves_a_text_without_words(
    kind: str, folder: Callable[[str], Path], images: list[Image.Image]
) -> None:
    answers = ask(shared(folder(kind), ""), images)
    assert len({answer.text for answer in answers}) == 3
    assert answers != ask(shared(folder(kind)), images)


def test_an_end_at_the_last_token_is_one(folder: Callable[[str], Path], images: list[Image.Image]) -> None:
    asked = shared(folder("instructblip"))
    place, answer = next((place, answer) for place, answer in enumerate(ask(asked, images)) if answer.finished)
    count = len(asked._tokenizer(answer.text, add_special_tokens=False).input_ids)
    assert count > 0
    assert ask(asked, images, max_new_tokens=count + 1)[place] == answer
    assert ask(asked, images, max_new_tokens=count)[place] == Answer(answer.text, False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip", "blip2", "idefics3", "git"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"repetition_penalty": 1.8}, {"min_new_tokens": 12}, {"max_new_tokens": 3}],
    ids=lambda options: next(iter(options)),
)
def test_settings_are_those_of_generate(
    kind: str, options: dict[str, Any], folder: Callable[[str], Path], images: list[Image.Image]
) -> None:
    answers = ask(shared(folder(kind)), images, **options)
    assert answers == [plain(kind, folder(kind), image, SHORT, **{**GREEDY, **options}) for image in images]


def test_what_is_drawn_depends_on_the_seeds_alone(folder: Callable[[str], Path], images: list[Image.Image]) -> None:
    asked = captioner(folder("idefics3"), temperature=1.0)
    settings = asked.config.settings()
    first = asked.answer(images, settings, [1, 2, 3])
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert asked.answer(images, settings, [1, 2, 4]) != first
    assert torch.equal(torch.rand(3), expected)
    assert asked.answer(images, settings, [3, 2, 1]) != first
    asked.answer(images[:1], asked.config.settings(1), [5])
    assert asked.answer(images, settings, [1, 2, 3]) == first


@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}])
def test_drawing_from_the_most_probable_token_alone_is_greedy(
    options: dict[str, Any], folder: Callable[[str], Path], images: list[Image.Image]
) -> None:
    assert ask(shared(folder("llava")), images, **options) == ask(shared(folder("llava")), images)


def test_nothing_is_drawn_by_a_setting_that_is_not_recorded(
    folder: Callable[[str], Path], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers' own top_k of 50 is in use")

    monkeypatch.setattr("transformers.generation.utils.TopKLogitsWarper", refuse)
    assert len(ask(shared(folder("llava")), images, temperature=0.7, top_p=0.9)) == 3


RECOMMENDED = {
    "do_sample": True,
    "temperature": 1.9,
    "top_k": 3,
    "num_beams": 4,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_length": 6,
    "forced_eos_token_id": 2,
}


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_what_a_checkpoint_recommends_is_not_used(
    kind: str, copy: Callable[[str], Path], images: list[Image.Image]
) -> None:
    changed = copy(kind)
    expected = ask(captioner(changed), images)
    file = changed / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **RECOMMENDED}))
    if kind == "llava":  # where a language model within generates, transformers does not read the file
        assert plain(kind, changed, images[0], SHORT, **GREEDY) != expected[0]
    assert ask(captioner(changed), images) == expected


def test_several_tokens_may_end_an_answer(copy: Callable[[str], Path], images: list[Image.Image]) -> None:
    changed = copy("llava")
    before = ask(captioner(changed), images)
    said = [set(re.findall(r"\w+", answer.text)) for answer in before]
    end = min(said[0] - said[1])
    words = AutoTokenizer.from_pretrained(changed)
    file = changed / "generation_config.json"
    ends = [words.eos_token_id, words.convert_tokens_to_ids(end)]
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    expected = []
    for answer in before:
        text, *rest = re.split(rf"\b{end}\b", answer.text)
        expected.append(Answer(text.strip(), bool(rest) or answer.finished))
    assert ask(captioner(changed), images) == expected
    assert expected[0] != before[0]
    assert expected[1] == before[1]


def test_padding_with_the_end_token_is_no_end(copy: Callable[[str], Path], images: list[Image.Image]) -> None:
    changed = copy("llava")
    expected = ask(captioner(changed), images)
    for name in ("generation_config.json", "config.json"):
        content = json.loads((changed / name).read_text())
        for part in (content, content.get("text_config", {})):
            if "pad_token_id" in part:
                part["pad_token_id"] = part["eos_token_id"]
        (changed / name).write_text(json.dumps(content))
    assert ask(captioner(changed), images) == expected


def test_a_tokenizer_without_padding(copy: Callable[[str], Path], images: list[Image.Image]) -> None:
    changed = copy("idefics3")
    expected = ask(captioner(changed), images)
    file = changed / "tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["pad_token"]
    file.write_text(json.dumps(content))
    assert ask(captioner(changed), images) == expected


def test_groups_do_not_change_answers_in_float32(folder: Callable[[str], Path], images: list[Image.Image]) -> None:
    """Idefics 3's inputs are padded to the longest on the left."""
    asked = captioner(folder("idefics3"))
    settings = asked.config.settings()
    together = asked.answer(images, settings, [0, 1, 2])
    assert [asked.answer([image], settings, [0])[0] for image in images] == together
    assert asked.answer(images[::-1], settings, [2, 1, 0]) == together[::-1]


def test_dtype_and_device_map(folder: Callable[[str], Path], images: list[Image.Image]) -> None:
    config = CaptionerConfig(str(folder("llava")), prompt=SHORT, max_new_tokens=16)
    asked = LocalCaptioner(config)
    assert {parameter.dtype for parameter in asked.model.parameters()} == {torch.bfloat16}
    assert (asked.group_size, asked.concurrency, asked.revision) == (8, 1, None)
    assert all(answer.text for answer in ask(asked, images))
    asked = LocalCaptioner(dataclasses.replace(config, dtype="auto", device_map="auto"))
    assert asked.model.dtype == torch.float32
    assert ask(asked, images) == ask(shared(folder("llava")), images)


def test_transformers_does_not_warn(
    folder: Callable[[str], Path], images: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            for kind in ("vit_gpt2", "git", "llava"):
                ask(captioner(folder(kind), "", max_new_tokens=4), images, temperature=0.7, top_p=0.9)
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    assert transformers_logging.get_verbosity() == logging.WARNING


@pytest.mark.slow
def test_closing_frees_the_model(folder: Callable[[str], Path]) -> None:
    asked = captioner(folder("blip2"))
    asked.close()
    assert not [value for value in vars(asked).values() if isinstance(value, torch.nn.Module)]


def test_too_little_memory_says_what_to_do(
    folder: Callable[[str], Path], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = captioner(folder("llava"), batch_size=3)

    def generate(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(asked.model, "generate", generate)
    with pytest.raises(torch.OutOfMemoryError, match="`batch_size`"):
        asked.answer(images, asked.config.settings(), [0, 1, 2])


def test_a_model_that_generates_in_a_way_of_its_own(
    folder: Callable[[str], Path], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = captioner(folder("llava"))
    monkeypatch.setattr(asked.model, "generate", lambda **_: torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration"):
        asked.answer(images, asked.config.settings(), [0, 1, 2])


def test_revisions_on_the_hub(
    folder: Callable[[str], Path], images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server(tmp_path / "hub") as hub:
        use_in_process(monkeypatch, hub, tmp_path / "cache", token=WRITE_TOKEN)
        commits = []
        for seed in range(2):
            tiny_captioners.save_llava(tmp_path / str(seed), seed=seed)
            files = {file.name: file.read_bytes() for file in (tmp_path / str(seed)).iterdir()}
            commits.append(hub.add("ada/captioner", files))
        newest = captioner("ada/captioner")
        assert newest.revision == commits[1]
        first = captioner("ada/captioner", revision=commits[0])
        assert first.revision == commits[0]
        settings = first.config.settings()
        answers = [asked.answer(images, settings, [0, 1, 2]) for asked in (first, newest)]
        assert answers == [ask(captioner(tmp_path / "0"), images), ask(captioner(tmp_path / "1"), images)]
        assert captioner("ada/captioner", revision="main").revision == commits[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "v1"}, "`revision`"),
        ({"max_new_tokens": 600}, "512 positions.* 489 .*600"),
        ({"retry": {"max_new_tokens": 490}}, " 489 .*`max_new_tokens`"),
    ],
)
def test_options_that_do_not_fit(change: dict[str, Any], message: str, folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=message):
        captioner(folder("llava"), **change)


def test_as_many_tokens_as_there_are_positions(images: list[Image.Image], tmp_path: Path) -> None:
    tiny_captioners.save_vit_gpt2(tmp_path / "vit_gpt2", positions=24)
    tiny_captioners.save_blip2(tmp_path / "blip2", positions=24)
    # of the image 4, and `<s> the image shows`; the last new token is not read
    for kind, prompt, new in (("vit_gpt2", "", 24), ("blip2", SHORT, 24 - 4 - 4 + 1)):
        [answer] = ask(captioner(tmp_path / kind, prompt, max_new_tokens=new, min_new_tokens=new), images[:1])
        assert answer.finished is False
        with pytest.raises(ValueError, match=f" {new} for `max_new_tokens`"):
            captioner(tmp_path / kind, prompt, max_new_tokens=new + 1)


def test_models_without_a_prompt_ask_for_none(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="`prompt`"):
        captioner(folder("vit_gpt2"))


def test_a_prompt_without_the_image(folder: Callable[[str], Path], images: list[Image.Image], tmp_path: Path) -> None:
    tiny_captioners.save_llava(tmp_path / "bare", chat_template=None, **KINDS["llava"][1])
    with pytest.raises(ValueError, match="LlavaProcessor"):
        captioner(tmp_path / "bare")
    # what the chat template writes
    prompt = f"user : <image> {SHORT} assistant :"
    assert ask(captioner(tmp_path / "bare", prompt), images) == ask(shared(folder("llava")), images)


def test_a_processor_that_leaves_the_image_out(copy: Callable[[str], Path]) -> None:
    changed = copy("blip2")
    file = changed / "processor_config.json"
    content = json.loads(file.read_text())
    del content["num_query_tokens"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="<image>"):
        captioner(changed)


def test_models_that_describe_images_and_others() -> None:
    config = Phi4MultimodalConfig(architectures=["Phi4MultimodalForCausalLM"])  # of a class that is in no list
    assert _model_class("phi", config) is Phi4MultimodalForCausalLM
    for other in (CLIPConfig(), LlamaConfig(architectures=["LlamaForCausalLM"])):
        with pytest.raises(ValueError, match=f"'{other.model_type}'"):
            _model_class("name", other)


@pytest.mark.skipif(is_torchvision_available(), reason="needs a machine without torchvision")
def test_processors_that_need_torchvision(copy: Callable[[str], Path]) -> None:
    changed = copy("llava")
    file = changed / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "processor_class": "Qwen2VLProcessor"}))
    with pytest.raises(ValueError, match="torchvision"):
        captioner(changed)


def test_weights_that_are_not_there(copy: Callable[[str], Path]) -> None:
    changed = copy("blip")
    content = json.loads((changed / "config.json").read_text())
    content["text_config"]["num_hidden_layers"] = 3
    (changed / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="BlipForConditionalGeneration"):
        captioner(changed)


def test_damaged_and_missing_files(copy: Callable[[str], Path], tmp_path: Path) -> None:
    changed = copy("llava")
    (changed / "processor_config.json").unlink()
    (changed / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="llava.*processor"):
        captioner(changed)
    (changed / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="llava.*weights"):
        captioner(changed)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        captioner(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        captioner(tmp_path / "empty")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_to_be_had(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="`device`"):
        LocalCaptioner(CaptionerConfig(str(folder("llava"))), device="cuda")
