"""Embeddings of a folder of images or a file of texts in a Parquet file; an interrupted run goes on where it was."""

import hashlib
import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .data.readers import KINDS, column_of, every_row, value_of
from .encoder import Encoder, warn_of_cut_texts
from .files import PARTIAL, check_output, printable, replacing, set_aside_no_folder
from .search import build_index
from .store import CUT, WHOLE, EmbeddingStore

logger = logging.getLogger(__name__)

# Rows of the Parquet file that are in memory at a time.
WRITE_BLOCK = 1024
TEXT_FILES = (".txt", *(extension for extension, kind in KINDS.items() if kind != "webdataset"))


def embed_images(
    encoder: Encoder,
    folder: str | os.PathLike,
    output: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[int, dict[str, str]]:
    """
    Writes the embeddings of a folder's images to a Parquet file with the columns `file` and `embedding`.

    `file` is relative to the folder. Until the file is complete, what is computed is kept in `<output>.partial/`, and
    the same call goes on from there. The model's name and the encoder's fingerprint are in the schema's metadata.

    Args:
        encoder ([`Encoder`]): the dual encoder.
        folder (`str` or `os.PathLike`): the folder.
        output (`str` or `os.PathLike`): the Parquet file.
        image_root (`str` or `os.PathLike`, *optional*, defaults to `folder`):
            The folder that links in `folder` must not lead out of.
        batch_size (`int`, *optional*, defaults to 32): images in a batch.
        overwrite (`bool`, *optional*, defaults to `False`): whether `output` may be replaced.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `tuple[int, dict[str, str]]`: how many images were written; those skipped, relative to the folder, with the
        reasons.

    Raises:
        ValueError, OSError: as `check_output` and [`~lotlip_hf.search.build_index`].
    """
    check_output(output, overwrite=overwrite)
    partial = _partial_folder(output)
    index = build_index(
        encoder, folder, index_folder=partial, image_root=image_root, batch_size=batch_size, progress=progress
    )
    with index.store as store:

        def batches() -> Iterator[tuple[list[str], np.ndarray]]:
            for start in range(0, len(index.files), WRITE_BLOCK):
                names = [
                    os.fsencode(name).decode(errors="backslashreplace") for name in index.files[start:][:WRITE_BLOCK]
                ]
                yield names, store.vectors(index.places[start : start + WRITE_BLOCK])

        _write_parquet(output, "file", batches(), encoder, store)
    shutil.rmtree(partial)
    return len(index.files), index.skipped


def embed_texts(
    encoder: Encoder,
    file: str | os.PathLike,
    output: str | os.PathLike,
    *,
    column: str = "text",
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """
    Writes the embeddings of a file's texts, in its order, to a Parquet file with the columns `text` and `embedding`.

    Interruptions and metadata as in `embed_images`. A text that is there more than once is encoded once.

    Args:
        encoder ([`Encoder`]): the dual encoder.
        file (`str` or `os.PathLike`): the texts, see `read_texts`.
        output (`str` or `os.PathLike`): the Parquet file.
        column (`str`, *optional*, defaults to `"text"`): the texts' column.
        batch_size (`int`, *optional*, defaults to 64): texts of full length in a batch.
        overwrite, progress: as in `embed_images`.

    Returns:
        `int`: how many texts were written.

    Raises:
        ValueError, OSError: as `check_output` and `read_texts`.
    """
    check_output(output, overwrite=overwrite)
    partial = _partial_folder(output)
    # To the end: what is wrong with the file shows before the long work.
    digests = Counter(_digest(text) for text in read_texts(file, column))
    if not digests:
        raise _no_texts(file)

    made_by = encoder.fingerprint("text")
    with EmbeddingStore(partial, made_by, encoder.dim) as store:
        known = store.held(digests).places
        keys: list[str] = []

        def new_texts() -> Iterator[str]:
            seen = set(known)
            for text in read_texts(file, column):
                if (key := _digest(text)) not in seen:
                    seen.add(key)
                    keys.append(key)
                    yield text

        total = len(digests) - len(known)
        try:
            with store.adding(batch_size) as add:
                for index, embedding, was_cut in encoder.iterate_texts(
                    new_texts(), batch_size=batch_size, progress=progress and total > 0, total=total
                ):
                    add(keys[index], embedding.numpy(), CUT if was_cut else WHOLE)
        except KeyboardInterrupt:
            kept = len(store.held(digests).places)
            logger.warning(
                "Interrupted: %d embeddings are kept in %s; the same command goes on from there.", kept, store.path
            )
            raise
        held = store.held(digests)
        # Of the whole file, what an interrupted run encoded included.
        cut = sum(digests[key] for key, stamp in held.stamps.items() if stamp == CUT)
        warn_of_cut_texts(cut, digests.total(), encoder.max_text_length)

        def batches() -> Iterator[tuple[list[str], np.ndarray]]:
            texts = read_texts(file, column)
            while block := list(itertools.islice(texts, WRITE_BLOCK)):
                missing = [text for text in block if _digest(text) not in held.places]
                if missing:
                    raise ValueError(
                        f"{file}: changed while it was read, {missing[0][:50]!r} is new; run the same again."
                    )
                yield block, store.vectors([held.places[_digest(text)] for text in block])

        _write_parquet(output, "text", batches(), encoder, store)
    shutil.rmtree(partial)
    return digests.total()


def check_texts(file: str | os.PathLike, column: str = "text") -> None:
    """
    Finds out before a model is loaded whether a file has texts, by the first of them.

    Args:
        file, column: as in `read_texts`.

    Raises:
        ValueError, OSError: as `read_texts`, and if there is none.
    """
    if next(read_texts(file, column), None) is None:
        raise _no_texts(file)


def _no_texts(file: str | os.PathLike) -> ValueError:
    return ValueError(f"{file}: no texts in this file.")


def read_texts(file: str | os.PathLike, column: str = "text") -> Iterator[str]:
    """
    Reads texts one by one.

    Args:
        file (`str` or `os.PathLike`):
            UTF-8 with a text on each line, an empty line being an empty text (`.txt`); an object on each line
            (`.jsonl`) or a list of them (`.json`); `.csv` or `.tsv` with a header; or `.parquet`.
        column (`str`, *optional*, defaults to `"text"`):
            The texts' column, or the way to a value in it (`conversations[1].value`), except in `.txt`. Of a list each
            text is one.

    Yields:
        `str`: the texts in order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another kind, or damaged, or has no such column, or a value is not a text.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix.lower() not in TEXT_FILES:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(TEXT_FILES)}.")
    row = 0
    try:
        for row, value in enumerate(_values(path, column), 1):
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str):
                    found = "nothing" if text is None else printable(repr(text)[:50])
                    raise ValueError(f"{path}, row {row}: expected a text in {column!r}, got {found}.")
                text.encode()  # lone surrogates, which JSON can hold, are no text
                yield text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"{path}, about row {row}: not valid Unicode ({error.reason}).") from error


def _values(path: Path, column: str) -> Iterator[Any]:
    """The values of a file's texts, row by row."""
    if path.suffix.lower() == ".txt":
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                yield line.removesuffix("\n")
        return
    # images may be in the other columns
    for row, values in enumerate(every_row(path, [column], texts=[column]), 1):
        if column_of(column, values) is None:
            found = ", ".join(map(repr, values)) or "none"
            raise ValueError(f"{path}, row {row}: no column {column!r} (--column); found {found}.")
        yield value_of(values, column)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _partial_folder(output: str | os.PathLike) -> Path:
    folder = Path(f"{os.fspath(output)}{PARTIAL}")
    set_aside_no_folder(folder)
    return folder


def _write_parquet(
    output: str | os.PathLike,
    column: str,
    batches: Iterable[tuple[list[str], np.ndarray]],
    encoder: Encoder,
    store: EmbeddingStore,
) -> None:
    """Writes the file, whole or not at all."""
    schema = pa.schema(
        [(column, pa.string()), ("embedding", pa.list_(pa.float32(), store.dim))],
        metadata={"model": encoder.name, "fingerprint": store.made_by},
    )
    with replacing(Path(output)) as file, pq.ParquetWriter(file, schema) as writer:
        for values, rows in batches:
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), store.dim)
            writer.write_batch(pa.record_batch([pa.array(values, pa.string()), embeddings], schema=schema))
