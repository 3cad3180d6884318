"""Composed search: the image of a query becomes a word of a text, "a photo of [$] that CHANGE"."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .encoder import Encoder, warn_of_cut_texts
from .engines.torch import TorchEngine, evaluating
from .files import FileError, read_tensors, write_tensors
from .prompts import find_words, word_vectors

FILE = "composer.safetensors"
PROMPT, CHANGE = "a photo of {}", " that {}"


class Composer(nn.Module):
    """
    Maps the embedding of an image to the embedding of a word (RTD, https://arxiv.org/abs/2406.09188): an MLP of three
    layers with GELU. Inputs have components of size 1: the embedding is normalised, times the square root of its size.

    Args:
        embedding_size (`int`): Number P of dimensions of the embeddings.
        word_size (`int`): Number of dimensions of word embeddings of the text tower.
        hidden_size (`int`, *optional*, defaults to `4 * embedding_size`): Width of the hidden layers.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.compose import Composer

    >>> Composer(embedding_size=512, word_size=768)(torch.randn(2, 512)).shape
    torch.Size([2, 768])
    ```
    """

    def __init__(self, embedding_size: int, word_size: int, hidden_size: int | None = None) -> None:
        super().__init__()
        hidden_size = hidden_size or 4 * embedding_size
        self.layers = nn.Sequential(
            nn.Linear(embedding_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, word_size),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, P] embeddings of images or texts, of any length -> [B, word_size] embeddings of words."""
        return self.layers(F.normalize(embeddings, dim=-1) * embeddings.shape[-1] ** 0.5)

    @torch.inference_mode()
    def query(self, encoder: Encoder, image: np.ndarray, change: str) -> np.ndarray:
        """
        Encodes an image with a change in words, to search for.

        Args:
            encoder (`Encoder`): Encoder of the model, in PyTorch.
            image (`np.ndarray`): Embedding [P] of the image.
            change (`str`): The change, such as "is asleep".

        Returns:
            `np.ndarray`: Embedding [P], normalised.

        Raises:
            `ValueError`: If the change is empty.

        Example:

        ```python
        >>> from lotlip_hf import load_encoder
        >>> from lotlip_hf.compose import Composer

        >>> encoder = load_encoder("checkpoint")
        >>> composer = Composer(encoder.dim, encoder.engine.model.text_model.get_input_embeddings().embedding_dim)
        >>> image = encoder.encode_images(["photos/cat.png"], progress=False)[0].numpy()
        >>> query = composer.query(encoder, image, "is asleep")
        ```
        """
        if not change.strip():
            raise ValueError("The description is empty. Pass a change of the image, or leave it out.")
        engine = torch_engine(encoder)
        with evaluating(engine.model):
            words = self(torch.from_numpy(image)[None].to(engine.device))
            (query,), cut = composed_features(engine, words, [change])
        warn_of_cut_texts(cut, 1, engine.max_text_length)
        return query.cpu().numpy()

    def save(self, folder: str | Path) -> None:
        """Writes `composer.safetensors` in the folder of a model."""
        write_tensors(Path(folder) / FILE, {name: weight.float() for name, weight in self.state_dict().items()})


def torch_engine(encoder: Encoder) -> TorchEngine:
    """Returns the engine of an encoder. Raises a `ValueError` if it is not PyTorch's."""
    if not isinstance(encoder.engine, TorchEngine):
        raise ValueError(f"{encoder.name}: a composed query needs a model of transformers, not an export.")
    return encoder.engine


def load_composer(folder: str | Path, encoder: Encoder) -> Composer | None:
    """
    Reads the composer of a model, to the device of the model.

    Args:
        folder (`str` or `Path`): Folder of the model.
        encoder (`Encoder`): Encoder of the model, in PyTorch.

    Returns:
        `Composer` or `None`: The composer, or `None` if the folder has none.

    Raises:
        `ValueError`: If the file is damaged, larger than 256 MiB, or of a model of other sizes.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.compose import load_composer

    >>> load_composer("checkpoint", load_encoder("checkpoint")) is None
    True
    ```
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    engine = torch_engine(encoder)
    weights, _ = read_tensors(path)
    words = engine.model.text_model.get_input_embeddings().embedding_dim
    hidden = weights.get("layers.0.bias", torch.empty(0)).numel()
    size = encoder.dim  # computed, which must not be on the device below
    with torch.device("meta"):
        composer = Composer(size, words, hidden or None)
    expected = {name: weight.shape for name, weight in composer.state_dict().items()}
    if {name: weight.shape for name, weight in weights.items()} != expected:
        reason = f"not the composer of a model with embeddings of size {size} and words of size {words}"
        raise FileError(path, f"{reason}. Train one with examples/compose_queries.py, or delete the file")
    weights = {name: weight.float() for name, weight in weights.items()}
    composer.load_state_dict(weights, assign=True)
    return composer.eval().requires_grad_(False).to(engine.device)


def composed_features(
    engine: TorchEngine, words: torch.Tensor, changes: Sequence[str | None]
) -> tuple[torch.Tensor, int]:
    """
    Computes the embeddings of "a photo of [$] that CHANGE". Gradients reach the words and the text tower.

    Args:
        engine (`TorchEngine`): Engine of LoTLIP or a stock dual encoder, such as CLIP or SigLIP.
        words (`torch.Tensor`): Word embeddings [B, word_size] in place of [$].
        changes (`Sequence[str | None]`): Changes of B images. Without a change, the text is "a photo of [$]".

    Returns:
        `tuple[torch.Tensor, int]`: Embeddings [B, P], normalised, and how many texts were cut at the maximum length.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.compose import Composer, composed_features

    >>> encoder = load_encoder("checkpoint")
    >>> composer = Composer(encoder.dim, encoder.engine.model.text_model.get_input_embeddings().embedding_dim)
    >>> images = encoder.encode_images(["photos/cat.png"], progress=False)
    >>> embeddings, cut = composed_features(encoder.engine, composer(images), ["is asleep"])
    ```
    """
    ends = ["" if change is None else CHANGE.format(change) for change in changes]
    cut = 0

    def tokens_of(word: str) -> dict[str, list[list[int]]]:
        nonlocal cut
        tokens, was_cut = engine.tokenize([PROMPT.format(word) + end for end in ends], engine.max_text_length)
        cut = sum(was_cut)
        return tokens

    inputs, at = find_words(engine, tokens_of, 1)
    with word_vectors(engine.model, at, words):
        return engine.text_embeds(inputs), cut


def text_features(engine: TorchEngine, texts: Sequence[str]) -> torch.Tensor:
    """
    Computes the embeddings of texts, with gradients for the text tower.

    Args:
        engine (`TorchEngine`): Engine of LoTLIP or a stock dual encoder, such as CLIP or SigLIP.
        texts (`Sequence[str]`): B texts, which are cut at the maximum length.

    Returns:
        `torch.Tensor`: Embeddings [B, P], normalised.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.compose import text_features

    >>> text_features(load_encoder("checkpoint").engine, ["a cat"]).requires_grad
    True
    ```
    """
    tokens, _ = engine.tokenize([*texts], engine.max_text_length)
    return engine.text_embeds(engine.on_device(engine.pad(tokens)))


def contrastive_loss(queries: torch.Tensor, targets: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """
    RTD's loss of B queries and their targets as one set: each of the 2 B embeddings is a class for all others, and its
    partner is the right one.

    Args:
        queries (`torch.Tensor`): Embeddings [B, P], of any length.
        targets (`torch.Tensor`): Embeddings [B, P].
        temperature (`float`, *optional*, defaults to 0.07): Divides the cosines.

    Returns:
        `torch.Tensor`: The mean over the 2 B embeddings.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.compose import contrastive_loss

    >>> contrastive_loss(torch.eye(2), torch.eye(2)).item() < 1e-5
    True
    ```
    """
    both = F.normalize(torch.cat([queries, targets]), dim=-1)
    logits = (both @ both.T / temperature).fill_diagonal_(float("-inf"))
    partners = torch.arange(len(both), device=both.device).roll(len(queries))
    return F.cross_entropy(logits, partners)
