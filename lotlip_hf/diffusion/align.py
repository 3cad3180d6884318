"""
Learning to give out another text encoder's states: what to match where two tokenizers cut a text into different
tokens, and how close it came. `examples/align_text_encoder.py` trains with it.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..modeling.calls_lotlip import for_one_call
from ..modeling.modeling_lotlip import LoTLIPTextModel
from .text_encoder import LoTLIPTextEncoder

# Places that every text has; its words follow.
START, END, PADDING, FIRST_WORD = range(4)
WORD = r"[\w']+|[^\w\s']"
MEASURES = ("words", "read_outs", "pooled")
NUM_QUERIES = 64


class Batch(NamedTuple):
    """Token ids of B prompts and the place in its text of each token, all [B, L], L the tokenizer's full length."""

    teacher_ids: torch.Tensor
    teacher_places: torch.Tensor
    student_ids: torch.Tensor
    student_places: torch.Tensor


class States(NamedTuple):
    """What an encoder says of B prompts: sequence [B, L, D], the places of its tokens [B, L], pooled [B, D]."""

    sequence: torch.Tensor
    places: torch.Tensor
    pooled: torch.Tensor


class Words(NamedTuple):
    """A text's `input_ids` [L], padded to the tokenizer's length, and which place of the text each token is of [L]."""

    input_ids: list[int]
    places: list[int]


def tokenize_words(tokenizer: Any, text: str) -> Words | None:
    """
    Tokenises a text and tells which of its words each token is of. A word is a run of letters and digits or a
    punctuation mark; LoTLIP's separator is the full stop that it stands for. So texts of two tokenizers line up word
    by word.

    Args:
        tokenizer: LoTLIP's or any fast tokenizer that puts one token before and one behind the text.
        text: A text as [`lotlip_hf.modeling.tokenization_lotlip.clean`] leaves it.

    Returns:
        Ids and places: 0 for the first token, 1 for the last, 2 for padding, from 3 the words. `None` if the text is
        longer than the tokenizer's `model_max_length`, or if the tokenizer changes it so that its words are not found.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from lotlip_hf.diffusion.align import tokenize_words

    >>> tokenizer = AutoTokenizer.from_pretrained("checkpoint")  # doctest: +SKIP
    >>> tokenize_words(tokenizer, "Zebras graze. Why?").places[:9]  # zebra ##s graz ##e [SEP] why ?  # doctest: +SKIP
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
    places = iter([START, *(FIRST_WORD + word for word in words), END])
    return Words(inputs["input_ids"], [next(places) if is_text else PADDING for is_text in inputs["attention_mask"]])


def word_means(states: torch.Tensor, places: torch.Tensor, num_places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean state of each place of a text.

    Args:
        states: [B, L, D].
        places: [B, L], what [`tokenize_words`] says of each token.
        num_places: Number P of places; those from P on are left out.

    Returns:
        Means [B, P, D], 0 for a place without tokens, and which places have tokens [B, P].
    """
    members = (places.unsqueeze(-1) == torch.arange(num_places, device=places.device)).to(states.dtype)  # [B, L, P]
    counts = members.sum(1)
    means = members.transpose(1, 2) @ states / counts.clamp(min=1).unsqueeze(-1)
    return means, counts > 0


def attention_readouts(states: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """
    What each query reads off a sequence by attention, as a denoiser reads its prompt: the order of the states does not
    count, and each of them does, those of the padding too.

    Args:
        states: [B, L, D].
        queries: [Q, D].

    Returns:
        [B, Q, D]
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
        words = states.sequence[states.places >= FIRST_WORD]
        drawn = torch.randint(len(words), (NUM_QUERIES,), device=words.device)
        self.queries = F.normalize(words[drawn], dim=-1) * words.shape[-1] ** 0.5
        answers, found = self._measures(states, int(states.places.max()) + 1)
        self.means = {name: (answer[found] if name == "words" else answer).mean(0) for name, answer in answers.items()}

    @torch.no_grad()
    def _raw_states(self, batch: Batch) -> States:
        tower = getattr(self.teacher, "text_model", self.teacher)  # the name that it has beside a projection
        outputs = tower(batch.teacher_ids, output_hidden_states=True)
        sequence = outputs.last_hidden_state if self.target_layer == -1 else outputs.hidden_states[-2]
        return States(sequence, batch.teacher_places, outputs.pooler_output)

    def _standardize(self, states: States) -> States:
        return States(
            self.sequence_scale.standardize(states.sequence),
            states.places,
            self.pooled_scale.standardize(states.pooled),
        )

    def teacher_states(self, batch: Batch) -> States:
        """The teacher's states, standardised; pooled is before the projection."""
        return self._standardize(self._raw_states(batch))

    @torch.no_grad()
    def tower_states(self, batch: Batch) -> States:
        """The tower's states, which the adapters of all encoders start from."""
        outputs = self.tower(batch.student_ids, output_corner_embeds=False)
        return States(outputs.last_hidden_state, batch.student_places, outputs.pooler_output)

    def student_states(self, encoder: LoTLIPTextEncoder, tower: States, teacher: States) -> States:
        """An unfinished encoder's states. Those of a resampler stand where the teacher's tokens do."""
        sequence = encoder.adapt(tower.sequence, tower.places != PADDING)
        places = tower.places if encoder.config.output_length is None else teacher.places
        return States(sequence, places, encoder.pooled_adapter(tower.pooled))

    def loss(self, encoder: LoTLIPTextEncoder, tower: States, teacher: States) -> torch.Tensor:
        """
        How far an encoder is from the teacher: [`distance`] of the words or positions, and of the pooled outputs.

        Args:
            encoder: One without projection.
            tower: What `tower_states` says of some prompts.
            teacher: What `teacher_states` says of them.

        Returns:
            A scalar.
        """
        states = self.student_states(encoder, tower, teacher)
        answers, expected = states.sequence, teacher.sequence
        if states.places is not teacher.places:
            num_places = int(teacher.places.max()) + 1
            answers, answered = word_means(answers, states.places, num_places)
            expected, asked = word_means(expected, teacher.places, num_places)
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

    def _measures(self, states: States, num_places: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Means of the words [B, W, D], read-outs [B, Q, D] and pooled [B, D]; and which words there are [B, W]."""
        words, found = word_means(states.sequence, states.places, num_places)
        answers = (words[:, FIRST_WORD:], attention_readouts(states.sequence, self.queries), states.pooled)
        return dict(zip(MEASURES, answers, strict=True)), found[:, FIRST_WORD:]

    @torch.no_grad()
    def report(
        self, encoders: dict[str, LoTLIPTextEncoder], batches: Iterable[Batch], others: Iterable[Batch]
    ) -> dict[str, dict[str, dict[str, float]]]:
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
            num_places = int(teacher.places.max()) + 1
            expected, asked = self._measures(teacher, num_places)
            states = [self.student_states(encoder, tower, teacher) for encoder in encoders.values()]
            answered = [self._measures(one, num_places) for one in (self.teacher_states(other), *states)]
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
    Sums over N answers, which add up over batches. The mean target is what knows nothing of the text.

    Args:
        answers: [..., D].
        targets: [..., D].
        mean: [D], or [Q, D] where each of the Q answers of a text has its own.

    Returns:
        [4], float64: the answers' squared errors, those of the mean, cosines around the mean, and N.
    """
    answers, targets = answers.double() - mean, targets.double() - mean
    squares = (answers - targets).square().sum(), targets.square().sum()
    cosines = F.cosine_similarity(answers, targets, dim=-1)
    return torch.stack([*squares, cosines.sum(), torch.ones_like(cosines).sum()])
