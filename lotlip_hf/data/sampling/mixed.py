"""Mixed: the short text is the raw short caption or, by probability, a rewrite of it, as in LaCLIP and VeCLIP."""

from dataclasses import dataclass, replace
from random import Random

from ..record import Record, Texts
from .sub_captions import SubCaptions

MIN_WORDS = 2


@dataclass(frozen=True)
class Mixed(SubCaptions):
    """
    Draws the long texts as [`SubCaptions`] does, and the short text from several captions: the short caption with
    `short_probability`, else one of the record's `rewrites`, or without rewrites a sub-caption of a long caption.

    If the drawn text has fewer than two words, separated by white space, or the record has neither rewrites nor long
    captions, the short text is the short caption. For LaCLIP's uniform draw from the short caption and R rewrites, the
    probability is 1 / (1 + R). The other arguments are those of [`SubCaptions`].

    Args:
        short_probability (`float`, *optional*, defaults to 0.5): Probability of the short caption.

    Raises:
        `ValueError`: If an option is out of range or, when called, if a record lacks a caption in `captioners`.

    Example:

    ```python
    >>> from random import Random
    >>> from lotlip_hf.data.sampling import Mixed

    >>> record = {"image": "cat.jpg", "id": "cat.jpg", "short_caption": "IMG_7.jpg", "long_captions": []}
    >>> record["rewrites"] = ["a grey cat", "a cat that sleeps"]
    >>> (texts,) = Mixed(num_long_texts=0, short_probability=0.0)([record], [Random(0)])
    >>> texts.short in record["rewrites"]
    True
    ```
    """

    short_probability: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.short_probability <= 1:
            raise ValueError(f"`short_probability` must be in [0, 1], got {self.short_probability}.")

    def _draw(self, record: Record, rng: Random) -> Texts:
        texts = super()._draw(record, rng)
        if rng.random() < self.short_probability:
            return texts
        if rewrites := record.get("rewrites"):
            drawn = rng.choice(rewrites)
        else:
            drawn = SubCaptions._draw(replace(self, num_long_texts=1), record, rng).long[0]
        return texts if len(drawn.split()) < MIN_WORDS else texts._replace(short=drawn)
