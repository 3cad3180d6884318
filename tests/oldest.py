"""The oldest transformers that setup.py allows, in an environment that otherwise is the installed one.

`make test` makes it once (`python tests/oldest.py`); a test that finds none makes it itself. It lives in the
environment (`sys.prefix`), not in the repository.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import requires
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement


def oldest_version() -> str:
    """The lower end of the versions of transformers that lotlip-hf asks for."""
    (transformers,) = (r for r in map(Requirement, requires("lotlip-hf")) if r.name == "transformers")
    (version,) = (specifier.version for specifier in transformers.specifier if specifier.operator == ">=")
    return version


def python() -> Path:
    """Make the environment, unless it is there already.

    Several processes may call this at once: one makes it while the others wait.

    Returns:
        Its interpreter.

    Raises:
        RuntimeError: pip could not install that transformers; the message holds what pip said and the command to run.
    """
    folder = Path(sys.prefix) / "oldest-transformers" / oldest_version()
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    if not complete.is_file():
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not complete.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                _make(folder, interpreter)
                complete.touch()
    return interpreter


def _make(folder: Path, interpreter: Path) -> None:
    venv.create(folder, symlinks=True)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # What it lacks it takes from the installed environment, with the editable packages there.
    below = sysconfig.get_path("purelib")
    (site_packages / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    command += ["--disable-pip-version-check", f"transformers=={oldest_version()}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(
            f"The oldest supported transformers, {oldest_version()}, could not be installed by pip. With a connection "
            f"to a package index, run: {sys.executable} tests/oldest.py\npip said:\n{finished.stdout}{finished.stderr}"
        )


if __name__ == "__main__":
    print(f"transformers {oldest_version()} runs under {python()}")
