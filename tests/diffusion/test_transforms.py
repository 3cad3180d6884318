"""Transforms of prompt states: what each computes, and that a pipeline sees it for its prompts alone."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compel
import pytest
import torch
from diffusers import DiffusionPipeline
from test_denoising import windowed
from test_diffusion import bert, bert_tokenizer, inversion, lora_weights

import tiny_diffusion
from lotlip_hf.diffusion.ella import ELLA, connected
from lotlip_hf.diffusion.swap import swap_text_encoder
from lotlip_hf.diffusion.text_encoder import LoTLIPTextEncoder
from lotlip_hf.diffusion.transforms import PromptTokens, direction, isolate, keep, merge, steer, suppress, transformed
from scripts import load_script
from tiny_diffusion import picture, pipeline, same

KINDS = list(tiny_diffusion.BUILDERS)
PROMPT = "a photo of a cat and a red house"
NEGATIVE = "the dog"
GROUPS = {
    "onload_device": torch.device("cpu"),
    "offload_device": torch.device("cpu"),
    "offload_type": "leaf_level",
}


def identity(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
    return states


def doubled(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
    return 2 * states


def neutral(pipe: DiffusionPipeline) -> dict[str, Callable[..., Any]]:
    """Each transform with a strength of 0."""
    return {
        "suppress": suppress("red", 0.0),
        "isolate": isolate("house", strength=0.0),
        "keep": keep("cat", strength=0.0),
        "merge": merge("red house", strength=0.0),
        "steer": steer("cat", direction(pipe, [("red cat", "cat")]), 0.0),
    }


def states_of(pipe: DiffusionPipeline, slot: str, prompt: str, transform: Any = None, **kwargs: Any) -> Any:
    """Output of a text encoder for a prompt, as a pipeline calls it."""
    tokenizer = getattr(pipe, slot.replace("text_encoder", "tokenizer"))
    length = min(tokenizer.model_max_length, 77)
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        if transform is None:
            return ids[0], getattr(pipe, slot)(ids, output_hidden_states=True)
        with transformed(pipe, transform, slot, **kwargs):
            return ids[0], getattr(pipe, slot)(ids, output_hidden_states=True)


@pytest.mark.same_bits
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_changes_no_bit(kind: str) -> None:
    pipe = pipeline(kind)
    guided = {} if kind == "flux" else {"negative_prompt": NEGATIVE}
    plain = picture(pipe, PROMPT, **guided)
    for name, transform in neutral(pipe).items():
        with transformed(pipe, transform):
            assert torch.equal(picture(pipe, PROMPT, **guided), plain), name
    with transformed(pipe, doubled):
        assert not torch.allclose(picture(pipe, PROMPT, **guided), plain, atol=1e-3)
    assert torch.equal(picture(pipe, PROMPT, **guided), plain)


@pytest.mark.parametrize(
    ("kind", "guided"), [("sd", {}), ("sdxl", {}), ("sd3", {}), ("flux", {"true_cfg_scale": 3.0})]
)
def test_negative_prompts_are_transformed_only_if_asked(kind: str, guided: dict[str, Any]) -> None:
    pipe, seen = pipeline(kind), list[str]()

    def listed(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
        seen.append(prompt.text)
        return states

    for negative in (False, True):
        seen.clear()
        with transformed(pipe, listed, negative=negative):
            picture(pipe, PROMPT, negative_prompt=NEGATIVE, **guided)
        assert set(seen) == {PROMPT, NEGATIVE} if negative else {PROMPT}
    # given as states, the prompt is not encoded
    if kind == "sd":
        embeds = pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0]
        seen.clear()
        with transformed(pipe, listed):
            picture(pipe, None, prompt_embeds=embeds, negative_prompt=NEGATIVE)
        assert not seen


@pytest.mark.parametrize(
    ("kind", "slot", "text"),
    [
        ("sd", "text_encoder", "a cat, a concat! a red cat"),
        ("sd2", "text_encoder", "a cat, a concat! a red cat"),  # pads with "!"
        ("flux", "text_encoder_2", "a cat of a dog of a red cat"),
    ],
)
def test_the_tokens_of_a_prompt(kind: str, slot: str, text: str) -> None:
    pipe, prompts = pipeline(kind), list[PromptTokens]()

    def listed(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
        prompts.append(prompt)
        return states

    ids, _ = states_of(pipe, slot, text, listed)
    prompt = prompts[0]
    assert prompt.ids == ids.tolist()
    spans = {index: prompt.text[start:end] for index, (start, end) in enumerate(prompt.offsets) if start < end}
    assert "".join(spans.values()) == text.replace(" ", "")
    assert ["".join(spans[index] for index in one) for one in prompt.find("cat")] == ["cat", "cat"]  # not of "concat"
    assert [[spans[index] for index in one] for one in prompt.find("red cat")] == [["red", "cat"]]
    assert prompt.find("at") == prompt.find("house") == prompt.find("") == []
    assert max(spans) == prompt.end - 1


@pytest.mark.parametrize(
    ("kind", "slot"), [("sd", "text_encoder"), ("sdxl", "text_encoder_2"), ("sd3", "text_encoder_3")]
)
def test_each_transform_by_hand(kind: str, slot: str) -> None:
    pipe = pipeline(kind)
    ids, plain = states_of(pipe, slot, PROMPT)
    tokenizer = getattr(pipe, slot.replace("text_encoder", "tokenizer"))
    pieces = [token.strip("▁").removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
    red, house, cat = (pieces.index(word) for word in ("red", "house", "cat"))
    layers = range(len(plain.hidden_states))
    before = [plain.last_hidden_state[0], *(plain.hidden_states[layer][0] for layer in layers)]

    def after(transform: Any) -> list[torch.Tensor]:
        _, output = states_of(pipe, slot, PROMPT, transform)
        return [output.last_hidden_state[0], *(output.hidden_states[layer][0] for layer in layers)]

    for old, new in zip(before, after(suppress("red house")), strict=True):
        space = torch.linalg.qr(old[[red, house]].T)[0]  # orthonormal columns
        torch.testing.assert_close(new, old - old @ space @ space.T, atol=1e-4, rtol=0)
        assert (new @ old[[red, house]].T).abs().max() < 1e-3
    for old, half in zip(before, after(suppress("red", 0.5)), strict=True):
        unit = torch.nn.functional.normalize(old[red], dim=0)
        torch.testing.assert_close(half, old - 0.5 * torch.outer(old @ unit, unit), atol=1e-4, rtol=0)

    _, alone = states_of(pipe, slot, "the dog")  # words that are not in the prompt
    dogs = [alone.last_hidden_state[0], *(alone.hidden_states[layer][0] for layer in layers)]
    first = int(slot != "text_encoder_3")
    for old, new, dog in zip(before, after(suppress("the dog", rank=1)), dogs, strict=True):
        unit = torch.linalg.svd(dog[first : first + 2])[2][0]
        torch.testing.assert_close(new, old - torch.outer(old @ unit, unit), atol=1e-4, rtol=0)

    _, clean = states_of(pipe, slot, "a photo of the house")
    place = first + 4
    for layer, (old, new) in enumerate(zip(before, after(isolate("house", "a photo of the house")), strict=True)):
        expected = old.clone()
        expected[house] = (clean.last_hidden_state if layer == 0 else clean.hidden_states[layer - 1])[0, place]
        torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)
    for old, new in zip(before, after(isolate("red house", PROMPT)), strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)

    end = pieces.index("<|endoftext|>" if first else "/s>" if "/s>" in pieces else "</s>")
    for old, new in zip(before, after(keep("cat", "red house")), strict=True):
        expected = old.clone()
        expected[[index for index in range(first, end) if index not in (cat, red, house)]] = old[end + 1]
        torch.testing.assert_close(new, expected, atol=1e-6, rtol=0)
    for old, new in zip(before, after(merge("red house")), strict=True):
        expected = old.clone()
        expected[[red, house]] = (old[red] + old[house]) / 2
        torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)


def test_a_direction_is_a_mean_of_differences() -> None:
    pipe = pipeline("sdxl")
    pairs, prefixes = [("red cat", "cat"), ("red house", "the house")], ["a photo of a", "the"]
    found = direction(pipe, pairs, prefixes)
    assert found.keys() == {"text_encoder", "text_encoder_2"}
    for slot, vector in found.items():
        differences = []
        for prefix in prefixes:
            for pair in pairs:
                texts = [f"{prefix} {one}" for one in pair]
                both = [states_of(pipe, slot, text)[1].hidden_states[-2][0, len(text.split())] for text in texts]
                differences.append(both[0] - both[1])
        torch.testing.assert_close(vector, torch.stack(differences).mean(0), atol=1e-5, rtol=0)
    # of one pair with one prefix, it maps the one state to the other
    pipe = pipeline("sd")
    vector = direction(pipe, [("red cat", "cat")], ["the"])
    _, target = states_of(pipe, "text_encoder", "the red cat")
    _, moved = states_of(pipe, "text_encoder", "the cat", steer("cat", vector))
    torch.testing.assert_close(moved.last_hidden_state[0, 2], target.last_hidden_state[0, 3], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "slot"), [("sdxl", "text_encoder_2"), ("flux", "text_encoder"), ("sd", "text_encoder")]
)
def test_pooled_states_change_only_if_asked(kind: str, slot: str) -> None:
    pipe = pipeline(kind)
    name = "text_embeds" if kind == "sdxl" else "pooler_output"
    _, plain = states_of(pipe, slot, PROMPT)
    if kind != "flux":
        _, output = states_of(pipe, slot, PROMPT, doubled)
        assert torch.equal(output[name], plain[name])
    _, output = states_of(pipe, slot, PROMPT, doubled, pooled=True)
    torch.testing.assert_close(output[name], 2 * plain[name], atol=1e-4, rtol=0)
    _, output = states_of(pipe, slot, PROMPT, identity, pooled=True)
    torch.testing.assert_close(output[name], plain[name], atol=1e-5, rtol=0)


def test_contexts_nest_and_end_after_errors() -> None:
    pipe = pipeline("sd")
    plain = picture(pipe, PROMPT)
    shifted = lambda states, prompt: states + 1  # noqa: E731
    with transformed(pipe, shifted), transformed(pipe, doubled):
        _, output = states_of(pipe, "text_encoder", PROMPT)
    _, before = states_of(pipe, "text_encoder", PROMPT)
    torch.testing.assert_close(output.last_hidden_state, 2 * (before.last_hidden_state + 1))
    with pytest.raises(ValueError, match="elephant"), transformed(pipe, merge("elephant")):
        picture(pipe, PROMPT)
    assert "encode_prompt" not in vars(pipe)
    assert not pipe.text_encoder._forward_hooks
    assert torch.allclose(picture(pipe, PROMPT), plain, atol=1e-5)


def test_wrong_slots_and_shares() -> None:
    with pytest.raises(ValueError, match="text_encoder_2"), transformed(pipeline("sd"), identity, "text_encoder_2"):
        pass
    with pytest.raises(ValueError, match="pooled"), transformed(pipeline("flux"), identity, "text_encoder"):
        pass
    with pytest.raises(ValueError, match="pooled"), transformed(pipeline("flux"), identity, pooled=True):
        pass
    for make in (suppress, isolate, keep, merge):
        with pytest.raises(ValueError, match="strength"):
            make("cat", strength=1.5)
    pipe = pipeline("sd")
    with pytest.raises(ValueError, match="direction"), transformed(pipe, steer("cat", {"other": torch.ones(1)})):
        picture(pipe, PROMPT)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_with_lora_inversion_compel_offload_and_a_saved_pipeline(kind: str, tmp_path: Path) -> None:
    pipe = pipeline(kind)
    plain = picture(pipe, PROMPT)
    with transformed(pipe, suppress("red")):
        expected = picture(pipe, PROMPT)
        pipe.save_pretrained(tmp_path)
    assert not same(expected, plain)
    saved = type(pipe).from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    assert same(picture(saved, PROMPT), plain)

    # LoRA weights and inversions, loaded before or in the context
    layers = {f"text_encoder.text_model.{name}": one for name, one in lora_weights(pipe.text_encoder).items()}
    pipe.load_lora_weights(layers)
    with transformed(pipe, suppress("red")):
        with_lora = picture(pipe, PROMPT)
    pipe.unload_lora_weights()
    with transformed(pipe, suppress("red")):
        pipe.load_lora_weights(layers)
        assert same(picture(pipe, PROMPT), with_lora)
        assert not same(with_lora, expected)
        pipe.unload_lora_weights()
        assert same(picture(pipe, PROMPT), expected)
    parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    pipe.load_textual_inversion(inversion(), **parts)
    found = list[str]()
    with transformed(pipe, lambda states, prompt: found.append(prompt.text) or states, "text_encoder"):
        picture(pipe, "a <toy> and a cat")
    assert found == ["a <toy> <toy>_1 and a cat"] * len(found)
    with transformed(pipe, suppress("<toy> <toy>_1"), "text_encoder"):
        assert not same(picture(pipe, "a <toy> and a cat"), picture(saved, "a cat"))
    pipe.unload_textual_inversion(**parts)

    if kind == "sd":
        weighted = compel.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
        with transformed(pipe, suppress("red")):
            embeds = weighted(PROMPT)
        assert same(picture(pipe, None, prompt_embeds=embeds), expected)
        assert not same(weighted("a photo of a cat and a (red)++ house"), weighted(PROMPT))

    for turn_on in ("enable_model_cpu_offload", "enable_group_offload"):
        own = {"device": torch.device("cpu")} if "model" in turn_on else GROUPS
        offloaded = pipeline(kind)
        with transformed(offloaded, suppress("red")):
            getattr(offloaded, turn_on)(**own)
            assert same(picture(offloaded, PROMPT), expected)
        with transformed(offloaded, isolate("house")):
            assert not same(picture(offloaded, PROMPT), plain)
        assert same(picture(offloaded, PROMPT), plain)


def test_a_swapped_encoder() -> None:
    pipe = pipeline("sd")
    tower = bert()
    linear = LoTLIPTextEncoder.from_text_model(tower, adapter="linear", hidden_size=tiny_diffusion.WIDTH)
    swap_text_encoder(pipe, linear, tokenizer=bert_tokenizer())
    _, plain = states_of(pipe, "text_encoder", "the red house. a cat")
    _, moved = states_of(pipe, "text_encoder", "the red house. a cat", isolate("red house"))
    _, alone = states_of(pipe, "text_encoder", "red house")
    expected = plain.last_hidden_state[0].clone()
    expected[2:4] = alone.last_hidden_state[0, 1:3]
    torch.testing.assert_close(moved.last_hidden_state[0], expected, atol=1e-5, rtol=0)
    resampler = LoTLIPTextEncoder.from_text_model(tower, adapter="resampler", hidden_size=tiny_diffusion.WIDTH)
    swap_text_encoder(pipe, resampler, tokenizer=bert_tokenizer())
    with pytest.raises(ValueError, match="resampler"), transformed(pipe, identity):
        pass


@pytest.mark.slow
def test_the_table_of_pipelines_is_true(repository: Path, tmp_path: Path) -> None:
    lines = (repository / "docs" / "diffusion.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| | Stable Diffusion 1.x |"))
    rows = [[cell.strip() for cell in line[2:-1].split("|")][1:] for line in lines[start + 2 : start + 8]]
    states, pooled, ella, window, directions, word = rows
    invert = load_script("examples/invert_concept.py").main
    tower, tokenizer = bert(), bert_tokenizer()
    for index, kind in enumerate(KINDS):
        pipe = pipeline(kind)
        plain = picture(pipe, PROMPT)

        def moved(pipe: Any = pipe, **kwargs: Any) -> torch.Tensor:
            with transformed(pipe, lambda states, prompt: states + torch.arange(states.shape[1]), **kwargs):
                return picture(pipe, PROMPT)

        assert same(moved(), plain) != states[index].startswith("yes"), kind
        slot = "text_encoder_2" if kind == "sdxl" else "text_encoder"
        before = plain if kind == "flux" else moved(slot=slot)
        assert same(moved(slot=slot, pooled=True), before) != (pooled[index] == "yes"), kind
        connector = ELLA(tiny_diffusion.WIDTH, tiny_diffusion.WIDTH, 1, 4, 4, 8, 8)
        fits = contextlib.nullcontext() if ella[index] == "yes" else pytest.raises(ValueError, match="pipe")
        with fits, connected(pipe, connector, tower, tokenizer, max_length=30):
            assert not same(picture(pipe, PROMPT), plain), kind
        with transformed(pipe, steer("cat", direction(pipe, [("red cat", "cat")]), 5.0)):
            assert same(picture(pipe, PROMPT), plain) != directions[index].startswith("yes"), kind
        pipe.save_pretrained(tmp_path / kind)
        refused = "--pictures" if word[index] == "yes" else "--pipeline"  # there are no pictures
        with pytest.raises(SystemExit, match=refused):
            invert(
                ["--pipeline", str(tmp_path / kind), "--pictures", str(tmp_path), "--word", "cat", "--token", "<toy>"]
            )
        adapted = windowed(kind, "text_encoder")[0]
        before = picture(adapted, PROMPT)
        torch.nn.init.normal_(adapted.text_encoder.adapter.conv.weight)
        assert same(picture(adapted, PROMPT), before) != (window[index] == "yes"), kind
