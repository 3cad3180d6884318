"""Draws explanations: a web page that loads nothing from elsewhere, and pictures."""

import base64
import hashlib
import html
import io
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .explain import Attention, ExplainedSentence, ExplainedWord, Explanation
from .files import all_or_nothing, check_output, printable, replacing
from .grid import font

BLUE, RED, ORANGE = (0, 90, 200), (214, 39, 40), (230, 159, 0)
COLD, HOT = np.array([255, 210, 0, 0]), np.array([225, 0, 80, 200])  # red, green, blue and opacity of heat 0 and 1
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202020; background: #fff; margin: 1.5em auto; padding: 0 1.2em;
    max-width: 1500px; }
h1 { font-size: 1.4em; margin: 0; }
h2 { font-size: 1.15em; margin: 0; overflow-wrap: anywhere; }
.note { color: #595959; margin: 0.2em 0 1em; }
.panels { --share: calc((100% - (var(--columns) - 1) * 2.5em) / var(--columns)); display: grid; gap: 2.5em;
    grid-template-columns: repeat(auto-fit, minmax(max(min(100%, 440px), var(--share)), 1fr)); }
.panel { min-width: 0; }
figure { margin: 0.5em 0 1em; position: sticky; top: 0; z-index: 1; background: #fff; padding: 0.4em 0;
    border-bottom: 1px solid #d8d8d8; }
.picture { position: relative; overflow: hidden; width: min(100%, var(--aspect) * min(46vh, 420px)); }
.picture > img:first-child { display: block; width: 100%; }
.seen { position: absolute; box-shadow: 0 0 0 2000px rgba(255, 255, 255, 0.6); }
.heat { width: 100%; height: 100%; display: block; }
.heat[hidden] { display: none; }
figcaption { min-height: 1.5em; color: #595959; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.cut { background: #fff3d6; border-left: 4px solid #e69f00; padding: 0.4em 0.8em; margin: 0 0 1em; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 400; color: #595959; font-size: 13px; vertical-align: bottom; }
td, th { padding: 0.25em 0.5em; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; border-radius: 3px; white-space: nowrap; }
td:last-child { overflow-wrap: anywhere; }
tbody tr { border-top: 1px solid #ececec; }
[data-heat] { cursor: pointer; }
.word { border-radius: 3px; padding: 1px 1px; }
s.word { color: #767676; }
tr.active { background: #f0f3f7; }
.word.active, [data-heat]:focus-visible { outline: 2px solid #202020; outline-offset: 0; }
details { margin-top: 1em; }
summary { cursor: pointer; }
h3 { font-size: 1em; margin: 0.8em 0 0; }
h3 small { font-weight: 400; color: #595959; }
p.attention { margin: 0.2em 0; overflow-wrap: anywhere; }
.key { border-radius: 3px; padding: 1px 4px; }
"""
SCRIPT = """
const idle = "Point at a sentence or word to see where it is.";
let kept = null;
function show(chosen) {
  for (const panel of document.querySelectorAll(".panel")) {
    for (const one of panel.querySelectorAll(".active")) one.classList.remove("active");
    const found = chosen && panel.querySelector(`[data-key="${chosen.dataset.key}"]`);
    const heat = panel.querySelector(".heat"), caption = panel.querySelector("figcaption");
    heat.hidden = !found;
    caption.textContent = found ? found.dataset.label : idle;
    if (found) {
      heat.src = "data:image/png;base64," + found.dataset.heat;
      found.classList.add("active");
    }
  }
}
const target = (event) => event.target.closest && event.target.closest("[data-heat]");
document.addEventListener("mouseover", (event) => show(target(event) || kept));
document.addEventListener("focusin", (event) => show(target(event) || kept));
document.addEventListener("focusout", () => show(kept));
document.addEventListener("click", (event) => {
  kept = target(event) === kept ? null : target(event);
  show(kept);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") show(kept = null);
  if (event.key === "Enter" && target(event)) target(event).click();
});
const keyed = [...document.querySelectorAll("[data-key]")];
kept = keyed.find((one) => one.dataset.key === location.hash.slice(1)) || null; // page.html#0-s1: the second sentence
show(kept);
"""


def write_page(explanations: Sequence[Explanation], file: str | os.PathLike) -> None:
    """
    Writes a page with explanations side by side, and replaces an existing file.

    Args:
        explanations (`Sequence[Explanation]`): Explanations, of two images or of two models, for example.
        file (`str` or `os.PathLike`): File of HTML to write.

    Raises:
        `OSError`: If the file cannot be written; see [`~lotlip_hf.files.check_output`].
    """
    check_output(file, overwrite=True)
    with replacing(Path(file)) as output:
        output.write(page(explanations).encode())


def page(explanations: Sequence[Explanation]) -> str:
    """
    Returns the page of [`write_page`], which loads nothing and runs only its own script.

    Args:
        explanations (`Sequence[Explanation]`): Explanations.

    Returns:
        `str`: The page as HTML.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    texts = list(dict.fromkeys(one.text for one in explanations))
    panels = [_panel(one, texts.index(one.text)) for one in explanations]
    blue, red = (f"background: rgba{(*colour, 0.5)}" for colour in (BLUE, RED))
    legend = (
        f'The picture <span class="key" style="{blue}">supports</span> or <span class="key" style="{red}">contradicts'
        "</span> a word. The strongest word of a text has the full colour. Score: cosine of the picture and the "
        "sentence alone. Lost without: score of the whole text minus the score of the text without the sentence. "
        "Point at a sentence or word, or reach it with Tab, for its number and its heat map; a click or Enter keeps "
        "the map until Escape."
    )
    if any(max(*one.seen[:2], 1 - one.seen[2], 1 - one.seen[3]) > 0.01 for one in explanations):
        legend += " The model does not see pale margins."
    # Models below each other, if each has several pictures.
    columns = sum(one.model == explanations[0].model for one in explanations)
    columns = columns if columns > 1 else max(1, len(explanations))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">"
        f"<title>What the model sees</title><style>{STYLE}</style></head>\n<body><h1>What the model sees</h1>"
        f'<p class="note">{legend}</p><div class="panels" style="--columns: {columns}">{"".join(panels)}</div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def save_pictures(explanations: Sequence[Explanation], folder: str | os.PathLike) -> list[Path]:
    """
    Writes a PNG file for each explanation: see [`draw`].

    Args:
        explanations (`Sequence[Explanation]`): Explanations.
        folder (`str` or `os.PathLike`): Folder to create, which may exist if it is empty.

    Returns:
        `list[Path]`: The files, named by number, image and model, such as `1-cat-checkpoint.png`.

    Raises:
        `OSError`: If the folder is not empty or cannot be written.
    """
    check_output(folder, folder=True)
    names = [
        f"{number}-{_file_name(Path(one.image).stem)}-{_file_name(one.model)}.png"
        for number, one in enumerate(explanations, 1)
    ]
    with all_or_nothing(Path(folder)) as partial:
        partial.mkdir()
        for one, name in zip(explanations, names, strict=True):
            draw(one).save(partial / name)
    return [Path(folder) / name for name in names]


def draw(explanation: Explanation) -> Image.Image:
    """
    Draws an explanation: the text with coloured words, the picture, and the heat map of each sentence.

    Args:
        explanation (`Explanation`): Explanation.

    Returns:
        `PIL.Image.Image`: The picture.
    """
    side, margin, line, columns = 270, 20, 26, 4
    width = columns * (side + margin) + margin
    title_font, text_font, small_font = font(20), font(16), font(14)
    parts = list(_laid_out(explanation, text_font, margin, width - margin))
    first = margin + 40 + line * (1 + max([0, *(row for _, row, *_ in parts)])) + margin
    lines = [textwrap.wrap(printable(one.text), 36, max_lines=4) for one in explanation.sentences]
    cells = [("the whole text", f"score {explanation.score:.3f}", None)] + [
        ("\n".join(wrapped), f"score {one.score:.3f}   {_lost(one)}", one.heat)
        for wrapped, one in zip(lines, explanation.sentences, strict=True)
    ]
    scale = side / max(explanation.picture.size)
    size = tuple(max(1, round(scale * one)) for one in explanation.picture.size)
    picture = explanation.picture.resize(size, Image.Resampling.LANCZOS)
    below = 30 + 20 * max([1, *map(len, lines)])
    height = picture.height + below + margin
    canvas = Image.new("RGB", (width, first + -(-len(cells) // columns) * height), "white")
    pen = ImageDraw.Draw(canvas)
    title = f"{explanation.model}   {explanation.image}   score {explanation.score:.3f}"
    if explanation.num_cut:
        title += f"   {explanation.num_cut} words beyond {explanation.max_length} tokens are cut"
    pen.text((margin, margin), printable(title), "#202020", title_font)
    for left, row, part, colour, background in parts:
        top = margin + 40 + line * row
        pen.rectangle((left, top, left + text_font.getlength(part), top + line - 5), background)
        pen.text((left, top), part, colour, text_font)
    for number, (label, numbers, heat) in enumerate(cells):
        x, y = margin + number % columns * (side + margin), first + number // columns * height
        canvas.paste(_overlaid(picture, heat, explanation.seen), (x, y))
        pen.text((x, y + picture.height + 6), numbers, "#202020", small_font)
        pen.multiline_text((x, y + picture.height + 27), label, "#595959", small_font)
    return canvas


def _laid_out(
    explanation: Explanation, text_font: ImageFont.FreeTypeFont | ImageFont.ImageFont, start: float, end: float
) -> Iterator[tuple[float, int, str, str, tuple[int, int, int]]]:
    """Parts of the text in lines: their left edge, line, text, colour and background."""
    largest, left, row = _largest(explanation), start, 0
    for piece, word in _pieces(explanation, 0, len(explanation.text)):
        colour = "#a0a0a0" if word is not None and word.is_cut else "#202020"
        background = (255, 255, 255) if word is None or word.is_cut else _mixed(word.value / largest)
        for part in re.findall(r"\s+|\S+", printable(re.sub(r"\s", " ", piece))):
            wide = text_font.getlength(part)
            if left + wide > end and left > start:
                left, row = start, row + 1
                if part.isspace():
                    continue
            yield left, row, part, colour, background
            left += wide


def _largest(explanation: Explanation) -> float:
    """The largest absolute value of a word, which has the full colour."""
    return max([1e-9, *(abs(word.value) for word in explanation.words)])


def _panel(explanation: Explanation, text: int) -> str:
    largest = _largest(explanation)
    left, top, right, bottom = explanation.seen
    aspect = explanation.picture.width / explanation.picture.height
    place = f"left: {left:.1%}; top: {top:.1%}; width: {right - left:.1%}; height: {bottom - top:.1%}"
    cut = ""
    if explanation.num_cut:
        cut = (
            f'<p class="cut">The model reads {explanation.max_length} tokens. The last {explanation.num_cut} of '
            f"{len(explanation.words)} words are cut.</p>"
        )
    changes = max([1e-9, *(abs(one.lost or 0) for one in explanation.sentences)])
    rows = []
    for number, one in enumerate(explanation.sentences):
        lost = "" if one.lost is None else _signed(one.lost)
        words = "".join(
            _word(explanation, piece, word, text, largest) for piece, word in _pieces(explanation, one.start, one.end)
        )
        label = ", ".join(filter(None, [f"score {one.score:.3f}", _lost(one), one.text]))
        rows.append(
            f'<tr tabindex="0" {_heat(f"{text}-s{number}", label, one.heat)}>'
            f'<td class="number">{one.score:.3f}</td>'
            f'<td class="number" style="{_shade((one.lost or 0) / changes)}">{lost}</td>'
            f'<td dir="auto">{words}</td></tr>'
        )
    return (
        f'<section class="panel"><h2>{_text(explanation.model)}</h2>'
        f'<p class="note">{_text(explanation.image)}, score of the whole text <b>{explanation.score:.3f}</b></p>'
        f'<figure><div class="picture" style="--aspect: {aspect:.4f}">'
        f'<img alt="{_text(explanation.image)}" src="data:image/jpeg;base64,{_encoded(explanation.picture, "JPEG")}">'
        f'<div class="seen" style="{place}"><img class="heat" alt="" hidden>'
        f"</div></div><figcaption></figcaption></figure>{cut}"
        "<table><thead><tr><th>score</th><th>lost without</th><th>sentence</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        "<details><summary>What the text's tokens attend to (last layer, mean over heads)</summary>"
        f"{''.join(_attention(explanation, one) for one in explanation.attentions)}</details></section>"
    )


def _word(explanation: Explanation, piece: str, word: ExplainedWord | None, text: int, largest: float) -> str:
    if word is None:
        return _text(piece)
    key = f"{text}-w{explanation.words.index(word)}"
    said = f"cut: beyond {explanation.max_length} tokens" if word.is_cut else f"{word.value:+.2g}"
    tag = "s" if word.is_cut else "span"
    label = f"{piece}: {said}"
    return (
        f'<{tag} class="word" tabindex="0" title="{said}" style="{_shade(word.value / largest)}" '
        f"{_heat(key, label, word.heat)}>{_text(piece)}</{tag}>"
    )


def _attention(explanation: Explanation, attention: Attention) -> str:
    largest = max([1e-9, *attention.values])
    values = dict(zip((word.start for word in explanation.words), attention.values, strict=True))
    parts = []
    for piece, word in _pieces(explanation, 0, len(explanation.text)):
        if word is None:
            parts.append(_text(piece))
            continue
        value, tag = values[word.start], "s" if word.is_cut else "span"
        style = f"background: rgba{(*ORANGE, round(0.9 * value / largest, 2))}"
        parts.append(f'<{tag} class="word" title="{value:.1%}" style="{style}">{_text(piece)}</{tag}>')
    return (
        f"<h3>{_text(attention.token)} <small>{attention.rest:.0%} to other tokens</small></h3>"
        f'<p class="attention" dir="auto">{"".join(parts)}</p>'
    )


def _pieces(explanation: Explanation, start: int, end: int) -> Iterator[tuple[str, ExplainedWord | None]]:
    """The words of a part of the text, and what is between them."""
    for word in explanation.words:
        if start <= word.start < end:
            yield explanation.text[start : word.start], None
            yield explanation.text[word.start : word.end], word
            start = word.end
    yield explanation.text[start:end], None


def _lost(sentence: ExplainedSentence) -> str:
    return "" if sentence.lost is None else f"lost without {_signed(sentence.lost)}"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # not -0.000


def _heat(key: str, label: str, heat: Tensor) -> str:
    """Attributes of an element that shows a heat map."""
    return f'data-key="{key}" data-label="{_text(label)}" data-heat="{_encoded(_coloured(heat), "PNG")}"'


def _coloured(heat: Tensor) -> Image.Image:
    """[h, w] in [0, 1] -> a picture of w x h pixels, which is transparent where the heat is 0."""
    return Image.fromarray(np.rint(COLD + heat.numpy()[..., None] * (HOT - COLD)).astype(np.uint8))


def _overlaid(picture: Image.Image, heat: Tensor | None, seen: tuple[float, float, float, float]) -> Image.Image:
    """The picture under a heat map on the part that the model sees, and pale elsewhere."""
    left, top, right, bottom = (round(one * side) for one, side in zip(seen, 2 * picture.size, strict=True))
    right, bottom = max(left + 1, right), max(top + 1, bottom)
    covered = Image.new("RGBA", picture.size, (255, 255, 255, 153))  # as `.seen` of the page
    large = Image.new("RGBA", (right - left, bottom - top))
    if heat is not None:
        large = _coloured(heat).resize(large.size, Image.Resampling.BILINEAR)
    covered.paste(large, (left, top))
    return Image.alpha_composite(picture.convert("RGBA"), covered).convert("RGB")


def _encoded(picture: Image.Image, kind: str) -> str:
    content = io.BytesIO()
    picture.save(content, kind, quality=88)
    return base64.b64encode(content.getvalue()).decode()


def _shade(value: float) -> str:
    """The background of a value from -1 (red) to 1 (blue)."""
    return f"background: rgba{(*(BLUE if value > 0 else RED), round(0.7 * abs(value), 2))}"


def _mixed(value: float) -> tuple[int, int, int]:
    """The colour of `_shade` on white."""
    weight, colour = 0.7 * abs(value), BLUE if value > 0 else RED
    red, green, blue = (round(255 + weight * (one - 255)) for one in colour)
    return red, green, blue


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "x"


def _text(value: str) -> str:
    """Escapes a text; white space becomes spaces."""
    return html.escape(printable(re.sub(r"\s", " ", value)))
