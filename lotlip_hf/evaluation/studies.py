"""Studies of long texts: retrieval with texts truncated at several lengths, and with one sentence removed."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from ..distributed import rank, world_size
from ..encoder import TEXT_CHUNK, Encoder, warn_of_cut_texts
from ..plots import DIRECTION_COLOURS, DIRECTIONS, figure, save, wrapped
from ..terminal import progress_bar
from .embeddings import UNIT_SIZE, embed_images, embed_texts
from .retrieval import ranks, recalls
from .tasks import RetrievalData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Default limits in tokens. Those above the model's maximum are skipped, and of the long ones those that cut no text.
LIMITS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LONG_LIMITS = (1024, 2048, 4096, 8192)
# Separator of the sentences of a normalised text, at which LoTLIP's tokenizer also splits.
JOINER = ". "

Row = dict[str, Any]


def length_study(
    encoder: Encoder,
    data: RetrievalData,
    limits: Sequence[int] | None = None,
    *,
    digests: Sequence[str] | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """
    Measures R@1 and the FLOPs of the text tower with texts truncated at several limits, as in figure 4 of the LoTLIP
    paper but for one trained model.

    FLOPs are the mean over the texts of one forward pass. PyTorch counts matrix products only, with two FLOPs for a
    multiplication and an addition. Each text is counted at its truncated length without padding, or with padding if
    the model pads every text to a fixed length.

    Args:
        encoder (`Encoder`): The dual encoder.
        data (`RetrievalData`): Images and texts.
        limits (`Sequence[int]`, *optional*): Limits in tokens, special tokens included. Defaults to the model's
            maximum and those of 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096 and 8192 that are below
            it. Of the limits from 1024, only those up to the first that cuts no text.
        digests (`Sequence[str]`, *optional*): Digests of the images, if known from
            [`~lotlip_hf.evaluation.embeddings.image_digests`].
        cache (`str` or `os.PathLike`, *optional*): Folder for the cache of embeddings; see
            [`~lotlip_hf.evaluation.embeddings.embed_texts`].
        batch_size (`int`, *optional*): Number of images, or of texts of maximum length, in a batch. Defaults to 32
            images and 64 texts.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar for the images and one for
            all texts of the study.

    Returns:
        `list[dict]`: A row for each limit, in ascending order, with `max_length`, `image_to_text_r1`,
        `text_to_image_r1` and `texts_cut` (shares from 0 to 1), `mean_tokens`, and `text_flops` (`None` for a model
        that does not run in PyTorch).

    Raises:
        `ValueError`: If a limit is below 3 or above the model's maximum, or if the model uses flash attention, because
            PyTorch does not count its FLOPs.
        `IncompleteDataError`: If images cannot be read; the message names them.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
    >>> from lotlip_hf.evaluation.studies import length_study, plot_length_study

    >>> rows = length_study(load_encoder("checkpoint"), load_benchmark("scenes", num_images=8), limits=[16, 32])
    >>> [row["max_length"] for row in rows]
    [16, 32]
    >>> plot_length_study(rows, "length.png")
    ```
    """
    longest = encoder.max_text_length
    is_default = not limits
    limits = sorted(set(limits or [*(limit for limit in (*LIMITS, *LONG_LIMITS) if limit < longest), longest]))
    if limits[0] < 3 or limits[-1] > longest:
        raise ValueError(f"`limits` is {limits}. Pass values from 3 to {longest}, the model's maximum in tokens.")
    _check_attention(encoder)

    texts = list(data.texts)
    tokenized = [(len(ids), at_end) for ids, at_end in _tokens(encoder, texts, longest)]
    lengths = [length for length, _ in tokenized]
    if is_default:
        short = [limit for limit in limits if limit <= max(LIMITS)]
        long = limits[len(short) :]
        needed = sum(limit < max(lengths) for limit in [*short[-1:], *long])
        limits = short + long[:needed]
    _warn(sum(at_end for _, at_end in tokenized), data, longest)
    # limits are processed in descending order, and each limit only changes the texts that are longer
    changed = {
        limit: [index for index, length in enumerate(lengths) if limit == limits[-1] or length > limit]
        for limit in limits
    }
    settings = {"cache": cache, "batch_size": batch_size or 32, "progress": progress}
    image_embeds = embed_images(encoder, data.images, names=data.image_names, digests=digests, **settings)
    count_flops = _flop_counter(encoder, texts, lengths)
    text_embeds = torch.empty(len(texts), image_embeds.shape[1])
    rows: list[Row] = []
    with _progress_bar(sum(map(len, changed.values())), progress) as bar:
        embed = _embedder(encoder, cache, batch_size, bar)
        for limit in reversed(limits):
            if indices := changed[limit]:
                text_embeds[indices] = embed([texts[index] for index in indices], limit)
            rows.append(
                {
                    "max_length": limit,
                    **recalls(image_embeds, text_embeds, data.text_to_image, ks=[1]),
                    "texts_cut": sum(length > limit or at_end for length, at_end in tokenized) / len(texts),
                    "mean_tokens": sum(min(length, limit) for length in lengths) / len(texts),
                    "text_flops": count_flops(limit),
                }
            )
    return rows[::-1]


def sentence_ablation(
    encoder: Encoder,
    data: RetrievalData,
    max_sentences: int | None = None,
    *,
    digests: Sequence[str] | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """
    Measures the loss in retrieval when sentence k of every text is removed, for k = 1, 2, ...

    Sentences are separated by `". "`, as in the normalised texts of the long-caption benchmarks. Texts with fewer than
    k sentences, or with only one, are not changed. Arguments not listed here are those of [`length_study`].

    Args:
        max_sentences (`int`, *optional*): The last k. Defaults to the largest number of sentences in a text.

    Returns:
        `list[dict]`: A row for the unchanged texts, with `sentence` 0, and a row for each k:

        - `sentence`: k.
        - `num_texts`: Number of texts from which a sentence was removed.
        - `num_read`: Number of these texts in which the sentence is within the model's maximum length.
        - `image_to_text_r1`, `text_to_image_r1` (from 0 to 1), `image_to_text_mean_rank`, `text_to_image_mean_rank`
          (from 1) and `score` (mean cosine of a text and its image), over all images and texts.
        - The same names with `_lost`: Total loss against the unchanged texts, divided by the number of changed texts,
          or for image to text by the number of their images. Positive values are worse, also for ranks. The loss
          includes the effect of changed texts on the ranks of other texts.

    Raises:
        `ValueError`: If no text has two sentences.
        `IncompleteDataError`: If images cannot be read; the message names them.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
    >>> from lotlip_hf.evaluation.studies import plot_sentence_ablation, sentence_ablation

    >>> rows = sentence_ablation(load_encoder("checkpoint"), load_benchmark("scenes", num_images=8), max_sentences=2)
    >>> [row["sentence"] for row in rows]
    [0, 1, 2]
    >>> plot_sentence_ablation(rows, "sentences.png")
    ```
    """
    texts = list(data.texts)
    sentences = [text.split(JOINER) for text in texts]
    most = max(map(len, sentences))
    if most < 2:
        raise ValueError(f"No text of {data.name} has two sentences, separated by {JOINER!r}. Use longer texts.")

    longest = encoder.max_text_length
    most = min(most, max_sentences or most)
    having = {
        k: [index for index, parts in enumerate(sentences) if len(parts) >= max(k, 2)] for k in range(1, most + 1)
    }
    _warn(sum(at_end for _, at_end in _tokens(encoder, texts, longest)), data, longest)
    settings = {"cache": cache, "batch_size": batch_size or 32, "progress": progress}
    image_embeds = embed_images(encoder, data.images, names=data.image_names, digests=digests, **settings)
    text_to_image = torch.as_tensor(data.text_to_image)

    def score(text_embeds: torch.Tensor) -> dict[str, float]:
        image_ranks, text_ranks = ranks(image_embeds, text_embeds, data.text_to_image)
        return {
            **recalls(image_embeds, text_embeds, data.text_to_image, ks=[1]),
            "image_to_text_mean_rank": image_ranks.mean().item(),
            "text_to_image_mean_rank": text_ranks.mean().item(),
            "score": (image_embeds[text_to_image] * text_embeds).sum(1).double().mean().item(),
        }

    total = len(texts) + sum(map(len, having.values()))
    with _progress_bar(total, progress) as bar:
        embed = _embedder(encoder, cache, batch_size, bar)
        whole_embeds = embed(texts, None)
        whole = score(whole_embeds)
        rows: list[Row] = [{"sentence": 0, "num_texts": 0, "num_read": 0, **whole, **_lost(whole, whole, {})}]
        for k, indices in having.items():
            shorter = [JOINER.join(sentences[index][: k - 1] + sentences[index][k:]) for index in indices]
            before = _tokens(encoder, [texts[index] for index in indices], longest)
            after = _tokens(encoder, shorter, longest)
            read = {
                index: text
                for index, text, (old, _), (new, _) in zip(indices, shorter, before, after, strict=True)
                if old != new
            }
            text_embeds = whole_embeds.clone()
            if read:
                text_embeds[list(read)] = embed(list(read.values()), None)
            bar.update(len(indices) - len(read))
            now = score(text_embeds)
            factors = {
                "image_to_text": len(image_embeds) / len(text_to_image[indices].unique()),
                "text_to_image": len(texts) / len(indices),
                "score": len(texts) / len(indices),
            }
            rows.append(
                {
                    "sentence": k,
                    "num_texts": len(indices),
                    "num_read": len(read),
                    **now,
                    **_lost(whole, now, factors),
                }
            )
    return rows


def plot_length_study(rows: Sequence[Mapping[str, Any]], file: str | os.PathLike, title: str = "") -> None:
    """
    Draws R@1 in both directions and the FLOPs of the text tower against the limit in tokens.

    Args:
        rows (`Sequence[Mapping]`): Rows from [`length_study`].
        file (`str` or `os.PathLike`): File of the plot. The extension determines the format.
        title (`str`, *optional*, defaults to `""`): Title, such as `"model on data"`.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If the extension of `file` is unknown.
        `OSError`: If the file cannot be written.
    """
    picture = figure(7, 4.5)
    axes = picture.subplots()
    axes.set_title(wrapped(title, 60), fontsize=10)
    limits = [row["max_length"] for row in rows]
    for name, label in DIRECTIONS.items():
        values = [100 * row[f"{name}_r1"] for row in rows]
        axes.plot(limits, values, color=DIRECTION_COLOURS[name], marker="o", markersize=4, label=f"R@1, {label}")
    axes.set_xlabel("maximum length of a text in tokens (share of texts that are cut)")
    axes.set_ylabel("R@1 (%)")
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(limits, [f"{row['max_length']}\n{row['texts_cut']:.0%}" for row in rows])
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if all(row["text_flops"] is not None for row in rows):
        flops = axes.twinx()
        (line,) = flops.plot(limits, [row["text_flops"] / 1e9 for row in rows], color="0.35", linestyle="--")
        flops.set_ylim(bottom=0)
        flops.set_ylabel("text tower, GFLOPs per text")
        handles, labels = [*handles, line], [*labels, "GFLOPs (right)"]
    picture.legend(handles, labels, loc="outside upper center", ncols=3)
    save(picture, file)


def plot_sentence_ablation(rows: Sequence[Mapping[str, Any]], file: str | os.PathLike, title: str = "") -> None:
    """
    Draws the loss caused by the removal of each sentence: R@1 and mean rank in both directions, and the score. Errors
    and arguments not listed here are those of [`plot_length_study`].

    Args:
        rows (`Sequence[Mapping]`): Rows from [`sentence_ablation`].
    """
    width = max(6, 2 + 0.45 * len(rows))
    picture = figure(width, 7)
    panels = picture.subplots(3, 1, sharex=True)
    panels[0].set_title(wrapped(title, int(9 * width)), fontsize=10)
    rows = rows[1:]
    positions = range(len(rows))

    def draw(axes: "Axes", metric: str, factor: float, title: str) -> None:
        for shift, name in ((-0.2, "image_to_text"), (0.2, "text_to_image")):
            values = [factor * row[f"{name}_{metric}_lost"] for row in rows]
            axes.bar(
                [position + shift for position in positions],
                values,
                0.4,
                color=DIRECTION_COLOURS[name],
                label=DIRECTIONS[name],
            )
        axes.set_ylabel(title)

    draw(panels[0], "r1", 100, "R@1 lost (points)")
    draw(panels[1], "mean_rank", 1, "ranks lost\n(mean rank)")
    panels[2].bar(positions, [row["score_lost"] for row in rows], 0.4, color="0.45")
    panels[2].set_ylabel("score lost\n(cosine)")
    panels[2].set_xlabel("removed sentence\ntexts that contain it\ntexts that contain it within the model's limit")
    panels[2].set_xticks(positions, [f"{row['sentence']}\n{row['num_texts']}\n{row['num_read']}" for row in rows])
    for axes in panels:
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=2)
    save(picture, file)


def _progress_bar(texts: int, progress: bool) -> Any:
    """Creates one progress bar for all texts of a study."""
    return progress_bar(total=texts, desc="Encoding texts", unit="text", shown=progress and rank() == 0)


def _embedder(
    encoder: Encoder,
    cache: str | os.PathLike | None,
    batch_size: int | None,
    bar: Any,
) -> Callable[[list[str], int | None], torch.Tensor]:
    """Returns a function that embeds N texts as [N, P], truncated at an optional limit, and advances the bar."""
    own = None if cache is None else encoder.fingerprint("text")  # takes seconds, so it is computed once
    at_once = UNIT_SIZE * world_size()

    def embed(texts: list[str], max_length: int | None) -> torch.Tensor:
        # same order as in `embed_texts`, so that both form the same units in the cache
        unique = sorted(set(texts), key=lambda text: (-len(text), text))
        parts = []
        for start in range(0, len(unique), at_once):
            part = embed_texts(
                encoder,
                unique[start : start + at_once],
                cache=cache,
                batch_size=batch_size or 64,
                max_length=max_length,
                fingerprint=own,
                warn=False,
                progress=False,
            ).embeds
            parts.append(part)
            bar.update(len(part))
        bar.update(len(texts) - len(unique))
        indices = {text: index for index, text in enumerate(unique)}
        return torch.cat(parts)[[indices[text] for text in texts]]

    return embed


def _tokens(encoder: Encoder, texts: list[str], max_length: int) -> Iterator[tuple[list[int], bool]]:
    """Yields the token ids of each text, truncated at `max_length`, and whether the text was truncated."""
    for start in range(0, len(texts), TEXT_CHUNK):
        encoded, was_cut = encoder.engine.tokenize(texts[start : start + TEXT_CHUNK], max_length)
        yield from zip(encoded["input_ids"], was_cut, strict=True)


def _warn(cut: int, data: RetrievalData, max_length: int) -> None:
    """Logs once how many texts are truncated at the model's maximum length."""
    if rank() == 0:
        warn_of_cut_texts(cut, len(data.texts), max_length)


def _check_attention(encoder: Encoder) -> None:
    model = getattr(encoder.engine, "model", None)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel) and is_flash_attention_requested(module.config):
            raise ValueError(
                'PyTorch cannot count the FLOPs of flash attention. Load the model with attn_implementation="sdpa".'
            )


def _flop_counter(encoder: Encoder, texts: list[str], lengths: list[int]) -> Callable[[int], float | None]:
    """Returns a function that computes the mean FLOPs per text, truncated at a limit."""
    is_padded = encoder.engine.pads_to_full_length
    counted: dict[int, int] = {}

    def count(limit: int) -> float | None:
        keys = [limit if is_padded else min(length, limit) for length in lengths]
        for key, text in zip(keys, texts, strict=True):
            if key in counted:
                continue
            with FlopCounterMode(display=False) as counter, _single_products():
                list(encoder.iterate_texts([text], max_length=limit))
            counted[key] = counter.get_total_flops()
        if not all(counted[key] for key in keys):  # PyTorch counts no FLOPs in ONNX Runtime
            return None
        return sum(counted[key] for key in keys) / len(keys)

    return count


@contextmanager
def _single_products() -> Iterator[None]:
    """Computes attention by matrix products, because some fused kernels are not counted."""
    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)


def _lost(whole: Mapping[str, float], now: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """Returns the loss in each metric, times the factor of the first key that the metric's name starts with."""
    lost = {}
    for name, value in whole.items():
        factor = next((factor for start, factor in factors.items() if name.startswith(start)), 1.0)
        better = now[name] - value if name.endswith("rank") else value - now[name]
        lost[f"{name}_lost"] = factor * better
    return lost
