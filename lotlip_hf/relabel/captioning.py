"""Captions the images of chunks, several groups at the same time."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from ..data.record import RecordError
from ..images import ImageError, image_source, load_image
from .captioners.base import IMAGE_ERRORS, Answer, Captioner, CaptionerConfig
from .captioners.endpoint import shrunk
from .chunks import Chunk, open_journal
from .config import NO_ANSWER, RelabelConfig
from .journal import DamagedError, Journal
from .quality import judge
from .storage import Storage, as_text, digest, file_of, writable

READERS = 4  # threads that decode images in advance


class _Read(NamedTuple):
    """The image of a record with the digest of its file (if files are copied), or the reason to skip it."""

    image: Image.Image | None = None
    skip: str = ""
    digest: str | None = None


@dataclass
class _Open:
    """A chunk that is being captioned."""

    chunk: Chunk
    journal: Journal
    left: int  # number of groups without captions


class Captioning:
    """The work of one captioner, which is loaded when the first group needs captions."""

    def __init__(
        self,
        config: RelabelConfig,
        number: int,
        make: Callable[[CaptionerConfig], Captioner],
        storage: Storage,
        bar: tqdm,
    ) -> None:
        self.config, self.number, self.storage, self.bar = config, number, storage, bar
        self.options = config.captioners[number]
        self.max_attempts = _max_attempts(self.options, config.max_attempts)
        self._make, self._captioner = make, None
        self._pending: dict[Future, _Open] = {}
        self._threads = contextlib.ExitStack()

    def __enter__(self) -> "Captioning":
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.cancel()
        if self._captioner is not None:
            self._captioner.close()  # close it before the threads, because they wait for its pending requests
        self._threads.close()

    def caption(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Yields each chunk when its journal is complete. A slow image delays only its own chunk."""
        for chunk in chunks:
            journal = open_journal(self.config, chunk, self.number)
            if journal.is_whole:
                self.bar.update(len(chunk.records))
                yield chunk
                continue
            captioner, readers, askers = self._begin()
            journal.begin({"group_size": captioner.group_size, "revision": captioner.revision})
            starts = range(0, len(chunk.records), captioner.group_size)
            groups = {n: chunk.records[start : start + captioner.group_size] for n, start in enumerate(starts)}
            if any(len(groups.get(n, ())) != len(captions) for n, captions in journal.groups.items()):
                raise DamagedError(journal.partial, "the captions belong to other records")
            missing = {n: group for n, group in groups.items() if n not in journal.groups}
            self.bar.update(sum(len(group) for n, group in groups.items() if n in journal.groups))
            opened = _Open(chunk, journal, len(missing))
            if not missing:
                journal.complete()
                yield chunk
            for n, group in missing.items():
                images = readers.submit(list, map(self._read_image, group))
                future = askers.submit(self._caption_group, captioner, journal, n, group, images)
                self._pending[future] = opened
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

    def _settle(self) -> Iterator[Chunk]:
        """Waits until a group is done, and yields completed chunks. Raises errors after all successful groups."""
        done = wait(self._pending, return_when=FIRST_COMPLETED).done
        for future in sorted(done, key=lambda future: future.exception() is not None):
            opened = self._pending.pop(future)
            self.bar.update(future.result())
            opened.left -= 1
            if not opened.left:
                opened.journal.complete()
                yield opened.chunk

    def _read_image(self, record: Mapping[str, Any]) -> _Read:
        try:
            if record.get("error"):
                raise RecordError(record["error"])
            str(image_source(record["image"]).path).encode()  # Parquet and JSON need names in UTF-8
            source = self.storage.read(record["image"])
            image = load_image(source, "image")
            self.storage.was_read(record["image"])
        except (ImageError, RecordError, TypeError) as error:
            self.storage.check(record["image"], error)
            return _Read(skip=self.storage.without_folders(as_text(error)).removeprefix("image: "))
        except UnicodeEncodeError:
            return _Read(skip="the file name is not valid UTF-8")
        if self.options.endpoint is not None:
            image = shrunk(image, self.options.max_image_size)  # saves memory while images wait for their requests
        is_copied = self.config.copies_images and file_of(record["image"]) is not None
        return _Read(image, digest=digest(source["bytes"]) if is_copied else None)

    def _caption_group(
        self,
        captioner: Captioner,
        journal: Journal,
        number: int,
        group: Sequence[Mapping[str, Any]],
        images: "Future[list[_Read]]",
    ) -> int:
        """Captions a group, saves the captions in the journal, and returns the number of records."""
        read = images.result()
        captions: list[dict[str, Any]] = [{} if one.image is not None else {"skip": one.skip} for one in read]
        asked = [index for index, caption in enumerate(captions) if not caption]
        for attempt in range(self.max_attempts):
            if not asked:
                break
            seeds = [_seed(self.config.seed, self.number, group[index]["id"], attempt) for index in asked]
            images_of = [image for index in asked if (image := read[index].image) is not None]
            answers = self._ask(captioner, images_of, self.options.settings(attempt), seeds)
            again = []
            for index, answer in zip(asked, answers, strict=True):
                if answer.error is not None:
                    text, reasons = "", (NO_ANSWER,)
                else:
                    text, reasons = judge(
                        writable(answer.text), self.options.prompt, answer.finished, self.config.rules
                    )
                earlier = captions[index]
                captions[index] = {
                    "text": text,
                    "attempts": attempt + 1,
                    "reasons": list(reasons),
                    "earlier_reasons": sorted({*earlier.get("earlier_reasons", ()), *earlier.get("reasons", ())}),
                }
                policies = {self.config.policies.get(reason, "drop") for reason in reasons}
                if policies & {"retry", "drop"}:
                    dropped = writable(answer.error) if answer.error else text
                    captions[index] |= {"text": "", "dropped": dropped[: self.config.rules.max_characters]}
                if "retry" in policies and "drop" not in policies:
                    again.append(index)
            asked = again
        for one, caption in zip(read, captions, strict=True):
            if one.digest is not None:
                caption["image"] = one.digest
        journal.add(number, captions)
        return len(group)

    def _ask(
        self, captioner: Captioner, images: Sequence[Image.Image], settings: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[Answer]:
        """
        Returns the answers. After an error each image is sent separately. If an image still fails, a grey test image
        shows whether the image or the model is the cause.
        """
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
                    f"{self.options.model} fails on every image ({reason}). The captions so far are saved."
                ) from error
            return [Answer("", error=f"the model fails on this image ({type(error).__name__}: {error})")]


def _max_attempts(options: CaptionerConfig, wanted: int) -> int:
    """Returns the number of attempts that can differ: at temperature 0 the same settings give the same answer."""
    first, again = options.settings(0), options.settings(1)
    if again["temperature"] > 0:
        return wanted
    return min(wanted, 1 if again == first else 2)


def _seed(seed: int, captioner: int, record_id: Any, attempt: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{captioner}\0{as_text(record_id)}\0{attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
