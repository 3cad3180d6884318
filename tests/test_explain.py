"""`lotlip_hf.explain`: scores against brute force, words and attention of every tower, what a model does not see."""

import dataclasses
import html
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

import tiny
import tiny_clip
import tiny_vision
from browser import chromium_page
from lotlip_hf import Encoder, LoTLIPConfig, LoTLIPModel, LoTLIPProcessor, load_encoder
from lotlip_hf.cli import main
from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.explain import Explanation, explain
from lotlip_hf.explain_page import draw, page, save_pictures, write_page
from lotlip_hf.scenes.dataset import render, scene
from lotlip_hf.scenes.small import small_model

TEXT = "There is a large red star at the top left. You can see a blue circle! In all, two shapes are on a background."
CLOSE = {"rel": 0, "abs": 1e-5}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(*small_model(hidden_size=32, num_hidden_layers=2, max_text_length=64))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A square picture, and one that is cropped."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / "square.png", folder / "wide <b>.png"]
    render(scene(0), 96).save(files[0])
    render(scene(1), 96).resize((128, 64)).save(files[1])
    return files


@pytest.fixture(scope="module")
def explanations(encoder: Encoder, pictures: list[Path]) -> list[Explanation]:
    return [explain(encoder, picture, TEXT) for picture in pictures]


def words_of(found: Explanation) -> list[str]:
    return [found.text[word.start : word.end] for word in found.words]


def test_scores_are_those_of_brute_force(encoder: Encoder, pictures: list[Path], explanations: list[Any]) -> None:
    first, second, third = (found.strip() for found in re.findall(r"[^.!]+[.!]", TEXT))
    without = [f"{second} {third}", f"{first} {third}", f"{first} {second}"]
    for picture, found in zip(pictures, explanations, strict=True):
        image = encoder.encode_images([picture], progress=False)[0]
        texts = encoder.encode_texts([TEXT, *split_sentences(TEXT), *without], progress=False)
        whole, *others = (texts @ image).tolist()
        assert found.score == pytest.approx(whole, **CLOSE)
        assert [one.score for one in found.sentences] == pytest.approx(others[:3], **CLOSE)
        assert [one.lost for one in found.sentences] == pytest.approx([whole - one for one in others[3:]], **CLOSE)
        assert "".join(TEXT[one.start : one.end] for one in found.sentences) == TEXT
        assert words_of(found) == re.findall(r"\w+", TEXT)
        assert found.num_cut == 0
        assert (found.image, found.text) == (picture.name, TEXT)
    assert [found.seen for found in explanations] == [(0, 0, 1, 1), (0.25, 0, 0.75, 1)]
    one = explain(encoder, pictures[0], "A red star.")
    assert [sentence.lost for sentence in one.sentences] == [None]


def test_a_picture_in_memory_and_a_folder_will_do(official_checkpoint: Path, photos: Path) -> None:
    found = explain(official_checkpoint, Image.open(photos / "a.png"), "A cat. A dog.")
    expected = explain(load_encoder(official_checkpoint), photos / "a.png", "A cat. A dog.")
    assert found.image == "image"
    assert found.model == expected.model == official_checkpoint.name
    assert found.score == pytest.approx(expected.score, **CLOSE)


def test_only_what_the_model_reads_has_a_value(encoder: Encoder, pictures: list[Path]) -> None:
    text = " ".join(f"The star number {number} is red." for number in range(20))
    found = explain(encoder, pictures[0], text)
    kept = [word for word in found.words if not word.is_cut]
    ids = encoder.engine.tokenize([text[: kept[-1].end]], encoder.max_text_length)
    more = encoder.engine.tokenize([text[: found.words[len(kept)].end]], encoder.max_text_length)
    assert (ids[1], more[1]) == ([False], [True])
    assert found.words[: len(kept)] == kept
    assert found.num_cut == len(found.words) - len(kept) > 0
    assert not any(word.value for word in found.words[len(kept) :])
    assert not any(any(one.values[len(kept) :]) for one in found.attentions)
    assert found.sentences[-1].lost == pytest.approx(0, abs=1e-6)  # it was not read
    tokenizer: Any = encoder.engine.tokenizer
    tokenizer.truncation_side = "left"
    try:
        left = explain(encoder, pictures[0], text)
    finally:
        tokenizer.truncation_side = "right"
    assert left.words[0].is_cut
    assert not left.words[-1].is_cut
    assert left.num_cut > 0


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean"])
def test_attention_is_that_of_the_last_layer(pooling: str, pictures: list[Path]) -> None:
    """The tokenizer makes a token of each word of Scenes."""
    _, processor = small_model(max_text_length=30)
    config = tiny.config(vision_backbone="vit", num_corner_tokens=2, pooling=pooling)
    config.text_config.backbone_config.vocab_size = len(processor.tokenizer)
    processor.image_processor.size = processor.image_processor.crop_size = {"height": 32, "width": 32}
    torch.manual_seed(0)
    model = LoTLIPModel(config).eval()
    text = "A large red star. A blue circle."
    found = explain(Encoder(model, processor), pictures[0], text)
    assert model.text_model.backbone.config._attn_implementation == "sdpa"
    assert not model.training
    model.set_attn_implementation("eager")
    inputs = processor.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        output = model.get_text_features(**inputs, output_attentions=True, output_corner_embeds=True)
    whole, corners = output.attentions[-1][0].mean(0), output.corner_attentions[-1][0].mean(0)
    pooled = whole.mean(0) if pooling == "mean" else whole[0]
    is_word = torch.tensor(
        [token.isalpha() for token in processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0])]
    )
    assert [one.token for one in found.attentions][1:] == ["corner 1", "corner 2"]
    assert (found.attentions[0].token == "[CLS]") == (pooling != "mean")
    for one, row in zip(found.attentions, [pooled, *corners], strict=True):
        assert one.values == pytest.approx(row[is_word].tolist(), **CLOSE)
        assert one.rest == pytest.approx(1 - sum(one.values), **CLOSE)


@pytest.mark.parametrize("family", tiny_vision.FAMILIES, ids=lambda family: family.name)
def test_every_image_tower_has_heat_maps(family: tiny_vision.Family, pictures: list[Path]) -> None:
    small, processor = small_model(hidden_size=32, num_hidden_layers=1)
    config = LoTLIPConfig(
        text_config=small.config.text_config, vision_config=family.config(projection_dim=32), projection_dim=32
    )
    torch.manual_seed(0)
    model = LoTLIPModel(config).eval()
    found = explain(Encoder(model, LoTLIPProcessor(family.image_processor(), processor.tokenizer)), pictures[1], TEXT)
    height, width = found.sentences[0].heat.shape
    if family.model_type == "siglip2_vision_model":
        assert (height, width) == (3, 6)  # the shape of the picture
    elif "convnext" not in family.name:
        assert (height, width) == (4, 4)
    heat = torch.stack([one.heat for one in (*found.sentences, *found.words)])
    assert heat.shape == (len(found.sentences) + len(found.words), height, width)
    assert ((heat >= 0) & (heat <= 1)).all()
    assert page([found])


def test_other_models_are_refused(tmp_path: Path, pictures: list[Path]) -> None:
    tiny_clip.save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="LoTLIP"):
        explain(tmp_path / "clip", pictures[0], TEXT)


@pytest.mark.parametrize("text", ["", " \n", "?!"])
def test_a_text_needs_a_word(text: str, encoder: Encoder, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match="text"):
        explain(encoder, pictures[0], text)


# The page


def test_the_page_is_escaped_and_loads_nothing(encoder: Encoder, pictures: list[Path]) -> None:
    text = 'A <script>alert("star")</script> & a \u202ered\u202c circle. http://127.0.0.1/ is "blue".'
    found = dataclasses.replace(explain(encoder, pictures[1], text), model="<i>model</i>")
    written = page([found, found])
    assert written.count("<script") == 1
    assert "<i>" not in written
    assert "<b>." not in written
    assert "\u202e" not in written
    assert "wide &lt;b&gt;.png" in written
    shown = html.unescape(re.sub(r"<[^>]+>", "", written[written.index("<tbody>") : written.index("</tbody>")]))
    assert 'A <script>alert("star")</script> & a ' in shown
    assert not re.findall(
        r"(?:src|href|url)\W{1,3}(?!data:)\w+:", re.sub(r"<script>.*</script>", "", written, flags=16)
    )


def test_colours_follow_the_values(explanations: list[Explanation]) -> None:
    (found, _) = explanations
    written = page(explanations)
    cells = re.findall(r'<span class="word" tabindex="0" title="([^"]+)" style="background: rgba\((\d+), ', written)
    assert len(cells) == sum(len(one.words) for one in explanations)
    for title, red in cells:
        assert float(title) == 0 or (float(title) > 0) == (int(red) == 0)
    assert [float(title) for title, _ in cells[: len(found.words)]] == pytest.approx(
        [word.value for word in found.words], rel=0.06
    )
    text = dataclasses.replace(found, words=[dataclasses.replace(word, is_cut=True) for word in found.words])
    written = page([text])
    assert written.count('<s class="word" tabindex="0"') == len(found.words)
    assert f"{len(found.words)} words are cut" in written


def test_pictures(explanations: list[Explanation], tmp_path: Path) -> None:
    files = save_pictures(explanations, tmp_path / "drawn")
    assert [file.name for file in files] == ["1-square-LoTLIPModel.png", "2-wide-b-LoTLIPModel.png"]
    for file, found in zip(files, explanations, strict=True):
        with Image.open(file) as drawn:
            assert drawn.size == draw(found).size
            colours = {colour for _, colour in drawn.convert("RGB").getcolors(2**24) or []}
        assert len(colours) > 100
    cold = [dataclasses.replace(one, heat=torch.zeros_like(one.heat)) for one in explanations[0].sentences]
    without = draw(dataclasses.replace(explanations[0], sentences=cold))
    assert ImageChops.difference(without, draw(explanations[0])).getbbox() is not None
    # What the model does not see is pale.
    wide = dataclasses.replace(explanations[1], picture=Image.new("RGB", explanations[1].picture.size, "black"))
    colours = {colour for _, colour in draw(wide).getcolors(2**24) or []}
    assert {(0, 0, 0), (153, 153, 153)} <= colours
    written = [page([one]) for one in explanations]
    assert ["does not see pale margins" in one for one in written] == [False, True]
    with pytest.raises(FileExistsError, match="drawn"):
        save_pictures(explanations, tmp_path / "drawn")


@pytest.mark.slow
def test_the_page_in_a_browser(explanations: list[Explanation], tmp_path: Path) -> None:
    """Hover, keyboard and click show the heat of a sentence or word over both pictures, on the part that is seen."""
    write_page(explanations, tmp_path / "page.html")
    with chromium_page() as browser:
        errors: list[str] = []
        browser.on("console", lambda message: errors.append(message.text))
        browser.on("pageerror", lambda error: errors.append(str(error)))
        asked: list[str] = []
        browser.on("request", lambda request: asked.append(request.url.partition(":")[0]))
        browser.goto((tmp_path / "page.html").as_uri())
        panels = [browser.locator(".panel").nth(number) for number in range(2)]

        def shown() -> list[str | None]:
            """The heat maps over the two pictures, both or none."""
            heat = [panel.locator(".heat") for panel in panels]
            return [one.get_attribute("src") if one.is_visible() else None for one in heat]

        assert shown() == [None, None]
        sentence, word = panels[0].locator("tr[data-heat]").nth(1), panels[0].locator(".word[data-heat]").nth(3)
        sentence.locator("td").first.hover()
        heat = [panel.locator("tr[data-heat]").nth(1).get_attribute("data-heat") for panel in panels]
        assert shown() == [f"data:image/png;base64,{one}" for one in heat]
        assert f"{explanations[0].sentences[1].score:.3f}" in panels[0].locator("figcaption").inner_text()
        word.hover()
        of_word = [panel.locator(".word[data-heat]").nth(3).get_attribute("data-heat") for panel in panels]
        assert shown() == [f"data:image/png;base64,{one}" for one in of_word]
        assert panels[1].locator("figcaption").inner_text().startswith("large: ")
        browser.locator("h1").hover()
        assert shown() == [None, None]

        # The keyboard reaches each, and Enter keeps it.
        browser.keyboard.press("Tab")
        first = panels[0].locator("tr[data-heat]").nth(0)
        assert first.evaluate("one => one === document.activeElement")
        assert shown()[0] == f"data:image/png;base64,{first.get_attribute('data-heat')}"
        browser.keyboard.press("Tab")
        assert panels[0].locator(".word").nth(0).evaluate("one => one === document.activeElement")
        browser.keyboard.press("Enter")
        kept = shown()
        assert kept[0] == f"data:image/png;base64,{panels[0].locator('.word').nth(0).get_attribute('data-heat')}"
        browser.evaluate("document.activeElement.blur()")
        browser.locator("h1").hover()
        assert shown() == kept
        browser.keyboard.press("Escape")
        assert shown() == [None, None]
        word.click()
        browser.locator("h1").hover()
        assert None not in shown()
        browser.locator("h1").click()
        assert shown() == [None, None]

        # Pictures keep their shape in narrow windows, and nothing is wider than the window.
        for width in (400, 900, 1600):
            browser.set_viewport_size({"width": width, "height": 900})
            for panel, one in zip(panels, explanations, strict=True):
                box = panel.locator(".picture > img").first.bounding_box()
                assert box["width"] / box["height"] == pytest.approx(one.picture.width / one.picture.height, rel=0.02)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
        # Two models with two pictures each are two rows.
        others = [dataclasses.replace(one, model="other") for one in explanations]
        write_page([*explanations, *others], tmp_path / "rows.html")
        browser.goto((tmp_path / "rows.html").as_uri())
        tops = browser.locator(".panel").evaluate_all("all => all.map(one => one.getBoundingClientRect().top)")
        assert tops[0] == tops[1] < tops[2] == tops[3]
        browser.goto((tmp_path / "page.html").as_uri())

        # Over the wide picture, the heat covers the middle, which the model sees.
        word.hover()
        picture, heat_box = (panels[1].locator(name).bounding_box() for name in (".picture", ".heat"))
        assert heat_box["width"] == pytest.approx(picture["width"] / 2, abs=2)
        assert heat_box["x"] - picture["x"] == pytest.approx(picture["width"] / 4, abs=2)
        browser.locator("summary").first.click()
        assert panels[0].locator("h3").all_inner_texts()[1].startswith("corner 1")
        assert set(asked) <= {"file", "data"}

        browser.goto("about:blank")
        browser.goto(f"{(tmp_path / 'page.html').as_uri()}#0-s1")  # the second sentence is chosen
        assert shown() == [f"data:image/png;base64,{one}" for one in heat]
        assert errors == []


# lotlip explain


def test_the_command_prints_and_writes(
    official_checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "A cat sleeps. A dog sees it."
    command = ["explain", "--model", str(official_checkpoint), "--device", "cpu", "--image"]
    files = [str(photos / name) for name in ("a.png", "b.png")]
    outputs = ["--output", str(tmp_path / "page.html"), "--pictures", str(tmp_path / "drawn")]
    assert main([*command, *files, text, *outputs]) == 0  # the description after the pictures
    out = capsys.readouterr().out
    assert main([*command, *files, "--device", "cpu", text]) == 0
    assert capsys.readouterr().out == out
    found = explain(official_checkpoint, files[1], text)
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    assert [f"{found.sentences[0].score:.4f}", f"{found.sentences[0].lost:+.4f}", "A cat sleeps."] in rows
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('class="panel"') == 2
    assert len([*(tmp_path / "drawn").iterdir()]) == 2
    # Models whose folders have the same name are shown with their paths.
    same = [shutil.copytree(official_checkpoint, tmp_path / name / "checkpoint-1") for name in ("one", "two")]
    assert main(["explain", "--model", *map(str, same), "--image", files[0], "--device", "cpu", text]) == 0
    out = capsys.readouterr().out
    assert all(f"{one}, a.png" in out for one in same)
    assert main([*command, files[0], "cat " * 300]) == 0
    assert "are cut" in capsys.readouterr().out


def test_the_command_refuses(
    official_checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_clip.save_clip(tmp_path / "clip")
    picture = str(photos / "a.png")
    model = ["explain", "--model", str(official_checkpoint)]
    for argv, word in (
        ([*model, "--image", picture], "TEXT"),
        (["explain", "--model", str(tmp_path / "clip"), "--image", picture, "A cat."], "LoTLIP"),
        ([*model, "--image", str(tmp_path / "no.png"), "A cat sleeps."], "no.png"),
        ([*model, "--image", picture, "A cat sleeps.", "--output", str(tmp_path / "no" / "page.html")], "page.html"),
        ([*model, "--image", picture, "A cat sleeps.", "--pictures", str(photos)], str(photos)),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert word in error
        assert len(error.splitlines()) == 1
