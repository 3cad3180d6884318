"""A page where one drops pictures, types a long description, and sees them ranked, sentence by sentence.

    python examples/space/app.py --model checkpoint --compare openai/clip-vit-base-patch16

`--model` and `--compare` are folders or Hub ids of dual models: LoTLIP, CLIP, SigLIP. On a Space, where there is no
command line, the variables LOTLIP_MODEL and LOTLIP_COMPARE name them. Needs gradio: `pip install 'lotlip-hf[space]'`.
"""

import argparse
import base64
import hashlib
import html
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.encoder import Encoder, load_encoder
from lotlip_hf.images import ImageError, load_image, read_image_bytes
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from lotlip_hf.terminal import printable_lines, printable_output

MAX_IMAGES = 1000
MAX_SENTENCES = 50
# How many of the ranked pictures the page shows.
NUM_SHOWN = 24
# Embeddings that are kept of each model. More than `MAX_IMAGES`: those of one ranking are never dropped.
CACHE_SIZE = 10_000
# Longest sides in pixels, in the gallery and above the table.
GALLERY_SIDE, TABLE_SIDE = 400, 96
# Drawn for the start: two groups of four that share the large shape, so that only a long description tells them apart.
NUM_EXAMPLES = 8

STYLE = """
.notice { border-left: 4px solid #d97706; background: rgba(217, 119, 6, 0.12); border-radius: 4px; padding: 8px 12px; }
.notice p, .notice ul { margin: 0; }
.model h2 { margin: 0; }
.model p { margin: 2px 0 6px 0; opacity: 0.75; }
#pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(90px, 1fr)); }
.block.ranked .grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.ranked .grid-wrap { min-height: 0; max-height: none; }
.ranked .gallery-item { height: auto; }
.ranked .thumbnail-item { display: flex; flex-direction: column; aspect-ratio: auto; height: auto; }
.ranked .thumbnail-item img { aspect-ratio: 1; height: auto; }
.ranked .caption-label { position: static; width: 100%; max-width: none; border: none; white-space: normal; }
.sentences { overflow-x: auto; }
.sentences table { border: none; border-spacing: 3px; border-collapse: separate; font-size: 13px; line-height: 1.3;
    margin: 0; padding: 0; }
.sentences th, .sentences td { padding: 5px 8px; border-radius: 4px; border: none; text-align: center; }
.sentences tbody th { position: sticky; left: 0; min-width: 180px; text-align: left; font-weight: 400;
    background: var(--body-background-fill); overflow-wrap: anywhere; }
.sentences tr.whole th, .sentences tr.whole td { font-weight: 600; }
.sentences thead th { font-weight: 400; vertical-align: bottom; }
.sentences img { display: block; max-width: 52px; max-height: 52px; margin: 0 auto 2px auto; border-radius: 3px; }
.sentences small { display: block; opacity: 0.75; }
.sentences td { font-variant-numeric: tabular-nums; min-width: 60px; }
.legend { margin: 6px 0 0 0; font-size: 13px; opacity: 0.75; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


@dataclass
class Model:
    """
    A dual encoder, and the images that it has embedded.

    Args:
        name (`str`): what the page calls it.
        encoder ([`Encoder`]): the dual encoder.
        embeddings (`dict[str, torch.Tensor]`, *optional*):
            By the digest of an image file's content, its normalised embedding [P]; the latest used come last.
    """

    name: str
    encoder: Encoder
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranking:
    """
    The images as one model ranks them. N is the number of images, S of sentences.

    Args:
        images (`list[str]`): the files, the best first.
        scores (`torch.Tensor`): of shape [N], the cosine similarity of each image and the whole text.
        sentences (`list[str]`): the text's sentences, in its order; at most `MAX_SENTENCES`.
        sentence_scores (`torch.Tensor`): of shape [S, N], the cosine similarity of each sentence alone and each image.
        max_length (`int`): the longest text that the model reads, in tokens.
        text_was_cut (`bool`): whether the whole text is longer.
        num_cut_sentences (`int`): how many sentences are longer by themselves.
    """

    images: list[str]
    scores: torch.Tensor
    sentences: list[str]
    sentence_scores: torch.Tensor
    max_length: int
    text_was_cut: bool
    num_cut_sentences: int


def load(name: str) -> Model:
    """Loads a folder or Hub id; the page does not tell where a folder lies."""
    return Model(Path(name).resolve().name if os.path.isdir(name) else name, load_encoder(name))


def rank(
    models: Sequence[Model],
    images: Sequence[str],
    text: str,
    progress: Callable[..., Any] | None = None,
) -> tuple[list[Ranking], dict[str, str]]:
    """
    Ranks images by a text, with each model.

    An image is embedded once by each model and known again by its content, so another text takes no more than the time
    to encode it.

    Args:
        models (`Sequence[Model]`): the models.
        images (`Sequence[str]`): image files.
        text (`str`): the description.
        progress (`Callable`, *optional*): is told of each image, as `gradio.Progress` wants it.

    Returns:
        `tuple`: a [`Ranking`] for each model, and the images that cannot be read, a dictionary from file to reason.

    Raises:
        ValueError: if there is no text, no image, none that can be read, or more than `MAX_IMAGES`.
    """
    images = list(dict.fromkeys(images))
    if not images:
        raise ValueError("There is no picture yet: drop one or more.")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"These are {len(images)} pictures: drop at most {MAX_IMAGES}.")
    if not text.strip():
        raise ValueError("There is no description yet: type what the picture shows.")
    sentences = split_sentences(text)[:MAX_SENTENCES]
    digests, skipped = {}, {}
    for image in images:
        try:
            digests[image] = hashlib.blake2b(read_image_bytes(image)).hexdigest()
        except ImageError as error:
            skipped[image] = error.reason
    for model in models:
        failed = embed_images(model, digests, progress)
        digests = {image: digest for image, digest in digests.items() if image not in failed}
        skipped |= failed
    if not digests:
        reasons = "; ".join(f"{Path(image).name}: {reason}" for image, reason in skipped.items())
        raise ValueError(f"None of these pictures can be read ({reasons}).")
    return [rank_one(model, digests, text, sentences) for model in models], skipped


def embed_images(model: Model, digests: dict[str, str], progress: Callable[..., Any] | None = None) -> dict[str, str]:
    """
    Embeds the images that a model has not seen.

    Args:
        model (`Model`): the model; its `embeddings` are brought up to date.
        digests (`dict[str, str]`): from file to the digest of its content.
        progress (`Callable`, *optional*): as in [`rank`].

    Returns:
        `dict[str, str]`: the files that cannot be read, and why.
    """
    known = model.embeddings
    new = {digest: image for image, digest in digests.items() if digest not in known}
    for digest in digests.values():
        if digest in known:
            known[digest] = known.pop(digest)  # to the end: used last
    reasons = {}
    results = model.encoder.iterate_images(list(new.values()))
    for count, (index, result) in enumerate(results, 1):
        digest = list(new)[index]
        if isinstance(result, ImageError):
            reasons[digest] = result.reason
        else:
            known[digest] = result
        if progress is not None:
            progress((count, len(new)), desc=f"{model.name} looks at the pictures", unit="pictures")
    while len(known) > CACHE_SIZE:
        del known[next(iter(known))]
    return {image: reasons[digest] for image, digest in digests.items() if digest in reasons}


def rank_one(model: Model, digests: dict[str, str], text: str, sentences: list[str]) -> Ranking:
    """Ranks images that are embedded: [`rank`] for one model."""
    texts = [text, *sentences]
    rows: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    was_cut = [False] * len(texts)
    for index, embedding, cut in model.encoder.iterate_texts(texts):
        rows[index], was_cut[index] = embedding, cut
    scores = torch.stack(rows) @ torch.stack([model.embeddings[digest] for digest in digests.values()]).T
    # Copies of an image may differ in the last bits; they stay in the order in which they came.
    order = torch.sort(scores[0].mul(1e6).round(), descending=True, stable=True).indices
    files = list(digests)
    return Ranking(
        images=[files[index] for index in order],
        scores=scores[0, order],
        sentences=sentences,
        sentence_scores=scores[1:, order],
        max_length=model.encoder.max_text_length,
        text_was_cut=was_cut[0],
        num_cut_sentences=sum(was_cut[1:]),
    )


def sentence_evidence(ranking: Ranking) -> torch.Tensor:
    """
    How much each sentence speaks for or against each image: its score less its mean over all images.

    Args:
        ranking (`Ranking`): of N images by S sentences.

    Returns:
        `torch.Tensor`: of shape [S, N]; above 0 for the image, below 0 against it.
    """
    return ranking.sentence_scores - ranking.sentence_scores.mean(dim=1, keepdim=True)


@lru_cache(maxsize=256)
def thumbnail(image: str, side: int) -> Image.Image:
    """An image file, upright and at most `side` pixels long and wide. Gradio names uploads by their content."""
    picture = load_image(image)
    picture.thumbnail((side, side))
    return picture


def data_url(picture: Image.Image) -> str:
    """A picture as the `src` of an HTML image."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(ranking: Ranking) -> list[tuple[Image.Image, str]]:
    """The first images with their captions: rank, score, name."""
    rows = zip(ranking.images[:NUM_SHOWN], ranking.scores.tolist(), strict=False)
    return [
        (thumbnail(image, GALLERY_SIDE), f"{place}.  {score:.4f}  {Path(image).name}")
        for place, (image, score) in enumerate(rows, 1)
    ]


def summary(model: Model, ranking: Ranking) -> str:
    """The head of a model's column, in HTML: what it is, and what it did not read or the page does not show."""
    lines = [f"reads up to {ranking.max_length} tokens"]
    notes = []
    if ranking.text_was_cut:
        notes.append(f"The description is longer: it was cut at {ranking.max_length} tokens, the rest was not read.")
    if ranking.num_cut_sentences:
        sentences = "sentence" if ranking.num_cut_sentences == 1 else "sentences"
        notes.append(f"{ranking.num_cut_sentences} {sentences} of it, taken alone, had to be cut there as well.")
    if len(ranking.images) > NUM_SHOWN:
        lines.append(f"the first {NUM_SHOWN} of {len(ranking.images)} pictures are shown")
    return f'<div class="model"><h2>{html.escape(model.name)}</h2><p>{"; ".join(lines)}</p></div>{notice(notes)}'


def notice(lines: Sequence[str]) -> str:
    """Lines that should be seen, in HTML; nothing if there are none."""
    if not lines:
        return ""
    return f'<div class="notice">{"".join(f"<p>{html.escape(line)}</p>" for line in lines)}</div>'


def sentence_table(ranking: Ranking) -> str:
    """
    Each sentence alone against each image, in HTML.

    The images stand in their order, and on top the sentences that speak most for the first one.
    """
    evidence = sentence_evidence(ranking)
    largest = max(float(evidence[:, :NUM_SHOWN].abs().max()), 1e-6) if len(evidence) else 1.0

    def cells(scores: torch.Tensor, differences: torch.Tensor, coloured: bool) -> str:
        parts = []
        for score, difference in zip(scores[:NUM_SHOWN].tolist(), differences[:NUM_SHOWN].tolist(), strict=True):
            strength = 0.6 * abs(difference) / largest if coloured else 0
            colour = "37, 99, 235" if difference > 0 else "234, 88, 12"  # blue for, orange against
            style = f"background: rgba({colour}, {strength:.2f})"
            parts.append(f'<td style="{style}">{score:.4f}<small>{difference:+.4f}</small></td>')
        return "".join(parts)

    head = "".join(
        f'<th title="{html.escape(Path(image).name)}"><img alt="" src="{data_url(thumbnail(image, TABLE_SIDE))}">'
        f"{place}</th>"
        for place, image in enumerate(ranking.images[:NUM_SHOWN], 1)
    )
    whole = cells(ranking.scores, ranking.scores - ranking.scores.mean(), coloured=False)
    rows = [f'<tr class="whole"><th>the whole description</th>{whole}</tr>']
    for index in torch.sort(evidence[:, 0], descending=True, stable=True).indices.tolist():
        scores = cells(ranking.sentence_scores[index], evidence[index], coloured=True)
        rows.append(f"<tr><th>{html.escape(ranking.sentences[index])}</th>{scores}</tr>")
    legend = (
        "Each sentence alone against each picture: its score, and below how far that is from the sentence's mean over "
        "all pictures. Blue speaks for the picture, orange against it. On top: what speaks most for the first picture."
    )
    if len(ranking.sentences) == MAX_SENTENCES:
        legend += f" No more than {MAX_SENTENCES} sentences are taken apart; the whole description has all of them."
    return (
        f'<div class="sentences"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'</div><p class="legend">{legend}</p>'
    )


def draw_examples(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Draws Scenes of the held-out split in a folder; returns the files and descriptions of some of them."""
    scenes = [scene(index, split="test") for index in range(NUM_EXAMPLES)]
    files = []
    for number, one in enumerate(scenes, 1):
        files.append(str(Path(folder) / f"shapes-{number}.png"))
        render(one, 256).save(files[-1])
    return files, [long_captions(scenes[0])[0], long_captions(scenes[6])[0], short_caption(scenes[0])]


def build(models: Sequence[Model], examples: tuple[list[str], list[str]] = ([], [])) -> gr.Blocks:
    """
    The page.

    Args:
        models (`Sequence[Model]`): one model, or several to compare side by side.
        examples (`tuple`, *optional*): image files that are there at the start, and descriptions to choose from.

    Returns:
        `gr.Blocks`: the app, to be launched with `STYLE` and `THEME`.
    """
    pictures, descriptions = examples

    def show(images: list[tuple[str, str | None]] | None, text: str, progress: gr.Progress = gr.Progress()) -> list:  # noqa: B008
        try:
            rankings, skipped = rank(models, [image for image, _ in images or []], text or "", progress)
        except ValueError as error:
            return [notice([str(error)]), *["", [], ""] * len(models)]
        left_out = [f"Left out, as it cannot be read: {Path(image).name} ({why})" for image, why in skipped.items()]
        columns = [
            (summary(model, ranking), gallery(ranking), sentence_table(ranking))
            for model, ranking in zip(models, rankings, strict=True)
        ]
        return [notice(left_out), *(part for column in columns for part in column)]

    with gr.Blocks(
        title="LoTLIP: pictures by long descriptions",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, 24 * 3600),  # uploads, in seconds
    ) as page:
        gr.Markdown(
            "# Find a picture by a long description\n"
            "Drop pictures, describe one of them in as many sentences as you like, and see them ranked, with what "
            "each sentence says for and against each of them."
        )
        with gr.Row():
            images = gr.Gallery(
                pictures or None,
                label="Pictures",
                show_label=False,
                type="filepath",
                file_types=["image"],
                sources=["upload"],
                interactive=True,
                height=280,
                object_fit="contain",
                elem_id="pictures",
            )
            with gr.Column():
                text = gr.Textbox(
                    descriptions[0] if descriptions else "",
                    label="Description",
                    placeholder="A ginger cat looks into the camera. Its fur has dark stripes. ...",
                    lines=6,
                    max_lines=12,
                    elem_id="description",
                )
                button = gr.Button("Rank the pictures", variant="primary", elem_id="rank")
        chosen = None
        if descriptions:
            chosen = gr.Examples(
                [[one] for one in descriptions],
                [text],
                label="Descriptions of the pictures drawn for the start",
                cache_examples=False,
            )
        outputs: list[Any] = [gr.HTML(elem_id="message")]
        with gr.Row():
            for number in range(1, len(models) + 1):
                with gr.Column(elem_id=f"model-{number}"):
                    outputs.append(gr.HTML())
                    outputs.append(
                        gr.Gallery(
                            show_label=False,
                            height="auto",
                            object_fit="contain",
                            interactive=False,
                            buttons=["fullscreen"],
                            elem_classes="ranked",
                        )
                    )
                    outputs.append(gr.HTML())
        # One at a time, whatever started it: the models and what they have embedded are shared.
        run: dict[str, Any] = {"fn": show, "inputs": [images, text], "outputs": outputs, "concurrency_id": "rank"}
        gr.on([button.click, text.submit, *([page.load] if pictures else [])], **run, api_name="rank")
        if chosen is not None:
            chosen.load_input_event.then(**run, api_visibility="private")
    return page


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=os.environ.get("LOTLIP_MODEL"), help="checkpoint folder or Hub id")
    parser.add_argument("--compare", default=os.environ.get("LOTLIP_COMPARE"), help="another one, to show beside it")
    parser.add_argument("--port", type=int, help="port to serve on; by default the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="make a public link, through gradio's servers")
    arguments = parser.parse_args(argv)
    if not arguments.model:
        parser.error("name a checkpoint, with --model or, on a Space, in the variable LOTLIP_MODEL")
    if arguments.port is not None and not 0 < arguments.port < 65536:
        parser.error(f"--port {arguments.port}: expected a number from 1 to 65535")
    return arguments


@printable_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Loads the models and serves the page until it is interrupted."""
    arguments = parse_arguments(argv)
    try:
        models = [load(name) for name in (arguments.model, arguments.compare) if name]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {printable_lines(error)}") from error
    with tempfile.TemporaryDirectory() as folder:
        page = build(models, draw_examples(folder))
        try:
            page.launch(server_port=arguments.port, share=arguments.share, ssr_mode=False, css=STYLE, theme=THEME)
        except OSError as error:
            raise SystemExit(f"error: the page cannot be served; try another --port ({error})") from error


if __name__ == "__main__":
    main()
