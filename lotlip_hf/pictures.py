"""Pictures of prompts: drawn by a diffusion pipeline, and scored by what the prompts ask for."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import gather_lists, rank, world_size
from .encoder import Encoder
from .engines.torch import described, tokenizer_settings
from .evaluation.embeddings import embed_images, embed_texts, image_digests
from .evaluation.evaluate import record_of
from .evaluation.tables import PROMPTS, ROUNDING
from .evaluation.tasks import PromptData
from .files import replacing
from .metrics import composed_score, word_alignment
from .terminal import progress_bar
from .words import Word, find_phrase, split_words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def draw_prompts(
    data: PromptData,
    pipeline: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> PromptData:
    """
    Draws a picture for each prompt with the default settings of a pipeline, in float32. Pictures that the folder has
    from the same weights, settings, seed and prompt are not drawn again. With several processes, each process draws a
    share of the pictures.

    Args:
        data (`PromptData`): The prompts. Their images are not read.
        pipeline (`str` or `os.PathLike`): Folder or Hub id of a pipeline of diffusers. Weights are read from
            safetensors files.
        folder (`str` or `os.PathLike`): Folder of the pictures, which is created if it is missing.
        seed (`int`, *optional*, defaults to 0): Seed of the noise of the first picture. The seed of picture i is
            `seed + i`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Device of the pipeline.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `PromptData`: The prompts with their pictures. `protocol` names the pipeline and the seed.

    Raises:
        `ImportError`: If diffusers is not installed.
        `OSError`: If the pipeline cannot be read or a picture cannot be written.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("--pipeline needs diffusers: pip install 'lotlip-hf[diffusion]'") from error
    pipe = DiffusionPipeline.from_pretrained(pipeline, use_safetensors=True, trust_remote_code=False).to(device)
    pipe.set_progress_bar_config(disable=True)
    made_by = pipeline_fingerprint(pipe)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, prompt in enumerate(data.prompts):
        key = json.dumps([made_by, seed + index, prompt]).encode()
        files.append(folder / f"{index:05}-{hashlib.blake2b(key, digest_size=8).hexdigest()}.png")
    own = [index for index in range(rank(), len(files), world_size()) if not files[index].is_file()]
    for index in progress_bar(own, desc="Drawing", unit="picture", shown=progress and rank() == 0):
        picture = pipe(data.prompts[index], generator=torch.Generator().manual_seed(seed + index)).images[0]
        with replacing(files[index]) as file:
            picture.save(file, format="PNG")
    gather_lists([])  # waits for the pictures of the other processes
    modules = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]
    drawn = {
        "pipeline": os.fspath(pipeline),
        "pipeline_fingerprint": made_by,
        "pipeline_parameters": sum(one.numel() for module in modules for one in module.parameters()),
        "seed": seed,
    }
    names = [file.name for file in files]
    return replace(data, images=files, image_names=names, protocol={**data.protocol, **drawn})


def pipeline_fingerprint(pipe: "DiffusionPipeline") -> str:
    """
    Returns a hash of what determines the pictures of a pipeline: the weights, the configurations, the tokenizers.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, component in sorted(pipe.components.items()):
        config = getattr(component, "config", None)
        entries = config.to_dict() if hasattr(config, "to_dict") else config or {}
        settings: dict[str, Any] = {
            key: entries[key] for key in entries if not key.startswith("_") and key != "transformers_version"
        }
        if hasattr(component, "init_kwargs"):
            settings = tokenizer_settings(component)
        described_as = [name, type(component).__name__, settings]
        digest.update(json.dumps(described_as, sort_keys=True, default=str).encode())
        if isinstance(component, torch.nn.Module):
            for key, weight in sorted(component.state_dict().items()):
                description, content = described(key, weight)
                digest.update(description.encode())
                digest.update(content)
    return digest.hexdigest()


def evaluate_prompts(
    encoder: Encoder,
    data: PromptData,
    *,
    benchmark: str | None = None,
    model_name: str | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Scores the pictures of prompts by the parts that the prompts ask for. Arguments not listed here are those of
    [`~lotlip_hf.evaluation.evaluate.evaluate`].

    Args:
        data (`PromptData`): Prompts with their parts and pictures, such as from [`draw_prompts`].

    Returns:
        `dict[str, Any]`: Results as from [`~lotlip_hf.evaluation.evaluate.evaluate`], with the metrics of
        [`prompt_metrics`], and in `rows` those of each prompt.

    Raises:
        `IncompleteDataError`: If pictures cannot be read; the message names them.
        `ValueError`: If a part is no phrase of its prompt, or if the encoder does not run in transformers.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.evaluation.tasks import Part, PromptData
    >>> from lotlip_hf.pictures import evaluate_prompts

    >>> prompts, parts = ["A ginger cat."], [[Part("cat"), Part("ginger")]]
    >>> data = PromptData("mine", "mine", ["photos/cat.png"], ["cat"], prompts, parts)
    >>> results = evaluate_prompts(load_encoder("checkpoint"), data)
    >>> 0 <= results["metrics"]["supported_parts"] <= 1
    True
    ```
    """
    if not len(data.images) == len(data.prompts) == len(data.parts):
        raise ValueError(f"`data.parts` has {len(data.parts)} lists. Pass a list for each prompt and image.")
    fingerprints = encoder.fingerprints()
    digests = image_digests(data.images, names=data.image_names, progress=progress)
    image_embeds = embed_images(
        encoder,
        data.images,
        names=data.image_names,
        digests=digests,
        cache=cache,
        batch_size=batch_size or 32,
        fingerprint=fingerprints["image"],
        progress=progress,
    )
    settings = {"cache": cache, "batch_size": batch_size or 64, "fingerprint": fingerprints["text"]}
    metrics, rows, num_cut = prompt_metrics(encoder, data, image_embeds, **settings, progress=progress)
    protocol = {"batch_size": batch_size, "num_texts_cut": num_cut, "similarity": "cosine"}
    record = record_of(encoder, data, fingerprints, digests, benchmark, model_name, protocol)
    return {"task": PROMPTS, "metrics": metrics, "rows": rows, **record}


def without_span(text: str, span: Word) -> str:
    """Returns a text without a part of it."""
    return f"{text[: span.start].rstrip()} {text[span.end :].lstrip()}".strip()


def prompt_metrics(
    encoder: Encoder,
    data: PromptData,
    image_embeds: Tensor,
    *,
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    fingerprint: str | None = None,
    progress: bool = True,
) -> tuple[dict[str, float], list[dict[str, Any]], int]:
    """
    Scores pictures by the parts of their prompts. A picture supports a part, or a word of a part, if its cosine with
    the prompt is lower without it.

    The values of [`~lotlip_hf.metrics.word_alignment`] are in the rows, but not in a mean: they add up to about 0 for
    any picture, so their signs compare the words of a prompt with each other and not the picture with the prompt.

    Args:
        encoder (`Encoder`): A dual encoder of transformers.
        data (`PromptData`): N prompts with their parts and pictures.
        image_embeds (`torch.Tensor`): Embeddings [N, dim] of the pictures, normalised.
        cache (`str` or `os.PathLike`, *optional*): Folder for the cache of embeddings; see
            [`~lotlip_hf.evaluation.embeddings.embed_texts`].
        batch_size (`int`, *optional*, defaults to 64): Number of texts of maximum length in a batch.
        fingerprint (`str`, *optional*): Fingerprint of the encoder for texts, if known.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `tuple[dict[str, float], list[dict[str, Any]], int]`: The means over the prompts, a row of scores for each
        prompt, and the number of prompts that are longer than the model reads. `supported_parts` and
        `supported_words` are shares from 0 to 1; `clip_score` is [`~lotlip_hf.metrics.clip_score`];
        `composed_score` is [`~lotlip_hf.metrics.composed_score`] of the prompts that have boxes.

    Raises:
        `ValueError`: If a part is no phrase of its prompt, or if the encoder does not run in transformers.
    """
    spans = [_spans(prompt, parts) for prompt, parts in zip(data.prompts, data.parts, strict=True)]
    variants = [
        [prompt, *(without_span(prompt, span) for span in (*parts, *words))]
        for prompt, (parts, words) in zip(data.prompts, spans, strict=True)
    ]
    texts = [text for own in variants for text in own]
    settings = {"cache": cache, "batch_size": batch_size, "fingerprint": fingerprint, "progress": progress}
    embeds, was_cut = embed_texts(encoder, texts, warn=False, **settings)
    rows: list[dict[str, Any]] = []
    first, num_cut = 0, 0
    for index, (own, (parts, words)) in enumerate(zip(variants, spans, strict=True)):
        cosines = embeds[first : first + len(own)] @ image_embeds[index]
        lost = cosines[0] - cosines[1:]
        supported = lost > ROUNDING
        rows.append(
            {
                "prompt": data.prompts[index],
                "image": data.image_names[index],
                "supported_parts": supported[: len(parts)].double().mean().item(),
                "supported_words": supported[len(parts) :].double().mean().item(),
                "clip_score": 100 * max(cosines[0].item(), 0.0),
                "parts": [
                    {"text": span.text, "cosine_lost": value}
                    for span, value in zip(parts, lost[: len(parts)].tolist(), strict=True)
                ],
                "words": [
                    {"text": span.text, "cosine_lost": value}
                    for span, value in zip(words, lost[len(parts) :].tolist(), strict=True)
                ],
            }
        )
        num_cut += int(was_cut[first])
        first += len(own)
    for index, values, composed in gather_lists(_of_share(encoder, data, [words for _, words in spans], progress)):
        for word, value in zip(rows[index]["words"], values, strict=True):
            word["word_alignment"] = value
        if composed is not None:
            rows[index]["composed_score"] = composed
    names = ("supported_parts", "supported_words", "clip_score", "composed_score")
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(own) / len(own) for name, own in values.items() if own}, rows, num_cut


def _spans(prompt: str, parts: Sequence[Any]) -> tuple[list[Word], list[Word]]:
    """Returns the parts of a prompt and their words as spans of the prompt."""
    found = [find_phrase(prompt, part.text) for part in parts]
    spans = [span for span in found if span is not None]
    if not spans or len(spans) < len(parts):
        raise ValueError(
            f"`parts` of the prompt {prompt!r:.80} are not all phrases of it. Pass phrases of the prompt."
        )
    inside = [
        word for word in split_words(prompt) if any(one.start <= word.start and word.end <= one.end for one in spans)
    ]
    return spans, inside


def _of_share(
    encoder: Encoder, data: PromptData, words: Sequence[Sequence[Word]], progress: bool
) -> list[tuple[int, list[float | None], float | None]]:
    """Returns, for this process' share, the index of a prompt, the alignment of its words and the composed score."""
    own = range(rank(), len(data.prompts), world_size())
    is_shown = progress and rank() == 0
    if not own:
        return []
    images, prompts = [data.images[index] for index in own], [data.prompts[index] for index in own]
    aligned = word_alignment(images, prompts, encoder, progress=is_shown)
    found = []
    for number, index in enumerate(progress_bar(own, desc="Composing", unit="picture", shown=is_shown)):
        values = {word.start: word.value for word in aligned[number]}  # without the words that the model cuts
        boxed = [(part.text, [part.box]) for part in data.parts[index] if part.box is not None]
        composed = composed_score(images[number], prompts[number], boxed, encoder) if boxed else None
        found.append((index, [values.get(word.start) for word in words[index]], composed))
    return found
