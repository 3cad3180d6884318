"""Reads the tensors of a TorchScript archive without TorchScript, which would run the archive's code."""

import ast
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from lotlip_hf.files import one_line

from .common import ConversionError

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
CONSTANTS = "/constants.pkl"
# Parameters and buffers of a class in the archive's code.
TENSORS = r"class {}\(Module\):\n  __parameters__ = (\[.*?\])\n  __buffers__ = (\[.*?\])\n"


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(CONSTANTS) for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Reads an archive's state dict, the same as `torch.jit.load(path).state_dict()`."""
    try:
        with zipfile.ZipFile(path) as archive:
            (constants,) = (name for name in archive.namelist() if name.endswith(CONSTANTS))
            reader = _Unpickler(archive, constants.removesuffix(CONSTANTS))
            return _state_dict(reader.load(), reader)
    except Exception as error:  # a damaged pickle can raise any error
        raise ConversionError(f"{path} is a damaged TorchScript archive ({one_line(error)}).") from error


class _Unpickler(pickle.Unpickler):
    """Unpickles modules as objects that have their attributes and no code."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (), {"__module__": module})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # build_intlist, restore_type_tag, ...
            return lambda value, *_: value
        if (module, name) == ("torch", "device"):
            return str
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, _, size = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key][:size]

    def tensor_names(self, kind: type) -> list[str]:
        """The parameters and buffers that a module's class lists. Other tensors of the module are not weights."""
        *folders, module = kind.__module__.split(".")
        code = self.archive.read("/".join([self.root, "code", *folders, f"{module}.py"])).decode()
        listed = re.search(TENSORS.format(re.escape(kind.__name__)), code)
        return [] if listed is None else [name for names in listed.groups() for name in ast.literal_eval(names)]


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)


def _state_dict(module: Any, reader: _Unpickler, prefix: str = "") -> dict[str, torch.Tensor]:
    values = vars(module)
    state_dict = {prefix + name: values[name] for name in reader.tensor_names(type(module))}
    for name, value in values.items():
        if type(value).__module__.startswith("__torch__"):
            state_dict |= _state_dict(value, reader, f"{prefix}{name}.")
    return {name: tensor for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)}
