"""The scripts of `examples/` and `benchmarks/` as modules, so that tests can call their `main`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent


def load_script(path: str) -> ModuleType:
    """A script, by its path in the repository, executed anew."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where HfArgumentParser looks annotations up
    spec.loader.exec_module(module)
    return module
