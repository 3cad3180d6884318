"""
Long captions for any image set, by several captioning models: the first step of the LoTLIP paper.

Records are cut into chunks of `shard_size`, a chunk into groups that a captioner answers together. What a group is
answered depends on the group alone, so neither the number of processes nor an interruption changes it. One captioner
after the other goes through all chunks; each group's captions are kept in a journal in `<output>/.relabel` as soon as
they are there. The last captioner leaves each chunk as a shard in `<output>/data`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
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
from ..data.records import load_records
from ..files import PARTIAL, OutsideError, check_output, is_own_file, printable, replacing
from ..images import find_images
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
    """Loads a model of transformers, or prepares for an endpoint, as the captioner's options say."""
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
    """The card and what belongs to it, once every chunk is written."""
    names = share.names()
    if names is None:
        return None
    written = {path.name for path in Path(config.output, "data").glob("[!.]*")}
    shards = {shard_path(config, name).name for name in names}
    if others := sorted(written - shards):
        raise changed(config.data, f"there are none any more for {others[0]}")
    if written != shards:
        return None
    with FileLock(Path(config.output, HIDDEN, "lock-finish")):  # two processes may end at a time
        return _write_the_rest(config, names)


def _write_the_rest(config: RelabelConfig, names: Sequence[str]) -> dict[str, Any]:
    folder = Path(config.output)
    for path in (*folder.glob(f"data/.*{PARTIAL}"), *folder.glob(f"{HIDDEN}/*-captioner-*")):
        path.unlink(missing_ok=True)  # what processes that were killed left behind
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
        is_folder = os.path.isdir(config.data)
        images, unreadable = find_images(config.data, root=config.image_root) if is_folder else ([], {})
        if not images and not unreadable:
            raise
        empty = {"short_caption": None, "long_captions": []}
        found = {name: {"image": os.path.join(config.data, name), "id": name, **empty} for name in images}
        broken = {name: {"image": None, "id": name, "error": reason} | empty for name, reason in unreadable.items()}
        records = [record for _, record in sorted({**found, **broken}.items())]
    except MissingColumn as error:
        raise MissingColumn(
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
    if not (output / HIDDEN).is_dir():
        check_output(output, folder=True)
    if os.path.isdir(config.data) and output.resolve().is_relative_to(Path(config.data).resolve()):
        raise ValueError(
            f"{output}: lies in {config.data}, whose images it would be read with; choose another --output."
        )
    for option, folder in (("--image-folder", config.image_folder), ("--image-root", config.image_root)):
        if folder is not None and not os.path.isdir(folder):
            raise NotADirectoryError(f"{option} {folder}: no such folder.")
    # Journals and locks are opened for writing as they are found.
    folders = [path for path in (output / HIDDEN, output / "data") if path.exists() or path.is_symlink()]
    strange = [path for path in folders if path.is_symlink() or not path.is_dir()]
    strange += [
        path
        for folder in folders
        for path in folder.glob("*")
        if path.is_symlink() or not path.is_file() or (folder.name == HIDDEN and not is_own_file(path))
    ]
    if strange:
        raise OutsideError(f"{printable(strange[0])}: a link, or not as a run leaves it; choose another --output.")
