"""Writes the embeddings of a folder of images or a file of texts to a Parquet file; interrupted runs resume."""

import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .data.readers import KINDS, column_of, every_row, value_of
from .encoder import Encoder, warn_of_cut_texts
from .files import PARTIAL, check_output, printable, replacing, set_aside_unless_folder
from .images import ImageError, find_images, image_digest
from .search import build_index
from .states import FrozenStates
from .store import CUT, WHOLE, EmbeddingStore, text_digest
from .terminal import progress_bar

logger = logging.getLogger(__name__)

WRITE_BLOCK = 1024  # rows of the Parquet file in memory at a time
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

    `file` is the path relative to the folder. The metadata of the schema contain the name of the model and the
    fingerprint of the encoder. Embeddings are saved in `<output>.partial/` until the file is complete, so the same
    call resumes after an interruption.

    Args:
        encoder (`Encoder`): Dual encoder.
        folder (`str` or `os.PathLike`): Folder of images, with its subfolders.
        output (`str` or `os.PathLike`): Parquet file to write.
        image_root (`str` or `os.PathLike`, *optional*, defaults to `folder`): Links to files outside of this folder
            are not followed.
        batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
        overwrite (`bool`, *optional*, defaults to `False`): Whether `output` may be replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `tuple[int, dict[str, str]]`: Number of images written, and the reason for each skipped image, by its path
        relative to the folder.

    Raises:
        `ValueError`: If the folder has no readable image.
        `OSError`: If the folder does not exist, or `output` exists or cannot be written.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.embed import embed_images

    >>> written, skipped = embed_images(load_encoder("checkpoint"), "photos", "photos.parquet")
    ```
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
                yield names, store.vectors(index.locations[start : start + WRITE_BLOCK])

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
    Writes the embeddings of a file's texts to a Parquet file with the columns `text` and `embedding`.

    The rows are in the order of the file. A repeated text is encoded once. Metadata and interruptions are handled as
    in [`embed_images`].

    Args:
        encoder (`Encoder`): Dual encoder.
        file (`str` or `os.PathLike`): File of texts; see [`read_texts`] for the formats.
        output (`str` or `os.PathLike`): Parquet file to write.
        column (`str`, *optional*, defaults to `"text"`): Column of the texts.
        batch_size (`int`, *optional*, defaults to 64): Number of texts of maximum length in a batch; batches of
            shorter texts are larger.
        overwrite (`bool`, *optional*, defaults to `False`): Whether `output` may be replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `int`: Number of texts written.

    Raises:
        `ValueError`: If the file has no texts or cannot be parsed.
        `OSError`: If the file does not exist, or `output` exists or cannot be written.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.embed import embed_texts

    >>> _ = Path("texts.txt").write_text("A cat on a sofa.\\nA dog in the snow.\\n")
    >>> embed_texts(load_encoder("checkpoint"), "texts.txt", "texts.parquet")
    2
    ```
    """
    check_output(output, overwrite=overwrite)
    partial = _partial_folder(output)
    # Reads the whole file once, to find errors before the long work.
    digests = Counter(text_digest(text) for text in read_texts(file, column))
    if not digests:
        raise _no_texts(file)

    made_by = encoder.fingerprint("text")
    with EmbeddingStore(partial, made_by, encoder.dim) as store:
        known = store.held(digests).locations
        keys: list[str] = []

        def new_texts() -> Iterator[str]:
            seen = set(known)
            for text in read_texts(file, column):
                if (key := text_digest(text)) not in seen:
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
            kept = len(store.held(digests).locations)
            logger.warning(
                "Interrupted: %d embeddings are kept in %s. Run the same command to resume.", kept, store.path
            )
            raise
        held = store.held(digests)
        # Counts all texts of the file, also those that an interrupted run encoded.
        cut = sum(digests[key] for key, stamp in held.stamps.items() if stamp == CUT)
        warn_of_cut_texts(cut, digests.total(), encoder.max_text_length)

        def batches() -> Iterator[tuple[list[str], np.ndarray]]:
            texts = read_texts(file, column)
            while block := list(itertools.islice(texts, WRITE_BLOCK)):
                missing = [text for text in block if text_digest(text) not in held.locations]
                if missing:
                    raise ValueError(
                        f"{file}: changed during the run, {missing[0][:50]!r} is new. Run the same command again."
                    )
                yield block, store.vectors([held.locations[text_digest(text)] for text in block])

        _write_parquet(output, "text", batches(), encoder, store)
    shutil.rmtree(partial)
    return digests.total()


def keep_image_states(
    states: FrozenStates,
    folder: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[int, int, dict[str, str]]:
    """
    Fills the cache with the pooled states of a folder's images, for training with a frozen image tower.

    Args:
        states (`FrozenStates`): States of the image tower.
        folder (`str` or `os.PathLike`): Folder of images, with its subfolders.
        image_root (`str` or `os.PathLike`, *optional*, defaults to `folder`): Links to files outside of this folder
            are not followed.
        batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `tuple[int, int, dict[str, str]]`: Number of images in the cache, number of those that were computed, and the
        reason for each skipped image, by its path relative to the folder.

    Raises:
        `OSError`: If the folder does not exist, or the cache cannot be written.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.embed import keep_image_states
    >>> from lotlip_hf.states import FrozenStates

    >>> states = FrozenStates(load_encoder("checkpoint"), "image", "cache")
    >>> count, computed, skipped = keep_image_states(states, "photos")
    ```
    """
    files, skipped = find_images(folder, image_root)
    names: list[str] = []
    keys: list[str] = []
    for name in progress_bar(files, desc="Reading images", unit="image", shown=progress, delay=2):
        try:
            keys.append(image_digest(Path(folder, name)))
            names.append(name)
        except ImageError as error:
            skipped[name] = error.reason

    def fail(index: int, error: ImageError) -> None:
        skipped.update((name, error.reason) for name, key in zip(names, keys, strict=True) if key == keys[index])

    computed = states.fill_images(
        keys, lambda index: Path(folder, names[index]), fail, batch_size=batch_size, progress=progress
    )
    return len(files.keys() - skipped), computed, dict(sorted(skipped.items()))


def keep_text_states(
    states: FrozenStates,
    file: str | os.PathLike,
    *,
    column: str = "text",
    batch_size: int = 64,
    progress: bool = True,
) -> int:
    """
    Fills the cache with the pooled states of a file's texts, for training with a frozen text tower.

    Args:
        states (`FrozenStates`): States of the text tower.
        file (`str` or `os.PathLike`): File of texts; see [`read_texts`] for the formats.
        column (`str`, *optional*, defaults to `"text"`): Column of the texts.
        batch_size (`int`, *optional*, defaults to 64): Number of texts of maximum length in a batch.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `int`: Number of texts in the file.

    Raises:
        `ValueError`: If the file cannot be parsed.
        `OSError`: If the file does not exist, or the cache cannot be written.
    """
    number = 0
    with progress_bar(desc="Encoding texts", unit="text", shown=progress) as bar:
        texts = read_texts(file, column)
        while block := list(itertools.islice(texts, WRITE_BLOCK)):
            states.fill_texts(block, batch_size=batch_size)
            number += len(block)
            bar.update(len(block))
    return number


def check_texts(file: str | os.PathLike, column: str = "text") -> None:
    """
    Checks before a model is loaded that a file has texts, by reading the first one.

    Args:
        file (`str` or `os.PathLike`): File of texts; see [`read_texts`] for the formats.
        column (`str`, *optional*, defaults to `"text"`): Column of the texts.

    Raises:
        `ValueError`: If the file has no texts or cannot be parsed.
        `OSError`: If the file cannot be read.
    """
    if next(read_texts(file, column), None) is None:
        raise _no_texts(file)


def _no_texts(file: str | os.PathLike) -> ValueError:
    return ValueError(f"{file}: the file has no texts.")


def read_texts(file: str | os.PathLike, column: str = "text") -> Iterator[str]:
    """
    Reads the texts of a file one by one.

    Args:
        file (`str` or `os.PathLike`): UTF-8 file with one text on each line (`.txt`; an empty line is an empty text),
            one JSON object on each line (`.jsonl`), a list of JSON objects (`.json`), a table with a header (`.csv`,
            `.tsv`), or `.parquet`.
        column (`str`, *optional*, defaults to `"text"`): Column of the texts, or the path of a value in it
            (`conversations[1].value`). Ignored for `.txt`. If the value is a list, each item is a text.

    Yields:
        `str`: The texts, in order.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the file has another extension, is damaged, has no such column, or a value is not a text.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix.lower() not in TEXT_FILES:
        raise ValueError(f"{path}: not a file of texts. Pass a file that ends in {', '.join(TEXT_FILES)}.")
    row = 0
    try:
        for row, value in enumerate(_values(path, column), 1):
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str):
                    found = "nothing" if text is None else printable(repr(text)[:50])
                    raise ValueError(
                        f"{path}, row {row}: expected a text in {column!r}, got {found}. Pass another --column."
                    )
                text.encode()  # raises an error for half a surrogate pair, which JSON allows
                yield text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"{path}, about row {row}: not valid Unicode ({error.reason}). Save as UTF-8.") from error


def _values(path: Path, column: str) -> Iterator[Any]:
    """Yields the value of `column` in each row, or each line of a `.txt` file."""
    if path.suffix.lower() == ".txt":
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                yield line.removesuffix("\n")
        return
    # Reads only this column: others may contain images.
    for row, values in enumerate(every_row(path, [column], texts=[column]), 1):
        if column_of(column, values) is None:
            found = ", ".join(map(repr, values)) or "none"
            raise ValueError(f"{path}, row {row}: no column {column!r}. Pass --column with one of: {found}.")
        yield value_of(values, column)


def embedding_schema(
    encoder: Encoder,
    fingerprint: str,
    dim: int,
    columns: Mapping[str, pa.DataType],
    kept: Mapping[str, pa.DataType] | None = None,
) -> pa.Schema:
    """
    Returns the schema of a file of embeddings. Its metadata have the keys `model`, `revision` and `fingerprint`.

    Args:
        encoder (`Encoder`): Dual encoder.
        fingerprint (`str`): Result of `encoder.fingerprint`.
        dim (`int`): Number P of dimensions.
        columns (`Mapping[str, pyarrow.DataType]`): Columns before `embedding`.
        kept (`Mapping[str, pyarrow.DataType]`, *optional*): Columns after `embedding`.

    Returns:
        `pyarrow.Schema`: The columns, `embedding` as float32 [P], and the metadata.
    """
    fields = {**columns, "embedding": pa.list_(pa.float32(), dim), **(kept or {})}
    made_by = {"model": encoder.name, "revision": encoder.revision or "", "fingerprint": fingerprint}
    return pa.schema(list(fields.items()), metadata=made_by)


def _partial_folder(output: str | os.PathLike) -> Path:
    folder = Path(f"{os.fspath(output)}{PARTIAL}")
    set_aside_unless_folder(folder)
    return folder


def _write_parquet(
    output: str | os.PathLike,
    column: str,
    batches: Iterable[tuple[list[str], np.ndarray]],
    encoder: Encoder,
    store: EmbeddingStore,
) -> None:
    """Writes the file under a temporary name, and renames it when it is complete."""
    schema = embedding_schema(encoder, store.made_by, store.dim, {column: pa.string()})
    with replacing(Path(output)) as file, pq.ParquetWriter(file, schema) as writer:
        for values, rows in batches:
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), store.dim)
            writer.write_batch(pa.record_batch([pa.array(values, pa.string()), embeddings], schema=schema))
