"""
Learning to give out another text encoder's states: what to match where two tokenizers cut a text into different
tokens, training, and how close it came. `examples/align_text_encoder.py` is its command.
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
from ..modeling.modeling_lotlip import LoTLIPTextModel
from ..modeling.tokenization_lotlip import clean
from ..plots import figure, save
from ..terminal import progress_bar
from .text_encoder import LoTLIPTextEncoder, pipeline_target_layer

# Word ids of the tokens that every text has; its words follow.
START, END, PADDING, FIRST_WORD = range(4)
WORD = r"[\w']+|[^\w\s']"
MEASURES = ("words", "read_outs", "pooled")
NUM_QUERIES = 64

# For each answer and measure, its error and cosine
Report = dict[str, dict[str, dict[str, float]]]


class Teacher(NamedTuple):
    """
    A CLIP text encoder that is to be replaced.

    Args:
        encoder: The encoder.
        tokenizer: Its tokenizer.
        target_layer: The hidden state that its pipeline reads (-1: the last, normalised).
        read_together: The slots whose states the pipeline joins token by token, if there are several.
    """

    encoder: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: Any
    target_layer: int
    read_together: tuple[str, ...] = ()


class Batch(NamedTuple):
    """Token ids of B prompts and which word each token is of, all [B, L], L the tokenizer's full length."""

    teacher_ids: torch.Tensor
    teacher_word_ids: torch.Tensor
    student_ids: torch.Tensor
    student_word_ids: torch.Tensor


class States(NamedTuple):
    """What an encoder says of B prompts: sequence [B, L, D], the word ids of its tokens [B, L], pooled [B, D]."""

    sequence: torch.Tensor
    word_ids: torch.Tensor
    pooled: torch.Tensor


class Words(NamedTuple):
    """A text's `input_ids` [L], padded to the tokenizer's length, and which word each token is of [L]."""

    input_ids: list[int]
    word_ids: list[int]


# A prompt as the teacher's and as the student's tokenizer read it
Prompt = tuple[Words, Words]


def load_teacher(
    folder: Path,
    slot: str = "text_encoder",
    tokenizer: Path | None = None,
    target_layer: int | None = None,
    device: str = "cpu",
) -> Teacher:
    """
    Loads the encoder that is to be replaced, frozen.

    Args:
        folder: Folder of a pipeline, or of a CLIP text encoder.
        slot: Which text encoder of the pipeline.
        tokenizer: Folder of its tokenizer; by default the pipeline's, or the encoder's own folder.
        target_layer: The state to match; by default the one that the pipeline reads, or -1.
        device: Where to put the encoder.
    """
    slots = _text_encoders(folder)
    encoder_folder, tokenizer_folder, layer, read_together = folder, folder, -1, []
    if slots is None and slot == "text_encoder":  # the encoder's own folder
        slots = {}
    elif slot not in (slots or {}):
        raise ValueError(f"{folder} has no text encoder {slot!r}, but {', '.join(slots or {}) or 'none'}.")
    if slots:
        encoder_folder, tokenizer_folder = folder / slot, folder / slot.replace("text_encoder", "tokenizer")
        read_together = [name for name, class_name in slots.items() if class_name.startswith(("CLIP", "LoTLIP"))]
        layer = pipeline_target_layer(_has_projection(folder / name, slots[name]) for name in read_together)
    config = None
    if (encoder_folder / "config.json").is_file():
        with naming_damage(str(encoder_folder)):
            config = AutoConfig.from_pretrained(encoder_folder, trust_remote_code=False)
    if config is None or config.model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"{encoder_folder}: no CLIP text encoder.")
    is_projected = "CLIPTextModelWithProjection" in (config.architectures or [])
    encoder = _load_frozen(CLIPTextModelWithProjection if is_projected else CLIPTextModel, encoder_folder, device)
    loaded_tokenizer = _load_tokenizer(tokenizer or tokenizer_folder, encoder)
    joined = tuple(read_together) if len(read_together) > 1 else ()
    return Teacher(encoder, loaded_tokenizer, target_layer or layer, joined)


def load_student(path: str | Path, max_length: int | None = None, device: str = "cpu") -> tuple[LoTLIPTextModel, Any]:
    """The text tower of a LoTLIP, frozen, and its tokenizer for prompts of up to `max_length` tokens."""
    tower = _load_frozen(LoTLIPTextModel, path, device)
    tokenizer = _load_tokenizer(path, tower)
    if max_length is not None and max_length > tokenizer.model_max_length:
        raise ValueError(f"{path} takes {tokenizer.model_max_length} tokens; `max_length` is {max_length}.")
    tokenizer.model_max_length = max_length or tokenizer.model_max_length
    return tower, tokenizer


def _load_frozen(model_class: Any, path: str | Path, device: str) -> Any:
    model = load_strict(model_class, path, allow_unexpected=True, dtype=torch.float32)
    return model.to(device=device).requires_grad_(False)


def _load_tokenizer(path: str | Path, model: Any) -> Any:
    """A model's tokenizer, which cuts at as many tokens as both take."""
    tokenizer = load_tokenizer(path, "save the model's tokenizer there, or name the teacher's folder of it")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}.")
    fit_tokenizer(model, tokenizer)
    return tokenizer


def _text_encoders(pipeline: Path) -> dict[str, str] | None:
    """The slots of a pipeline's folder and the classes of the text encoders in them."""
    file = pipeline / "model_index.json"
    if not file.is_file():
        return None
    try:
        index = parse_json(read_regular(file))
        classes = {name: value[1] for name, value in index.items() if name.startswith("text_encoder")}
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is damaged ({error}).") from error
    return {name: class_name for name, class_name in classes.items() if class_name is not None}


def _has_projection(folder: Path, class_name: str) -> bool:
    """Whether a text encoder of a pipeline has a projection; one that took a CLIP's place says so in its settings."""
    if class_name == "LoTLIPTextEncoder":
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).projection_dim is not None
    return class_name == "CLIPTextModelWithProjection"


def read_prompts(file: Path, field: str = "prompt") -> list[str]:
    """Prompts, cleaned, each once: of a text file the lines, of a `.jsonl` file a field of each line's object."""
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if file.suffix == ".jsonl" and line.strip():
            try:
                line = json.loads(line)[field]
                line.encode("utf-8")
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, object, field, text
                raise ValueError(f"{file}, line {number}: no text in the field {field!r}.") from error
        texts.append(clean(line))
    return [text for text in dict.fromkeys(texts) if text]


def tokenize_prompts(texts: Iterable[str], teacher_tokenizer: Any, student_tokenizer: Any) -> list[Prompt]:
    """
    Cleaned prompts by both tokenizers, without those that [`tokenize_words`] cannot read with one of the two. Those of
    the same tokens are there once: trained on and held out, they would flatter the report.
    """
    prompts = {}
    for text in texts:
        teacher, student = tokenize_words(teacher_tokenizer, text), tokenize_words(student_tokenizer, text)
        if teacher is not None and student is not None:
            prompts[tuple(teacher.input_ids + student.input_ids)] = teacher, student
    return list(prompts.values())


def batches(prompts: Sequence[Prompt], size: int, device: torch.device | str) -> Iterator[Batch]:
    """All prompts in their order."""
    for start in range(0, len(prompts), size):
        columns = zip(*((*teacher, *student) for teacher, student in prompts[start : start + size]), strict=True)
        yield Batch(*(torch.tensor(column, device=device) for column in columns))


def tokenize_words(tokenizer: Any, text: str) -> Words | None:
    """
    Tokenises a text and tells which of its words each token is of. A word is a run of letters and digits or a
    punctuation mark; LoTLIP's separator is the full stop that it stands for. So texts of two tokenizers line up word
    by word.

    Args:
        tokenizer: LoTLIP's or any fast tokenizer that puts one token before and one behind the text.
        text: A text as [`lotlip_hf.modeling.tokenization_lotlip.clean`] leaves it.

    Returns:
        Ids and word ids: 0 for the first token, 1 for the last, 2 for padding, from 3 the words. `None` if the text is
        longer than the tokenizer's `model_max_length`, or if the tokenizer changes it so that its words are not found.

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
                f"`tokenizer` has cleaning={tokenizer.cleaning!r}, whose sentences end elsewhere than the replaced "
                'encoder\'s: words are found in each other with cleaning="official" alone.'
            )
        read, word = text.replace(full_stop, tokenizer.sep_token), f"{re.escape(tokenizer.sep_token)}|{WORD}"
    inputs = for_one_call(tokenizer)(
        text, padding="max_length", truncation=True, return_offsets_mapping=True, verbose=False
    )
    spans = [span for span, is_text in zip(inputs["offset_mapping"], inputs["attention_mask"], strict=True) if is_text]
    # the tokenizer's own reading of the text, else its spans are of something else
    is_whole = not inputs.encodings[0].overflowing and max((end for _, end in spans), default=0) == len(read)
    if not is_whole:
        return None
    word_of_character = [-1] * len(read)
    for index, match in enumerate(re.finditer(word, read)):
        word_of_character[match.start() : match.end()] = [index] * (match.end() - match.start())
    # by its last character, for some tokenizers count the space before a word to it
    words = [word_of_character[end - 1] if end > start else -1 for start, end in spans[1:-1]]
    if -1 in words:
        return None
    word_ids = iter([START, *(FIRST_WORD + word for word in words), END])
    return Words(inputs["input_ids"], [next(word_ids) if is_text else PADDING for is_text in inputs["attention_mask"]])


def word_means(states: torch.Tensor, word_ids: torch.Tensor, num_word_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean state of each of W words, of states [B, L, D] and their tokens' word ids [B, L]: [B, W, D], 0 for a word
    without tokens; and which words have tokens [B, W].
    """
    members = (word_ids.unsqueeze(-1) == torch.arange(num_word_ids, device=word_ids.device)).to(states.dtype)
    counts = members.sum(1)
    means = members.transpose(1, 2) @ states / counts.clamp(min=1).unsqueeze(-1)
    return means, counts > 0


def attention_readouts(states: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """
    What each query [Q, D] reads off states [B, L, D] by attention, as a denoiser reads its prompt: [B, Q, D].
    The order of the states does not count, and each of them does, those of the padding too.
    """
    return F.scaled_dot_product_attention(queries.to(states).expand(len(states), -1, -1), states, states)


class Scale(NamedTuple):
    """Mean and deviation [D] of states, dimension by dimension. A few of CLIP's are a hundred times larger than the
    others, and would be all that counts in a distance."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor) -> "Scale":
        """Of states [..., D]."""
        flat = states.flatten(0, -2)
        return cls(flat.mean(0), flat.std(0).clamp(min=1e-6))

    def standardize(self, states: torch.Tensor) -> torch.Tensor:
        """States [..., D] with mean 0 and deviation 1."""
        return (states - self.mean) / self.deviation

    @torch.no_grad()
    def undo(self, adapter: nn.Module) -> None:
        """Makes an adapter that gives standardised states give those of the scale, by the layer that it ends with."""
        last = getattr(adapter, "output_projection", adapter)  # a linear adapter is that layer
        last.weight.mul_(self.deviation.unsqueeze(1))
        last.bias.mul_(self.deviation).add_(self.mean)


def distance(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error of states [..., D], and one less their cosine."""
    return F.mse_loss(states, targets) + 1 - F.cosine_similarity(states, targets, dim=-1).mean()


class Alignment:
    """
    Learning a teacher's states, standardised by their own mean and deviation.

    The two tokenizers cut a text differently, so token i of the one is not token i of the other. An encoder that maps
    each token by itself learns, for each word, that the mean of its tokens be the mean of the teacher's; likewise for
    the first token, the last, and the padding. That suits a slot whose states a denoiser reads alone, by
    cross-attention, where their order does not count. Their number does: more or fewer tokens of padding weigh
    more or less.

    A resampler gives as many states as the teacher and learns each by its position, as AltDiffusion's encoder learns
    CLIP's (https://arxiv.org/abs/2211.06679). It is the one to take where token i of two encoders is joined into one
    state, as in Stable Diffusion XL and 3.

    Args:
        teacher: The encoder to be replaced. It stays as it is.
        tower: The text tower that all encoders to be trained share. It stays as it is.
        target_layer: The teacher's state that counts: -1, `last_hidden_state`; -2, `hidden_states[-2]`.
        sample: Some batches of training prompts, for means, deviations and queries; they must fit in memory.
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
        # Queries are words, all of the same length: one like "cat" reads off what a prompt has of it.
        words = states.sequence[states.word_ids >= FIRST_WORD]
        drawn = torch.randint(len(words), (NUM_QUERIES,), device=words.device)
        self.queries = F.normalize(words[drawn], dim=-1) * words.shape[-1] ** 0.5
        answers, found = self._measures(states, int(states.word_ids.max()) + 1)
        self.means = {name: (answer[found] if name == "words" else answer).mean(0) for name, answer in answers.items()}

    @torch.no_grad()
    def _raw_states(self, batch: Batch) -> States:
        tower = getattr(self.teacher, "text_model", self.teacher)  # the name that it has beside a projection
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
        """The teacher's states, standardised; pooled is before the projection."""
        return self._standardize(self._raw_states(batch))

    @torch.no_grad()
    def tower_states(self, batch: Batch) -> States:
        """The tower's states, which the adapters of all encoders start from."""
        outputs = self.tower(batch.student_ids, output_corner_embeds=False)
        return States(outputs.last_hidden_state, batch.student_word_ids, outputs.pooler_output)

    def student_states(self, encoder: LoTLIPTextEncoder, tower: States, teacher: States) -> States:
        """An unfinished encoder's states. Those of a resampler stand where the teacher's tokens do."""
        sequence = encoder.adapt(tower.sequence, tower.word_ids != PADDING)
        word_ids = tower.word_ids if encoder.config.output_length is None else teacher.word_ids
        return States(sequence, word_ids, encoder.pooled_adapter(tower.pooled))

    def loss(self, encoder: LoTLIPTextEncoder, tower: States, teacher: States) -> torch.Tensor:
        """How far an encoder is from the teacher: [`distance`] of words or positions, and of the pooled outputs."""
        states = self.student_states(encoder, tower, teacher)
        answers, expected = states.sequence, teacher.sequence
        if states.word_ids is not teacher.word_ids:
            num_word_ids = int(teacher.word_ids.max()) + 1
            answers, answered = word_means(answers, states.word_ids, num_word_ids)
            expected, asked = word_means(expected, teacher.word_ids, num_word_ids)
            answers, expected = answers[answered & asked], expected[answered & asked]
        return distance(answers, expected) + distance(states.pooled, teacher.pooled)

    def finish(self, encoder: LoTLIPTextEncoder) -> None:
        """Makes an encoder give the teacher's own states, not standardised ones, and gives it the teacher's
        projection."""
        self.sequence_scale.undo(encoder.adapter)
        self.pooled_scale.undo(encoder.pooled_adapter)
        projection = getattr(self.teacher, "text_projection", None)
        if projection is not None:
            encoder.text_projection = projection
            encoder.config.projection_dim = projection.out_features

    def _measures(self, states: States, num_word_ids: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Means of the words [B, W, D], read-outs [B, Q, D] and pooled [B, D]; and which words there are [B, W]."""
        words, found = word_means(states.sequence, states.word_ids, num_word_ids)
        answers = (words[:, FIRST_WORD:], attention_readouts(states.sequence, self.queries), states.pooled)
        return dict(zip(MEASURES, answers, strict=True)), found[:, FIRST_WORD:]

    @torch.no_grad()
    def report(
        self, encoders: dict[str, LoTLIPTextEncoder], batches: Iterable[Batch], others: Iterable[Batch]
    ) -> Report:
        """
        How close unfinished encoders come to the teacher, on standardised states.

        Args:
            encoders: By name.
            batches: Prompts that were not trained on.
            others: The same in another order, for the answer "what another prompt says".

        Returns:
            For "mean" (of the training prompts), "another prompt" and each encoder: for "words", "read_outs" (of
            attention over the whole sequence, as a denoiser's) and "pooled" (before the projection): `error`, the
            squared error relative to that of the mean, and `cosine`, around the mean.
        """
        sums: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("mean", "another prompt", *encoders)}
        for batch, other in zip(batches, others, strict=True):
            teacher, tower = self.teacher_states(batch), self.tower_states(batch)
            num_word_ids = int(teacher.word_ids.max()) + 1
            expected, asked = self._measures(teacher, num_word_ids)
            states = [self.student_states(encoder, tower, teacher) for encoder in encoders.values()]
            answered = [self._measures(one, num_word_ids) for one in (self.teacher_states(other), *states)]
            knows_nothing = {kind: self.means[kind].expand_as(expected[kind]) for kind in MEASURES}
            for name, (answers, found) in zip(sums, ((knows_nothing, asked), *answered), strict=True):
                for kind in MEASURES:
                    both = asked & found if kind == "words" else slice(None)
                    new = closeness(answers[kind][both], expected[kind][both], self.means[kind])
                    sums[name][kind] = sums[name].get(kind, 0) + new
        return {
            name: {
                kind: {"error": (square / mean_square).item(), "cosine": (cosine / count).item()}
                for kind, (square, mean_square, cosine, count) in row.items()
            }
            for name, row in sums.items()
        }


def closeness(answers: torch.Tensor, targets: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """
    Sums over N answers [..., D], which add up over batches: squared errors, those of the mean target, which knows
    nothing of the text, cosines around the mean, and N. `mean` is [D], or [Q, D] of each of a text's Q answers.
    """
    answers, targets = answers.double() - mean, targets.double() - mean
    squares = (answers - targets).square().sum(), targets.square().sum()
    cosines = F.cosine_similarity(answers, targets, dim=-1)
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
    Trains the adapters of all encoders on the same batches, in an order that Python's `random` draws. A
    `KeyboardInterrupt` ends the training early.

    Args:
        encoders: By name; what is to be trained of them requires gradients.
        alignment: Of the teacher, and of the tower of the encoders.
        prompts: The prompts, which are shuffled in place.
        batch_size: Prompts in a batch.
        num_epochs: How often to see every prompt.
        learning_rate: The highest of AdamW, after a warmup; it falls as a cosine.

    Returns:
        The number of steps done, and the number of all.
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
    """A report as text."""
    lines = [" " * 16 + "".join(f"{name:>18}" for name in MEASURES), " " * 16 + "     error  cosine" * len(MEASURES)]
    for name, row in report.items():
        numbers = "".join(f"{row[measure]['error']:>10.3f}{row[measure]['cosine']:>8.3f}" for measure in MEASURES)
        lines.append(f"{name:<16}{numbers}")
    return "\n".join(lines)


def draw_report(report: Report, file: Path) -> None:
    """Draws the errors of a report as bars; an `ImportError` without matplotlib."""
    picture = figure(7, 3.5)
    axes, width = picture.subplots(), 1 / (len(report) + 1)
    for index, (name, row) in enumerate(report.items()):
        left = [measure + index * width for measure in range(len(MEASURES))]
        axes.bar(left, [row[measure]["error"] for measure in MEASURES], 0.9 * width, label=name)
    axes.set_xticks([measure + 0.4 for measure in range(len(MEASURES))], MEASURES)
    axes.set_ylabel("squared error on held-out prompts, mean = 1")
    axes.legend()
    save(picture, file)
