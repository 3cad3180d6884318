"""Embeddings on disk: an append-only store that survives interruptions, and the fingerprint of who made them."""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedConfig, PreTrainedModel

from .encoder import max_text_length
from .files import DAMAGED, is_own_file, open_no_link, own_folder, parse_json, replacing, set_aside
from .images import background_of, checked_background

logger = logging.getLogger(__name__)

# Part of every fingerprint. Raised when the same model comes to give another embedding of the same file or text.
FORMAT_VERSIONS = {"image": 3, "text": 1}
ENTRIES = "entries.jsonl"
EMBEDDINGS = re.compile(r"embeddings-(0|[1-9][0-9]{0,8})\.f32")
MAX_COMPACTIONS = 10**9
LOCK = "lock"
# Bytes of a line of the entries, far above the longest path and the longest reason
MAX_LINE = 1 << 20
MAX_DIMENSION = 1 << 16
# Rows that are read at a time to be checked.
CHECK_BLOCK = 16384
# How names of an image tower's weights begin, in transformers' models and in open_clip's; what is neither of these nor
# of the similarities is the text tower's.
IMAGE_WEIGHTS = ("vision_model.", "visual_projection.", "open_clip.visual.")
SIMILARITY_WEIGHTS = ("logit_scale", "logit_bias", "open_clip.logit_scale", "open_clip.logit_bias")


class EmbeddingStore:
    """
    Embeddings in a folder, appended one by one; used as a context manager.

    `embeddings-<n>.f32` holds raw float32 rows. `entries.jsonl` holds a line per entry, written after its row; its
    line `{"dimension": P, "embeddings": file}` names the rows' file. What an interruption left half-written at the end
    is cut off on entering. A lock keeps other processes out; they wait.

    The folder may come with a data set. Only files of these names are opened, and no links; files that this
    class cannot have written are renamed, with a warning, and the store begins empty.

    Args:
        folder (`Path`): where the files are; made on entering.
        advice (`str`, *optional*): what the error says to do if the folder cannot be written to.
        root (`Path`, *optional*):
            The folder that the user named, by default `folder`'s parent. What lies between the two may not be a link.
        fields (`Mapping[str, type]`, *optional*): what each entry has, with its type.
        dimension (`int`, *optional*): of the embeddings, where it is known.

    Attributes:
        entries (`dict[str, dict]`):
            The latest entry of each key: its `row`, or why it has none as `error`, and the fields appended with it.
        rows (`int`): number of rows, those of superseded entries included.

    Raises:
        OSError: on entering or appending, if the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        advice: str = "choose a folder that can be written to",
        *,
        root: Path | None = None,
        fields: Mapping[str, type] | None = None,
        dimension: int | None = None,
    ) -> None:
        self.folder = folder
        self.advice = advice
        self.root = folder.parent if root is None else root
        self.fields = dict(fields or {})
        self.entries: dict[str, dict[str, Any]] = {}
        self.rows = 0
        self.dimension: int | None = None
        self._known_dimension = dimension
        self._embeddings_name = "embeddings-0.f32"
        self._lock = FileLock(folder / LOCK)
        self._entries_file: BinaryIO | None = None
        self._embeddings_file: BinaryIO | None = None

    def __enter__(self) -> "EmbeddingStore":
        try:
            own_folder(self.root, *self.folder.relative_to(self.root).parts)
            if not is_own_file(self.folder / LOCK):
                self._set_aside([LOCK], "its lock is a link or no file")
            try:
                self._lock.acquire(timeout=1)
            except Timeout:
                logger.warning("Waiting for another process that is writing to %s.", self.folder)
                self._lock.acquire()
            try:
                self._read()
            except _ForeignError as error:
                self._set_aside(self._names(), str(error))
                self._read()
            self._open()
        except OSError as error:
            self._close()
            reason = error.strerror or error
            raise OSError(f"{self.folder}: cannot keep embeddings there ({reason}); {self.advice}.") from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def append(self, key: str, embedding: np.ndarray | None, **fields: Any) -> None:
        """
        Adds an entry, which supersedes an earlier one of the same key.

        Args:
            key (`str`): what the entry is of.
            embedding (`np.ndarray`, *optional*): float32, of shape [P]; `None` for an entry without one.
            fields: anything to keep with it that JSON can hold; `error` says why there is no embedding.
        """
        if self._entries_file is None or self._embeddings_file is None:
            raise RuntimeError("enter the store first: `with EmbeddingStore(folder) as store`.")
        entry = dict(fields)
        if embedding is not None:
            if self.dimension is None:
                self.dimension = len(embedding)
                self._write(self._entries_file, _line(dimension=self.dimension, embeddings=self._embeddings_name))
            if embedding.shape != (self.dimension,):
                raise ValueError(
                    f"{self.folder}: expected an embedding of shape [{self.dimension}], got {list(embedding.shape)}; "
                    "what is kept there is of another model: remove that folder."
                )
            self._write(self._embeddings_file, np.ascontiguousarray(embedding, dtype="<f4").tobytes())
            entry["row"] = self.rows
            self.rows += 1
        self._write(self._entries_file, _line(key=key, **entry))
        self.entries[key] = entry

    def embeddings(self) -> np.ndarray:
        """All rows, of shape [rows, P], mapped from the file rather than read: usable after the store is left."""
        if self.rows == 0:
            return np.zeros((0, self.dimension or 0), dtype=np.float32)
        with self._opened(self._embeddings_name, "rb") as file:
            return np.memmap(file, "<f4", "r", shape=(self.rows, self.dimension or 0))

    def compact(self, keys: Iterable[str]) -> None:
        """Drops every entry but those of `keys`, and the rows that no entry names. Safe to interrupt."""
        rows = self.embeddings()
        number = int(self._embeddings_name.removeprefix("embeddings-").removesuffix(".f32")) + 1
        new_name = f"embeddings-{number % MAX_COMPACTIONS}.f32"
        kept: dict[str, dict[str, Any]] = {}
        count = 0
        # The replacement of the entries is the one step that counts: they name the file of their rows.
        with replacing(self.folder / ENTRIES) as entries:
            with self._opened(new_name, "xb") as embeddings:
                if self.dimension is not None:
                    entries.write(_line(dimension=self.dimension, embeddings=new_name))
                for key in keys:
                    entry = dict(self.entries[key])
                    if "row" in entry:
                        embeddings.write(rows[entry["row"]].tobytes())
                        entry["row"] = count
                        count += 1
                    entries.write(_line(key=key, **entry))
                    kept[key] = entry
            self._entries_file.close()  # pyright: ignore[reportOptionalMemberAccess]
            self._embeddings_file.close()  # pyright: ignore[reportOptionalMemberAccess]
        self.entries, self.rows, self._embeddings_name = kept, count, new_name
        self._open()

    def _names(self) -> list[str]:
        """The files of this store that are there, but for the lock."""
        return [name for name in os.listdir(self.folder) if name == ENTRIES or EMBEDDINGS.fullmatch(name)]

    def _opened(self, name: str, mode: str) -> BinaryIO:
        return open(self.folder / name, mode, opener=open_no_link)  # pyright: ignore[reportReturnType]

    def _set_aside(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            set_aside(self.folder / name)
        logger.warning(
            "%s: %s. These files are not used, their names now end in %s-...; what they are of is embedded again.",
            *(self.folder, reason, DAMAGED),
        )

    def _read(self) -> None:
        """Reads the entries up to the first that is damaged or whose row is missing, and cuts the files there."""
        self.entries, self.rows, self.dimension, self._embeddings_name = {}, 0, None, "embeddings-0.f32"
        for name in self._names():
            if not is_own_file(self.folder / name):
                raise _ForeignError(f"{name} is a link or no file")
        available = valid = 0
        with self._opened(ENTRIES, "a+b") as file:
            file.seek(0)
            while line := file.readline(MAX_LINE):
                try:
                    entry = parse_json(line)
                    if not line.endswith(b"\n") or not isinstance(entry, dict):
                        break
                    if "dimension" in entry:
                        available = self._read_header(entry)
                    elif not self._read_entry(entry, available):
                        break
                except ValueError:
                    break
                valid += len(line)
            if lost := os.fstat(file.fileno()).st_size - valid:
                logger.warning(
                    "%s: %d bytes at the end are incomplete; what they name is embedded again.", file.name, lost
                )
                file.truncate(valid)
        embeddings = self.embeddings()
        for start in range(0, self.rows, CHECK_BLOCK):
            if not np.isfinite(embeddings[start : start + CHECK_BLOCK]).all():
                raise _ForeignError(f"{self._embeddings_name} holds numbers that are not finite")

    def _read_header(self, entry: dict[str, Any]) -> int:
        """Takes the line that names the rows' file; returns how many rows that holds."""
        dimension, name = entry["dimension"], entry.get("embeddings")
        if type(dimension) is not int or not 0 < dimension <= MAX_DIMENSION or self.dimension is not None:
            raise _ForeignError(f"{ENTRIES} gives the dimension as {dimension!r}")
        if self._known_dimension not in (None, dimension):
            raise _ForeignError(f"its embeddings have {dimension} dimensions, the model's {self._known_dimension}")
        if not isinstance(name, str) or not EMBEDDINGS.fullmatch(name):
            raise _ForeignError(f"{ENTRIES} names {name!r} as the file of the embeddings")
        self.dimension, self._embeddings_name = dimension, name
        path = self.folder / name
        return path.stat().st_size // (4 * dimension) if path.exists() else 0

    def _read_entry(self, entry: dict[str, Any], available: int) -> bool:
        """Takes an entry as `append` writes it, if its row is there; returns whether it did."""
        key = entry.pop("key", None)
        if not isinstance(key, str) or any(type(entry.get(name)) is not kind for name, kind in self.fields.items()):
            return False
        if "row" in entry:
            if type(entry["row"]) is not int or entry["row"] != self.rows or self.rows >= available:
                return False
            self.rows += 1
        elif not isinstance(entry.get("error"), str):
            return False
        self.entries[key] = entry
        return True

    def _open(self) -> None:
        self._entries_file = self._opened(ENTRIES, "ab")
        self._embeddings_file = self._opened(self._embeddings_name, "ab")
        self._embeddings_file.truncate(self.rows * 4 * (self.dimension or 0))
        for leftover in self._names():
            if leftover not in (ENTRIES, self._embeddings_name):
                (self.folder / leftover).unlink()

    def _write(self, file: BinaryIO, data: bytes) -> None:
        try:
            file.write(data)
            file.flush()  # into the operating system's hands: there it survives this process
        except OSError as error:
            raise OSError(f"{self.folder}: cannot write ({error.strerror}).") from error

    def _close(self) -> None:
        for file in (self._entries_file, self._embeddings_file):
            if file is not None:
                with contextlib.suppress(OSError):  # of a full disk, which `_write` told of
                    file.close()
        self._entries_file = self._embeddings_file = None
        self._lock.release()


class _ForeignError(Exception):
    """Files that this class did not write; the message says what is wrong."""


def fingerprint(model: PreTrainedModel, processor: Any, modality: Literal["image", "text"]) -> str:
    """
    Names what makes embeddings of a modality: that tower's weights and configuration, and how its input is prepared.

    The same weights give the same fingerprint wherever they lie; other weights, in another dtype too, never do.

    Args:
        model (`PreTrainedModel`): the dual encoder.
        processor (`ProcessorMixin`): its processor.
        modality (`str`): `"image"` or `"text"`.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    if modality == "image":
        config = getattr(model.config, "vision_config", model.config)
        background = checked_background(background_of(processor))
        preparation = {**processor.image_processor.to_dict(), "background": background}
    else:
        config = getattr(model.config, "text_config", model.config)
        preparation = {
            **_tokenizer_settings(processor.tokenizer),
            "max_length": max_text_length(model, processor.tokenizer),
        }
    settings = {
        "version": FORMAT_VERSIONS[modality],
        "modality": modality,
        "config": _architecture(config.to_dict()),
        "preparation": {name: value for name, value in preparation.items() if value is not None},
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in _named_weights(model, modality):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Everything that decides on the token ids of a text."""
    origin = {"name_or_path", "is_local", "local_files_only", "processor_class", "backend"}
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, bool | int | str) and name not in origin and not name.endswith("_file")
    }
    if hasattr(tokenizer, "backend_tokenizer"):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two change with each call.
        settings["backend_tokenizer"] = {**backend, "truncation": None, "padding": None}
    else:
        settings["vocabulary"] = tokenizer.get_vocab()
    return settings


def _named_weights(model: PreTrainedModel, modality: Literal["image", "text"]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a tower; of a model with other names all but those on the similarities."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in SIMILARITY_WEIGHTS}
    of_images = {name for name in weights if name.startswith(IMAGE_WEIGHTS)}
    for name in sorted(weights):
        if not of_images or (name in of_images) == (modality == "image"):
            yield name, weights[name]


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says beyond the settings of every configuration, which come and go with transformers."""
    general = PreTrainedConfig().to_dict().keys() | {"transformers_version", "_name_or_path", "architectures", "dtype"}
    return {
        name: _architecture(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if (name not in general or name == "model_type") and not name.startswith("_") and value is not None
    }


def _line(**entry: Any) -> bytes:
    return json.dumps(entry).encode() + b"\n"
