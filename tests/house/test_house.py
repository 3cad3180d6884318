"""The shape of the repository: which part may import which, what is in the package, what no file may hold."""

import ast
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lotlip_hf
import lotlip_hf.conversion
import lotlip_hf.modeling
import upstream

REPOSITORY = Path(__file__).resolve().parents[2]
LARGEST_FILE = 5 * 1024 * 1024  # bytes

# What a checkpoint's remote code may import: transformers, and what every installation of transformers has.
MODELING_IMPORTS = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}


def imports(path: Path, *, lazy: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of each import of a file; a relative one keeps its dots.

    Those that only a type checker reads are left out, and with `lazy=False` those inside functions too.
    """

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def project_files() -> list[Path]:
    """Every file that is or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: git cannot list the project's files")
    return [path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file()]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "modeling").glob("*.py")), ids=lambda path: path.name)
def test_modeling_imports_only_what_remote_code_may(path: Path) -> None:
    allowed = MODELING_IMPORTS | set(sys.stdlib_module_names)
    if path.name == "tokenization_lotlip.py":
        allowed = allowed | {"ftfy"}
    for line, name in imports(path):
        if name.startswith("."):
            # transformers copies `from .x import y` along with the file; `from . import x` it does not find.
            assert re.fullmatch(r"\.\w+", name), f"{path.name}:{line}: write `from .module import name`, not {name!r}"
            assert (path.parent / f"{name[1:]}.py").is_file(), f"{path.name}:{line}: there is no {name[1:]}.py"
        else:
            assert name.split(".")[0] in allowed, f"{path.name}:{line}: modeling/ may not import {name}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "lotlip_hf").rglob("*.py")), ids=lambda path: path.name)
def test_lotlip_hf_does_not_look_up(path: Path) -> None:
    for line, name in imports(path):
        assert name.split(".")[0] not in {"benchmarks", "conversion", "examples", "modeling", "tests"}, (
            f"{path.name}:{line}: imports {name}"
        )
    for line, name in imports(path, lazy=False):
        assert "conversion" not in name.split("."), (
            f"{path.name}:{line}: import {name} inside the function that needs it"
        )


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["benchmarks", "conversion", "examples", "tests"])
def test_modeling_is_imported_under_its_package_name(folder: str) -> None:
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for line, name in imports(path):
            # Under its bare name every class would exist twice, and `isinstance` would tell them apart.
            assert name.split(".")[0] not in {"conversion", "modeling"}, (
                f"{path.name}:{line}: write lotlip_hf.{name}, not {name}"
            )


def test_the_packages_are_the_folders_of_this_checkout() -> None:
    assert Path(lotlip_hf.__file__).parent == REPOSITORY / "lotlip_hf"
    assert Path(lotlip_hf.modeling.__file__).parent == REPOSITORY / "modeling"
    assert Path(lotlip_hf.conversion.__file__).parent == REPOSITORY / "conversion"


def test_nothing_that_is_read_runs() -> None:
    """
    Where `trust_remote_code` is left out, transformers asks on the terminal, and input from a pipe answers. Pickles
    and TorchScript archives run what they hold.
    """
    auto = re.compile(r"(transformers\.)?(Auto\w+\.from_(pretrained|config)|pipeline)")
    unsafe = re.compile(r"(\w*pickle|dill|joblib|marshal)\.loads?|torch\.jit\.load|yaml\.(unsafe_|full_)?load")
    for folder in ("lotlip_hf", "modeling", "conversion", "examples", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name, said = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                where = f"{path.name}:{node.lineno}: {name}"
                assert not auto.fullmatch(name) or "trust_remote_code" in said, f"{where} without trust_remote_code"
                assert name != "torch.load" or said.get("weights_only") == "True", f"{where} without weights_only"
                assert not unsafe.fullmatch(name), where
                assert "allow_pickle" not in said, where


def test_every_public_name_is_there() -> None:
    for name in lotlip_hf.__all__:
        assert getattr(lotlip_hf, name) is not None, name


def test_the_version_is_said_once() -> None:
    assert lotlip_hf.__version__ == version("lotlip-hf")


def test_pinned_versions_are_ones_that_setup_allows() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    canonical = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pinned.items()}
    assert canonical["torch"] == "2.13.0"
    for requirement in map(Requirement, requires("lotlip-hf")):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in canonical, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(canonical[name]), f"{requirement} does not allow {canonical[name]}"


def test_no_file_names_this_machine_or_a_registry() -> None:
    # Put together here, so that this file does not hold them either.
    machine = re.compile(r"(?<![\w.<>-])/(?:work|root|tmp)" + r"/[\w.]")
    hosts = [
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "registry." + "npmjs",
        "download." + "pytorch",
        "anaconda" + ".org",
    ]
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(REPOSITORY)
        found = machine.search(text)
        assert found is None, f"{name} holds a path of one machine: {found and found.group()!r}"
        for host in hosts:
            assert host not in text, f"{name} names the host {host}"


def test_tests_reach_no_other_machine() -> None:
    with pytest.raises(RuntimeError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=10).close()


def test_no_file_is_large() -> None:
    for path in project_files():
        assert path.stat().st_size < LARGEST_FILE, f"{path.relative_to(REPOSITORY)} is over 5 MB"


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("lotlip_hf", "modeling", "conversion"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("lotlip_hf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"lotlip_hf/{path.relative_to(REPOSITORY / 'lotlip_hf')}" for path in python_files("lotlip_hf")}
    expected |= {f"lotlip_hf/modeling/{path.name}" for path in python_files("modeling")}
    expected |= {f"lotlip_hf/conversion/{path.name}" for path in python_files("conversion")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_shared_tests_that_cannot_be_fetched_say_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "cache_folder", lambda: tmp_path / "cache" / "version")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="tests/upstream.py"):
        upstream.upstream("test_modeling_common")
    left = [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]
    assert left == []


def test_the_shared_tests_appear_with_their_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, theirs = "class GenerationTesterMixin: pass", "class ExportTesterMixin: theirs = True"
    files = {
        "tests/test_modeling_common.py": own,
        "tests/exporters/test_export.py": theirs,
        "src/other.py": "",
    }
    archive = tmp_path / "transformers.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"transformers-5.99.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    monkeypatch.setattr(upstream, "cache_folder", lambda: tmp_path / "cache" / "version")
    monkeypatch.setattr(upstream, "_download", lambda folder: archive)
    package = upstream.fetch() / upstream.PACKAGE
    assert (package / "test_modeling_common.py").read_text() == own
    assert (package / "exporters" / "test_export.py").read_text() == theirs  # a stand-in replaces nothing
    assert "GenerationTesterMixin" in (package / "generation" / "test_utils.py").read_text()
    assert not list(package.rglob("other.py"))
    monkeypatch.setattr(upstream, "_download", lambda folder: pytest.fail("downloaded twice"))
    assert upstream.fetch() == package.parent


def python_files(folder: str) -> list[Path]:
    return list((REPOSITORY / folder).rglob("*.py"))
