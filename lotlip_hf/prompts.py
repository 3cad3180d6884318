"""Learnt prompts: vectors in place of word embeddings, in the texts of a frozen dual encoder."""

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from .data.augment import Augment, crop_size, load_augmented
from .encoder import Encoder
from .engines.torch import TorchEngine, evaluating
from .files import FileError, parse_json, printable, read_tensors, write_tensors
from .images import ImageSource
from .terminal import progress_bar

Position = Literal["end", "middle", "front"]

# Pairs of words of one token each. The tokens that differ between two prompts are those of the vectors.
PLACEHOLDERS = (("x", "y"), ("a", "the"), ("a", "of"))
TEXT_CHUNK = 64  # prompts that the text tower reads together
DEVIATION = 0.02  # of random vectors, as in CoOp
# SGD of CoOp (configs/trainers/CoOp and Dassl): momentum, weight decay, and the rate of the first epoch
MOMENTUM, WEIGHT_DECAY, WARMUP_RATE = 0.9, 5e-4, 1e-5
EPOCHS = ((8, 200), (2, 100), (1, 50))  # from this number of pictures a class
MAX_PROMPTS = 1 << 20  # classes times groups of a file
# Settings in a file, which are arguments of the classes
SETTINGS = {"class_specific": bool, "init": str | None, "position": str, "num_context": int}
MIXED_SETTINGS = {"groups": list, "top_k": int}


@contextlib.contextmanager
def word_vectors(model: Any, at: torch.Tensor, vectors: torch.Tensor) -> Iterator[None]:
    """
    Context in which vectors replace the word embeddings of some tokens. The model reads token ids as usual, so that
    positions, masks and pooled tokens are those of the ids. Gradients reach the vectors.

    Args:
        model (`PreTrainedModel`): LoTLIP or another dual encoder with a `text_model`, such as CLIP or SigLIP.
        at (`torch.Tensor`): Bool [N, L] in the shape of the token ids: the tokens that are replaced.
        vectors (`torch.Tensor`): Vectors [n, width] in the order of the n tokens, row by row.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.prompts import word_vectors

    >>> engine = load_encoder("checkpoint").engine
    >>> inputs = engine.on_device(engine.pad(engine.tokenize(["a cat"], 16)[0]))
    >>> at = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    >>> at[0, 1] = True
    >>> vectors = torch.zeros(1, engine.model.text_model.get_input_embeddings().embedding_dim, requires_grad=True)
    >>> with word_vectors(engine.model, at, vectors):
    ...     features = engine.model.get_text_features(**inputs).pooler_output
    ```
    """

    def replace(module: torch.nn.Module, args: Any, embeds: torch.Tensor) -> torch.Tensor:
        return embeds.masked_scatter(at.reshape(*embeds.shape[:-1], 1), vectors.to(embeds))

    handle = model.text_model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def find_words(
    engine: TorchEngine, tokens_of: Callable[[str], dict[str, list[list[int]]]], number: int
) -> tuple[dict[str, Tensor], Tensor]:
    """
    Returns the padded tokens [N, L] of N texts, and the bool mask [N, L] of a word that is `number` times in each: the
    tokens that differ if the word is another. `tokens_of` returns the unpadded tokens for a word. Raises a
    `ValueError` if the tokenizer splits the words.
    """
    for pair in PLACEHOLDERS:
        one, other = map(tokens_of, pair)
        if [len(ids) for ids in one["input_ids"]] != [len(ids) for ids in other["input_ids"]]:
            continue
        inputs, others = (engine.on_device(engine.pad(tokens)) for tokens in (one, other))
        at = inputs["input_ids"] != others["input_ids"]
        if (at.sum(1) == number).all():
            return inputs, at
    raise ValueError(
        f"The tokenizer of {engine.name} splits the words {PLACEHOLDERS}, so that vectors have no position."
    )


class _Prompts(nn.Module):
    """What prompts of one context and of several have in common: the model, the class names and the file."""

    def __init__(self, encoder: Encoder, class_names: Sequence[str], settings: dict[str, Any]) -> None:
        super().__init__()
        if isinstance(class_names, str) or not class_names:
            raise ValueError(f"`class_names` is {class_names!r}. Pass a list of names, such as ['cat', 'dog'].")
        engine = encoder.engine
        if not isinstance(engine, TorchEngine) or not hasattr(engine.model, "text_model"):
            raise ValueError(
                f"{encoder.name} (--model) has no text tower in PyTorch, which learnt prompts need. Pass a checkpoint "
                "of a LoTLIP, CLIP or SigLIP."
            )
        self.encoder, self.engine = encoder, engine
        self.class_names, self.settings = list(class_names), settings

    @property
    def logit_scale(self) -> Tensor:
        """Factor of the cosine similarities, a scalar."""
        return self.engine.model.logit_scale.detach().float().exp()

    def loss(self, image_embeds: Tensor, labels: Tensor) -> Tensor:
        """
        Computes the cross entropy of the classes.

        Args:
            image_embeds (`torch.Tensor`): Normalised image embeddings [N, P].
            labels (`torch.Tensor`): Indices of their classes, [N].

        Returns:
            `torch.Tensor`: Scalar, with a gradient for the vectors.
        """
        return F.cross_entropy(self(image_embeds), labels)

    def save(self, file: str | os.PathLike) -> None:
        """
        Writes the vectors, the class names and the names of the model to a safetensors file of a few KB.

        Args:
            file (`str` or `os.PathLike`): The file. An existing file is replaced.

        Raises:
            `OSError`: If the file cannot be written.
        """
        metadata = {
            "class_names": self.class_names,
            "settings": self.settings,
            "model": self.encoder.name,
            "fingerprint": self.encoder.fingerprints(),
        }
        write_tensors(file, self.state_dict(), {name: json.dumps(value) for name, value in metadata.items()})

    def describe(self) -> dict[str, Any]:
        """Returns the settings and a digest of the weights, for the protocol of an evaluation."""
        digest = hashlib.blake2b(save({name: one.cpu() for name, one in self.state_dict().items()}), digest_size=16)
        return {**self.settings, "digest": digest.hexdigest()}


class PromptedClasses(_Prompts):
    """
    Classes whose prompts contain learnt vectors in place of words (CoOp, Zhou et al., 2022): `[v] ... [v] cat.` The
    vectors are the only parameters. Their gradient passes through the text tower, which is frozen.

    Args:
        encoder (`Encoder`): LoTLIP, CLIP or SigLIP in PyTorch.
        class_names (`Sequence[str]`): C class names.
        num_context (`int`, *optional*, defaults to 16): Number M of vectors. With `init`, its number of tokens.
        class_specific (`bool`, *optional*, defaults to `False`): Whether each class has vectors of its own.
        init (`str`, *optional*): Words that the vectors start from, such as `"a photo of a"`, or a template with `{}`
            for the class, which takes the place of `position`. By default the vectors are drawn from a normal
            distribution.
        position (`str`, *optional*, defaults to `"end"`): Where the class name is: `"end"`, `"middle"` or `"front"`.

    Raises:
        `ValueError`: If the model has no text tower in PyTorch, a prompt is longer than its texts, or an argument is
            wrong.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.prompts import PromptedClasses

    >>> encoder = load_encoder("checkpoint")
    >>> prompts = PromptedClasses(encoder, ["cat", "dog"], init="a photo of a")
    >>> prompts.class_embeddings().shape == (2, encoder.dim)
    True
    ```
    """

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        num_context: int = 16,
        class_specific: bool = False,
        init: str | None = None,
        position: Position = "end",
    ) -> None:
        settings = {"class_specific": class_specific, "init": init, "position": position}
        super().__init__(encoder, class_names, settings)
        if position not in ("end", "middle", "front"):
            raise ValueError(f"`position` (--position) is {position!r}. Pass end, middle or front.")
        words = (init or "").strip()
        if "{}" in words:
            parts = [part.strip() for part in words.removesuffix(".").split("{}")]
            if len(parts) != 2:
                raise ValueError(f"`init` (--init) is {init!r}. Pass a template with one {{}} for the class.")
            before, after = map(self._count, parts)
            words = " ".join(filter(None, parts))
        else:
            num_context = num_context if init is None else self._count(words)
            before = {"end": num_context, "middle": num_context // 2, "front": 0}[position]
            after = num_context - before
        num_context = settings["num_context"] = before + after
        if not 1 <= num_context <= encoder.max_text_length:
            raise ValueError(
                f"`num_context` or words (--num-context, --init, --groups) give {num_context} vectors. Use at least 1 "
                f"and fewer than the {encoder.max_text_length} tokens of a text."
            )
        self.inputs, self.at = self._find(before, after)
        device = self.engine.model.device
        embedding = self.engine.model.text_model.get_input_embeddings()
        if init is None:
            count = len(self.class_names) if class_specific else 1
            vectors = torch.randn(count, num_context, embedding.embedding_dim) * DEVIATION
        else:  # the words in front of the name, whatever the position
            ids = self._tokenize([f"{words} {self.class_names[0]}."])["input_ids"][0]
            start = self._find(num_context, 0)[1][0].nonzero()[:, 0]
            with torch.no_grad():
                vectors = embedding(torch.tensor(ids, device=device))[start].float().cpu()
            vectors = vectors.expand(len(self.class_names) if class_specific else 1, -1, -1)
        self.vectors = nn.Parameter((vectors if class_specific else vectors[0]).to(device).clone())

    def class_embeddings(self) -> Tensor:
        """
        Computes the embeddings of the classes, with a gradient for the vectors.

        Returns:
            `torch.Tensor`: Normalised embeddings [C, P] in float32, on the device of the model.
        """
        model, vectors = self.engine.model, self.vectors
        if not self.settings["class_specific"]:
            vectors = vectors.expand(len(self.class_names), -1, -1)
        embeds = []
        with evaluating(model), torch.set_grad_enabled(self.vectors.requires_grad and torch.is_grad_enabled()):
            for start in range(0, len(vectors), TEXT_CHUNK):
                chunk = slice(start, start + TEXT_CHUNK)
                inputs = {name: values[chunk] for name, values in self.inputs.items()}
                with word_vectors(model, self.at[chunk], vectors[chunk].flatten(0, 1)):
                    embeds.append(self.engine.text_embeds(inputs))
        return torch.cat(embeds)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """
        Computes the logits of the classes.

        Args:
            image_embeds (`torch.Tensor`): Normalised image embeddings [N, P].

        Returns:
            `torch.Tensor`: Logits [N, C]: the cosine similarities, times the scale of the model.
        """
        return self.logit_scale * image_embeds.to(self.at.device) @ self.class_embeddings().T

    def _tokenize(self, texts: list[str]) -> dict[str, list[list[int]]]:
        """Tokens of prompts. Raises a `ValueError` if one is too long."""
        encoded, was_cut = self.engine.tokenize(texts, self.encoder.max_text_length)
        if any(was_cut):
            text = texts[was_cut.index(True)]
            raise ValueError(
                f"The prompt {text!r} is longer than {self.encoder.max_text_length} tokens. Use fewer vectors "
                "(--num-context), or a shorter class name."
            )
        return encoded

    def _count(self, words: str) -> int:
        """The number of tokens of words in front of a class name."""
        name = self.class_names[0]
        with_words, without = self._tokenize([f"{words} {name}.".strip(), f"{name}."])["input_ids"]
        return len(with_words) - len(without)

    def _find(self, before: int, after: int) -> tuple[dict[str, Tensor], Tensor]:
        """Padded tokens of the prompts, each [C, L], and the bool mask of the tokens that vectors replace."""

        def tokens_of(word: str) -> dict[str, list[list[int]]]:
            return self._tokenize(
                [" ".join([*before * [word], name, *after * [word]]) + "." for name in self.class_names]
            )

        return find_words(self.engine, tokens_of, before + after)


class MixedPrompts(_Prompts):
    """
    Classes with several learnt contexts, of which a router chooses some for each image (MoCoOp, Du et al., 2024). The
    logits of the chosen contexts are weighted by the router. A context starts from the first template of its group.

    Args:
        encoder (`Encoder`): LoTLIP, CLIP or SigLIP in PyTorch.
        class_names (`Sequence[str]`): C class names.
        groups (`Sequence[Sequence[str]]`): Templates with `{}` of each of G groups.
        top_k (`int`, *optional*, defaults to 1): Number of contexts for an image.
        gate_weight (`float`, *optional*, defaults to 1.0): Weight of the gating loss: the cross entropy between the
            router and the softmax of the similarities of the image to the templates of its class in each group.
        text_weight (`float`, *optional*, defaults to 1.0): Weight of the text loss: the contrast between the class
            embeddings of each context and those of the templates of its group. The paper's weights are not confirmed.

    Raises:
        `ValueError`: As [`PromptedClasses`].

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.prompts import MixedPrompts

    >>> encoder = load_encoder("checkpoint")
    >>> groups = [["a photo of a {}.", "a picture of a {}."], ["a drawing of a {}."]]
    >>> prompts = MixedPrompts(encoder, ["cat", "dog"], groups, top_k=2)
    >>> prompts(encoder.encode_images(["photos/cat.png"])).shape
    torch.Size([1, 2])
    ```
    """

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        groups: Sequence[Sequence[str]],
        top_k: int = 1,
        gate_weight: float = 1.0,
        text_weight: float = 1.0,
    ) -> None:
        groups = [list(group) for group in groups]
        super().__init__(encoder, class_names, {"groups": groups, "top_k": top_k})
        if not groups or not all(group and all("{}" in template for template in group) for group in groups):
            raise ValueError(f"`groups` (--groups) is {groups!r}. Pass lists of templates with {{}} for the class.")
        if not 1 <= top_k <= len(groups):
            raise ValueError(f"`top_k` (--top-k) is {top_k}. Pass 1 to {len(groups)}, the number of groups.")
        self.contexts = nn.ModuleList(PromptedClasses(encoder, class_names, init=group[0]) for group in groups)
        device = self.engine.model.device
        self.router = nn.Linear(encoder.dim, len(groups), device=device)
        self.gate_weight, self.text_weight = gate_weight, text_weight
        self._templates: Tensor | None = None

    def class_embeddings(self) -> Tensor:
        """Returns the normalised embeddings of the classes in each context, [G, C, P], with gradients."""
        return torch.stack([context.class_embeddings() for context in self.contexts])

    def template_embeddings(self) -> Tensor:
        """Returns the embeddings of the classes by the templates of each group, [G, C, P]; computed once."""
        if self._templates is None:
            means = []
            for group in self.settings["groups"]:
                texts = [template.replace("{}", name) for name in self.class_names for template in group]
                embeds = self.encoder.encode_texts(texts, progress=False)
                means.append(F.normalize(embeds.unflatten(0, (-1, len(group))).mean(1), dim=-1))
            self._templates = torch.stack(means).to(self.router.weight.device)
        return self._templates

    def forward(self, image_embeds: Tensor) -> Tensor:
        """As [`PromptedClasses.forward`]."""
        return self._mix(image_embeds.to(self.router.weight.device), self.class_embeddings())

    def loss(self, image_embeds: Tensor, labels: Tensor) -> Tensor:
        """As [`PromptedClasses.loss`], with the gating loss and the text loss."""
        classes, templates = self.class_embeddings(), self.template_embeddings()
        own = torch.einsum("np,gnp->ng", image_embeds, templates[:, labels])
        gate = F.cross_entropy(self.router(image_embeds), (self.logit_scale * own).softmax(-1))
        pairs = self.logit_scale * classes @ templates.mT  # [G, C, C]
        each = torch.arange(len(self.class_names), device=pairs.device).repeat(len(pairs))
        text = F.cross_entropy(pairs.flatten(0, 1), each)
        loss = F.cross_entropy(self._mix(image_embeds, classes), labels)
        return loss + self.gate_weight * gate + self.text_weight * text

    def _mix(self, image_embeds: Tensor, classes: Tensor) -> Tensor:
        """Logits [N, C] from the class embeddings [G, C, P]."""
        scores, chosen = self.router(image_embeds).topk(self.settings["top_k"])  # [N, k]
        logits = self.logit_scale * torch.einsum("np,gcp->ngc", image_embeds, classes)
        logits = logits.gather(1, chosen.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))  # [N, k, C]
        return (scores.softmax(-1).unsqueeze(-1) * logits).sum(1)


def load_prompts(file: str | os.PathLike, encoder: Encoder) -> PromptedClasses | MixedPrompts:
    """
    Reads learnt prompts.

    Args:
        file (`str` or `os.PathLike`): File of [`PromptedClasses.save`] or `lotlip prompts`.
        encoder (`Encoder`): The encoder that the prompts were learnt with.

    Returns:
        [`PromptedClasses`] or [`MixedPrompts`]: The prompts. `class_embeddings()` are the embeddings of the classes.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If the file is damaged, or its prompts were learnt with another model.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.prompts import PromptedClasses, load_prompts

    >>> encoder = load_encoder("checkpoint")
    >>> PromptedClasses(encoder, ["cat", "dog"]).save("prompts.safetensors")
    >>> load_prompts("prompts.safetensors", encoder).class_names
    ['cat', 'dog']
    ```
    """
    tensors, metadata = read_tensors(file)
    try:
        names, settings, model, fingerprint = (
            parse_json(metadata[name]) for name in ("class_names", "settings", "model", "fingerprint")
        )
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise ValueError("it has no class names")
        if not all(one.dtype == torch.float32 for one in tensors.values()):
            raise ValueError("its vectors are not in float32")
        kind = MixedPrompts if "groups" in settings else PromptedClasses
        arguments = _checked(settings, MIXED_SETTINGS if kind is MixedPrompts else SETTINGS)
        if len(names) * len(arguments.get("groups", "1")) > MAX_PROMPTS:
            raise ValueError(f"it has {len(names)} classes")
        if kind is PromptedClasses:
            num_context = arguments["num_context"]
            shape = (len(names), num_context) if arguments["class_specific"] else (num_context,)
            if tensors["vectors"].shape[:-1] != shape:
                raise ValueError(f"its vectors are {list(tensors['vectors'].shape)}")
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(file, f"not learnt prompts ({printable(error)})") from error
    if fingerprint != encoder.fingerprints():
        raise ValueError(
            f"{printable(os.fspath(file))} (--prompts) was learnt with {printable(model)}, but {encoder.name} has "
            "other weights, dtype or processor. Pass that model, or run `lotlip prompts` with this one."
        )
    # The shapes for one class, before memory for all classes is allocated
    expected = {name: one.shape for name, one in kind(encoder, names[:1], **arguments).state_dict().items()}
    if arguments.get("class_specific"):
        expected["vectors"] = torch.Size([len(names), *expected["vectors"][1:]])
    if {name: one.shape for name, one in tensors.items()} != expected:
        raise FileError(file, "its tensors do not fit the model")
    prompts = kind(encoder, names, **arguments)
    prompts.load_state_dict(tensors)
    return prompts.requires_grad_(False)


def _checked(settings: Any, types: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, which must have these names and types."""
    if not isinstance(settings, dict) or settings.keys() != types.keys():
        raise ValueError(f"its settings are {settings!r:.200}")
    for name, kind in types.items():
        if not isinstance(settings[name], kind) or (kind is int and isinstance(settings[name], bool)):
            raise ValueError(f"`{name}` is {settings[name]!r:.200}")
    for group in settings.get("groups", ()):
        if not isinstance(group, list) or not all(isinstance(template, str) for template in group):
            raise ValueError(f"`groups` has {group!r:.200}")
    return settings


class FewShots(NamedTuple):
    """Indices of the images of a few-shot split: to learn from, and held out."""

    learnt: list[int]
    held_out: list[int]


def few_shots(labels: Sequence[int], shots: int, seed: int = 0) -> FewShots:
    """
    Draws a few images of each class, and as many others that are held out.

    Args:
        labels (`Sequence[int]`): Class of each image, [I].
        shots (`int`): Number of images of a class to learn from. A class with fewer gives all.
        seed (`int`, *optional*, defaults to 0): Seed of the draw. That of a class does not depend on other classes.

    Returns:
        [`FewShots`]: Indices in `labels`, sorted. Up to `shots` images of a class are held out, if it has more.

    Example:

    ```python
    >>> from lotlip_hf.prompts import few_shots

    >>> [len(part) for part in few_shots([0, 0, 0, 1, 1, 1], shots=2)]
    [4, 2]
    ```
    """
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(int(label), []).append(index)
    learnt, held_out = [], []
    for label, indices in of_class.items():
        Random(f"{seed} {label}").shuffle(indices)
        learnt += indices[:shots]
        held_out += indices[shots : 2 * shots]
    return FewShots(sorted(learnt), sorted(held_out))


def learn_prompts(
    prompts: PromptedClasses | MixedPrompts,
    images: Sequence[ImageSource] | Tensor,
    labels: Sequence[int],
    *,
    epochs: int | None = None,
    learning_rate: float = 0.002,
    batch_size: int = 32,
    augment: Augment | None = None,
    held_out: tuple[Tensor, Sequence[int]] | None = None,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """
    Learns prompts from a few labelled images, in place, as CoOp does: by SGD with a cosine schedule and an epoch of
    warm-up. The model does not change. Without `augment`, the image tower reads each image once.

    Args:
        prompts (`PromptedClasses` or `MixedPrompts`): The prompts.
        images (`Sequence[ImageSource]` or `torch.Tensor`): N images, or without `augment` their normalised embeddings
            [N, P].
        labels (`Sequence[int]`): Index of the class of each image, [N].
        epochs (`int`, *optional*): Number of passes over the images. Defaults to 200 for 8 or more images of a class,
            100 for 2 or more, and 50 for 1.
        learning_rate (`float`, *optional*, defaults to 0.002): Highest learning rate.
        batch_size (`int`, *optional*, defaults to 32): Number of images in a step.
        augment (`Augment`, *optional*): Random changes of the images, such as the crop and flip of CoOp:
            `Augment(crop=0.08, flip=0.5)`.
        held_out (`tuple[torch.Tensor, Sequence[int]]`, *optional*): Embeddings [H, P] and labels of other images.
        patience (`int`, *optional*): Number of epochs without a higher accuracy of `held_out` after which learning
            stops. The vectors of the best epoch are kept. By default, those of the last epoch are.
        seed (`int`, *optional*, defaults to 0): Seed of the order and the changes of the images.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[dict[str, float]]`: For each epoch its `epoch`, `learning_rate`, `loss` and, with `patience`, the
        `accuracy` of the held-out images.

    Raises:
        `ValueError`: If `patience` is passed without `held_out`, or a loss is not finite.
        `ImageError`: If an image cannot be read.
    """
    if patience is not None and (held_out is None or not len(held_out[1])):
        raise ValueError("`patience` (--patience) needs held-out images: classes with more images than --shots.")
    device = prompts.engine.model.device
    shots = max(Counter(labels).values())
    epochs = epochs or next(epochs for least, epochs in EPOCHS if shots >= least)
    targets = torch.tensor([int(label) for label in labels], device=device)
    if augment is None:
        is_embedded = isinstance(images, Tensor)
        images = images if is_embedded else prompts.encoder.encode_images(images, progress=progress)
        images = images.to(device)
    parameters = list(prompts.parameters())
    optimizer = torch.optim.SGD(parameters, lr=WARMUP_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    best = _accuracy(prompts, held_out) if patience is not None and held_out is not None else 0.0
    kept, waited, log = _copied(prompts), 0, []
    with progress_bar(range(epochs), desc="Learning prompts", unit="epoch", shown=progress) as bar:
        for epoch in bar:
            rate = _rate(epoch, epochs, learning_rate)
            optimizer.param_groups[0]["lr"] = rate
            losses = []
            for batch in torch.randperm(len(targets), generator=generator).split(batch_size):
                if augment is None:
                    embeds = images[batch]
                else:
                    embeds = _augmented(prompts, images, batch.tolist(), augment, seed, epoch)
                loss = prompts.loss(embeds, targets[batch])
                if not loss.isfinite():
                    raise ValueError(f"The loss is {loss.item()}. Lower `learning_rate` (--learning-rate).")
                optimizer.zero_grad()
                loss.backward(inputs=parameters)  # no gradients of the frozen towers
                optimizer.step()
                losses.append(loss.item() * len(batch))
            log.append({"epoch": epoch + 1, "learning_rate": rate, "loss": sum(losses) / len(targets)})
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}")
            if patience is None or held_out is None:
                continue
            log[-1]["accuracy"] = accuracy = _accuracy(prompts, held_out)
            waited += 1
            if accuracy > best:
                best, kept, waited = accuracy, _copied(prompts), 0
            elif waited == patience:
                break
    if patience is not None:
        prompts.load_state_dict(kept)
    return log


def _rate(epoch: int, epochs: int, highest: float) -> float:
    """The learning rate of an epoch, from 0: that of the warm-up in the first, and then a cosine."""
    return WARMUP_RATE if epoch == 0 else highest * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def _augmented(
    prompts: PromptedClasses | MixedPrompts,
    images: Sequence[ImageSource],
    batch: list[int],
    augment: Augment,
    seed: int,
    epoch: int,
) -> Tensor:
    """Normalised embeddings [B, P] of changed images."""
    engine = prompts.engine
    size = crop_size(engine.image_processor) if augment.crop else None
    pixels = [
        load_augmented(
            images[index],
            f"images[{index}]",
            augment=augment,
            rng=Random(f"{seed} {epoch} {index}"),
            size=size,
            image_processor=engine.image_processor,
            background=engine.background,
        )[0]
        for index in batch
    ]
    inputs = {name: np.concatenate([np.asarray(one[name]) for one in pixels]) for name in pixels[0]}
    return engine.embed("image", inputs).clone()  # a normal tensor, unlike one of inference mode


@torch.no_grad()
def _accuracy(prompts: PromptedClasses | MixedPrompts, held_out: tuple[Tensor, Sequence[int]]) -> float:
    """Share of the images whose class has the highest logit."""
    embeds, labels = held_out
    return (prompts(embeds).argmax(-1).cpu() == torch.tensor([int(label) for label in labels])).float().mean().item()


def _copied(prompts: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in prompts.state_dict().items()}
