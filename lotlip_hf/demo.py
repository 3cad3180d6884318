"""The page of `lotlip demo` and of the Space, which ranks pictures by a description and explains the ranking."""

import base64
import hashlib
import html
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from .data.sentences import split_sentences
from .encoder import Encoder
from .explain import explain
from .explain_page import page as explanation_page
from .images import ImageError, load_image, read_image_bytes
from .scenes.dataset import long_captions, render, scene, short_caption
from .search import ImageIndex

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The page needs gradio: pip install 'lotlip-hf[space]'") from error

MAX_IMAGES = 1000
MAX_SENTENCES = 50
NUM_SHOWN = 24  # ranked pictures on the page
CACHE_SIZE = 10_000  # embeddings to keep per model; at least `MAX_IMAGES`
GALLERY_SIDE, TABLE_SIDE = 400, 96  # longest side of pictures in pixels, in the gallery and in the table
# Two groups of four scenes with the same large shape, so that only a long description distinguishes them.
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
.explanation { width: 100%; height: 900px; border: 1px solid #d8d8d8; border-radius: 4px; }
.legend { margin: 6px 0 0 0; font-size: 13px; opacity: 0.75; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Photos(NamedTuple):
    """
    Embedded images.

    Args:
        files (`list[str]`): N image files.
        embeds (`torch.Tensor`): Their embeddings [N, P].
    """

    files: list[str]
    embeds: torch.Tensor


@dataclass
class Model:
    """
    A dual encoder with the images of a folder, or with a cache of embeddings of dropped images.

    Args:
        name (`str`): Name on the page.
        encoder (`Encoder`): The dual encoder.
        embeddings (`dict[str, torch.Tensor]`, *optional*): Embeddings [P] by the digest of the image file, from the
            least to the most recently used.
        photos (`Photos`, *optional*): Images of a folder, from [`indexed`].
    """

    name: str
    encoder: Encoder
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    photos: Photos | None = None


@dataclass(frozen=True)
class Ranking:
    """
    The ranking of N images by one model, for a text with S sentences.

    Args:
        images (`list[str]`): Image files, the best first.
        scores (`torch.Tensor`): Cosine similarities of the images and the whole text, of shape [N].
        sentences (`list[str]`): Sentences of the text in their order, at most `MAX_SENTENCES`.
        sentence_scores (`torch.Tensor`): Cosine similarities of each sentence and each image, of shape [S, N].
        max_length (`int`): Maximum length of a text in tokens.
        text_was_cut (`bool`): Whether the whole text exceeds the maximum length.
        num_cut_sentences (`int`): Number of sentences that exceed the maximum length.
    """

    images: list[str]
    scores: torch.Tensor
    sentences: list[str]
    sentence_scores: torch.Tensor
    max_length: int
    text_was_cut: bool
    num_cut_sentences: int


def shown_name(name: str) -> str:
    """Returns the Hub id of a model, or the last part of its folder's path: a page does not show the others."""
    return Path(name).resolve().name if os.path.isdir(name) else name


def indexed(index: ImageIndex) -> Photos:
    """Loads the embeddings of an index into memory."""
    with index.store as store:
        return Photos(
            [str(index.folder / name) for name in index.files], torch.from_numpy(store.vectors(index.locations))
        )


def rank(
    models: Sequence[Model],
    images: Sequence[str],
    text: str,
    progress: Callable[..., Any] | None = None,
) -> tuple[list[Ranking], dict[str, str]]:
    """
    Ranks images by a text with each model: those of the model's folder, or else those that are given.

    Args:
        models (`Sequence[Model]`): The models.
        images (`Sequence[str]`): Image files; not read if the models have `photos`. Their embeddings are cached, so
            that only the first text takes long.
        text (`str`): The description.
        progress (`Callable`, *optional*): A `gradio.Progress`, called for each image.

    Returns:
        `tuple`: A list with one [`Ranking`] per model, and the reason for each image file that cannot be read.

    Raises:
        `ValueError`: If there is no text, no readable image, or more than `MAX_IMAGES` images.
    """
    found, skipped = [model.photos for model in models if model.photos is not None], {}
    if not found and not images:
        raise ValueError("There are no pictures. Drop one or more.")
    if not text.strip():
        raise ValueError("There is no description. Type one.")
    if not found:
        found, skipped = embed_all(models, list(dict.fromkeys(images)), progress)
    sentences = split_sentences(text)[:MAX_SENTENCES]
    return [rank_one(model, photos, text, sentences) for model, photos in zip(models, found, strict=True)], skipped


def embed_all(
    models: Sequence[Model], images: Sequence[str], progress: Callable[..., Any] | None = None
) -> tuple[list[Photos], dict[str, str]]:
    """
    Embeds images with each model.

    Args:
        models (`Sequence[Model]`): The models. Updates their `embeddings`.
        images (`Sequence[str]`): Image files.
        progress (`Callable`, *optional*): See [`rank`].

    Returns:
        `tuple`: The readable images for each model, and the reason for each file that cannot be read.

    Raises:
        `ValueError`: If no image can be read, or if there are more than `MAX_IMAGES`.
    """
    if len(images) > MAX_IMAGES:
        raise ValueError(f"{len(images)} pictures are too many. Drop at most {MAX_IMAGES}.")
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
    rows = [torch.stack([model.embeddings[digest] for digest in digests.values()]) for model in models]
    return [Photos(list(digests), embeds) for embeds in rows], skipped


def embed_images(model: Model, digests: dict[str, str], progress: Callable[..., Any] | None = None) -> dict[str, str]:
    """
    Embeds images that are not yet in the cache of a model.

    Args:
        model (`Model`): The model. Updates `model.embeddings`.
        digests (`dict[str, str]`): The digest of each image file.
        progress (`Callable`, *optional*): See [`rank`].

    Returns:
        `dict[str, str]`: The reason for each file that cannot be read.
    """
    known = model.embeddings
    new = {digest: image for image, digest in digests.items() if digest not in known}
    for digest in digests.values():
        if digest in known:
            known[digest] = known.pop(digest)  # moves it to the end
    reasons = {}
    results = model.encoder.iterate_images(list(new.values()))
    for count, (index, result) in enumerate(results, 1):
        digest = list(new)[index]
        if isinstance(result, ImageError):
            reasons[digest] = result.reason
        else:
            known[digest] = result
        if progress is not None:
            progress((count, len(new)), desc=f"Embedding pictures with {model.name}", unit="pictures")
    while len(known) > CACHE_SIZE:
        del known[next(iter(known))]
    return {image: reasons[digest] for image, digest in digests.items() if digest in reasons}


def rank_one(model: Model, photos: Photos, text: str, sentences: list[str]) -> Ranking:
    """Ranks embedded images with one model."""
    texts = [text, *sentences]
    rows: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    was_cut = [False] * len(texts)
    for index, embedding, cut in model.encoder.iterate_texts(texts):
        rows[index], was_cut[index] = embedding, cut
    scores = torch.stack(rows) @ photos.embeds.T
    # Rounding keeps copies of an image in their order, though their scores may differ in the last bits.
    order = torch.sort(scores[0].mul(1e6).round(), descending=True, stable=True).indices
    return Ranking(
        images=[photos.files[index] for index in order.tolist()],
        scores=scores[0, order],
        sentences=sentences,
        sentence_scores=scores[1:, order],
        max_length=model.encoder.max_text_length,
        text_was_cut=was_cut[0],
        num_cut_sentences=sum(was_cut[1:]),
    )


def sentence_evidence(ranking: Ranking) -> torch.Tensor:
    """
    Returns the evidence of each sentence for each image: its score minus its mean score over all images.

    Args:
        ranking (`Ranking`): A ranking of N images by S sentences.

    Returns:
        `torch.Tensor`: The evidence, of shape [S, N]. A positive value means a better fit than the sentence's average.
    """
    return ranking.sentence_scores - ranking.sentence_scores.mean(dim=1, keepdim=True)


@lru_cache(maxsize=256)
def thumbnail(image: str, side: int) -> Image.Image:
    """
    Loads an image, at most `side` pixels long and wide, or a grey square if the image of a folder is no longer there.
    Gradio names uploads by their content, so caching shows no old ones.
    """
    try:
        picture = load_image(image)
    except ImageError:
        return Image.new("RGB", (side, side), "#808080")
    picture.thumbnail((side, side))
    return picture


def data_url(picture: Image.Image) -> str:
    """Encodes a picture as the `src` of an HTML image."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(ranking: Ranking) -> list[tuple[Image.Image, str]]:
    """Returns the first images with their labels: rank, score, file name."""
    rows = zip(ranking.images[:NUM_SHOWN], ranking.scores.tolist(), strict=False)
    return [
        (thumbnail(image, GALLERY_SIDE), f"{rank}.  {score:.4f}  {Path(image).name}")
        for rank, (image, score) in enumerate(rows, 1)
    ]


def summary(model: Model, ranking: Ranking) -> str:
    """Returns the head of a model's column in HTML, with notes about text that was cut and pictures not shown."""
    lines = [f"reads up to {ranking.max_length} tokens"]
    notes = []
    if ranking.text_was_cut:
        notes.append(f"The description is too long and was cut at {ranking.max_length} tokens.")
    if ranking.num_cut_sentences:
        sentences = "sentence was" if ranking.num_cut_sentences == 1 else "sentences were"
        notes.append(f"{ranking.num_cut_sentences} {sentences} too long and cut at {ranking.max_length} tokens.")
    if len(ranking.images) > NUM_SHOWN:
        lines.append(f"shows the first {NUM_SHOWN} of {len(ranking.images)} pictures")
    return f'<div class="model"><h2>{html.escape(model.name)}</h2><p>{"; ".join(lines)}</p></div>{notice(notes)}'


def notice(lines: Sequence[str]) -> str:
    """Returns a box with lines of text in HTML, or an empty string without lines."""
    if not lines:
        return ""
    return f'<div class="notice">{"".join(f"<p>{html.escape(line)}</p>" for line in lines)}</div>'


def sentence_table(ranking: Ranking) -> str:
    """
    Returns a table of the scores of each sentence and each image in HTML. Columns are in the order of the ranking. The
    first rows are the sentences that fit the first image best.
    """
    evidence = sentence_evidence(ranking)
    largest = max(float(evidence[:, :NUM_SHOWN].abs().max()), 1e-6) if len(evidence) else 1.0

    def cells(scores: torch.Tensor, differences: torch.Tensor, coloured: bool) -> str:
        parts = []
        for score, difference in zip(scores[:NUM_SHOWN].tolist(), differences[:NUM_SHOWN].tolist(), strict=True):
            strength = 0.6 * abs(difference) / largest if coloured else 0
            colour = "37, 99, 235" if difference > 0 else "234, 88, 12"  # blue or orange
            style = f"background: rgba({colour}, {strength:.2f})"
            parts.append(f'<td style="{style}">{score:.4f}<small>{difference:+.4f}</small></td>')
        return "".join(parts)

    head = "".join(
        f'<th title="{html.escape(Path(image).name)}"><img alt="" src="{data_url(thumbnail(image, TABLE_SIDE))}">'
        f"{rank}</th>"
        for rank, image in enumerate(ranking.images[:NUM_SHOWN], 1)
    )
    whole = cells(ranking.scores, ranking.scores - ranking.scores.mean(), coloured=False)
    rows = [f'<tr class="whole"><th>the whole description</th>{whole}</tr>']
    for index in torch.sort(evidence[:, 0], descending=True, stable=True).indices.tolist():
        scores = cells(ranking.sentence_scores[index], evidence[index], coloured=True)
        rows.append(f"<tr><th>{html.escape(ranking.sentences[index])}</th>{scores}</tr>")
    legend = (
        "Each cell shows the score of a sentence and a picture, and below it the difference from the sentence's mean "
        "over all pictures: blue if better, orange if worse. The rows are sorted by the first picture."
    )
    if len(ranking.sentences) == MAX_SENTENCES:
        legend += f" The table shows only the first {MAX_SENTENCES} sentences; the whole description uses all."
    return (
        f'<div class="sentences"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'</div><p class="legend">{legend}</p>'
    )


def explain_first(models: Sequence[Model], images: Sequence[str], text: str) -> tuple[str, list[str]]:
    """
    Explains the picture that the first model ranks first, by each model that is a LoTLIP.

    Args:
        models (`Sequence[Model]`): The models.
        images (`Sequence[str]`): Image files.
        text (`str`): The description.

    Returns:
        `tuple[str, list[str]]`: The page of [`~lotlip_hf.explain_page.page`], or an empty string without a LoTLIP, and
        notes about models that are none.

    Raises:
        `ValueError`: As [`rank`], or if the text has no word or more than `MAX_SENTENCES` sentences.
    """
    if len(split_sentences(text)) > MAX_SENTENCES:
        raise ValueError(f"The description is too long to explain. Use at most {MAX_SENTENCES} sentences.")
    image = rank(models[:1], images, text)[0][0].images[0]
    found, notes = [], []
    for model in models:
        try:
            model.encoder.lotlip()
        except ValueError:
            notes.append(f"{model.name} cannot be explained, because it is not a LoTLIP.")
            continue
        found.append(explain(model.encoder, image, text))
    return explanation_page(found) if found else "", notes


def frame(written: str) -> str:
    """Returns a page of HTML in a frame, in which its script can reach nothing else."""
    if not written:
        return ""
    source = html.escape(written)
    return f'<iframe class="explanation" title="Explanation" sandbox="allow-scripts" srcdoc="{source}"></iframe>'


def draw_examples(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Draws held-out Scenes into a folder. Returns the files, and descriptions of some of them."""
    scenes = [scene(index, split="test") for index in range(NUM_EXAMPLES)]
    files = []
    for number, one in enumerate(scenes, 1):
        files.append(str(Path(folder) / f"shapes-{number}.png"))
        render(one, 256).save(files[-1])
    return files, [long_captions(scenes[0])[0], long_captions(scenes[6])[0], short_caption(scenes[0])]


def build(models: Sequence[Model], examples: tuple[list[str], list[str]] = ([], [])) -> gr.Blocks:
    """
    Builds the page. It has no field to drop pictures if the models have `photos`.

    Args:
        models (`Sequence[Model]`): One model, or several models that are shown side by side.
        examples (`tuple`, *optional*, defaults to `([], [])`): Image files and descriptions that the page starts with.

    Returns:
        `gr.Blocks`: The app, to be launched with `STYLE` and `THEME`.
    """
    pictures, descriptions = examples
    photos = models[0].photos
    given = "Drop pictures" if photos is None else f"The folder has {len(photos.files)} pictures"

    def show(images: list[tuple[str, str | None]] | None, text: str, progress: gr.Progress = gr.Progress()) -> list:  # noqa: B008
        try:
            rankings, skipped = rank(models, [image for image, _ in images or []], text or "", progress)
        except ValueError as error:
            return [notice([str(error)]), *["", [], ""] * len(models), ""]
        left_out = [f"{Path(image).name} cannot be read: {reason}" for image, reason in skipped.items()]
        columns = [
            (summary(model, ranking), gallery(ranking), sentence_table(ranking))
            for model, ranking in zip(models, rankings, strict=True)
        ]
        return [notice(left_out), *(part for column in columns for part in column), ""]

    def show_explanation(images: list[tuple[str, str | None]] | None, text: str) -> tuple[str, str]:
        try:
            written, notes = explain_first(models, [image for image, _ in images or []], text or "")
        except ValueError as error:
            return notice([str(error)]), ""
        return notice(notes), frame(written)

    with gr.Blocks(
        title="LoTLIP: pictures by long descriptions",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, 24 * 3600),  # uploads, in seconds
    ) as page:
        gr.Markdown(
            f"# Find a picture by a long description\n{given}. Describe one of them in several sentences. The page "
            "ranks the pictures and shows how well each sentence fits each picture. It also explains the picture that "
            "the description ranks first: each word, and where it is."
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
                visible=photos is None,
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
                explaining = gr.Button("Explain the first picture", elem_id="explain")
        chosen = None
        if descriptions:
            chosen = gr.Examples(
                [[one] for one in descriptions],
                [text],
                label="Descriptions of the example pictures",
                cache_examples=False,
            )
        outputs: list[Any] = [gr.HTML(elem_id="message")]
        explanation = gr.HTML(elem_id="explanation")  # above the ranking, where it is seen when it comes
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
        outputs.append(explanation)
        # One ranking at a time, because the models and their caches are shared.
        run: dict[str, Any] = {"fn": show, "inputs": [images, text], "outputs": outputs, "concurrency_id": "rank"}
        gr.on([button.click, text.submit, *([page.load] if pictures else [])], **run, api_name="rank")
        explaining.click(
            show_explanation, [images, text], [outputs[0], outputs[-1]], concurrency_id="rank", api_name="explain"
        )
        if chosen is not None:
            chosen.load_input_event.then(**run, api_visibility="private")
    return page


def serve(
    models: Sequence[Model], examples: tuple[list[str], list[str]], port: int | None = None, share: bool = False
) -> None:
    """
    Serves the page until Ctrl-C.

    Args:
        models (`Sequence[Model]`): See [`build`].
        examples (`tuple`): See [`build`].
        port (`int`, *optional*): Port of the page. Defaults to the first free one from 7860.
        share (`bool`, *optional*, defaults to `False`): Whether to create a public link through gradio's servers.

    Raises:
        `OSError`: If the port is taken.
    """
    page = build(models, examples)
    try:
        # Without a link, be quiet: gradio would advise an argument that the command does not have.
        options = {"quiet": not share, "prevent_thread_lock": True, "ssr_mode": False}
        page.launch(server_port=port, share=share, css=STYLE, theme=THEME, **options)
    except OSError as error:
        raise OSError(f"The page cannot be served: {error}. Try another --port.") from error
    if not share:
        print(f"The page is at {page.local_url} (Ctrl-C ends it).", flush=True)
    page.block_thread()
