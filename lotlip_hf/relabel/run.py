"""
Long captions for any image set, by several captioning models: the first step of the LoTLIP paper.

Records are cut into chunks of `shard_size`, a chunk into groups that a captioner answers together. What a group is
answered depends on the group alone, so neither the number of processes nor an interruption changes it. One captioner
after the other goes through all chunks; each group's captions are kept in a journal in `<output>/.relabel` as soon as
they are there. The last captioner leaves each chunk as a shard in `<output>/data`.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from huggingface_hub import model_info
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.collator import RecordError, read_image
from ..data.records import ColumnError, load_records
from ..data.sampling import split_sentences
from ..files import PARTIAL, OutsideError, is_own_file, printable, replacing, write_json
from ..images import ImageError, find_images, image_source, read_image_bytes
from ..plots import check_plot
from .captioners.base import Answer, Captioner, CaptionerConfig, published_name
from .captioners.endpoint import EndpointCaptioner, shrunk
from .card import COUNTED, HISTOGRAMS, merge_statistics, shard_statistics, write_card
from .config import NO_ANSWER, RelabelConfig
from .journal import NONE, DamagedError, Journal, fits, read_json
from .quality import judge
from .shards import SUFFIXES, write_shard

Records = Dataset | IterableDataset | list[dict[str, Any]]

HIDDEN = ".relabel"
SKIPPED = "skipped.jsonl"
# What models raise of an image that does not suit them
IMAGE_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
READERS = 4  # threads that decode images ahead
HUB_TIMEOUT = 10.0  # seconds
# Control characters but line ends and tabs, and marks that turn the direction of what follows
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")
# The forms of the files in `.relabel`, for `fits`
PART = {"records": int}
IDENTITY = {"options": dict, "captioners": [{"model": str}]}
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
# What a file's contents have no part in: the same file may be readable in a minute.
PASSING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN}


def load_captioner(config: CaptionerConfig) -> Captioner:
    """
    Loads a model of transformers, or prepares for an endpoint.

    Args:
        config: The captioner's options.

    Raises:
        ValueError, OSError: if there is no such model, or an option is not for it.
    """
    if config.endpoint is not None:
        return EndpointCaptioner(config)
    from .captioners.local import LocalCaptioner

    return LocalCaptioner(config)


def _check_captioners(config: RelabelConfig) -> None:
    """Before the first of them goes to work, all are looked at: a misspelt name should not cost days."""
    from .captioners.local import check_model

    for captioner in config.captioners:
        if captioner.endpoint is not None:
            EndpointCaptioner(captioner).close()
        else:
            check_model(captioner)


def relabel(
    config: RelabelConfig,
    *,
    make_captioner: Callable[[CaptionerConfig], Captioner] | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """
    Writes long captions for a set of images, as shards that the training reads as they are.

    In `output` are `data/` with the shards, `README.md`, a data set card with the statistics of the LoTLIP paper's
    table 6 and `histograms.png`, the same as numbers in `statistics.json`, and `skipped.jsonl`, which lists the
    images that could not be read and the records without any caption. A record has `id`, `image`, `short_caption` (the
    raw caption; where there is none the first sentence of the first long one), `long_captions`, one of each captioner
    (empty where it was dropped), and `captions`, which says for each of these who wrote it, how, and what is wrong.
    Models in folders go by the folder's own name, images by their path from the image folder on (see [`image_base`]):
    where things lie on this machine is in none of these files.

    A run that was stopped, in whatever way, goes on from what it kept, when called again with the same options and
    records, which are told apart by their ids. With
    several processes (`torchrun`, `accelerate launch`) each does its share; the last one to end writes the card.

    Args:
        config (`RelabelConfig`): what to do.
        make_captioner (`Callable[[CaptionerConfig], Captioner]`, *optional*):
            Makes a captioner of its options, for engines of your own; by default [`load_captioner`].
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.

    Returns:
        `dict[str, Any]`, *optional*: what `statistics.json` holds; `None` while other processes are still at work.

    Raises:
        ValueError: if an option does not fit the data, the models, or what `output` was begun with.
        FileExistsError: if `output` holds something else.
        EndpointError: if an endpoint gives no answers; what was done is kept.
        OSError: if there is no such data or model, or `output` cannot be written to.

    Example:

    ```python
    >>> from lotlip_hf.relabel.captioners.base import CaptionerConfig
    >>> from lotlip_hf.relabel.run import relabel
    >>> from lotlip_hf.relabel.config import RelabelConfig

    >>> models = ("Salesforce/instructblip-vicuna-7b", "llava-hf/llava-1.5-7b-hf")
    >>> captioners = [CaptionerConfig(model) for model in models]
    >>> statistics = relabel(RelabelConfig(data="pictures", output="relabelled", captioners=captioners))
    ```
    """
    folder = Path(config.output)
    state = PartialState(cpu=not torch.accelerator.is_available())  # without an accelerator, too, it has to be told
    hidden = folder / HIDDEN
    _check_folders(config)
    tokenizer = _load_tokenizer(config.tokenizer)
    records = _open_records(config)
    if make_captioner is None:
        _check_captioners(config)
        make_captioner = load_captioner
    hidden.mkdir(parents=True, exist_ok=True)
    check_plot(folder / HISTOGRAMS)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(hidden / f"lock-{state.process_index}", timeout=0))
            for path in hidden.glob("lock-[0-9]*"):
                if path.name[5:].isdecimal() and int(path.name[5:]) >= state.num_processes:
                    with FileLock(path, timeout=0):  # of a run of more processes
                        pass
        except Timeout as error:
            raise OSError(f"{folder}: another run is writing there.") from error
        _keep_identity(hidden, config)
        (folder / "data").mkdir(exist_ok=True)
        share, storage = _Share(config, records, state.process_index, state.num_processes), _Storage(config)
        for number, captioner in enumerate(config.captioners):
            is_last = number == len(config.captioners) - 1
            title = f"{captioner.model} ({number + 1}/{len(config.captioners)})"
            is_shown = progress and state.is_main_process
            with (
                tqdm(total=share.total(), desc=title, unit="image", disable=not is_shown) as bar,
                _Captioning(config, number, make_captioner, storage, bar) as captioning,
            ):
                is_done = partial(_is_done, config, number=number)
                for chunk in captioning.caption(share.chunks(is_done, bar)):
                    if is_last:
                        _write_shard(config, chunk, storage, tokenizer)
        return _finish(config, share)


class _Chunk(NamedTuple):
    """Successive records that make a shard."""

    name: str
    records: list[dict[str, Any]]

    def header(self) -> dict[str, Any]:
        """What the chunk's journals begin with."""
        ids = json.dumps([str(record["id"]) for record in self.records]).encode()
        return {"records": hashlib.blake2b(ids, digest_size=16).hexdigest()}


class _Share:
    """
    What this process does. Chunks are numbered through a part: a stream's file, or all that is no stream. Each is
    one process's, by its number alone.
    """

    def __init__(self, config: RelabelConfig, records: Records, rank: int, world_size: int) -> None:
        self.data, self.size, self.hidden = config.data, config.shard_size, Path(config.output, HIDDEN)
        self.records, self.rank, self.world_size = records, rank, world_size
        self.parts = records.num_shards if isinstance(records, IterableDataset) else 1
        # with fewer files than processes, all read all of them
        self.is_shared = self.parts < world_size
        if not isinstance(records, IterableDataset):
            self._keep_length(0, len(records))

    def chunks(self, is_done: Callable[[str, list[dict[str, Any]] | None], bool], bar: tqdm) -> Iterator[_Chunk]:
        """The chunks of this process that are not done, in order."""
        for part in self._own_parts():
            bar.set_postfix_str(f"file {part + 1}/{self.parts}" if self.parts > 1 else "")
            length = self._length(part)
            if isinstance(self.records, IterableDataset):
                if length is not None and all(is_done(name, None) for name, _ in self._own_chunks(part, length)):
                    _skip(bar, sum(size for _, size in self._own_chunks(part, length)))
                else:
                    yield from self._stream(part, is_done, bar)
                continue
            for name, size in self._own_chunks(part, len(self.records)):
                start = int(name.split("-")[1]) * self.size
                # a table's rows are not read, for images may be in them
                at_hand = self.records[start : start + size] if isinstance(self.records, list) else None
                if is_done(name, at_hand):
                    _skip(bar, size)
                else:
                    yield _Chunk(name, at_hand or _rows(self.records, start, start + size))

    def _stream(
        self, part: int, is_done: Callable[[str, list[dict[str, Any]] | None], bool], bar: tqdm
    ) -> Iterator[_Chunk]:
        assert isinstance(self.records, IterableDataset)
        stream, length = iter(self.records.shard(self.parts, part)), 0
        while rows := list(itertools.islice(stream, self.size)):
            name = _chunk_name(part, length // self.size)
            length += len(rows)
            if self._is_own(name) and is_done(name, rows):
                _skip(bar, len(rows))
            elif self._is_own(name):
                yield _Chunk(name, rows)
        self._keep_length(part, length)

    def names(self) -> list[str] | None:
        """Of all processes' chunks; `None` if a part has not been read to its end."""
        lengths = [self._length(part) for part in range(self.parts)]
        if None in lengths:
            return None
        return [name for part, length in enumerate(lengths) for name, _ in self._chunks(part, length or 0)]

    def total(self) -> int | None:
        """Records of this process; `None` if a part has not been read to its end."""
        lengths = {part: self._length(part) for part in self._own_parts()}
        if None in lengths.values():
            return None
        return sum(size for part, length in lengths.items() for _, size in self._own_chunks(part, length or 0))

    def _own_parts(self) -> range:
        return range(self.parts) if self.is_shared else range(self.rank, self.parts, self.world_size)

    def _chunks(self, part: int, length: int) -> list[tuple[str, int]]:
        starts = range(0, length, self.size)
        return [(_chunk_name(part, start // self.size), min(self.size, length - start)) for start in starts]

    def _own_chunks(self, part: int, length: int) -> list[tuple[str, int]]:
        return [(name, size) for name, size in self._chunks(part, length) if self._is_own(name)]

    def _is_own(self, name: str) -> bool:
        return not self.is_shared or sum(map(int, name.split("-"))) % self.world_size == self.rank

    def _length(self, part: int) -> int | None:
        path = self.hidden / f"part-{part:05d}.json"
        return read_json(path, PART)["records"] if path.exists() else None

    def _keep_length(self, part: int, length: int) -> None:
        kept = self._length(part)
        if kept is None:
            write_json(self.hidden / f"part-{part:05d}.json", {"records": length})
        elif kept != length:
            raise _changed(self.data, f"there were {kept} and are {length}")


class _Storage:
    """
    What the images are read from. Where it goes away, not the images are at fault, and the run stops: what is skipped
    is skipped for good.
    """

    def __init__(self, config: RelabelConfig) -> None:
        self.data, self.limit = config.data, config.max_image_bytes
        self.folders = {path for path in (config.data, config.image_folder) if path and os.path.exists(path)}
        self.base = image_base(config)
        above = (self.base, os.path.dirname(os.path.abspath(config.data)), config.image_folder, config.image_root)
        spelled = {spell(path) for path in above if path for spell in (os.path.abspath, os.path.realpath)}
        spelled |= set(map(printable, spelled))  # as messages have them
        above = sorted(map(re.escape, spelled - {os.sep}), key=len, reverse=True)
        self._above = re.compile(rf"({'|'.join(above) or '(?!)'})(?:({re.escape(os.sep)})|(?![\w.-]))")

    def name(self, path: str) -> str:
        """A path as it is published: from the image folder on, or the file's own name."""
        path = os.path.abspath(path)
        if self.base is None or os.path.commonpath((self.base, path)) != self.base:
            return os.path.basename(path)
        return Path(os.path.relpath(path, self.base)).as_posix()

    def unplaced(self, text: str) -> str:
        """A text as it is published: without the folders that the data lie in."""
        return self._above.sub(lambda found: "" if found[2] else ".", text)

    def read(self, image: Any) -> Any:
        """The image with its file's bytes: the same bytes are captioned and digested."""
        path = _file(image)
        if path is None:
            return image
        return {"bytes": read_image_bytes(path, self.limit), "path": self.name(path)}

    def was_read(self, image: Any) -> None:
        """Remembers the folder of an image that was there."""
        if path := _file(image):
            self.folders.add(os.path.dirname(os.path.abspath(path)))

    def check(self, image: Any, error: Exception) -> None:
        """Raises an `OSError` if what went wrong with the image may be well in a minute."""
        cause = error if isinstance(error, OSError) else error.__cause__
        folder = os.path.dirname(os.path.abspath(_image_path(image) or ""))
        is_gone = any(not os.path.exists(one) for one in {folder, self.data} & self.folders)
        if is_gone or isinstance(cause, MemoryError) or getattr(cause, "errno", None) in PASSING:
            raise OSError(
                f"{self.data}: images cannot be read any more ({_text(error)}). What was done is kept; the same "
                "command goes on from there."
            ) from error


class _Read(NamedTuple):
    """A record's image, and its file's digest where the file is copied; or why there is no image."""

    image: Image.Image | None = None
    skip: str = ""
    digest: str | None = None


@dataclass
class _Open:
    """A chunk that a captioner is at."""

    chunk: _Chunk
    journal: Journal
    left: int  # groups that are not answered


class _Captioning:
    """One captioner, loaded when there is something to caption."""

    def __init__(
        self,
        config: RelabelConfig,
        number: int,
        make: Callable[[CaptionerConfig], Captioner],
        storage: "_Storage",
        bar: tqdm,
    ) -> None:
        self.config, self.number, self.storage, self.bar = config, number, storage, bar
        self.options = config.captioners[number]
        self.max_attempts = _max_attempts(self.options, config.max_attempts)
        self._make, self._captioner = make, None
        self._pending: dict[Future, _Open] = {}
        self._threads = contextlib.ExitStack()

    def __enter__(self) -> "_Captioning":
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.cancel()
        if self._captioner is not None:
            self._captioner.close()  # what waits for a server ends; then the threads do
        self._threads.close()

    def caption(self, chunks: Iterable[_Chunk]) -> Iterator[_Chunk]:
        """Leaves a whole journal of each chunk, and yields it then; a slow image holds up its own chunk alone."""
        for chunk in chunks:
            journal = _open_journal(_journal_path(self.config, chunk.name, self.number), chunk, self.config.data)
            if journal.is_whole:
                _skip(self.bar, len(chunk.records))
                yield chunk
                continue
            captioner, readers, askers = self._begin()
            journal.begin({"group_size": captioner.group_size, "revision": captioner.revision})
            starts = range(0, len(chunk.records), captioner.group_size)
            groups = {n: chunk.records[start : start + captioner.group_size] for n, start in enumerate(starts)}
            if any(len(groups.get(n, ())) != len(captions) for n, captions in journal.groups.items()):
                raise DamagedError(journal.partial, "captions of other records")
            missing = {n: group for n, group in groups.items() if n not in journal.groups}
            _skip(self.bar, sum(len(group) for n, group in groups.items() if n in journal.groups))
            opened = _Open(chunk, journal, len(missing))
            if not missing:
                journal.complete()
                yield chunk
            for n, group in missing.items():
                images = readers.submit(self._read_images, group)
                asked = askers.submit(self._caption_group, captioner, journal, n, group, images)
                self._pending[asked] = opened
                if len(self._pending) > 2 * captioner.concurrency:
                    yield from self._settle()
        while self._pending:
            yield from self._settle()

    def _begin(self) -> tuple[Captioner, ThreadPoolExecutor, ThreadPoolExecutor]:
        if self._captioner is None:
            self._captioner = self._make(self.options)
            self._readers = self._threads.enter_context(ThreadPoolExecutor(READERS))
            self._askers = self._threads.enter_context(ThreadPoolExecutor(self._captioner.concurrency))
        return self._captioner, self._readers, self._askers

    def _settle(self) -> Iterator[_Chunk]:
        """Waits for a group or more; yields the chunks that are done with it. What failed comes after what did not."""
        done = wait(self._pending, return_when=FIRST_COMPLETED).done
        for future in sorted(done, key=lambda future: future.exception() is not None):
            opened = self._pending.pop(future)
            self.bar.update(future.result())
            opened.left -= 1
            if not opened.left:
                opened.journal.complete()
                yield opened.chunk

    def _read_images(self, group: Sequence[Mapping[str, Any]]) -> list["_Read"]:
        """The images of records, or why there is none."""
        return [self._read_image(record) for record in group]

    def _read_image(self, record: Mapping[str, Any]) -> "_Read":
        try:
            if record.get("error"):
                raise RecordError(record["error"])
            str(_image_path(record["image"])).encode()  # a name that is no text cannot be written
            source = self.storage.read(record["image"])
            image = read_image(source, "image")
            self.storage.was_read(record["image"])
        except (ImageError, RecordError) as error:
            self.storage.check(record["image"], error)
            return _Read(skip=self.storage.unplaced(_text(error)).removeprefix("image: "))
        except UnicodeEncodeError:
            return _Read(skip="the file's name is no text in UTF-8")
        if self.options.endpoint is not None:
            image = shrunk(image, self.options.max_image_size)  # many wait for their answers
        is_copied = self.config.copies_images and _file(record["image"]) is not None
        return _Read(image, digest=_digest(source["bytes"]) if is_copied else None)

    def _caption_group(
        self,
        captioner: Captioner,
        journal: Journal,
        number: int,
        group: Sequence[Mapping[str, Any]],
        images: "Future[list[_Read]]",
    ) -> int:
        """Keeps what the group is answered; returns how many records it has."""
        read = images.result()
        captions: list[dict[str, Any]] = [{} if one.image is not None else {"skip": one.skip} for one in read]
        asked = [place for place, caption in enumerate(captions) if not caption]
        for attempt in range(self.max_attempts):
            if not asked:
                break
            seeds = [_seed(self.config.seed, self.number, group[place]["id"], attempt) for place in asked]
            images_of = [image for place in asked if (image := read[place].image) is not None]
            answers = self._ask(captioner, images_of, self.options.settings(attempt), seeds)
            again = []
            for place, answer in zip(asked, answers, strict=True):
                if answer.error is not None:
                    text, reasons = "", (NO_ANSWER,)
                else:
                    text, reasons = judge(
                        _writable(answer.text), self.options.prompt, answer.finished, self.config.rules
                    )
                earlier = captions[place]
                captions[place] = {
                    "text": text,
                    "attempts": attempt + 1,
                    "reasons": list(reasons),
                    "earlier_reasons": sorted({*earlier.get("earlier_reasons", ()), *earlier.get("reasons", ())}),
                }
                policies = {self.config.policies.get(reason, "drop") for reason in reasons}
                if policies & {"retry", "drop"}:
                    dropped = _writable(answer.error) if answer.error else text
                    captions[place] |= {"text": "", "dropped": dropped[: self.config.rules.max_characters]}
                if "retry" in policies and "drop" not in policies:
                    again.append(place)
            asked = again
        for one, caption in zip(read, captions, strict=True):
            if one.digest is not None:
                caption["image"] = one.digest
        journal.add(number, captions)
        return len(group)

    def _ask(
        self, captioner: Captioner, images: Sequence[Image.Image], settings: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[Answer]:
        """The answers; where they fail, each image alone, and a grey one to see whether it is the image's fault."""
        try:
            return captioner.answer(images, settings, seeds)
        except torch.OutOfMemoryError:
            raise
        except IMAGE_ERRORS as error:
            if len(images) > 1:
                pairs = zip(images, seeds, strict=True)
                return [self._ask(captioner, [image], settings, [seed])[0] for image, seed in pairs]
            try:
                captioner.answer([Image.new("RGB", (224, 224), "grey")], settings, seeds)
            except IMAGE_ERRORS:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"{self.options.model}: fails on every image ({reason}). What was done is kept."
                ) from error
            return [Answer("", error=f"the model fails on this image ({type(error).__name__}: {error})")]


def _max_attempts(options: CaptionerConfig, wanted: int) -> int:
    """Attempts that may differ: at temperature 0 the same settings give the same answer."""
    first, again = options.settings(0), options.settings(1)
    if again["temperature"] > 0:
        return wanted
    return min(wanted, 1 if again == first else 2)


def _open_journal(path: Path, chunk: _Chunk, data: str) -> Journal:
    header = chunk.header()
    journal = Journal(path, header)
    if journal.header["records"] != header["records"]:
        raise _changed(data, f"those of {chunk.name} are others")
    if journal.is_whole and (
        len(journal.captions()) != len(chunk.records)
        or not fits(journal.header, {"group_size": int, "revision": (str, NONE)})
    ):
        raise DamagedError(path, "captions of other records")
    return journal


def image_base(config: RelabelConfig) -> str | None:
    """
    The folder that the paths of images in the output start from: what the training takes as `--image-folder`.

    Args:
        config (`RelabelConfig`): the options of the run.

    Returns:
        `str` or `None`: `image_root`, `image_folder` or the folder of `data`; `None` for data on the Hub.
    """
    data = config.data
    if not os.path.isdir(data):
        fixed = re.split(r"[*?\[{]", data, maxsplit=1)[0]
        data = os.path.dirname(fixed) or "." if fixed != data or os.path.exists(data) else None
    base = config.image_root or config.image_folder or data
    return None if base is None else os.path.abspath(base)


def _file(image: Any) -> str | None:
    """The path of an image's file; `None` if its bytes are at hand, it is on the web, or there is none."""
    path = _image_path(image) if _image_bytes(image) is None else None
    return None if path is None or path.startswith(("http://", "https://")) else path


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _image_path(image: Any) -> str | None:
    return image_source(image).path


def _image_bytes(image: Any) -> bytes | None:
    source = image_source(image).source
    return source if isinstance(source, bytes) else None


def _write_shard(config: RelabelConfig, chunk: _Chunk, storage: _Storage, tokenizer: PreTrainedTokenizerBase) -> None:
    """The chunk with its captions, in place of their journals."""
    paths = [_journal_path(config, chunk.name, number) for number in range(len(config.captioners))]
    journals = [_open_journal(path, chunk, config.data) for path in paths]
    details: list[list[dict[str, Any]]] = []
    raw: list[str] = []
    skipped: list[dict[str, Any]] = []

    def rows() -> Iterator[dict[str, Any]]:
        for record, *captions in zip(chunk.records, *(journal.captions() for journal in journals), strict=True):
            texts = [caption.get("text", "") for caption in captions]
            raw_caption = _raw_caption(record["short_caption"])
            sentences = (sentence for text in texts for sentence in split_sentences(text))
            short_caption = raw_caption or next(sentences, "")
            reason = next((caption["skip"] for caption in captions if "skip" in caption), None)
            path = _image_path(record["image"])
            name = None if path is None else _text(storage.name(path))
            entry = {"id": _text(storage.unplaced(str(record["id"]))), "image": name}
            image: dict[str, Any] | str = reason or _image(record["image"], captions, config, storage)
            if isinstance(image, str):
                skipped.append({**entry, "reason": image})
                continue
            described = [
                _describe(options, journal.header["revision"], caption, tokenizer)
                for options, journal, caption in zip(config.captioners, journals, captions, strict=True)
            ]
            details.append(described)
            if not short_caption:
                reason = "no caption was kept, and it has no raw one"
                what = [{name: one[name] for name in ("model", "reasons", "dropped")} for one in described]
                skipped.append({**entry, "reason": reason, "captions": what})
                continue
            if raw_caption:
                raw.append(raw_caption)
            yield {
                "id": entry["id"],
                "image": image,
                "short_caption": short_caption,
                "long_captions": texts,
                "captions": described,
            }

    with replacing(_shard_path(config, chunk.name)) as file:
        write_shard(file, rows(), config.format, chunk.name)
        images = len(details) - sum("captions" in one for one in skipped)
        sidecar = {
            **chunk.header(),
            "skipped": skipped,
            "statistics": shard_statistics(details, images, raw, config, tokenizer),
            "revisions": [journal.header["revision"] for journal in journals],
        }
        # what it says of the shard is there before the shard, whose being there ends the work on the chunk
        write_json(_sidecar_path(config, chunk.name), sidecar)
    for path in paths:
        path.unlink(missing_ok=True)  # the process that ends the run removes what is left


def _describe(
    options: CaptionerConfig, revision: str | None, caption: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What the column `captions` says of a caption."""
    return {
        "model": published_name(options.model),
        "revision": revision,
        "prompt": options.prompt,
        "settings": options.published_settings(caption["attempts"] - 1),
        "attempts": caption["attempts"],
        "tokens": len(tokenizer(caption["text"], add_special_tokens=False, verbose=False)["input_ids"]),
        "sub_captions": len(split_sentences(caption["text"])),
        "reasons": caption["reasons"],
        "earlier_reasons": caption["earlier_reasons"],
        "dropped": caption.get("dropped"),
    }


def _image(
    image: Any, captions: Sequence[Mapping[str, Any]], config: RelabelConfig, storage: _Storage
) -> dict[str, Any] | str:
    """As a shard has it, or why it cannot."""
    path = _file(image)
    if path is None:
        name = _image_path(image)
        return {"bytes": _image_bytes(image), "path": None if name is None else os.path.basename(name)}
    name = storage.name(path)
    if not config.copies_images:
        return {"bytes": None, "path": name}
    try:
        content = storage.read(image)["bytes"]
    except ImageError as error:
        storage.check(image, error)
        return f"{_text(name)}: cannot be read any more since it was captioned ({storage.unplaced(_text(error))})"
    # journals of earlier versions hold no digests
    digest = _digest(content)
    if any(caption.get("image", digest) != digest for caption in captions):
        return f"{_text(name)}: has changed since it was captioned"
    return {"bytes": content, "path": os.path.basename(path)}


def _raw_caption(caption: Any) -> str:
    """The raw caption, as it can be written."""
    return _writable(caption) if isinstance(caption, str) and caption.strip() else ""


def _finish(config: RelabelConfig, share: _Share) -> dict[str, Any] | None:
    """The card and what belongs to it, once every chunk is written."""
    names = share.names()
    if names is not None:
        written = {path.name for path in Path(config.output, "data").glob("[!.]*")}
        if others := sorted(written - {_shard_path(config, name).name for name in names}):
            raise _changed(config.data, f"there are none any more for {others[0]}")
    if names is None or not all(_shard_path(config, name).exists() for name in names):
        return None
    with FileLock(Path(config.output, HIDDEN, "lock-finish")):  # two processes may end at a time
        return _write_the_rest(config, names)


def _write_the_rest(config: RelabelConfig, names: Sequence[str]) -> dict[str, Any]:
    folder = Path(config.output)
    for path in (*folder.glob(f"data/.*{PARTIAL}"), *folder.glob(f"{HIDDEN}/*-captioner-*")):
        path.unlink(missing_ok=True)  # what processes that were killed left behind
    sidecars = [_read_sidecar(config, name) for name in names]
    skipped = [one for sidecar in sidecars for one in sidecar["skipped"]]
    statistics = merge_statistics(config, [sidecar["statistics"] for sidecar in sidecars], len(skipped))
    with replacing(folder / SKIPPED) as file:
        file.writelines(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in skipped)
    lists = [sidecar["revisions"] for sidecar in sidecars]
    revisions = [sorted({one for one in ones if one}) for ones in zip(*lists, strict=True)]
    write_card(config, statistics, revisions)
    return statistics


def _read_sidecar(config: RelabelConfig, name: str) -> dict[str, Any]:
    path = _sidecar_path(config, name)
    sidecar = read_json(path, SIDECAR)
    statistics = sidecar["statistics"]
    numbers = [one[what] for one in (statistics["raw"], *statistics["captioners"]) for what in COUNTED]
    if not all(key.isdecimal() for counts in numbers for key in counts) or not (
        len(statistics["captioners"]) == len(sidecar["revisions"]) == len(config.captioners)
    ):
        raise DamagedError(path, "other fields or types than a run writes")
    return sidecar


def _text(value: Any) -> str:
    """As a text that can be written, whatever bytes a file's name holds."""
    return os.fsencode(str(value)).decode(errors="backslashreplace")


def _writable(text: str) -> str:
    """A text without the control characters and halves of surrogate pairs that JSON may hold."""
    return CONTROLS.sub(" ", text.replace("\r\n", "\n")).encode(errors="replace").decode()


def _chunk_name(part: int, number: int) -> str:
    return f"{part:05d}-{number:05d}"


def _shard_path(config: RelabelConfig, name: str) -> Path:
    return Path(config.output, "data", name + SUFFIXES[config.format])


def _sidecar_path(config: RelabelConfig, name: str) -> Path:
    return Path(config.output, HIDDEN, f"{name}.json")


def _journal_path(config: RelabelConfig, name: str, number: int) -> Path:
    return Path(config.output, HIDDEN, f"{name}-captioner-{number}.jsonl")


def _is_done(config: RelabelConfig, name: str, records: list[dict[str, Any]] | None, number: int) -> bool:
    """
    Whether a captioner has nothing left to do for a chunk; the last one also leaves its shard. Records that are at
    hand are compared with those that the shard was made of, by their ids.
    """
    if _shard_path(config, name).exists():
        if records is not None:
            if _read_sidecar(config, name)["records"] != _Chunk(name, records).header()["records"]:
                raise _changed(config.data, f"those of {name} are others")
        return True
    return number < len(config.captioners) - 1 and _journal_path(config, name, number).exists()


def _seed(seed: int, captioner: int, record_id: Any, attempt: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{captioner}\0{_text(record_id)}\0{attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _skip(bar: tqdm, images: int) -> None:
    """What was done before does not count for the images a second."""
    if not bar.disable:
        bar.initial += images
        bar.last_print_n += images
        bar.n += images
        bar.refresh()


def _rows(records: Dataset, start: int, stop: int) -> list[dict[str, Any]]:
    columns = records[start:stop]
    return [{name: column[row] for name, column in columns.items()} for row in range(stop - start)]


def _open_records(config: RelabelConfig) -> Records:
    try:
        records = load_records(
            config.data,
            config.column_mapping(),
            split=config.split,
            image_folder=config.image_folder,
            streaming=config.streaming,
            image_root=config.image_root,
            max_record_bytes=config.max_record_bytes,
        )
    except FileNotFoundError:
        if not os.path.isdir(config.data):
            raise
        images, unreadable = find_images(config.data, root=config.image_root)
        if not images and not unreadable:
            raise
        empty = {"short_caption": None, "long_captions": []}
        found = {name: {"image": os.path.join(config.data, name), "id": name, **empty} for name in images}
        broken = {name: {"image": None, "id": name, "error": reason} | empty for name, reason in unreadable.items()}
        records = [record for _, record in sorted({**found, **broken}.items())]
    except ColumnError as error:
        raise ColumnError(
            error.problem,
            error.field,
            "Say which to read: --image-column, --short-column (`none` if there are no raw captions), --id-column. A "
            "folder of pictures with a table in it is read as the table says; leave the table out otherwise.",
        ) from error
    if not isinstance(records, IterableDataset) and not len(records):
        raise ValueError(f"{config.data}: holds no record.")
    return records


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the Hub's cache, else from the Hub if that answers in `HUB_TIMEOUT`."""
    load = partial(AutoTokenizer.from_pretrained, name, trust_remote_code=False)
    try:
        with contextlib.suppress(OSError, ValueError):
            return load(local_files_only=True)
        if not os.path.isdir(name):
            model_info(name, timeout=HUB_TIMEOUT)  # the next line would try for most of a minute
        return load()
    except (OSError, ValueError, HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"--tokenizer {name}: cannot be loaded ({printable(' '.join(str(error).split()))}), but tokens are "
            "counted with it. Name the folder of a tokenizer, a captioner's for example, with --tokenizer."
        ) from error


def _check_folders(config: RelabelConfig) -> None:
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: a file, not a folder to write.")
    if output.is_dir() and any(output.iterdir()) and not (output / HIDDEN).is_dir():
        raise FileExistsError(f"{output}: holds something else already; choose another --output.")
    if os.path.isdir(config.data) and output.resolve().is_relative_to(Path(config.data).resolve()):
        raise ValueError(
            f"{output}: lies in {config.data}, whose images it would be read with; choose another --output."
        )
    for option, folder in (("--image-folder", config.image_folder), ("--image-root", config.image_root)):
        if folder is not None and not os.path.isdir(folder):
            raise NotADirectoryError(f"{option} {folder}: no such folder.")
    _check_links(output)


def _check_links(output: Path) -> None:
    """Refuses an output folder that leads elsewhere: journals and locks are opened for writing as they are found."""
    for folder in (output / HIDDEN, output / "data"):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutsideError(f"{folder}: not a folder of its own, as a run makes it; choose another --output.")
        for path in folder.glob("*"):
            if path.is_symlink() or not path.is_file() or (folder.name == HIDDEN and not is_own_file(path)):
                raise OutsideError(
                    f"{printable(path)}: a link or no regular file, as no run leaves it; choose another --output."
                )


def _keep_identity(hidden: Path, config: RelabelConfig) -> None:
    """
    Compares the options with those that the output was begun with, as far as something was done with them: those of
    a captioner that has not begun may change, and so may all while nothing has.
    """
    path = hidden / "config.json"
    identity = {"options": config.identity(), "captioners": config.captioner_identities()}
    identity = json.loads(json.dumps(identity))
    has_shards = any(Path(config.output, "data").glob("[!.]*"))
    if path.exists():
        begun = read_json(path, IDENTITY)
        has_begun = [
            has_shards or any(hidden.glob(f"*-captioner-{number}.*")) for number in range(len(begun["captioners"]))
        ]
        changed = []
        if any(has_begun):
            changed += _changes("", begun["options"], identity["options"])
        for number, (before, is_kept) in enumerate(zip(begun["captioners"], has_begun, strict=True)):
            after = identity["captioners"][number : number + 1]
            if is_kept and not after:
                changed.append(f"captioner {number} ({before['model']}) is left out")
            elif is_kept:
                changed += _changes(f"captioner {number}: ", before, after[0])
        if has_shards and len(identity["captioners"]) > len(begun["captioners"]):
            changed.append("there are more captioners")
        if changed:
            raise ValueError(
                f"{config.output} was begun with other options: {'; '.join(changed)}. Give the same, or choose "
                "another --output."
            )
        if begun == identity:
            return
        for part in hidden.glob("part-*.json") if not any(has_begun) else ():
            part.unlink(missing_ok=True)
    write_json(path, identity)


def _changes(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The options that both have and that differ."""
    changed = []
    for name in sorted(before.keys() & after.keys()):
        if name in ("policies", "rules") and isinstance(before[name], Mapping):
            changed += _changes(f"{what}{name}: ", before[name], after[name])  # a newer version may have more of them
        elif before[name] != after[name]:
            changed.append(f"{what}`{name}` was {before[name]!r} and is {after[name]!r}")
    return changed


def _changed(data: str, how: str) -> ValueError:
    return ValueError(f"{data}: the records have changed since the output was begun: {how}. Choose another --output.")
