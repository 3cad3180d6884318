"""The page of a run's outcome: tables of recalls, and held-out pictures as their captions rank them."""

import base64
import html
import io
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from datasets import Dataset

from ..data.record import Record
from ..encoder import Encoder
from ..evaluation.retrieval import ranks
from ..files import printable
from ..images import Background, ImageError, ImageSource, image_source, load_image
from .config import TrainingConfig
from .data import intact_texts
from .validation import whole_captions

# Examples of a group, ranked pictures of an example, side of a thumbnail in pixels, characters of a shown caption
EXAMPLES, TOP, SIDE, CAPTION = 5, 5, 144, 600
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; margin: 2em auto; max-width: 1040px; padding: 0 1em; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
th, td { padding: 0.25em 0.8em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead tr:last-child th { border-bottom: 1px solid #808080; }
tbody tr:first-child { font-weight: 600; }
.warning { background: #fff3d6; border-left: 4px solid #e69f00; padding: 0.5em 1em; }
.example { border-top: 1px solid #d8d8d8; padding: 1em 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-end; }
figure { margin: 0; width: 152px; text-align: center; font-size: 13px; color: #606060; }
figure img { border: 3px solid #e8e8e8; }
.query { margin-right: 22px; }
.right img { border-color: #009e73; }
.caption { margin: 0 0 0.6em; overflow-wrap: anywhere; }
"""


class Table(NamedTuple):
    """A title, two rows of column titles, and rows of cells."""

    title: str
    head: list[list[str]]
    body: list[list[str]]


class _Example(NamedTuple):
    """A caption, the rank of its picture, and the pictures ranked first, as indices with their similarities."""

    index: int
    rank: float
    top: list[tuple[int, float]]


class _Pairs:
    """The ids, long captions and pictures of N intact records. Each thumbnail is made once."""

    def __init__(self, records: Dataset | Sequence[Record], config: TrainingConfig, background: Background) -> None:
        intact = dict(intact_texts(records))
        draw, rngs = whole_captions(config), [Random(0)] * len(intact)
        self.records, self.indices, self.background = records, [*intact], background
        self.ids = [record["id"] for record in intact.values()]
        self.captions = [texts.long[0] for texts in draw([*intact.values()], rngs)]
        self.thumbnails: dict[int, str] = {}

    def image(self, number: int) -> ImageSource:
        return image_source(self.records[self.indices[number]]["image"]).source

    def figure(self, number: int, note: str, name: str) -> str:
        """Returns a picture of at most `SIDE` pixels as JPEG within the page, with a note below."""
        if number not in self.thumbnails:
            picture = load_image(self.image(number), background=self.background)
            picture.thumbnail((SIDE, SIDE))
            content = io.BytesIO()
            picture.save(content, "JPEG", quality=80)
            self.thumbnails[number] = base64.b64encode(content.getvalue()).decode()
        record = _text(self.ids[number])
        return (
            f'<figure class="{name}"><img src="data:image/jpeg;base64,{self.thumbnails[number]}" alt="{record}" '
            f'title="{record}"><figcaption>{note}</figcaption></figure>'
        )


def ranked_page(
    tables: Sequence[Table],
    warning: str | None,
    encoder: Encoder,
    records: Dataset | Sequence[Record],
    config: TrainingConfig,
) -> str:
    """Returns a page of HTML, which loads nothing and runs nothing."""
    parts = [] if warning is None else [f'<p class="warning">{_text(warning)}</p>']
    for title, (groups, names), body in tables:
        titles = "".join(f'<th colspan="{groups.count(name)}">{_text(name)}</th>' for name in dict.fromkeys(groups))
        parts += [f"<h2>{_text(title)}</h2>", f"<table><thead><tr>{titles}</tr>", _row(names, "th")]
        parts += ["</thead><tbody>", *(_row(cells, "td") for cells in body), "</tbody></table>"]
    pairs = _Pairs(records, config, encoder.engine.background)
    parts.append(
        f"<h2>Held-out pictures by their long captions</h2><p>Each caption ranks {len(pairs.ids):,} pictures. Its own "
        f"picture is on the left, and has a green frame if it is among the first {TOP}. Under a picture is its "
        "similarity.</p>"
    )
    for title, examples in _examples(encoder, pairs).items():
        parts += [f"<h3>{title}</h3>", *(_shown(example, pairs) for example in examples)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>Outcome of the training</title><style>{STYLE}</style></head>\n"
        "<body><h1>Outcome of the training</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _examples(encoder: Encoder, pairs: _Pairs) -> dict[str, list[_Example]]:
    """Chooses examples of each group by the rank of a caption's picture among the readable pictures."""
    read = {
        index: embedding
        for index, embedding in encoder.iterate_images(map(pairs.image, range(len(pairs.ids))))
        if not isinstance(embedding, ImageError)
    }
    if not read:
        return {}
    kept = sorted(read)
    images = torch.stack([read[index] for index in kept])
    texts = encoder.encode_texts([pairs.captions[index] for index in kept], progress=False)
    found = ranks(images, texts).text_to_image.tolist()
    order = sorted(range(len(kept)), key=found.__getitem__)
    first = [row for row in order if found[row] < 2]
    near = [row for row in order if 2 <= found[row] <= 10]
    far = [row for row in reversed(order) if found[row] > 10]
    # spread over the records, not the first ones
    spread = [Random(0).sample(rows, min(EXAMPLES, len(rows))) for rows in (first, near)]
    titles = ("Found first", "Nearly found (2nd to 10th)", "Farthest from their picture")
    chosen: dict[str, list[_Example]] = {}
    for title, rows in zip(titles, (*spread, far[:EXAMPLES]), strict=True):
        for row in rows:
            top = (images @ texts[row]).topk(min(TOP, len(kept)))
            listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            example = _Example(kept[row], found[row], [(kept[each], score) for each, score in listed])
            chosen.setdefault(title, []).append(example)
    return chosen


def _shown(example: _Example, pairs: _Pairs) -> str:
    figures = [pairs.figure(example.index, f"rank {example.rank:g}", "query")]
    for index, score in example.top:
        figures.append(pairs.figure(index, f"{score:.3f}", "right" if index == example.index else ""))
    caption = pairs.captions[example.index]
    caption = caption if len(caption) <= CAPTION else f"{caption[:CAPTION]}..."
    return (
        f'<div class="example"><p class="caption" dir="auto">{_text(caption)}</p>'
        f'<div class="pictures">{"".join(figures)}</div></div>'
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(value: str) -> str:
    """Escapes a text; white space becomes one space."""
    return html.escape(printable(" ".join(value.split())))
