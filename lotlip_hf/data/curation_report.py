"""The report of a curation: tables, a JSON file and a plot."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..plots import COLOURS, figure, save, wrapped
from ..terminal import text_table
from .curation import Curation, probabilities

HEAD = 10  # entries in the tables
FACTORS = (1 / 100, 1 / 10, 1, 10, 100)  # of t


def tail_of(counts: Sequence[int], t: float) -> dict[str, float]:
    """
    Describes the tail for one t.

    Args:
        counts (`Sequence[int]`): Matches of each entry.
        t (`float`): Number of matches.

    Returns:
        `dict[str, float]`: `t`, the number of entries with at least one and fewer than t matches (`tail`), their share
        of the entries with a match (`share`), and the expected share of matches that keep their record (`matches`).
    """
    matched = [count for count in counts if count]
    tail = sum(count < t for count in matched)
    kept = sum(min(count, t) for count in matched)
    return {"t": t, "tail": tail, "share": tail / max(1, len(matched)), "matches": kept / max(1, sum(matched))}


def report(curation: Curation, t: float) -> dict[str, Any]:
    """
    Returns the numbers of a curation, for JSON.

    Args:
        curation (`Curation`): Result of [`curate`].
        t (`float`): Number of matches from which on matches were drawn.

    Returns:
        `dict[str, Any]`: Numbers of `records` and `entries`, the `head`: the entries with most matches, and the `tail`
        for several t.
    """
    counts, kept = curation.counts, curation.kept_counts
    order = sorted(range(len(counts)), key=lambda entry: -counts[entry])[:HEAD]
    chances = probabilities(counts, t)
    head = [
        {"entry": curation.entries[one], "matches": counts[one], "probability": chances[one], "kept": kept[one]}
        for one in order
        if counts[one]
    ]
    return {
        "records": {"read": sum(curation.records.values()), **curation.records},
        "entries": {"all": len(counts), "matched": sum(map(bool, counts)), "matches": sum(counts), "kept": sum(kept)},
        "head": head,
        "tail": [tail_of(counts, t * factor) for factor in FACTORS],
    }


def tables(numbers: dict[str, Any]) -> str:
    """Returns the result of [`report`] as tables, with a blank line between them."""
    total = max(1, numbers["records"]["read"])
    names = {"unmatched": "without a match", "dropped": "dropped by the draw"}
    records = [
        [names.get(name, name), f"{number:,}", f"{number / total:.1%}"] for name, number in numbers["records"].items()
    ]
    head = [
        [one["entry"], f"{one['matches']:,}", f"{one['probability']:.2%}", f"{one['kept']:,}"]
        for one in numbers["head"]
    ]
    tail = [
        [f"{one['t']:,.15g}", f"{one['tail']:,}", f"{one['share']:.1%}", f"{one['matches']:.1%}"]
        for one in numbers["tail"]
    ]
    return "\n\n".join(
        [
            text_table([["records", "number", "share"]], records),
            text_table([["most matches", "matches", "probability", "in kept records"]], head),
            text_table([["t", "tail entries", "share of entries", "matches that keep"]], tail, left=[]),
        ]
    )


def plot(curation: Curation, t: float, file: str | os.PathLike) -> None:
    """
    Draws the matches of each entry in all and in the kept records.

    Args:
        curation (`Curation`): Result of [`curate`].
        t (`float`): Number of matches from which on matches were drawn.
        file (`str` or `os.PathLike`): Picture file to write.

    Raises:
        `ImportError`, `ValueError`, `OSError`: See [`~lotlip_hf.plots.save`].
    """
    picture = figure(7, 4)
    axes = picture.subplots()
    before = np.array(curation.counts)
    order = np.argsort(-before, kind="stable")[: int((before > 0).sum())]
    ranks = np.arange(1, len(order) + 1)
    axes.loglog(ranks, before[order], color=COLOURS[1], label=f"all {sum(curation.records.values()):,} records")
    kept = np.array(curation.kept_counts, dtype=float)[order]
    axes.loglog(ranks, kept, ".", color=COLOURS[3], ms=3, label=f"{curation.records['kept']:,} kept records")
    axes.axhline(t, color="grey", lw=0.8, ls="--", label=f"t = {t:,.15g}")
    axes.set(xlabel="entries, ordered by their matches", ylabel="matches in the texts")
    axes.set_title(wrapped("Matches of each entry before and after balancing", 70))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(picture, file)
