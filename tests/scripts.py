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


# The start of a program that cannot import the package.
WITHOUT_LOTLIP = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lotlip_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""
