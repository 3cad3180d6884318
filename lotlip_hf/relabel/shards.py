"""Writes the shards of relabelled records, in the format of `records.load_records`, and their statistics."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..data.record import OPTIONAL, VECTORS, distinct
from ..data.records import COLUMNS
from ..data.sentences import split_sentences
from ..files import replacing, write_json
from ..images import ImageError, image_extensions, image_source, readable_formats
from .captioners.base import ROLES, CaptionerConfig, published_name
from .card import COUNTED, num_tokens, shard_statistics
from .chunks import Chunk, journal_path, open_journal, shard_path, sidecar_path
from .config import RelabelConfig
from .journal import NONE, DamagedError, changed, read_json
from .storage import Storage, as_text, digest, file_of, long_captions, raw_caption, writable

# Maximum rows and bytes of images in a row group, which writers and readers keep in memory
ROW_GROUP, ROW_GROUP_BYTES = 100, 1 << 27
# Extensions of formats that PIL knows by several extensions, and of MPO, the JPEG files of some cameras
EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "TIFF": ".tif"}
TEXTS = List(Value("string"))
FIELDS = {"id": Value("string"), "image": ImageFeature(), "short_caption": Value("string"), "long_captions": TEXTS}
CAPTION = {
    **dict.fromkeys(("model", "revision", "prompt", "settings"), Value("string")),
    **dict.fromkeys(("attempts", "tokens", "sub_captions"), Value("int64")),
    **dict.fromkeys(("reasons", "earlier_reasons"), TEXTS),
    "dropped": Value("string"),
}
# Further fields of runs that read texts or write other fields than long captions
ROLE_FIELDS = {name: COLUMNS[kind] for name, kind in OPTIONAL.items() if name not in VECTORS}
ROLE_CAPTION = {"input": Value("string"), "role": Value("string")}

# Form (see `fits`) of a sidecar
COUNTS = {str: int}
SIDECAR = {
    "records": str,
    "skipped": [dict],
    "statistics": {
        "images": int,
        "raw": {"tokens": COUNTS, "sub_captions": COUNTS},
        "captioners": [
            {
                **dict.fromkeys(("dropped", "asked_again"), int),
                **dict.fromkeys(("tokens", "sub_captions", "marked", "dropped_for", "mended"), COUNTS),
            }
        ],
    },
    "revisions": [(str, NONE)],
}


def write_chunk(config: RelabelConfig, chunk: Chunk, storage: Storage, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a chunk with its captions as a shard, and its statistics; then deletes its journals."""
    journals = [open_journal(config, chunk, number) for number in range(len(config.captioners))]
    details: list[list[dict[str, Any]]] = []
    raw: list[str] = []
    skipped: list[dict[str, Any]] = []

    def rows() -> Iterator[dict[str, Any]]:
        for record, *captions in zip(chunk.records, *(journal.captions() for journal in journals), strict=True):
            texts = _answers("long", captions, config) if config.writes_long else long_captions(record)
            caption = raw_caption(record)
            sentences = (sentence for text in texts for sentence in split_sentences(text))
            short_caption = caption or next(sentences, "")
            reason = next((caption["skip"] for caption in captions if "skip" in caption), None)
            path = image_source(record["image"]).path
            name = None if path is None else as_text(storage.name(path))
            entry = {"id": as_text(storage.without_folders(str(record["id"]))), "image": name}
            image: dict[str, Any] | str = reason or _image(record["image"], captions, config, storage)
            if isinstance(image, str):
                skipped.append({**entry, "reason": image})
                continue
            described = [
                _describe(options, journal.header["revision"], caption, tokenizer, config.uses_texts)
                for options, journal, caption in zip(config.captioners, journals, captions, strict=True)
            ]
            details.append(described)
            if not short_caption:
                reason = "no long caption was kept, and there is no raw caption"
                what = [{name: one[name] for name in ("model", "reasons", "dropped")} for one in described]
                skipped.append({**entry, "reason": reason, "captions": what})
                continue
            if caption:
                raw.append(caption)
            yield {
                "id": entry["id"],
                "image": image,
                "short_caption": short_caption,
                "long_captions": texts,
                **(_role_fields(record, captions, config) if config.uses_texts else {}),
                "captions": described,
            }

    with replacing(shard_path(config, chunk.name)) as file:
        write_shard(file, rows(), config, chunk.name)
        images = len(details) - sum("captions" in one for one in skipped)
        sidecar = {
            **chunk.header(),
            "skipped": skipped,
            "statistics": shard_statistics(details, images, raw, config, tokenizer),
            "revisions": [journal.header["revision"] for journal in journals],
        }
        # Write the sidecar before the shard, because a chunk with a shard counts as finished.
        write_json(sidecar_path(config, chunk.name), sidecar)
    for journal in journals:
        journal.path.unlink(missing_ok=True)  # `run._write_the_rest` deletes the journals of killed processes


def _answers(role: str, captions: Sequence[Mapping[str, Any]], config: RelabelConfig) -> list[str]:
    """Returns the answers of the captioners with a role; empty for dropped ones."""
    answers = zip(config.captioners, captions, strict=True)
    return [caption.get("text", "") for options, caption in answers if options.role == role]


def _role_fields(
    record: Mapping[str, Any], captions: Sequence[Mapping[str, Any]], config: RelabelConfig
) -> dict[str, Any]:
    """Returns the other fields of a record: the new texts of each role in the run, and the rest as it was."""
    fields: dict[str, Any] = {name: record.get(name) for name in ROLE_FIELDS}
    fields["regions"] = [{**region, "text": writable(region["text"])} for region in fields["regions"] or ()]
    fields["group"] = writable(fields["group"] or "") or None
    for role in {options.role for options in config.captioners} - {"long"}:
        texts = (text for answer in _answers(role, captions, config) for text in answer.split("\n"))
        fields[ROLES[role]] = distinct(filter(None, texts))
    for name in set(ROLES.values()) & fields.keys():
        fields[name] = [writable(text) for text in fields[name] or () if text]
    return fields


def _describe(
    options: CaptionerConfig,
    revision: str | None,
    caption: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    uses_texts: bool,
) -> dict[str, Any]:
    """Returns the entry of a caption in the column `captions`."""
    return {
        **({"input": options.input, "role": options.role} if uses_texts else {}),
        "model": published_name(options.model),
        "revision": revision,
        "prompt": options.prompt,
        "settings": options.published_settings(max(caption["attempts"] - 1, 0)),
        "attempts": caption["attempts"],
        "tokens": num_tokens(tokenizer, caption["text"]),
        "sub_captions": len(split_sentences(caption["text"])),
        "reasons": caption["reasons"],
        "earlier_reasons": caption["earlier_reasons"],
        "dropped": caption.get("dropped"),
    }


def _image(
    image: Any, captions: Sequence[Mapping[str, Any]], config: RelabelConfig, storage: Storage
) -> dict[str, Any] | str:
    """Returns the value of the column `image`, or the reason why the image is skipped."""
    path, stored = file_of(image), image_source(image)
    if path is None:
        name = None if stored.path is None else os.path.basename(stored.path)
        return {"bytes": stored.source if isinstance(stored.source, bytes) else None, "path": name}
    name = storage.name(path)
    if not config.copies_images:
        return {"bytes": None, "path": name}
    try:
        content = storage.read(image)["bytes"]
    except ImageError as error:
        storage.check(image, error)
        return f"{as_text(name)}: became unreadable after it was captioned ({storage.without_folders(as_text(error))})"
    if any(caption["image"] != digest(content) for caption in captions):
        return f"{as_text(name)}: changed after it was captioned"
    return {"bytes": content, "path": os.path.basename(path)}


def read_sidecar(config: RelabelConfig, name: str) -> dict[str, Any]:
    """Reads the statistics and skipped records of a shard."""
    path = sidecar_path(config, name)
    sidecar = read_json(path, SIDECAR)
    statistics = sidecar["statistics"]
    numbers = [one[what] for one in (statistics["raw"], *statistics["captioners"]) for what in COUNTED]
    if not all(key.isdecimal() for counts in numbers for key in counts) or not (
        len(statistics["captioners"]) == len(sidecar["revisions"]) == len(config.captioners)
    ):
        raise DamagedError(path, "unknown fields or types")
    return sidecar


def is_done(config: RelabelConfig, name: str, records: list[dict[str, Any]] | None, number: int) -> bool:
    """
    Returns whether a captioner has finished a chunk. If there is a shard and `records` are given, a `ValueError` is
    raised unless the shard has the ids of `records`.
    """
    if shard_path(config, name).exists():
        if records is not None:
            if read_sidecar(config, name)["records"] != Chunk(name, records).header()["records"]:
                raise changed(config.data, f"chunk {name} has other ids")
        return True
    return number < len(config.captioners) - 1 and journal_path(config, name, number).exists()


def write_shard(file: BinaryIO, rows: Iterable[Mapping[str, Any]], config: RelabelConfig, name: str) -> None:
    """
    Writes rows as Parquet, or as a tar of image files, each with a JSON file of the other columns. The same rows
    produce the same bytes.
    """
    if config.format == "parquet":
        fields, caption = (ROLE_FIELDS, ROLE_CAPTION) if config.uses_texts else ({}, {})
        schema = Features({**FIELDS, **fields, "captions": List({**caption, **CAPTION})}).arrow_schema
        with pq.ParquetWriter(file, schema) as writer:
            for group in _row_groups(rows):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        return
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows):
            key, image = f"{name}-{number:06d}", row["image"]
            fields = {column: value for column, value in row.items() if column != "image"}
            _add(tar, f"{key}{_extension(image)}", image["bytes"])
            _add(tar, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())


def _row_groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"]["bytes"] or b"")
        if len(group) == ROW_GROUP or size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # user and time stay empty, so that the same rows produce the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _extension(image: Mapping[str, Any]) -> str:
    extension = os.path.splitext(image["path"] or "")[1].lower()
    if extension in image_extensions():
        return extension
    with Image.open(io.BytesIO(image["bytes"]), formats=readable_formats()) as opened:
        kind = opened.format or ""
    known = (extension for extension, name in Image.registered_extensions().items() if name == kind)
    return EXTENSIONS.get(kind) or next(known)
