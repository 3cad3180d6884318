"""
Training of an adapter that maps a LoTLIP text tower to the states of a CLIP text encoder: matching the tokens of two
tokenizers, the loss, training and a report. `examples/align_text_encoder.py` is the command.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, CLIPTextModel, CLIPTextModelWithProjection, get_cosine_schedule_with_warmup

from ..files import parse_json, read_regular
from ..loading import fit_tokenizer, load_strict, load_tokenizer, naming_damage
from ..modeling.calls_lotlip import for_one_call
from ..modeling.cleaning_lotlip import clean
from ..modeling.modeling_lotlip import LoTLIPTextModel
from ..plots import figure, save
from ..terminal import progress_bar, text_table
from .text_encoder import LoTLIPTextEncoder, pipeline_target_layer

# Word ids of the first token, the last token and padding; the words of the text are numbered from 3 on.
START, END, PADDING, FIRST_WORD = range(4)
WORD = r"[\w']+|[^\w\s']"
MEASURES = ("words", "read_outs", "pooled")
NUM_QUERIES = 64

# Baseline or encoder name -> measure -> "error" and "cosine"
Report = dict[str, dict[str, dict[str, float]]]


class Teacher(NamedTuple):
    """
    The CLIP text encoder to replace.

    Args:
        encoder (`CLIPTextModel` or `CLIPTextModelWithProjection`): The encoder.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        target_layer (`int`): Index of the hidden state that the pipeline reads; -1 is the last one, normalised.
        read_together (`tuple[str, ...]`, *optional*, defaults to `()`): Slots whose states the pipeline concatenates
            token by token, if there are several.
    """

    encoder: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: Any
    target_layer: int
    read_together: tuple[str, ...] = ()


class Batch(NamedTuple):
    """Token ids and word ids of B prompts, each [B, L], where L is the `model_max_length` of the tokenizer."""

    teacher_ids: torch.Tensor
    teacher_word_ids: torch.Tensor
    student_ids: torch.Tensor
    student_word_ids: torch.Tensor


class States(NamedTuple):
    """Outputs of an encoder for B prompts: states [B, L, D], word ids of the tokens [B, L], pooled states [B, D]."""

    sequence: torch.Tensor
    word_ids: torch.Tensor
    pooled: torch.Tensor


class Words(NamedTuple):
    """Token ids of a text, padded to [L], and the word id of each token [L]."""

    input_ids: list[int]
    word_ids: list[int]


# A prompt, tokenized by the teacher and by the student
Prompt = tuple[Words, Words]


def load_teacher(
    folder: Path,
    slot: str = "text_encoder",
    tokenizer: Path | None = None,
    target_layer: int | None = None,
    device: str = "cpu",
) -> Teacher:
    """
    Loads the encoder to replace and freezes it.

    Args:
        folder (`Path`): Folder of a pipeline or of a CLIP text encoder.
        slot (`str`, *optional*, defaults to `"text_encoder"`): Slot of the text encoder in the pipeline.
        tokenizer (`Path`, *optional*): Folder of its tokenizer. Defaults to the tokenizer of the slot in a pipeline,
            or to `folder`.
        target_layer (`int`, *optional*): Index of the hidden state to match. Defaults to the state that the pipeline
            reads, or to -1 without a pipeline.
        device (`str`, *optional*, defaults to `"cpu"`): Device of the encoder.

    Returns:
        `Teacher`: The encoder, its tokenizer and the hidden state to match.

    Raises:
        `ValueError`: If `slot` does not contain a CLIP text encoder, or its tokenizer does not fit.
    """
    slots = _text_encoders(folder)
    encoder_folder, tokenizer_folder, layer, read_together = folder, folder, -1, []
    if slots is None and slot == "text_encoder":  # `folder` contains only an encoder
        slots = {}
    elif slot not in (slots or {}):
        raise ValueError(
            f"{folder} has no text encoder {slot!r}. Its text encoders: {', '.join(slots or {}) or 'none'}."
        )
    if slots:
        encoder_folder, tokenizer_folder = folder / slot, folder / slot.replace("text_encoder", "tokenizer")
        read_together = [name for name, class_name in slots.items() if class_name.startswith(("CLIP", "LoTLIP"))]
        layer = pipeline_target_layer(_has_projection(folder / name, slots[name]) for name in read_together)
    config = None
    if (encoder_folder / "config.json").is_file():
        with naming_damage(str(encoder_folder)):
            config = AutoConfig.from_pretrained(encoder_folder, trust_remote_code=False)
    if config is None or config.model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"{encoder_folder} does not contain a CLIP text encoder. Pass another folder or slot.")
    is_projected = "CLIPTextModelWithProjection" in (config.architectures or [])
    encoder = _load_frozen(CLIPTextModelWithProjection if is_projected else CLIPTextModel, encoder_folder, device)
    loaded_tokenizer = _load_tokenizer(tokenizer or tokenizer_folder, encoder)
    joined = tuple(read_together) if len(read_together) > 1 else ()
    return Teacher(encoder, loaded_tokenizer, target_layer or layer, joined)


def load_student(path: str | Path, max_length: int | None = None, device: str = "cpu") -> tuple[LoTLIPTextModel, Any]:
    """Loads the text tower of a checkpoint, frozen, and its tokenizer for texts of up to `max_length` tokens."""
    tower = _load_frozen(LoTLIPTextModel, path, device)
    tokenizer = _load_tokenizer(path, tower)
    if max_length is not None and max_length > tokenizer.model_max_length:
        raise ValueError(
            f"`max_length` is {max_length}. Pass at most {tokenizer.model_max_length}, the limit of {path}."
        )
    tokenizer.model_max_length = max_length or tokenizer.model_max_length
    return tower, tokenizer


def _load_frozen(model_class: Any, path: str | Path, device: str) -> Any:
    model = load_strict(model_class, path, allow_unexpected=True, dtype=torch.float32)
    return model.to(device=device).requires_grad_(False)


def _load_tokenizer(path: str | Path, model: Any) -> Any:
    """Loads a tokenizer and limits its length to the positions of the model."""
    tokenizer = load_tokenizer(path, "save the model's tokenizer there or pass the folder of the teacher's tokenizer")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}. Pass another."
        )
    fit_tokenizer(model, tokenizer)
    return tokenizer


def _text_encoders(pipeline: Path) -> dict[str, str] | None:
    """Returns the class of the text encoder in each slot of a pipeline's folder."""
    file = pipeline / "model_index.json"
    if not file.is_file():
        return None
    try:
        index = parse_json(read_regular(file))
        classes = {name: value[1] for name, value in index.items() if name.startswith("text_encoder")}
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is damaged ({error}). Download the pipeline again.") from error
    return {name: class_name for name, class_name in classes.items() if class_name is not None}


def _has_projection(folder: Path, class_name: str) -> bool:
    """Whether a text encoder of a pipeline has a text projection."""
    if class_name == "LoTLIPTextEncoder":
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).projection_dim is not None
    return class_name == "CLIPTextModelWithProjection"


def read_prompts(file: Path, field: str = "prompt") -> list[str]:
    """Reads cleaned, distinct prompts from the lines of a text file, or from a field of a `.jsonl` file."""
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if file.suffix == ".jsonl" and line.strip():
            try:
                line = json.loads(line)[field]
                line.encode("utf-8")
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # also without object, field or text
                raise ValueError(f"{file}, line {number}: {field!r} is not a text. Pass another field.") from error
        texts.append(clean(line))
    return [text for text in dict.fromkeys(texts) if text]


def tokenize_prompts(texts: Iterable[str], teacher_tokenizer: Any, student_tokenizer: Any) -> list[Prompt]:
    """
    Tokenizes cleaned prompts with both tokenizers. Drops prompts for which [`tokenize_words`] returns `None`, and
    prompts with the same tokens as an earlier prompt, so that no held-out prompt is also a training prompt.
    """
    prompts = {}
    for text in texts:
        teacher, student = tokenize_words(teacher_tokenizer, text), tokenize_words(student_tokenizer, text)
        if teacher is not None and student is not None:
            prompts[tuple(teacher.input_ids + student.input_ids)] = teacher, student
    return list(prompts.values())


def batches(prompts: Sequence[Prompt], size: int, device: torch.device | str) -> Iterator[Batch]:
    """Yields all prompts in order, in batches of `size`."""
    for start in range(0, len(prompts), size):
        columns = zip(*((*teacher, *student) for teacher, student in prompts[start : start + size]), strict=True)
        yield Batch(*(torch.tensor(column, device=device) for column in columns))


def tokenize_words(tokenizer: Any, text: str) -> Words | None:
    """
    Tokenizes a text and returns the word that each token belongs to, so that the tokens of two tokenizers can be
    matched. A word is a run of letters and digits or a punctuation mark. LoTLIP's separator counts as the full stop
    that it replaces.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): LoTLIP's, or a fast tokenizer that adds one first and one last token.
        text (`str`): Text, cleaned by [`lotlip_hf.modeling.cleaning_lotlip.clean`].

    Returns:
        `Words` or `None`: Token ids and word ids: 0 for the first token, 1 for the last, 2 for padding, 3 and more for
        words. `None` if the text is longer than `model_max_length` or a token does not belong to a word.

    Raises:
        `ValueError`: If the tokenizer splits sentences with another cleaning than `"official"`.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from lotlip_hf.diffusion.align import tokenize_words

    >>> tokenizer = AutoTokenizer.from_pretrained("checkpoint")  # doctest: +SKIP
    >>> # [CLS] zebra ##s graz ##e [SEP] why ? [SEP]
    >>> tokenize_words(tokenizer, "Zebras graze. Why?").word_ids[:9]  # doctest: +SKIP
    [0, 3, 3, 4, 4, 5, 6, 7, 1]
    ```
    """
    full_stop = ". "
    read, word = text, f"{re.escape(full_stop)}|{WORD}"
    if getattr(tokenizer, "split_sentences", False):
        if tokenizer.cleaning != "official":
            raise ValueError(
                f"The words of a tokenizer with cleaning={tokenizer.cleaning!r} cannot be matched to those of another "
                'tokenizer. Use a tokenizer with cleaning="official".'
            )
        read, word = text.replace(full_stop, tokenizer.sep_token), f"{re.escape(tokenizer.sep_token)}|{WORD}"
    inputs = for_one_call(tokenizer)(
        text, padding="max_length", truncation=True, return_offsets_mapping=True, verbose=False
    )
    spans = [span for span, is_text in zip(inputs["offset_mapping"], inputs["attention_mask"], strict=True) if is_text]
    # If the tokenizer truncates or rewrites the text, the spans are not positions in `read`.
    is_whole = not inputs.encodings[0].overflowing and max((end for _, end in spans), default=0) == len(read)
    if not is_whole:
        return None
    word_of_character = [-1] * len(read)
    for index, match in enumerate(re.finditer(word, read)):
        word_of_character[match.start() : match.end()] = [index] * (match.end() - match.start())
    # A span may include the space before its word, so use the word of the last character.
    words = [word_of_character[end - 1] if end > start else -1 for start, end in spans[1:-1]]
    if -1 in words:
        return None
    word_ids = iter([START, *(FIRST_WORD + word for word in words), END])
    return Words(inputs["input_ids"], [next(word_ids) if is_text else PADDING for is_text in inputs["attention_mask"]])


def word_means(states: torch.Tensor, word_ids: torch.Tensor, num_word_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Averages states [B, L, D] over the tokens of each of W words, given by word ids [B, L]. Returns the means
    [B, W, D], 0 for words without tokens, and a mask [B, W] of the words with tokens.
    """
    members = (word_ids.unsqueeze(-1) == torch.arange(num_word_ids, device=word_ids.device)).to(states.dtype)
    counts = members.sum(1)
    means = members.transpose(1, 2) @ states / counts.clamp(min=1).unsqueeze(-1)
    return means, counts > 0


def attention_readouts(states: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """
    Returns the attention outputs [B, Q, D] of queries [Q, D] over states [B, L, D]. A denoiser attends to its prompt
    in the same way: the result depends on all states, padding included, but not on their order.
    """
    return F.scaled_dot_product_attention(queries.to(states).expand(len(states), -1, -1), states, states)


class Scale(NamedTuple):
    """Mean and deviation [D] of states. Without scaling, a few dimensions of CLIP's states dominate a distance."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor) -> "Scale":
        """Computes the scale of states [..., D]."""
        flat = states.flatten(0, -2)
        return cls(flat.mean(0), flat.std(0).clamp(min=1e-6))

    def standardize(self, states: torch.Tensor) -> torch.Tensor:
        """Shifts and scales states [..., D] to mean 0 and standard deviation 1."""
        return (states - self.mean) / self.deviation

    @torch.no_grad()
    def undo(self, adapter: nn.Module) -> None:
        """Rescales the last layer of an adapter so that it returns states that are not standardised."""
        last = getattr(adapter, "output_projection", adapter)  # a linear adapter is its own last layer
        last.weight.mul_(self.deviation.unsqueeze(1))
        last.bias.mul_(self.deviation).add_(self.mean)


def distance(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared error of states [..., D] plus one minus their mean cosine."""
    return F.mse_loss(states, targets) + 1 - F.cosine_similarity(states, targets, dim=-1).mean()


class Alignment:
    """
    The loss of an encoder against its teacher. States are standardised with the teacher's mean and deviation.

    Token i of the student is not token i of the teacher, because their tokenizers split texts differently. `"linear"`
    and `"mlp"` adapters therefore match, for each word, the mean state of its tokens; the first token, the last token
    and padding are matched in the same way. These adapters suit a single text encoder that the denoiser reads by
    cross-attention: the order of the states does not matter there, but the number of padding tokens does.

    A `"resampler"` returns as many states as the teacher and matches them by position, as AltDiffusion does with CLIP
    (https://arxiv.org/abs/2211.06679). Use a resampler if the pipeline concatenates token i of two encoders, as Stable
    Diffusion XL and 3 do.

    Args:
        teacher (`CLIPTextModel` or `CLIPTextModelWithProjection`): The frozen encoder to replace.
        tower (`LoTLIPTextModel`): The frozen text tower that all trained encoders share.
        target_layer (`int`): Teacher state to match: -1 for `last_hidden_state`, -2 for `hidden_states[-2]`.
        sample (`Iterable[Batch]`): Batches of training prompts for the means, deviations and queries. They must fit
            in memory together.
    """

    def __init__(
        self,
        teacher: CLIPTextModel | CLIPTextModelWithProjection,
        tower: LoTLIPTextModel,
        target_layer: int,
        sample: Iterable[Batch],
    ) -> None:
        self.teacher = teacher
        self.tower = tower
        self.target_layer = target_layer
        states = States(*(torch.cat(parts) for parts in zip(*map(self._raw_states, sample), strict=True)))
        self.sequence_scale, self.pooled_scale = Scale.of(states.sequence), Scale.of(states.pooled)
        states = self._standardize(states)
        # Queries are word states of equal norm. For example, the state of "cat" attends to similar words of a prompt.
        words = states.sequence[states.word_ids >= FIRST_WORD]
        drawn = torch.randint(len(words), (NUM_QUERIES,), device=words.device)
        self.queries = F.normalize(words[drawn], dim=-1) * words.shape[-1] ** 0.5
        outputs, found = self._measures(states, int(states.word_ids.max()) + 1)
        self.means = {name: (output[found] if name == "words" else output).mean(0) for name, output in outputs.items()}

    @torch.no_grad()
    def _raw_states(self, batch: Batch) -> States:
        tower = getattr(self.teacher, "text_model", self.teacher)  # the encoder without its projection
        outputs = tower(batch.teacher_ids, output_hidden_states=True)
        sequence = outputs.last_hidden_state if self.target_layer == -1 else outputs.hidden_states[-2]
        return States(sequence, batch.teacher_word_ids, outputs.pooler_output)

    def _standardize(self, states: States) -> States:
        return States(
            self.sequence_scale.standardize(states.sequence),
            states.word_ids,
            self.pooled_scale.standardize(states.pooled),
        )

    def teacher_states(self, batch: Batch) -> States:
        """Returns the standardised states of the teacher. Pooled states are those before the projection."""
        return self._standardize(self._raw_states(batch))

    @torch.no_grad()
    def tower_states(self, batch: Batch) -> States:
        """Returns the states of the tower, the input of all adapters."""
        outputs = self.tower(batch.student_ids, output_corner_embeds=False)
        return States(outputs.last_hidden_state, batch.student_word_ids, outputs.pooler_output)

    def student_states(self, encoder: LoTLIPTextEncoder, tower: States, teacher: States) -> States:
        """Returns the states of an unfinished encoder. A resampler returns one state for each token of the teacher."""
        sequence = encoder.adapt(tower.sequence, tower.word_ids != PADDING)
        word_ids = tower.word_ids if encoder.config.output_length is None else teacher.word_ids
        return States(sequence, word_ids, encoder.pooled_adapter(tower.pooled))

    def loss(self, encoder: LoTLIPTextEncoder, tower: States, teacher: States) -> torch.Tensor:
        """Returns the sum of two values of [`distance`]: of word means or positions, and of pooled states."""
        states = self.student_states(encoder, tower, teacher)
        outputs, targets = states.sequence, teacher.sequence
        if states.word_ids is not teacher.word_ids:
            num_word_ids = int(teacher.word_ids.max()) + 1
            outputs, found = word_means(outputs, states.word_ids, num_word_ids)
            targets, has_target = word_means(targets, teacher.word_ids, num_word_ids)
            outputs, targets = outputs[found & has_target], targets[found & has_target]
        return distance(outputs, targets) + distance(states.pooled, teacher.pooled)

    def finish(self, encoder: LoTLIPTextEncoder) -> None:
        """Rescales an encoder's outputs to the teacher's original states and adds the teacher's projection."""
        self.sequence_scale.undo(encoder.adapter)
        self.pooled_scale.undo(encoder.pooled_adapter)
        projection = getattr(self.teacher, "text_projection", None)
        if projection is not None:
            encoder.text_projection = projection
            encoder.config.projection_dim = projection.out_features

    def _measures(self, states: States, num_word_ids: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Returns word means [B, W, D], read-outs [B, Q, D], pooled states [B, D], and the mask of words [B, W]."""
        words, found = word_means(states.sequence, states.word_ids, num_word_ids)
        outputs = (words[:, FIRST_WORD:], attention_readouts(states.sequence, self.queries), states.pooled)
        return dict(zip(MEASURES, outputs, strict=True)), found[:, FIRST_WORD:]

    @torch.no_grad()
    def report(
        self, encoders: dict[str, LoTLIPTextEncoder], batches: Iterable[Batch], others: Iterable[Batch]
    ) -> Report:
        """
        Compares unfinished encoders with the teacher on standardised states.

        Args:
            encoders (`dict[str, LoTLIPTextEncoder]`): The encoders by name.
            batches (`Iterable[Batch]`): Held-out prompts.
            others (`Iterable[Batch]`): The same prompts in another order, for the baseline `"another prompt"`.

        Returns:
            `dict`: Rows `"mean"` (the mean of the training prompts), `"another prompt"` and the encoders. Each has the
            measures `"words"` (word means), `"read_outs"` (attention over the sequence, as in a denoiser) and
            `"pooled"` (before the projection). Each measure has an `error` (squared error divided by that of
            `"mean"`) and a `cosine` (after subtraction of the mean).
        """
        sums: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("mean", "another prompt", *encoders)}
        for batch, other in zip(batches, others, strict=True):
            teacher, tower = self.teacher_states(batch), self.tower_states(batch)
            num_word_ids = int(teacher.word_ids.max()) + 1
            targets, has_target = self._measures(teacher, num_word_ids)
            states = [self.student_states(encoder, tower, teacher) for encoder in encoders.values()]
            measured = [self._measures(one, num_word_ids) for one in (self.teacher_states(other), *states)]
            baseline = {kind: self.means[kind].expand_as(targets[kind]) for kind in MEASURES}
            for name, (outputs, found) in zip(sums, ((baseline, has_target), *measured), strict=True):
                for kind in MEASURES:
                    both = has_target & found if kind == "words" else slice(None)
                    new = closeness(outputs[kind][both], targets[kind][both], self.means[kind])
                    sums[name][kind] = sums[name].get(kind, 0) + new
        return {
            name: {
                kind: {"error": (square / mean_square).item(), "cosine": (cosine / count).item()}
                for kind, (square, mean_square, cosine, count) in row.items()
            }
            for name, row in sums.items()
        }


def closeness(outputs: torch.Tensor, targets: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """
    Returns four sums over N outputs [..., D]: squared errors, squared errors of the mean, cosines after subtraction of
    the mean, and N. The sums of several batches can be added. `mean` is [D], or [Q, D] for Q outputs per text.
    """
    outputs, targets = outputs.double() - mean, targets.double() - mean
    squares = (outputs - targets).square().sum(), targets.square().sum()
    cosines = F.cosine_similarity(outputs, targets, dim=-1)
    return torch.stack([*squares, cosines.sum(), torch.ones_like(cosines).sum()])


def train(
    encoders: dict[str, LoTLIPTextEncoder],
    alignment: Alignment,
    prompts: list[Prompt],
    batch_size: int = 32,
    num_epochs: int = 3,
    learning_rate: float = 1e-3,
) -> tuple[int, int]:
    """
    Trains the adapters of all encoders on the same batches, shuffled with Python's `random`. A `KeyboardInterrupt`
    ends the training early.

    Args:
        encoders (`dict[str, LoTLIPTextEncoder]`): The encoders by name. Parameters that require gradients are trained.
        alignment (`Alignment`): The loss against the teacher.
        prompts (`list[Prompt]`): The prompts. The list is shuffled in place.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in a batch.
        num_epochs (`int`, *optional*, defaults to 3): Number of passes over the prompts.
        learning_rate (`float`, *optional*, defaults to 1e-3): Peak learning rate of AdamW, with a warmup and a cosine
            schedule.

    Returns:
        `tuple[int, int]`: The number of completed steps and the number of planned steps.
    """
    groups = [[p for p in encoder.parameters() if p.requires_grad] for encoder in encoders.values()]
    num_steps = num_epochs * -(-len(prompts) // batch_size)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
    done = 0
    try:
        with progress_bar(total=num_steps, desc="Training", unit="step") as bar:
            for _ in range(num_epochs):
                random.shuffle(prompts)
                for batch in batches(prompts, batch_size, alignment.tower.device):
                    tower, teacher = alignment.tower_states(batch), alignment.teacher_states(batch)
                    losses = {name: alignment.loss(encoder, tower, teacher) for name, encoder in encoders.items()}
                    optimizer.zero_grad()
                    torch.stack(list(losses.values())).sum().backward()
                    for group in groups:
                        nn.utils.clip_grad_norm_(group, 1.0)
                    optimizer.step()
                    schedule.step()
                    done += 1
                    bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()}, refresh=False)
                    bar.update()
    except KeyboardInterrupt:
        pass
    return done, num_steps


def report_table(report: Report) -> str:
    """Formats a report as a text table."""
    columns = [(measure, kind) for measure in MEASURES for kind in ("error", "cosine")]
    rows = [[name, *(f"{row[measure][kind]:.3f}" for measure, kind in columns)] for name, row in report.items()]
    return text_table(list(zip(("", ""), *columns, strict=True)), rows)


def draw_report(report: Report, file: Path) -> None:
    """Draws the errors of a report as bars. Needs matplotlib."""
    picture = figure(7, 3.5)
    axes, width = picture.subplots(), 1 / (len(report) + 1)
    for index, (name, row) in enumerate(report.items()):
        left = [measure + index * width for measure in range(len(MEASURES))]
        axes.bar(left, [row[measure]["error"] for measure in MEASURES], 0.9 * width, label=name)
    axes.set_xticks([measure + 0.4 for measure in range(len(MEASURES))], MEASURES)
    axes.set_ylabel("squared error on held-out prompts (mean = 1)")
    axes.legend()
    save(picture, file)
