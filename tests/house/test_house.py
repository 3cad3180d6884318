"""The shape of the repository: which part may import which, what is in the package, what no file may hold."""

import ast
import itertools
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import lotlip_hf
import lotlip_hf.conversion
import lotlip_hf.modeling

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON_FOLDERS = ("lotlip_hf", "modeling", "conversion", "examples", "benchmarks")
LARGEST_FILE = 5 * 1024 * 1024  # bytes

# What a checkpoint's remote code may import: transformers, and what every installation of transformers has.
MODELING_IMPORTS = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}

# From the ground up: a package or file imports from its own floor and from those below. Only these names are listed; a
# new file of a package has the package's floor.
FLOORS = (
    ("modeling",),
    ("auto",),
    ("files", "terminal", "options"),
    ("images", "plots", "distributed", "lora", "sentence_folder", "adapter_check", "attribution", "words", "regions"),
    ("data", "scenes", "loading", "engines", "backbones"),
    ("encoder",),
    ("store",),
    ("states", "dense", "prompts", "compose", "image_tuning"),
    ("search", "grid", "embed"),
    ("shards",),
    ("metrics", "diffusion", "training", "evaluation", "relabel"),
    ("hub", "explain", "explain_page", "demo", "pictures"),
    ("__init__",),
    ("cli", "__main__"),
)


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


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

    for node in walk(syntax_tree(path)):
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
    if path.name == "cleaning_lotlip.py":
        allowed = allowed | {"ftfy"}
    for line, name in imports(path):
        if name.startswith("."):
            # transformers copies `from .x import y` along with the file; `from . import x` it does not find.
            assert re.fullmatch(r"\.\w+", name), f"{path.name}:{line}: write `from .module import name`, not {name!r}"
            assert (path.parent / f"{name[1:]}.py").is_file(), f"{path.name}:{line}: there is no {name[1:]}.py"
        else:
            assert name.split(".")[0] in allowed, f"{path.name}:{line}: modeling/ may not import {name}"


@pytest.mark.slow
def test_lotlip_hf_does_not_look_up() -> None:
    for path in python_files("lotlip_hf"):
        for line, name in imports(path):
            assert name.split(".")[0] not in {"benchmarks", "conversion", "examples", "modeling", "tests"}, (
                f"{path.name}:{line}: imports {name}"
            )
        for line, name in imports(path, lazy=False):
            assert "conversion" not in name.split("."), (
                f"{path.name}:{line}: import {name} inside the function that needs it"
            )


@cache
def inner_imports() -> dict[str, set[str]]:
    """The files of `lotlip_hf` and its `modeling` by module name, and those that each imports, anywhere in it."""
    paths = {path.relative_to(REPOSITORY / "lotlip_hf"): path for path in python_files("lotlip_hf")}
    paths |= {path.relative_to(REPOSITORY): path for path in python_files("modeling")}
    modules = {".".join(name.with_suffix("").parts).removesuffix(".__init__"): name for name in paths}
    found: dict[str, set[str]] = {}
    for module, name in modules.items():
        found[module] = set()
        for node in ast.walk(syntax_tree(paths[name])):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = [*(name.parts[: -node.level] if node.level else ()), *filter(None, (node.module or "").split("."))]
            if not node.level and base.pop(0) != "lotlip_hf":
                continue
            for alias in node.names:
                imported = ".".join((*base, alias.name))
                found[module].add(imported if imported in modules else ".".join(base) or "__init__")
        found[module] &= modules.keys() - {module}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way along the arrows of a graph that ends where it began; empty if there is none."""
    left = {node: set(targets) - {node} for node, targets in graph.items()}
    while leaves := {node for node, targets in left.items() if not targets}:
        left = {node: targets - leaves for node, targets in left.items() if node not in leaves}
    way: list[str] = [min(left)] if left else []
    while way and way[-1] not in way[:-1]:
        way.append(min(left[way[-1]]))
    return way[way.index(way[-1]) :] if way else []


def test_no_file_imports_in_a_circle() -> None:
    graph = inner_imports()
    assert not circle(graph)
    packages: dict[str, set[str]] = {}
    for module, used in graph.items():
        packages.setdefault(module.split(".")[0], set()).update(one.split(".")[0] for one in used)
    assert not circle(packages)


def test_no_import_runs_up() -> None:
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    graph = inner_imports()
    unknown = {module.split(".")[0] for module in graph} - floors.keys()
    assert not unknown, "give them a floor in FLOORS"
    upward = {
        (module, one)
        for module, used in graph.items()
        for one in used
        if floors[one.split(".")[0]] > floors[module.split(".")[0]]
    }
    assert not upward


@pytest.mark.slow
def test_modeling_is_imported_under_its_package_name() -> None:
    for path in itertools.chain.from_iterable(map(python_files, ["benchmarks", "conversion", "examples", "tests"])):
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
    for folder in PYTHON_FOLDERS:
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(syntax_tree(path)):
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


def test_install_hints_are_spelt_the_same() -> None:
    extras = re.findall(r'"([\w-]+)": \w+_REQUIRES', (REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    for path in itertools.chain.from_iterable(
        map(python_files, ["lotlip_hf", "conversion", "examples", "benchmarks"])
    ):
        for hint in re.findall(r"pip install (?!--upgrade|-U)(\S+)", path.read_text(encoding="utf-8")):
            extra = re.match(r"'lotlip-hf\[([\w-]+)\]'", hint)
            assert extra is not None, f"{path.name}: {hint}"
            assert extra[1] in extras, f"{path.name}: {hint}"


SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Examples?):$", re.MULTILINE)
TYPE = r"\(`[^`]+`(?: or `[^`]+`)*(?:, \*optional\*)?(?:, defaults to .+?)?\)"
ARGUMENT = re.compile(rf" {{4}}(?:(\*{{0,2}}\w+(?:, \w+)*) {TYPE}|(\*\*\w+)): \S")


def argument_names(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    """The arguments of a function, or of a class: those of `__init__`, and its fields."""
    if isinstance(node, ast.FunctionDef):
        return {one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)}
    fields = {
        one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    inits = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
    return fields.union(*map(argument_names, inits))


def test_docstrings_have_the_form_of_transformers() -> None:
    for path in itertools.chain.from_iterable(map(python_files, PYTHON_FOLDERS)):
        for node in ast.walk(syntax_tree(path)):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            text, where = ast.get_docstring(node) or "", f"{path.name}:{node.lineno}"
            if re.match(r"_(?!_)", node.name):
                assert not SECTION.search(text), f"{where}: private, so its docstring has no sections"
            known = argument_names(node)
            section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", text, re.MULTILINE)
            for line in re.findall(r"^ {4}\S.*", section[1], re.MULTILINE) if section else []:
                entry = ARGUMENT.match(line)
                assert entry, f"{where}: {line.strip()}"
                names = set(re.findall(r"\w+", entry[1] or entry[2]))
                assert not known or names <= known, f"{where}: no argument {', '.join(names - known)}"


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


def test_shift_weights_moves_weights(request: pytest.FixtureRequest) -> None:
    layer = torch.nn.Linear(8, 8)
    before = layer.weight.data_ptr()
    layer(torch.ones(2, 8))
    assert (layer.weight.data_ptr() != before) == request.config.getoption("--shift-weights")


def test_no_file_is_large() -> None:
    for path in project_files():
        assert path.stat().st_size < LARGEST_FILE, f"{path.relative_to(REPOSITORY)} is over 5 MB"


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("lotlip_hf", "modeling", "conversion", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("lotlip_hf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"lotlip_hf/{path.relative_to(REPOSITORY / 'lotlip_hf')}" for path in python_files("lotlip_hf")}
    for folder in ("modeling", "conversion", "recipes"):
        expected |= {f"lotlip_hf/{folder}/{path.name}" for path in python_files(folder)}
    recipes = {f"lotlip_hf/recipes/{path.name}" for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert {name for name in names if name.endswith(".yaml")} == recipes
    assert {name for name in names if name.endswith(".py")} == expected
    assert any(name.endswith("/LICENSE") for name in names)


def python_files(folder: str) -> list[Path]:
    return list((REPOSITORY / folder).rglob("*.py"))
