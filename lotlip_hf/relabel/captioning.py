"""Captions the images or rewrites the texts of chunks, several groups at the same time."""

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
from .captioners.base import IMAGE_ERRORS, PLACEHOLDER, Answer, Captioner, CaptionerConfig, fill
from .captioners.endpoint import shrunk
from .chunks import Chunk, open_journal
from .config import NO_ANSWER, NO_TEXT, RelabelConfig
from .journal import DamagedError, Journal
from .quality import Judgement, judge, judge_list
from .storage import Storage, as_text, digest, file_of, long_captions, raw_caption, writable

READERS = 4  # threads that decode images in advance


class _Read(NamedTuple):
    """The image of a record (if it is read) and the digest of its file (if it is copied), or the reason to skip it."""

    image: Image.Image | None = None
    skip: str = ""
    digest: str | None = None


class _Texts(NamedTuple):
    """The texts of a record that a prompt may contain, or the reason why an earlier captioner skipped the record."""

    caption: str = ""
    captions: tuple[str, ...] = ()
    skip: str = ""


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
            texts = self._texts(chunk) if missing else []
            self.bar.update(sum(len(group) for n, group in groups.items() if n in journal.groups))
            opened = _Open(chunk, journal, len(missing))
            if not missing:
                journal.complete()
                yield chunk
            for n, group in missing.items():
                start = n * captioner.group_size
                known = texts[start : start + len(group)]
                read = readers.submit(list, map(self._read_image, group, known))
                future = askers.submit(self._caption_group, captioner, journal, n, group, known, read)
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

    def _texts(self, chunk: Chunk) -> list[_Texts]:
        """Returns the texts that the prompts of a chunk contain, or that its answers must differ from."""
        if self.options.input == "image" and self.options.role == "long":
            return [_Texts()] * len(chunk.records)
        earlier = [
            (self.config.captioners[number].role, open_journal(self.config, chunk, number).captions())
            for number in range(self.number)
        ]
        texts = []
        for index, record in enumerate(chunk.records):
            answers = [(role, captions[index]) for role, captions in earlier]
            long = long_captions(record) + [one.get("text", "") for role, one in answers if role == "long"]
            skip = next((one["skip"] for _, one in answers if "skip" in one), "")
            texts.append(_Texts(raw_caption(record), tuple(filter(str.strip, long)), skip))
        return texts

    def _read_image(self, record: Mapping[str, Any], texts: _Texts) -> _Read:
        if texts.skip:
            return _Read(skip=texts.skip)
        try:
            if record.get("error"):
                raise RecordError(record["error"])
            str(image_source(record["image"]).path).encode()  # Parquet and JSON need names in UTF-8
            if self.options.input == "text" and not self.config.copies_images:
                return _Read()
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
        texts: Sequence[_Texts],
        images: "Future[list[_Read]]",
    ) -> int:
        """Captions a group, saves the captions in the journal, and returns the number of records."""
        read = images.result()
        captions = [
            {"skip": one.skip} if one.skip else _without_text(self.options.prompt, known)
            for one, known in zip(read, texts, strict=True)
        ]
        asked = [index for index, caption in enumerate(captions) if not caption]
        for attempt in range(self.max_attempts):
            if not asked:
                break
            seeds = [_seed(self.config.seed, self.number, group[index]["id"], attempt) for index in asked]
            images_of = [None if self.options.input == "text" else read[index].image for index in asked]
            prompts = [
                fill(self.options.prompt, texts[index].caption, "\n".join(texts[index].captions)) for index in asked
            ]
            answers = self._ask(captioner, images_of, prompts, self.options.settings(attempt), seeds)
            again = []
            for index, answer in zip(asked, answers, strict=True):
                if answer.error is not None:
                    text, reasons = "", (NO_ANSWER,)
                else:
                    text, reasons = self._judge(answer, texts[index])
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

    def _judge(self, answer: Answer, texts: _Texts) -> Judgement:
        """Finds the problems of an answer. Tags may repeat texts of the prompt, rewrites and negatives must not."""
        role, prompt, rules = self.options.role, fill(self.options.prompt, "", ""), self.config.rules
        text = writable(answer.text)
        if role == "long":
            return judge(text, prompt, answer.finished, rules)
        known = () if role == "tags" else (texts.caption, *texts.captions)
        return judge_list(text, prompt, answer.finished, rules, known=known, commas=role == "tags")

    def _ask(
        self,
        captioner: Captioner,
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        settings: Mapping[str, Any],
        seeds: Sequence[int],
    ) -> list[Answer]:
        """
        Returns the answers. After an error each record is sent separately. If a record still fails, a grey test image
        or a short text shows whether the record or the model is the cause.
        """
        own = () if self.options.input == "image" else (prompts,)  # engines that describe images need not take prompts
        try:
            return captioner.answer(images, settings, seeds, *own)
        except torch.OutOfMemoryError:
            raise
        except IMAGE_ERRORS as error:
            if len(images) > 1:
                asked = zip(images, prompts, seeds, strict=True)
                return [self._ask(captioner, [image], [text], settings, [seed])[0] for image, text, seed in asked]
            what = "text" if self.options.input == "text" else "image"
            test_image = Image.new("RGB", (224, 224), "grey") if what == "image" else None
            try:
                captioner.answer([test_image], settings, seeds, *([self.options.test_prompt] for _ in own))
            except IMAGE_ERRORS:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"{self.options.model} fails on every {what} ({reason}). The captions so far are saved."
                ) from error
            return [Answer("", error=f"the model fails on this {what} ({type(error).__name__}: {error})")]


def _without_text(prompt: str, texts: _Texts) -> dict[str, Any]:
    """Returns the caption of a record that lacks a text of the prompt; empty if the record has all."""
    known = {"{caption}": texts.caption, "{captions}": texts.captions}
    missing = [name for name in PLACEHOLDER.findall(prompt) if not known[name]]
    if not missing:
        return {}
    reason = {"reasons": [NO_TEXT], "earlier_reasons": [], "dropped": f"the record has no {missing[0]}"}
    return {"text": "", "attempts": 0, **reason}


def _max_attempts(options: CaptionerConfig, wanted: int) -> int:
    """Returns the number of attempts that can differ: at temperature 0 the same settings give the same answer."""
    first, again = options.settings(0), options.settings(1)
    if again["temperature"] > 0:
        return wanted
    return min(wanted, 1 if again == first else 2)


def _seed(seed: int, captioner: int, record_id: Any, attempt: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{captioner}\0{as_text(record_id)}\0{attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
