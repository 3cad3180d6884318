"""The ids of a file, and the records that have them."""

import codecs
import hashlib
import os
from array import array
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..files import open_regular, printable
from .records import ids_of

logger = logging.get_logger(__name__)

MAX_LINE = 1 << 20  # bytes


class KeptIds:
    """
    The ids of a text file, one a line, as `lotlip curate` writes it. Memory holds a digest of 8 bytes for each.

    Args:
        file (`str` or `os.PathLike`): File. Empty lines are left out.

    Attributes:
        digests (`np.ndarray`): Sorted digests of the ids.
        digest (`str`): Digest of all ids, the same in any order.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If the file has no id.
    """

    def __init__(self, file: str | os.PathLike) -> None:
        self.file = os.fspath(file)
        found = array("Q")
        with open_regular(file) as opened:
            opened.seek(3 if opened.read(3) == codecs.BOM_UTF8 else 0)
            for line in iter(lambda: opened.readline(MAX_LINE), b""):
                if one := line.rstrip(b"\r\n"):
                    found.append(digest_of(one))
        if not found:
            raise ValueError(f"`keep`: {printable(self.file)} has no ids. Write one a line.")
        self.digests = np.unique(np.frombuffer(found, np.uint64))
        self.digest = hashlib.blake2b(self.digests.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.digests)

    def __contains__(self, record_id: object) -> bool:
        digest = np.uint64(digest_of(str(record_id)))
        index = np.searchsorted(self.digests, digest)
        return bool(index < len(self.digests) and self.digests[index] == digest)


def digest_of(record_id: bytes | str) -> int:
    """Returns a number of 64 bits for an id."""
    record_id = record_id.encode(errors="surrogatepass") if isinstance(record_id, str) else record_id
    return int.from_bytes(hashlib.blake2b(record_id, digest_size=8).digest(), "big")


def keep_records(records: Dataset | IterableDataset, ids: KeptIds) -> Dataset | IterableDataset:
    """
    Returns the records with the ids of a file, in their order. Damaged shards of a stream remain, so that they are
    reported.

    Args:
        records (`Dataset` or `IterableDataset`): Records.
        ids (`KeptIds`): The ids.

    Returns:
        `Dataset` or `IterableDataset`: The kept records.

    Raises:
        `ValueError`: If a table has none of the ids.
    """
    if isinstance(records, IterableDataset):
        return records.filter(_is_kept, fn_kwargs={"ids": ids})
    kept: list[int] = []
    found: set[str] = set()
    first = None
    for index, record_id in enumerate(ids_of(records)):
        first = first or record_id
        if record_id in ids:
            kept.append(index)
            found.add(record_id)
    if not kept:
        raise ValueError(
            f"`keep`: none of the {len(ids):,} ids of {printable(ids.file)} is in the data, whose first id is "
            f"{printable(first)}. Read the data with the columns with which the ids were written."
        )
    if len(found) < len(ids):
        logger.warning(
            f"`keep`: {len(ids) - len(found):,} of the {len(ids):,} ids of {printable(ids.file)} are not in the data."
        )
    return cast(Dataset, records.select(kept))


def _is_kept(record: Mapping[str, Any], ids: KeptIds) -> bool:
    return bool(record.get("is_shard")) or record["id"] in ids
