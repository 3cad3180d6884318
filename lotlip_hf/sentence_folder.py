"""Reads the settings of a sentence-transformers folder: pooling, prompt, maximum length and linear layers."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from .files import FileError, inside, parse_json, printable, read_regular, read_tensors

logger = logging.getLogger(__name__)

MAX_JSON = 1 << 20
# Pooling of sentence-transformers, with the switch that selected it before version 6 -> pooling of LoTLIP.
POOLINGS = {
    "cls": ("pooling_mode_cls_token", "cls"),
    "max": ("pooling_mode_max_tokens", None),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "mean_sqrt_len_tokens": ("pooling_mode_mean_sqrt_len_tokens", None),
    "weightedmean": ("pooling_mode_weightedmean_tokens", "weighted_mean"),
    "lasttoken": ("pooling_mode_lasttoken", "last"),
}
# Modules that need no other layer: LoTLIP's embeddings are normalised, and dropout is for training.
KNOWN = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")


@dataclass(frozen=True)
class SentenceFolder:
    """
    Settings of a sentence-transformers folder.

    Args:
        source (`str`): Folder or Hub id.
        pooling_modes (`tuple[str, ...]`): Names of the poolings in sentence-transformers, several if their results are
            concatenated.
        prompt (`str`): Text before each text, empty without a default prompt.
        max_length (`int`, *optional*): Maximum length in tokens, if it is not that of the tokenizer.
        dense (`Tensor`, *optional*): Matrix [D, hidden_size] of the linear layers after pooling.
        left_out (`tuple[str, ...]`): Settings that a new model cannot have, each with the reason.
    """

    source: str
    pooling_modes: tuple[str, ...] = ()
    prompt: str = ""
    max_length: int | None = None
    dense: Tensor | None = None
    left_out: tuple[str, ...] = ()

    @property
    def pooling(self) -> str | None:
        """LoTLIP's name of the pooling, or `None` if the folder has no pooling."""
        if not self.pooling_modes:
            return None
        found = POOLINGS[self.pooling_modes[0]][1] if len(self.pooling_modes) == 1 else None
        if found is None:
            raise ValueError(
                f"{self.source} has the pooling {' + '.join(self.pooling_modes)}, which LoTLIP does not support. Pass "
                "another one as `text_pooling` (`--text-pooling`), such as 'mean'."
            )
        return found


def read_sentence_folder(source: str | os.PathLike) -> SentenceFolder | None:
    """
    Reads the settings that sentence-transformers saves with a text encoder, without its code. From the Hub, it
    downloads only the small files of the settings and the weights of dense layers.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id of a text encoder.

    Returns:
        [`SentenceFolder`]: The settings, or `None` if the folder has no `modules.json`.

    Raises:
        `ValueError`: If a file is damaged, too large, or in another folder.
        `OSError`: If a file cannot be read.
    """
    source = os.fspath(source)
    modules = _read_json(source, "modules.json", list)
    if modules is None:
        return None
    folders: dict[str, list[str]] = {}  # by the kind of module
    for module in modules:
        kind, folder = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        is_name = isinstance(folder, str) and "\0" not in folder and os.path.basename(folder) == folder
        is_name = is_name and folder not in (".", "..")
        if not isinstance(kind, str) or not is_name:
            raise FileError(os.path.join(source, "modules.json"), "a module has no `type`, or a `path` elsewhere")
        folders.setdefault(kind.rpartition(".")[2], []).append(folder)
    model = _read_json(source, "config_sentence_transformers.json")
    prompt = _get(_get(model, "prompts", dict, {}), _get(model, "default_prompt_name", str), str, "")
    encoder = _read_json(source, os.path.join(*folders.get("Transformer", [""])[:1], "sentence_bert_config.json"))
    modes, pools_prompt = _pooling_of(source, folders["Pooling"][0]) if "Pooling" in folders else ((), True)
    dense, left_out = _read_dense(source, folders.get("Dense", []))
    left_out = [*(f"{kind} is unknown" for kind in folders if kind not in KNOWN), *left_out]
    dense = None if left_out else dense
    if prompt and not pools_prompt:
        left_out.append("LoTLIP pools the prompt with the text")
    return SentenceFolder(
        source=source,
        pooling_modes=modes,
        prompt=prompt,
        max_length=max(_get(encoder, "max_seq_length", int, 0), 0) or None,
        dense=dense,
        left_out=tuple(left_out),
    )


def _get(settings: dict[str, Any], key: str | None, kind: type, default: Any = None) -> Any:
    """The value of a setting if it has the right type."""
    value = settings.get(key)
    return value if type(value) is kind else default  # `True` is an `int`, too


def _pooling_of(source: str, folder: str) -> tuple[tuple[str, ...], bool]:
    """The poolings of a module, from `pooling_mode` or from older switches, and whether they include the prompt."""
    name = os.path.join(folder, "config.json")
    config = _read_json(source, name)
    if not config:
        raise FileError(os.path.join(source, name), "the file is missing or empty, but modules.json names it")
    modes = config.get("pooling_mode") or [mode for mode, (switch, _) in POOLINGS.items() if config.get(switch)]
    modes = tuple(modes if isinstance(modes, list) else [modes]) or ("mean",)
    if not all(isinstance(mode, str) and mode in POOLINGS for mode in modes):
        raise FileError(os.path.join(source, name), f"`pooling_mode` is {modes!r}, not one of {', '.join(POOLINGS)}")
    return modes, config.get("include_prompt") is not False


def _read_dense(source: str, folders: list[str]) -> tuple[Tensor | None, list[str]]:
    """The product of the matrices of dense modules, and the modules that are not matrices."""
    product, left_out = None, []
    for folder in folders:
        config = _read_json(source, os.path.join(folder, "config.json"))
        activation = str(config.get("activation_function")).rpartition(".")[2]
        is_matrix = activation == "Identity" and config.get("bias") is False and not config.get("use_residual")
        names = [config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")]
        path = _find(source, os.path.join(folder, "model.safetensors"))
        if path is None or not is_matrix or names != 2 * ["sentence_embedding"]:
            left_out.append(f"{folder} ({activation}) is not linear without bias")
            continue
        try:
            weight = read_tensors(path)[0]["linear.weight"].float()
            product = weight if product is None else weight @ product
        except (KeyError, RuntimeError) as error:
            raise FileError(path, f"not the weights of a dense layer ({printable(error)})") from error
        if not product.isfinite().all():
            raise FileError(path, "the weights of the dense layer are not finite")
    return product, left_out


def _read_json(source: str, name: str, kind: type = dict) -> Any:
    """The value in a JSON file of a folder or Hub id. Without the file, an empty dictionary, or `None` for a list."""
    path = _find(source, name)
    if path is None:
        return {} if kind is dict else None
    try:
        value = parse_json(read_regular(path, MAX_JSON))
    except ValueError as error:
        raise error if isinstance(error, FileError) else FileError(path, f"not JSON ({error})") from error
    if not isinstance(value, kind):
        raise FileError(path, f"contains a {type(value).__name__}, not a {kind.__name__}")
    return value


def _find(source: str, name: str) -> str | None:
    """Path of a file of a folder or Hub id, or `None` without the file."""
    if os.path.isdir(source):
        path = inside(source, name)
        return path if os.path.exists(path) else None
    try:
        return hf_hub_download(source, name)
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(source, name) is not _CACHED_NO_EXIST:
            logger.warning("%s: %s is not in the cache and the Hub cannot be reached. It is ignored.", source, name)
    except EntryNotFoundError:
        pass
    return None
