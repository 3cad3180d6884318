"""
Long captions for any image set, by several captioning models: the first step of the LoTLIP paper.

Records are cut into chunks of `shard_size`, a chunk into groups that a captioner answers together. What a group is
answered depends on the group alone, so neither the number of processes nor an interruption changes it. One captioner
after the other goes through all chunks; each group's captions are kept in a journal in `<output>/.relabel` as soon as
they are there. The last captioner leaves each chunk as a shard in `<output>/data`.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..evaluation.plots import check_plot
from ..images import ImageError, find_images
from .caption_quality import judge
from .captioners import Captioner, CaptionerConfig
from .collator import RecordError, read_image
from .records import load_records
from .relabel_card import CARD, HISTOGRAMS, merge_statistics, shard_statistics, statistics_table, write_card
from .relabel_config import NO_ANSWER, RelabelConfig, add_arguments, read_config
from .sampling import split_sentences
from .shards import SUFFIXES, replace_file, write_shard

Records = Dataset | IterableDataset | list[dict[str, Any]]

HIDDEN = ".relabel"
SKIPPED = "skipped.jsonl"
READERS = 4  # threads that decode images ahead


def main(argv: Sequence[str] | None = None) -> int:
    """The command `lotlip relabel`; 0 when done, also if images were skipped, which it says."""
    parser = argparse.ArgumentParser(
        prog="lotlip relabel",
        description="Write long captions for the images of a data set, by one or several captioning models, as shards "
        "that examples/train.py reads as they are. After an interruption the same command goes on from there. With "
        "several processes (`torchrun --nproc-per-node 2 -m lotlip_hf relabel ...`) each does its share.",
    )
    add_arguments(parser)
    config = read_config(parser.parse_args(argv))
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of images that it reads all the same
    state = _process_state()
    try:
        statistics = relabel(config)
    except torch.OutOfMemoryError as error:
        raise OSError(f"{error} What was done is kept; the same command goes on from there.") from error
    finally:
        state.destroy_process_group()
    if statistics is None:
        print(f"This process's share of {config.output} is done; the last process to end writes the card.")
        return 0
    print(statistics_table(statistics))
    print(f"{config.output} holds the shards, and what they are in {CARD}.")
    if statistics["skipped"]:
        what = "1 record was" if statistics["skipped"] == 1 else f"{statistics['skipped']} records were"
        print(f"{what} skipped: {Path(config.output, SKIPPED)} says why.", file=sys.stderr)
    return 0


def make_captioner(config: CaptionerConfig) -> Captioner:
    """
    Loads a model of transformers, or prepares for an endpoint.

    Args:
        config: The captioner's options.

    Raises:
        ValueError, OSError: if there is no such model, or an option is not for it.
    """
    if config.endpoint is not None:
        from .endpoint_captioner import EndpointCaptioner

        return EndpointCaptioner(config)
    from .local_captioner import LocalCaptioner

    return LocalCaptioner(config)


def relabel(
    config: RelabelConfig,
    *,
    make_captioner: Callable[[CaptionerConfig], Captioner] = make_captioner,
    progress: bool = True,
) -> dict[str, Any] | None:
    """
    Writes long captions for a set of images, as shards that the training reads as they are.

    In `output` are `data/` with the shards, `README.md`, a data set card with the statistics of the LoTLIP paper's
    table 6 and `histograms.png`, the same as numbers in `statistics.json`, and `skipped.jsonl`, which lists the
    images that could not be read and the records without any caption. A record has `id`, `image`, `short_caption` (the
    raw caption; where there is none the first sentence of the first long one), `long_captions`, one of each captioner
    (empty where it was dropped), and `captions`, which says for each of these who wrote it, how, and what is wrong.

    A run that was stopped, in whatever way, goes on from what it kept, when called again with the same options. With
    several processes (`torchrun`, `accelerate launch`) each does its share; the last one to end writes the card.

    Args:
        config (`RelabelConfig`): what to do.
        make_captioner (`Callable[[CaptionerConfig], Captioner]`, *optional*):
            Makes a captioner of its options, for engines of your own; by default models of transformers and endpoints.
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
    >>> from lotlip_hf.data.captioners import CaptionerConfig
    >>> from lotlip_hf.data.relabel import relabel
    >>> from lotlip_hf.data.relabel_config import RelabelConfig

    >>> models = ("Salesforce/instructblip-vicuna-7b", "llava-hf/llava-1.5-7b-hf")
    >>> captioners = [CaptionerConfig(model) for model in models]
    >>> statistics = relabel(RelabelConfig(data="pictures", output="relabelled", captioners=captioners))
    ```
    """
    folder, state = Path(config.output), _process_state()
    hidden = folder / HIDDEN
    _check_folders(folder, config.data)
    records = _open_records(config)
    tokenizer = _load_tokenizer(config.tokenizer)
    hidden.mkdir(parents=True, exist_ok=True)
    check_plot(folder / HISTOGRAMS)
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            try:
                stack.enter_context(FileLock(hidden / "lock", timeout=0))
            except Timeout as error:
                raise OSError(f"{folder}: another run is writing there.") from error
        _keep_identity(hidden / "config.json", config)
        (folder / "data").mkdir(exist_ok=True)
        share = _Share(config, records, hidden, state.process_index, state.num_processes)
        for number, captioner in enumerate(config.captioners):
            bar = stack.enter_context(
                tqdm(
                    total=share.total,
                    desc=f"{captioner.model} ({number + 1}/{len(config.captioners)})",
                    unit="image",
                    disable=not (progress and state.is_main_process),
                )
            )
            with _Captioning(config, number, make_captioner, bar) as captioning:
                for chunk in share.chunks(lambda name, number=number: _is_done(config, name, number), bar):
                    captioning.caption(chunk)
                    if number == len(config.captioners) - 1:
                        _write_shard(config, chunk, tokenizer)
            bar.close()
        return _finish(config, share)


def _process_state() -> PartialState:
    return PartialState(cpu=not torch.accelerator.is_available())  # without an accelerator, too, it has to be told


class _Chunk(NamedTuple):
    """Successive records that make a shard."""

    name: str
    records: list[dict[str, Any]]


class _Share:
    """
    What this process does. Chunks are numbered through a part: a stream's file, or all that is no stream. Each is
    one process's, by its number alone.
    """

    def __init__(self, config: RelabelConfig, records: Records, hidden: Path, rank: int, world_size: int) -> None:
        self.data, self.size, self.hidden = config.data, config.shard_size, hidden
        self.records, self.rank, self.world_size = records, rank, world_size
        self.parts, self.total = 1, None
        if isinstance(records, IterableDataset):
            self.parts = records.num_shards
        else:
            self._keep_length(0, len(records))
            self.total = sum(min(self.size, len(records) - start) for start in self._starts(len(records)))

    def chunks(self, is_done: Callable[[str], bool], bar: tqdm) -> Iterator[_Chunk]:
        """The chunks of this process that are not done, in order."""
        if not isinstance(self.records, IterableDataset):
            for start in self._starts(len(self.records)):
                name, stop = _chunk_name(0, start // self.size), min(start + self.size, len(self.records))
                if is_done(name):
                    _skip(bar, stop - start)
                else:
                    yield _Chunk(name, _rows(self.records, start, stop))
            return
        # with fewer files than processes, all read all of them
        is_shared = self.parts < self.world_size
        for part in range(0 if is_shared else self.rank, self.parts, 1 if is_shared else self.world_size):
            bar.set_postfix_str(f"file {part + 1}/{self.parts}")
            length = self._length(part)
            names = None if length is None else self._names(part, length)
            if names is not None and all(is_done(name) for name in names if self._is_mine(name, is_shared)):
                _skip(bar, length or 0)
                continue
            stream, length = iter(self.records.shard(self.parts, part)), 0
            while rows := list(itertools.islice(stream, self.size)):
                name = _chunk_name(part, length // self.size)
                length += len(rows)
                if not self._is_mine(name, is_shared):
                    continue
                if is_done(name):
                    _skip(bar, len(rows))
                else:
                    yield _Chunk(name, rows)
            self._keep_length(part, length)

    def names(self) -> list[str] | None:
        """Of all chunks; `None` if a part has not been read to its end."""
        lengths = [self._length(part) for part in range(self.parts)]
        if None in lengths:
            return None
        return [name for part, length in enumerate(lengths) for name in self._names(part, length or 0)]

    def _starts(self, length: int) -> range:
        return range(self.rank * self.size, length, self.world_size * self.size)

    def _names(self, part: int, length: int) -> list[str]:
        return [_chunk_name(part, number) for number in range(-(-length // self.size))]

    def _is_mine(self, name: str, is_shared: bool) -> bool:
        return not is_shared or sum(map(int, name.split("-"))) % self.world_size == self.rank

    def _length(self, part: int) -> int | None:
        path = self.hidden / f"part-{part:05d}.json"
        return json.loads(path.read_text())["records"] if path.exists() else None

    def _keep_length(self, part: int, length: int) -> None:
        kept = self._length(part)
        if kept is None:
            replace_file(self.hidden / f"part-{part:05d}.json", json.dumps({"records": length}).encode())
        elif kept != length:
            raise _changed(self.data, f"there were {kept} and are {length}")


class _Journal:
    """
    The captions of a chunk by one captioner, a line a group, in the order in which they were answered. What an
    interruption left half-written at the end is cut off. A whole one has its last name.
    """

    def __init__(self, path: Path, data: str, chunk: _Chunk) -> None:
        self.path, self.partial = path, path.with_suffix(".partial")
        ids = json.dumps([str(record["id"]) for record in chunk.records]).encode()
        self.header: dict[str, Any] = {"records": hashlib.blake2b(ids, digest_size=16).hexdigest()}
        self.groups: dict[int, list[dict[str, Any]]] = {}
        self.is_whole = path.exists()
        self._lock, self._file = threading.Lock(), None
        existing = path if self.is_whole else self.partial
        if existing.exists():
            content = existing.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(existing, len(whole))
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines:
                if lines[0]["records"] != self.header["records"]:
                    raise _changed(data, f"those of {chunk.name} are others")
                self.header = lines[0]
                self.groups = {line["group"]: line["captions"] for line in lines[1:]}

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, captioner: Captioner) -> None:
        """Opens it for `add`."""
        is_new = "group_size" not in self.header
        self.header |= {"group_size": captioner.group_size, "revision": captioner.revision} if is_new else {}
        self._file = open(self.partial, "ab")
        if is_new:
            self._append(self.header)

    def add(self, group: int, captions: list[dict[str, Any]]) -> None:
        """Keeps what a group was answered; may be called by several threads."""
        with self._lock:
            self._append({"group": group, "captions": captions})
            self.groups[group] = captions

    def complete(self) -> None:
        """Gives it its last name."""
        os.replace(self.partial, self.path)
        self.is_whole = True

    def captions(self) -> list[dict[str, Any]]:
        """One of each record."""
        return [caption for group in sorted(self.groups) for caption in self.groups[group]]

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line, ensure_ascii=False, sort_keys=True).encode(errors="surrogatepass") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class _Captioning:
    """One captioner, loaded when there is something to caption."""

    def __init__(
        self, config: RelabelConfig, number: int, make: Callable[[CaptionerConfig], Captioner], bar: tqdm
    ) -> None:
        self.config, self.number, self.bar = config, number, bar
        self.options = config.captioners[number]
        # where another try would be the same one, there is none
        is_same = self.options.settings(0) == self.options.settings(1) and self.options.temperature == 0
        self.max_attempts = 1 if is_same else config.max_attempts
        self._make, self._captioner = make, None

    def __enter__(self) -> "_Captioning":
        return self

    def __exit__(self, *_: object) -> None:
        if self._captioner is not None:
            self._captioner.close()

    def caption(self, chunk: _Chunk) -> None:
        """Leaves a whole journal of the chunk."""
        with _Journal(_journal_path(self.config, chunk.name, self.number), self.config.data, chunk) as journal:
            if journal.is_whole:
                _skip(self.bar, len(chunk.records))
                return
            if self._captioner is None:
                self._captioner = self._make(self.options)
            journal.begin(self._captioner)
            size = journal.header["group_size"]
            starts = range(0, len(chunk.records), size)
            groups = [(number, chunk.records[start : start + size]) for number, start in enumerate(starts)]
            _skip(self.bar, sum(len(group) for number, group in groups if number in journal.groups))
            missing = [(number, group) for number, group in groups if number not in journal.groups]
            self._answer(self._captioner, journal, missing)
            journal.complete()

    def _answer(
        self, captioner: Captioner, journal: _Journal, groups: Iterable[tuple[int, list[dict[str, Any]]]]
    ) -> None:
        """Answers groups while the images of the next ones are read."""
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(captioner.concurrency) as askers:
            pending: deque[Future] = deque()
            try:
                for number, group in groups:
                    images = readers.submit(_read_images, group)
                    pending.append(askers.submit(self._caption_group, captioner, journal, number, group, images))
                    if len(pending) > 2 * captioner.concurrency:
                        pending.popleft().result()
                while pending:
                    pending.popleft().result()
            except BaseException:
                for future in pending:
                    future.cancel()
                captioner.close()
                raise

    def _caption_group(
        self,
        captioner: Captioner,
        journal: _Journal,
        number: int,
        group: Sequence[Mapping[str, Any]],
        images: "Future[list[Image.Image | str]]",
    ) -> None:
        read = images.result()
        captions: list[dict[str, Any]] = [{"skip": image} if isinstance(image, str) else {} for image in read]
        asked = [place for place, caption in enumerate(captions) if not caption]
        for attempt in range(self.max_attempts):
            if not asked:
                break
            answers = captioner.answer(
                [read[place] for place in asked],  # pyright: ignore[reportArgumentType]
                self.options.settings(attempt),
                [_seed(self.config.seed, self.number, group[place]["id"], attempt) for place in asked],
            )
            again = []
            for place, answer in zip(asked, answers, strict=True):
                if answer.error is not None:
                    text, reasons = "", (NO_ANSWER,)
                else:
                    said = answer.text.encode(errors="replace").decode()  # half a surrogate pair cannot be written
                    text, reasons = judge(said, self.options.prompt, answer.finished, self.config.rules)
                earlier = captions[place]
                earlier_reasons = sorted({*earlier.get("earlier_reasons", ()), *earlier.get("reasons", ())})
                policies = {self.config.policies.get(reason, "drop") for reason in reasons}
                captions[place] = {
                    "text": text,
                    "attempts": attempt + 1,
                    "reasons": list(reasons),
                    "earlier_reasons": earlier_reasons,
                }
                if policies & {"retry", "drop"}:
                    captions[place] |= {"text": "", "dropped": answer.error or text}
                if "retry" in policies and "drop" not in policies:
                    again.append(place)
            asked = again
        journal.add(number, captions)
        self.bar.update(len(group))


def _read_images(group: Sequence[Mapping[str, Any]]) -> list[Image.Image | str]:
    """The images of records, or why there is none."""
    images: list[Image.Image | str] = []
    for record in group:
        try:
            if record.get("error"):
                raise RecordError(record["error"])
            images.append(read_image(record["image"], "image"))
            str(_image_path(record["image"])).encode()  # a name that is no text cannot be written
        except (ImageError, RecordError) as error:
            images.append(_text(error).removeprefix("image: "))
        except UnicodeEncodeError:
            images[-1] = "the file's name is no text in UTF-8"
    return images


def _image_path(image: Any) -> str | None:
    path = image.get("path") if isinstance(image, Mapping) else image
    return path if isinstance(path, str) else None


def _image_bytes(image: Any) -> bytes | None:
    content = image.get("bytes") if isinstance(image, Mapping) else image
    return content if isinstance(content, bytes) else None


def _write_shard(config: RelabelConfig, chunk: _Chunk, tokenizer: PreTrainedTokenizerBase) -> None:
    """The chunk with its captions, in place of their journals."""
    folder = Path(config.output)
    paths = [_journal_path(config, chunk.name, number) for number in range(len(config.captioners))]
    journals = [_Journal(path, config.data, chunk) for path in paths]
    rows, skipped, raw = [], [], []
    for record, *captions in zip(chunk.records, *(journal.captions() for journal in journals), strict=True):
        long_captions = [caption.get("text", "") for caption in captions]
        short_caption = record["short_caption"]
        if not isinstance(short_caption, str) or not short_caption.strip():
            short_caption = next((split_sentences(text)[0] for text in long_captions if text), "")
        path, content = _image_path(record["image"]), _image_bytes(record["image"])
        reason = next((caption["skip"] for caption in captions if "skip" in caption), None)
        if reason is None and not short_caption:
            reason = "no caption was kept, and it has no raw one"
        if reason is not None:
            skipped.append(
                {"id": _text(record["id"]), "image": None if path is None else _text(path), "reason": reason}
            )
            continue
        if short_caption is record["short_caption"]:
            raw.append(short_caption)
        if content is None and path is not None:
            if config.embed_images or config.format == "webdataset":
                path, content = os.path.basename(path), Path(path).read_bytes()
            else:
                path = os.path.relpath(path, folder / "data")
        details = [
            {
                "model": options.model,
                "revision": journal.header["revision"],
                "prompt": options.prompt,
                "settings": json.dumps(options.settings(caption["attempts"] - 1), sort_keys=True),
                "attempts": caption["attempts"],
                "tokens": len(tokenizer(caption["text"], add_special_tokens=False, verbose=False)["input_ids"]),
                "sub_captions": len(split_sentences(caption["text"])),
                "reasons": caption["reasons"],
                "earlier_reasons": caption["earlier_reasons"],
                "dropped": caption.get("dropped"),
            }
            for options, journal, caption in zip(config.captioners, journals, captions, strict=True)
        ]
        rows.append(
            {
                "id": _text(record["id"]),
                "image": {"bytes": content, "path": path},
                "short_caption": short_caption,
                "long_captions": long_captions,
                "captions": details,
            }
        )
    statistics = shard_statistics(rows, raw, len(config.captioners), tokenizer)
    revisions = [journal.header["revision"] for journal in journals]
    sidecar = {"skipped": skipped, "statistics": statistics, "revisions": revisions}
    # what it says of the shard is there before the shard, whose being there ends the work on the chunk
    replace_file(_sidecar_path(config, chunk.name), json.dumps(sidecar, sort_keys=True).encode())
    write_shard(_shard_path(config, chunk.name), rows, config.format)
    for path in paths:
        path.unlink()


def _finish(config: RelabelConfig, share: _Share) -> dict[str, Any] | None:
    """The card and what belongs to it, once every chunk is written."""
    names, folder = share.names(), Path(config.output)
    if names is None or not all(_shard_path(config, name).exists() for name in names):
        return None
    sidecars = [json.loads(_sidecar_path(config, name).read_text()) for name in names]
    skipped = [one for sidecar in sidecars for one in sidecar["skipped"]]
    statistics = merge_statistics(config, [sidecar["statistics"] for sidecar in sidecars], len(skipped))
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in skipped)
    replace_file(folder / SKIPPED, lines.encode())
    lists = [sidecar["revisions"] for sidecar in sidecars]
    revisions = [sorted({one for one in ones if one}) for ones in zip(*lists, strict=True)]
    write_card(config, statistics, revisions)
    return statistics


def _text(value: Any) -> str:
    """As a text that can be written, whatever bytes a file's name holds."""
    return os.fsencode(str(value)).decode(errors="backslashreplace")


def _chunk_name(part: int, number: int) -> str:
    return f"{part:05d}-{number:05d}"


def _shard_path(config: RelabelConfig, name: str) -> Path:
    return Path(config.output, "data", name + SUFFIXES[config.format])


def _sidecar_path(config: RelabelConfig, name: str) -> Path:
    return Path(config.output, HIDDEN, f"{name}.json")


def _journal_path(config: RelabelConfig, name: str, number: int) -> Path:
    return Path(config.output, HIDDEN, f"{name}-captioner-{number}.jsonl")


def _is_done(config: RelabelConfig, name: str, number: int) -> bool:
    """Whether a captioner has nothing left to do for a chunk; the last one also leaves its shard."""
    is_last = number == len(config.captioners) - 1
    return _shard_path(config, name).exists() or (not is_last and _journal_path(config, name, number).exists())


def _seed(seed: int, captioner: int, record_id: Any, attempt: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{captioner}\0{_text(record_id)}\0{attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _skip(bar: tqdm, images: int) -> None:
    """What was done before does not count for the images a second."""
    if not bar.disable:
        bar.initial += images
        bar.n += images
        bar.refresh()


def _rows(records: Dataset | list[dict[str, Any]], start: int, stop: int) -> list[dict[str, Any]]:
    if isinstance(records, list):
        return records[start:stop]
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
        )
    except FileNotFoundError:
        if not os.path.isdir(config.data):
            raise
        images, unreadable = find_images(config.data)
        if not images and not unreadable:
            raise
        empty = {"short_caption": None, "long_captions": []}
        found = {name: {"image": os.path.join(config.data, name), "id": name, **empty} for name in images}
        broken = {name: {"image": None, "id": name, "error": reason} | empty for name, reason in unreadable.items()}
        records = [record for _, record in sorted({**found, **broken}.items())]
    if not isinstance(records, IterableDataset) and not len(records):
        raise ValueError(f"{config.data}: holds no record.")
    return records


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer {name}: cannot be loaded, but tokens are counted with it. Name a folder or Hub id with a "
            f"tokenizer ({' '.join(str(error).split())})."
        ) from error


def _check_folders(output: Path, data: str) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: a file, not a folder to write.")
    if output.is_dir() and any(output.iterdir()) and not (output / HIDDEN).is_dir():
        raise FileExistsError(f"{output}: holds something else already; choose another --output.")
    if os.path.isdir(data) and output.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"{output}: lies in {data}, whose images it would be read with; choose another --output.")


def _keep_identity(path: Path, config: RelabelConfig) -> None:
    identity = json.loads(json.dumps(config.identity()))
    if not path.exists():
        replace_file(path, json.dumps(identity, indent=1, sort_keys=True).encode())
        return
    begun = json.loads(path.read_text())
    changed = [
        f"`{name}` was {begun.get(name)!r} and is {identity.get(name)!r}"
        for name in sorted(begun.keys() | identity.keys())
        if begun.get(name) != identity.get(name)
    ]
    if changed:
        raise ValueError(
            f"{config.output} was begun with other options: {'; '.join(changed)}. Give the same, or choose another "
            "--output."
        )


def _changed(data: str, how: str) -> ValueError:
    return ValueError(f"{data}: the records have changed since the output was begun: {how}. Choose another --output.")
