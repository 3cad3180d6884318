"""
Writes long captions for an image set with several captioning models, the first step of the LoTLIP paper, and rewrites,
negatives and tags.

Records are split into chunks of `shard_size`, and chunks into groups that a captioner answers together. The captions
of a group depend only on the group, so they do not change with the number of processes or after an interruption. The
captioners run one after the other over all chunks. The captions of each group are saved at once in a journal in
`<output>/.relabel`. The last captioner turns each chunk into a shard in `<output>/data`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import IterableDataset
from filelock import FileLock, Timeout
from huggingface_hub import model_info
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.mappings import MissingColumn
from ..data.records import image_records, load_records
from ..files import PARTIAL, OutsideError, check_output, is_own_file, printable, replacing
from ..plots import check_plot
from ..terminal import progress_bar
from .captioners.base import Captioner, CaptionerConfig
from .captioners.endpoint import EndpointCaptioner
from .captioning import Captioning
from .card import HISTOGRAMS, merge_statistics, write_card
from .chunks import Records, Share, shard_path
from .config import RelabelConfig
from .journal import HIDDEN, changed, keep_identity
from .shards import is_done, read_sidecar, write_chunk
from .storage import Storage

SKIPPED = "skipped.jsonl"
HUB_TIMEOUT = 10.0  # seconds


def load_captioner(config: CaptionerConfig) -> Captioner:
    """Creates the captioner of a config: an endpoint if `config.endpoint` is set, else a local model."""
    if config.endpoint is not None:
        return EndpointCaptioner(config)
    from .captioners.local import LocalCaptioner

    return LocalCaptioner(config)


def _check_captioners(config: RelabelConfig) -> None:
    """Checks all captioners before the first one starts, so that a misspelt name fails at once."""
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
    Writes long captions for a set of images, as shards that training reads directly.

    The folder `output` contains:

    - `data/`: the shards;
    - `README.md` and `histograms.png`: a data set card with statistics;
    - `statistics.json`: the statistics as numbers;
    - `skipped.jsonl`: the records with an unreadable image or without a caption.

    The columns of a shard are:

    - `id` and `image`;
    - `short_caption`: the raw caption, or the first sentence of the first long caption;
    - `long_captions`: one caption by each captioner with the role `"long"`, empty if it was dropped. If no captioner
      has this role, the long captions of the records;
    - `rewrites`, `negatives`, `tags`, `regions` and `group`, if a captioner reads texts or has another role: the
      answers with the role of the field, or else the field of the records;
    - `captions`: model, settings and problems of the answer of each captioner.

    The files contain no absolute paths. Images are named by their path relative to the image folder (see
    [`image_base`]), and local models by the name of their folder.

    A call with the same options and records resumes an interrupted run. With several processes (`torchrun`,
    `accelerate launch`), each process captions a share of the records, and the last process to finish writes the card.

    Args:
        config (`RelabelConfig`): Options of the run.
        make_captioner (`Callable[[CaptionerConfig], Captioner]`, *optional*, defaults to `load_captioner`): Function
            that creates a captioner from its options, for custom engines.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `dict[str, Any]` or `None`: Contents of `statistics.json`; `None` if other processes are still running.

    Raises:
        `ValueError`: If an option does not fit the data, the models, or the run that `output` belongs to.
        `FileExistsError`: If `output` contains other files.
        `EndpointError`: If an endpoint does not answer. The captions so far are saved.
        `OSError`: If the data or a model do not exist, or `output` is not writable.

    Example:

    ```python
    >>> from lotlip_hf.relabel.captioners.base import Answer, CaptionerConfig
    >>> from lotlip_hf.relabel.config import RelabelConfig
    >>> from lotlip_hf.relabel.run import relabel

    >>> class SizeCaptioner:
    ...     revision, group_size, concurrency = None, 8, 1
    ...
    ...     def __init__(self, config):
    ...         self.config = config
    ...
    ...     def answer(self, images, settings, seeds):
    ...         text = "A picture that is {} pixels wide and {} pixels high."
    ...         return [Answer(text.format(*image.size), finished=True) for image in images]
    ...
    ...     def close(self):
    ...         pass

    >>> captioners = [CaptionerConfig("llava-hf/llava-1.5-7b-hf")]
    >>> config = RelabelConfig(data="photos", output="relabelled", captioners=captioners, tokenizer="checkpoint")
    >>> statistics = relabel(config, make_captioner=SizeCaptioner)  # without `make_captioner`, LLaVA is loaded
    >>> statistics["captions"][1]["texts"]
    2
    ```
    """
    folder = Path(config.output)
    # `PartialState` itself does not notice that there is no accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available())
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
                    with FileLock(path, timeout=0):  # locked if a run with more processes is active
                        pass
        except Timeout as error:
            raise OSError(
                f"{folder}: another run is writing to this folder. Wait until it ends, or stop it."
            ) from error
        keep_identity(config)
        (folder / "data").mkdir(exist_ok=True)
        share, storage = Share(config, records, state.process_index, state.num_processes), Storage(config)
        for number, captioner in enumerate(config.captioners):
            is_last = number == len(config.captioners) - 1
            title = f"{captioner.model} ({number + 1}/{len(config.captioners)})"
            is_shown = progress and state.is_main_process
            with (
                progress_bar(total=share.total(), desc=title, unit="image", shown=is_shown) as bar,
                Captioning(config, number, make_captioner, storage, bar) as captioning,
            ):
                done = partial(is_done, config, number=number)
                for chunk in captioning.caption(share.chunks(done, bar)):
                    if is_last:
                        write_chunk(config, chunk, storage, tokenizer)
        return _finish(config, share)


def _finish(config: RelabelConfig, share: Share) -> dict[str, Any] | None:
    """Writes the card, the statistics and `skipped.jsonl` if all chunks are written; else returns `None`."""
    names = share.names()
    if names is None:
        return None
    written = {path.name for path in Path(config.output, "data").glob("[!.]*")}
    shards = {shard_path(config, name).name for name in names}
    if others := sorted(written - shards):
        raise changed(config.data, f"{others[0]} has no records any more")
    if written != shards:
        return None
    with FileLock(Path(config.output, HIDDEN, "lock-finish")):  # two processes may finish at the same time
        return _write_the_rest(config, names)


def _write_the_rest(config: RelabelConfig, names: Sequence[str]) -> dict[str, Any]:
    folder = Path(config.output)
    for path in (*folder.glob(f"data/.*{PARTIAL}"), *folder.glob(f"{HIDDEN}/*-captioner-*")):
        path.unlink(missing_ok=True)  # files of killed processes
    sidecars = [read_sidecar(config, name) for name in names]
    skipped = [one for sidecar in sidecars for one in sidecar["skipped"]]
    statistics = merge_statistics(config, [sidecar["statistics"] for sidecar in sidecars], len(skipped))
    with replacing(folder / SKIPPED) as file:
        file.writelines(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in skipped)
    lists = [sidecar["revisions"] for sidecar in sidecars]
    revisions = [sorted({one for one in ones if one}) for ones in zip(*lists, strict=True)]
    write_card(config, statistics, revisions)
    return statistics


def _open_records(config: RelabelConfig) -> Records:
    load = partial(
        load_records,
        config.data,
        split=config.split,
        image_folder=config.image_folder,
        streaming=config.streaming,
        image_root=config.image_root,
        max_record_bytes=config.max_record_bytes,
    )
    mapping = config.column_mapping()
    try:
        try:
            records = load(mapping=mapping)
        except MissingColumn as error:
            if error.field != "long" or config.mapping != "records":
                raise
            records = load(mapping=replace(mapping, long=()))  # the data may have raw captions alone
    except FileNotFoundError:
        records = image_records(config.data, config.image_root)
        if records is None:
            raise
    except MissingColumn as error:
        raise MissingColumn(
            error.problem,
            error.field,
            "Pass --image-column, --short-column (`none` if there are no raw captions) or --id-column. To caption a "
            "folder of images without its table, move the table out of the folder.",
        ) from error
    if not isinstance(records, IterableDataset) and not len(records):
        raise ValueError(f"{config.data} has no records. Check the path.")
    return records


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, from the Hub's cache, or from the Hub if it answers within `HUB_TIMEOUT`."""
    load = partial(AutoTokenizer.from_pretrained, name, trust_remote_code=False)
    try:
        with contextlib.suppress(OSError, ValueError):
            return load(local_files_only=True)
        if not os.path.isdir(name):
            model_info(name, timeout=HUB_TIMEOUT)  # fails fast: without network the next line retries for a minute
        return load()
    except (OSError, ValueError, HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"--tokenizer {name}: cannot be loaded ({printable(' '.join(str(error).split()))}). Pass the folder of "
            "another tokenizer; it only counts tokens."
        ) from error


def _check_folders(config: RelabelConfig) -> None:
    output = Path(config.output)
    if not (output / HIDDEN).is_dir():
        check_output(output, folder=True)
    if os.path.isdir(config.data) and output.resolve().is_relative_to(Path(config.data).resolve()):
        raise ValueError(f"{output} is inside the data folder {config.data}. Choose another --output.")
    for option, folder in (("--image-folder", config.image_folder), ("--image-root", config.image_root)):
        if folder is not None and not os.path.isdir(folder):
            raise NotADirectoryError(f"{option} {folder}: no such folder.")
    # Existing journals and locks will be opened for writing, so links are refused.
    folders = [path for path in (output / HIDDEN, output / "data") if path.exists() or path.is_symlink()]
    strange = [path for path in folders if path.is_symlink() or not path.is_dir()]
    strange += [
        path
        for folder in folders
        for path in folder.glob("*")
        if path.is_symlink() or not path.is_file() or (folder.name == HIDDEN and not is_own_file(path))
    ]
    if strange:
        raise OutsideError(f"{printable(strange[0])} is a link or an unexpected file. Choose another --output.")
