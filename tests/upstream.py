"""transformers' own test mixins, taken from the source distribution of the installed version.

A wheel of transformers has no tests; its source distribution has those that all models share. A test file says::

    from upstream import upstream

    ModelTesterMixin = upstream("test_modeling_common").ModelTesterMixin

`make test` fetches them once for each version (`python tests/upstream.py`); a test that finds none fetches them
itself. They live in the environment (`sys.prefix`), not in the repository, as the package `transformers_tests`.
"""

import hashlib
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import ModuleType

import transformers
from filelock import FileLock

# A name that ends in "tests", because transformers' `get_tests_dir` climbs until it meets one.
PACKAGE = "transformers_tests"
GOLDEN_IMAGES = Path(__file__).resolve().parent / "golden" / "images"

# What the shared tests import and the source distribution leaves out. A mixin is left empty where our models have no
# such ability (generation) or where it is not about a model's behaviour (exporters).
STAND_INS = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/__init__.py": "",
    # Every argument that all configurations share, at a value that is not its default.
    f"{PACKAGE}/utils/test_configuration_utils.py": """config_common_kwargs = {
    "architectures": ["LoTLIPModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "short", 1: "long", 2: "other"},
    "label2id": {"short": 0, "long": 1, "other": 2},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
""",
    f"{PACKAGE}/fixtures/sample_text.txt": "A long caption names what a short one leaves out.\n\nIt goes on.\n",
    # The shared tests find this one on `sys.path`, in the folder `utils` beside their package.
    "utils/fetch_hub_objects_for_ci.py": f"""from pathlib import Path

IMAGES = Path({str(GOLDEN_IMAGES)!r})


def url_to_local_path(url):
    \"\"\"A picture of ours for the address of any picture; other addresses are returned as they are.\"\"\"
    if url.endswith((".png", ".jpg", ".jpeg")):
        return str(sorted(IMAGES.glob("*.png"))[0])
    return url
""",
}


def cache_folder() -> Path:
    """The folder of this environment for the installed transformers and the stand-ins above."""
    stand_ins = hashlib.sha256(repr(STAND_INS).encode()).hexdigest()[:8]
    return Path(sys.prefix) / "transformers-tests" / f"{transformers.__version__}-{stand_ins}"


def fetch() -> Path:
    """Download the shared tests of the installed transformers, unless they are there already.

    Several processes may call this at once: one downloads while the others wait, and the folder appears complete or
    not at all.

    Returns:
        The folder to put on `sys.path`.

    Raises:
        RuntimeError: pip could not download the source distribution; the message holds what pip said and the command
            to run.
    """
    folder = cache_folder()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                    unpacked = Path(temporary) / "unpacked"
                    _unpack(_download(Path(temporary)), unpacked)
                    unpacked.rename(folder)
    return folder


def upstream(module: str) -> ModuleType:
    """Import one of transformers' shared test modules.

    Args:
        module: Its name inside transformers' `tests` folder, such as `"test_modeling_common"`.

    Returns:
        The module, as `transformers_tests.<module>`.

    Raises:
        RuntimeError: the tests are not there and could not be downloaded.
    """
    folder = str(fetch())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"{PACKAGE}.{module}")


def _download(folder: Path) -> Path:
    version = transformers.__version__
    # pip builds the metadata of what it downloads, with the environment's setuptools.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", "transformers", "--dest", str(folder)]
    command += [f"transformers=={version}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if finished.returncode != 0 or len(archives) != 1:
        raise RuntimeError(
            f"The tests that all models of transformers share come with the source distribution of transformers "
            f"{version}, which pip could not download. With a connection to a package index, run: "
            f"{sys.executable} tests/upstream.py\npip said:\n{finished.stdout}{finished.stderr}"
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    """Write the tests of a source distribution to `folder/transformers_tests`, and the stand-ins beside them."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and len(parts) > 2 and parts[1] == "tests" and ".." not in parts:
                target = folder.joinpath(PACKAGE, *parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    if not (folder / PACKAGE / "test_modeling_common.py").is_file():
        raise RuntimeError(f"{archive.name} holds no tests/test_modeling_common.py: transformers has moved its tests.")
    for name, content in STAND_INS.items():
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    print(f"The shared tests of transformers {transformers.__version__} are in {fetch()}")
