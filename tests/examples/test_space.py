"""`lotlip demo` and `examples/space/`: what the page computes, and the page itself in headless Chromium."""

import html
import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read once, when gradio is imported

import pytest
import torch
from huggingface_hub import ModelCard
from packaging.requirements import Requirement

from browser import chromium_page
from lotlip_hf import load_encoder
from lotlip_hf.cli import main
from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.scenes.dataset import long_captions, render, scene
from lotlip_hf.search import build_index
from scripts import REPOSITORY
from tiny_clip import save_clip

pytest.importorskip("gradio", reason="the Space needs gradio: pip install '.[space]'")
from gradio_client import Client, handle_file

pytestmark = pytest.mark.slow
SPACE = REPOSITORY / "examples" / "space"
SECONDS = 120  # for the app to start, on a machine that has much else to do
TEXT = "A cat. A red car, and a 3.5 m house! The photo of the dog. " + "The dog and the cat and the red car " * 12
CUT_AT = {"lotlip": 126, "clip": 77}  # tokens


@pytest.fixture(scope="module")
def app() -> ModuleType:
    return importlib.import_module("lotlip_hf.demo")


@pytest.fixture(scope="module")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "tiny-clip"
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five pictures, no two of which are equal."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [str(folder / f"scene {index}.png") for index in range(5)]
    for index, file in enumerate(files):
        render(scene(index), 64).save(file)
    return files


@pytest.fixture
def models(app: ModuleType, official_checkpoint: Path, clip_checkpoint: Path) -> list[Any]:
    return [
        app.Model(app.shown_name(str(folder)), load_encoder(folder, device="cpu"))
        for folder in (official_checkpoint, clip_checkpoint)
    ]


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A file that is a picture by its name alone."""
    file = tmp_path / "broken <b>.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\nand no picture")
    return str(file)


def test_ranks_are_those_of_brute_force(app: ModuleType, models: list[Any], pictures: list[str]) -> None:
    rankings, skipped = app.rank(models, pictures, TEXT)
    assert skipped == {}
    assert [model.name for model in models] == ["checkpoint", "tiny-clip"]  # of a folder, its name alone
    for model, ranking in zip(models, rankings, strict=True):
        images = model.encoder.encode_images(pictures, progress=False)
        whole, *alone = model.encoder.encode_texts([TEXT, *split_sentences(TEXT)], progress=False) @ images.T
        alone = torch.stack(alone)
        order = sorted(range(len(pictures)), key=lambda index: -whole[index])
        assert ranking.images == [pictures[index] for index in order]
        assert ranking.sentences == split_sentences(TEXT)
        assert len(ranking.sentences) == 4
        torch.testing.assert_close(ranking.scores, whole[order], rtol=0, atol=1e-6)
        torch.testing.assert_close(ranking.sentence_scores, alone[:, order], rtol=0, atol=1e-6)
        evidence = alone[:, order] - alone.mean(dim=1)[:, None]
        torch.testing.assert_close(app.sentence_evidence(ranking), evidence, rtol=0, atol=1e-6)
    assert rankings[0].images != rankings[1].images  # else a model shown twice would not be seen


def test_cut_texts_are_told_for_each_model(app: ModuleType, models: list[Any], pictures: list[str]) -> None:
    between = "the cat and " * 33  # 99 tokens: more than CLIP reads, fewer than LoTLIP
    rankings, _ = app.rank(models, pictures[:1], f"A dog. {between}")
    lengths = [ranking.max_length for ranking in rankings]
    assert lengths == list(CUT_AT.values())
    assert [ranking.text_was_cut for ranking in rankings] == [False, True]
    assert [ranking.num_cut_sentences for ranking in rankings] == [0, 1]
    assert "cut" not in app.summary(models[0], rankings[0])
    assert "cut at 77 tokens" in app.summary(models[1], rankings[1])
    rankings, _ = app.rank(models, pictures[:1], between * 2)
    assert "cut at 126 tokens" in app.summary(models[0], rankings[0])


def test_images_are_embedded_once(
    app: ModuleType,
    models: list[Any],
    pictures: list[str],
    broken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, embedded = models[0], []
    iterate = model.encoder.iterate_images

    def counted(images: list[str]) -> Iterator[Any]:
        embedded.extend(images)
        return iterate(images)

    monkeypatch.setattr(model.encoder, "iterate_images", counted)
    app.rank([model], pictures[:3], "A cat.")
    copy = tmp_path / "copy.png"
    shutil.copy(pictures[0], copy)
    shown: list[Any] = []
    images = [*pictures[1:4], str(copy), pictures[1], broken]
    (ranking,), _ = app.rank([model], images, "A dog.", lambda done, **kwargs: shown.append(done))
    assert embedded == [*pictures[:3], pictures[3], broken]  # the copy by its content, the broken one in vain
    assert sorted(ranking.images) == sorted([*pictures[1:4], str(copy)])
    assert shown == [(1, 2), (2, 2)]
    monkeypatch.setattr(app, "CACHE_SIZE", 2)
    app.rank([model], [pictures[1], pictures[4]], "A dog.")
    assert embedded[5:] == [pictures[4]]
    app.rank([model], [pictures[1], pictures[4]], "A cat.")  # both were kept, as the last that were used
    assert embedded[6:] == []
    assert len(model.embeddings) == 2


def test_equal_images_stay_in_their_order(
    app: ModuleType, models: list[Any], pictures: list[str], tmp_path: Path
) -> None:
    copies = [str(tmp_path / f"{name}.png") for name in "zab"]
    for copy in copies:
        shutil.copy(pictures[0], copy)
    assert app.rank(models, copies, "A cat.")[0][0].images == copies


def test_what_cannot_be_read_is_left_out_and_told(
    app: ModuleType, models: list[Any], pictures: list[str], broken: str, tmp_path: Path
) -> None:
    gone = str(tmp_path / "gone.png")
    rankings, skipped = app.rank(models, [broken, pictures[0], gone], "A cat.")
    assert [ranking.images for ranking in rankings] == [[pictures[0]]] * 2
    assert "not an image" in skipped[broken]
    assert "No such file" in skipped[gone]
    assert list(skipped) == [gone, broken]


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ("none", "A cat.", "picture"),
        ("all", " \n", "description"),
        ("broken", "A cat.", r"broken <b>\.png"),
        ("many", "A cat.", "1000"),
        ("all", "\ud800", "Unicode"),
    ],
)
def test_bad_input_is_told_in_the_page(
    app: ModuleType, models: list[Any], pictures: list[str], broken: str, images: str, text: str, message: str
) -> None:
    given = {"none": [], "all": pictures, "broken": [broken], "many": [f"{n}.png" for n in range(1001)]}[images]
    with pytest.raises(ValueError, match=message):
        app.rank(models, given, text)


def test_a_text_without_sentences_still_ranks(app: ModuleType, models: list[Any], pictures: list[str]) -> None:
    (ranking, _), _ = app.rank(models, pictures, "?!")
    assert ranking.sentences == []
    assert ranking.sentence_scores.shape == (0, 5)
    assert app.sentence_table(ranking).count("<tr") == 2  # the head and the whole text


def test_the_table_is_sorted_and_escaped(
    app: ModuleType, models: list[Any], pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "A cat & a <script>dog</script>. A red car. The house."
    ranking = app.rank(models, pictures, text)[0][0]
    table = app.sentence_table(ranking)
    assert "<script>" not in table
    assert "A cat &amp; a &lt;script&gt;dog&lt;/script&gt;" in table
    rows = re.findall(r"<tr><th>(.*?)</th>", table)[1:]
    evidence = app.sentence_evidence(ranking)[:, 0].tolist()
    expected = [ranking.sentences[index] for index in sorted(range(3), key=lambda index: -evidence[index])]
    assert [row.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for row in rows] == expected
    # blue for, orange against
    for style, difference in re.findall(r'<td style="(.*?)">[-.\d]+<small>(.*?)</small>', table):
        assert ("37, 99, 235" if float(difference) > 0 else "234, 88, 12") in style
    # only so many pictures and sentences are shown, which the page says
    monkeypatch.setattr(app, "NUM_SHOWN", 2)
    monkeypatch.setattr(app, "MAX_SENTENCES", 2)
    ranking = app.rank(models, pictures, text)[0][0]
    table = app.sentence_table(ranking)
    assert table.count("<td") == 3 * 2
    assert "2 sentences" in table
    assert [caption.split()[0] for _, caption in app.gallery(ranking)] == ["1.", "2."]
    assert "the first 2 of 5 pictures" in app.summary(models[0], ranking)


def test_the_first_picture_is_explained(app: ModuleType, models: list[Any], pictures: list[str]) -> None:
    text = "A cat & a red car. The house."
    page, notes = app.explain_first(models, pictures, text)
    first = app.rank(models[:1], pictures, text)[0][0].images[0]
    assert page.count('class="panel"') == 1
    assert f'alt="{Path(first).name}"' in page
    assert len(notes) == 1
    assert models[1].name in notes[0]
    assert app.explain_first(models[1:], pictures, text)[0] == ""
    framed = app.frame(page)
    assert framed.count("<") == 2
    assert html.unescape(framed.partition('srcdoc="')[2]).startswith(page)
    with pytest.raises(ValueError, match="50"):
        app.explain_first(models, pictures, "A cat. " * 51)


def test_a_folder_is_ranked_by_its_index(
    app: ModuleType, models: list[Any], pictures: list[str], broken: str, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in [*pictures, broken]:
        shutil.copy(file, folder)
    dropped, _ = app.rank(models, pictures, TEXT)
    for model in models:
        model.photos = app.indexed(build_index(model.encoder, folder, progress=False))
        model.encoder.iterate_images = None  # not called again
    ranked, skipped = app.rank(models, [], TEXT)
    assert skipped == {}
    for one, other in zip(ranked, dropped, strict=True):
        assert [Path(image).parent for image in one.images] == [folder] * 5
        assert [Path(image).name for image in one.images] == [Path(image).name for image in other.images]
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.sentence_scores, other.sentence_scores, rtol=0, atol=1e-6)
    Path(ranked[0].images[0]).unlink()  # after it was indexed
    assert len(app.gallery(ranked[0])) == 5
    assert "5 pictures" in str(app.build(models).get_config_file())
    with pytest.raises(ValueError, match="description"):
        app.rank(models, [], " ")


def test_arguments_that_do_not_fit_are_named(
    clip_checkpoint: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: object) -> str:
        assert main(["demo", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "--model" in error()
    assert "nowhere" in error("--model", tmp_path / "nowhere")
    assert "port" in error("--model", clip_checkpoint, "--port", "65536")
    assert "missing" in error("--model", clip_checkpoint, "--images", tmp_path / "missing")
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = ["--images", Path(pictures[0]).parent, "--index", tmp_path, "--port", server.getsockname()[1]]
        assert "--port" in error("--model", clip_checkpoint, *words)


def test_the_space_asks_for_what_the_package_needs() -> None:
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert asked == {str(needed) for needed in map(Requirement, requires("lotlip-hf") or []) if not needed.marker}
    settings = ModelCard.load(SPACE / "README.md").data.to_dict()
    assert settings["sdk"] == "gradio"
    assert settings["sdk_version"] == version("gradio")
    assert (SPACE / settings["app_file"]).is_file()


@contextmanager
def served(log: Path, *command: object, **variables: object) -> Iterator[str]:
    """Address of a page that a command serves."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [sys.executable, *map(str, command), "--port", str(port)]
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    with (
        log.open("wb") as output,
        subprocess.Popen(words, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + SECONDS
            while True:
                assert process.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(url, timeout=10).close()
                    break
                except OSError:
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)
    assert "Traceback" not in log.read_text()


def test_the_page_of_a_folder(app: ModuleType, official_checkpoint: Path, pictures: list[str], tmp_path: Path) -> None:
    words = ["-m", "lotlip_hf", "demo", "--model", official_checkpoint, "--images", Path(pictures[0]).parent]
    with served(tmp_path / "app.log", *words, "--index", tmp_path, GRADIO_TEMP_DIR=tmp_path / "shown") as url:
        client = Client(url, verbose=False, download_files=False)
        answer = client.predict([], TEXT, api_name="/rank")
        message, _ = client.predict([], "", api_name="/explain")
        assert url in (tmp_path / "app.log").read_text()
    model = app.Model("checkpoint", load_encoder(official_checkpoint, device="cpu"))
    expected = app.rank([model], pictures, TEXT)[0][0]
    assert answer[0] == ""
    shown = [shown["caption"].split(maxsplit=2)[2] for shown in answer[2]]
    assert shown == [Path(image).name for image in expected.images]
    assert all(sentence in html.unescape(answer[3]) for sentence in split_sentences(TEXT))
    assert "description" in message


@pytest.fixture
def address(official_checkpoint: Path, clip_checkpoint: Path, tmp_path: Path) -> Iterator[str]:
    """Where the app runs, started as a Space starts it: by variables, without arguments but the port."""
    variables = {
        "LOTLIP_MODEL": official_checkpoint,
        "LOTLIP_COMPARE": clip_checkpoint,
        "GRADIO_TEMP_DIR": tmp_path / "uploads",
    }
    with served(tmp_path / "app.log", SPACE / "app.py", **variables) as url:
        yield url


@pytest.fixture
def browser_page() -> Iterator[Any]:
    with chromium_page() as page:
        page.set_default_timeout(1000 * SECONDS)
        yield page


def test_the_app_of_the_space_is_served(address: str, pictures: list[str]) -> None:
    files = [{"image": handle_file(picture), "caption": None} for picture in pictures]
    answer = Client(address, verbose=False, download_files=False).predict(files, TEXT, api_name="/rank")
    assert ["checkpoint" in answer[1], "tiny-clip" in answer[4]] == [True, True]
    assert len(answer[2]) == len(answer[5]) == len(pictures)


def test_the_page_in_a_browser(
    browser_page: Any, address: str, app: ModuleType, models: list[Any], pictures: list[str], broken: str
) -> None:
    page = browser_page

    def captions(number: int) -> list[str]:
        return [
            " ".join(text.split())
            for text in page.locator(f"#model-{number} .ranked .caption-label").all_inner_texts()
        ]

    def rows(number: int) -> list[list[str]]:
        found = page.locator(f"#model-{number} .sentences tbody tr")
        return [
            [found.nth(row).locator("th").inner_text(), *found.nth(row).locator("td").all_inner_texts()]
            for row in range(found.count())
        ]

    def press_and_wait(text: str) -> None:
        """The first sentence of `text` is one that the page did not show before."""
        page.locator("#description textarea").fill(text)
        page.locator("#rank").click()
        first = split_sentences(text)[0]
        page.locator(f"#model-{len(models)} .sentences tbody th", has_text=first).first.wait_for()

    # The page is not empty at the start.
    page.goto(address)
    page.locator("#model-2 .sentences tbody td").first.wait_for()
    drawn = long_captions(scene(0, split="test"))[0]
    assert page.locator("#description textarea").input_value() == drawn
    assert len(captions(1)) == len(captions(2)) == 8
    assert {caption.split()[2] for caption in captions(1)} == {f"shapes-{number}.png" for number in range(1, 9)}

    # An example is ranked when it is chosen.
    page.get_by_text("The picture has a white background", exact=False).last.click()
    chosen = long_captions(scene(6, split="test"))[0]
    page.locator("#model-2 .sentences tbody th", has_text=split_sentences(chosen)[0]).first.wait_for()
    assert page.locator("#description textarea").input_value() == chosen

    # One's own pictures, one of them broken, in place of those.
    page.locator("#pictures").get_by_label("Clear").click()
    page.locator("#pictures input[type=file]").set_input_files([*pictures, broken])
    page.locator("#pictures .thumbnail-item").nth(5).wait_for()
    press_and_wait(TEXT)
    message = page.locator("#message").inner_text()
    assert re.fullmatch(r"broken.*\.png cannot be read: not an image.*", message.strip())
    rankings, _ = app.rank(models, pictures, TEXT)
    for number, (model, ranking) in enumerate(zip(models, rankings, strict=True), 1):
        column = page.locator(f"#model-{number}")
        assert column.locator("h2").inner_text() == model.name
        assert f"cut at {ranking.max_length} tokens" in column.locator(".notice").inner_text()
        # Scores may differ in the last digit: other processes, other threads.
        for caption, place, image, score in zip(
            captions(number), range(1, 6), ranking.images, ranking.scores.tolist(), strict=True
        ):
            assert caption.startswith(f"{place}. ")
            assert caption.endswith(Path(image).name)
            assert float(caption.split()[1]) == pytest.approx(score, abs=1e-4)
        whole, *alone = rows(number)
        assert whole[0] == "the whole description"
        evidence = app.sentence_evidence(ranking)
        order = torch.sort(evidence[:, 0], descending=True, stable=True).indices.tolist()
        assert [row[0] for row in alone] == [ranking.sentences[index] for index in order]
        for row, index in zip(alone, order, strict=True):
            cells = [[float(value) for value in cell.split()] for cell in row[1:]]
            wanted = torch.stack([ranking.sentence_scores[index], evidence[index]], dim=1)
            torch.testing.assert_close(torch.tensor(cells), wanted, rtol=0, atol=1e-4)
        # Every picture is really drawn.
        for image in column.locator("img").all():
            image.scroll_into_view_if_needed()
            page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())

    # The first picture is explained, by the model that is a LoTLIP, until the pictures are ranked again.
    page.locator("#explain").click()
    frame = page.frame_locator("#explanation iframe")
    frame.locator("tr[data-heat]").first.hover()
    frame.locator(".heat").wait_for(state="visible")
    assert frame.locator(".panel").count() == 1
    assert frame.locator("h2").inner_text() == models[0].name
    assert frame.locator(".picture img").first.get_attribute("alt") == Path(rankings[0].images[0]).name
    assert models[1].name in page.locator("#message").inner_text()

    # Whatever is typed is shown, and nothing of it runs.
    typed = 'A ${1 + 1} {{2 + 2}} <img src="x" onerror="document.title = 1"> **cat** & `dog`'
    press_and_wait(f"The house. {typed}")
    assert typed in [row[0] for row in rows(1)]
    assert page.locator("#explanation iframe").count() == 0
    assert page.locator("img[src=x]").count() == 0
    assert page.title() != "1"

    # Bad input: a message, no stale ranking, and the pictures are still there.
    page.locator("#description textarea").fill("  ")
    page.locator("#rank").click()
    page.locator("#message", has_text="no description").wait_for()
    assert captions(1) == []
    assert rows(2) == []
    press_and_wait("The red car.")
    assert page.locator("#message").inner_text().strip() != ""  # the broken one
    assert len(captions(1)) == 5
    page.locator("#pictures").get_by_label("Clear").click()
    page.locator("#rank").click()
    page.locator("#message", has_text="no pictures").wait_for()
