"""Code, commands, links and tables of the README, the model card, `docs/` and the examples in docstrings."""

import argparse
import contextlib
import doctest
import inspect
import io
import json
import re
import shlex
import shutil
import tarfile
import textwrap
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTModel

import lotlip_hf
import tiny_clip
import tiny_diffusion
from lotlip_hf.cli import COMMANDS
from lotlip_hf.cli import main as lotlip
from lotlip_hf.cli.convert import KINDS
from lotlip_hf.conversion.clip import convert as convert_clip
from lotlip_hf.data.sampling import STRATEGIES
from lotlip_hf.modeling.backbones_lotlip import POOLINGS, TEXT_BACKBONES
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from lotlip_hf.training.config import parse_arguments
from lotlip_hf.training.terms import TERMS
from scripts import load_script
from tiny_captioners import save_instructblip, save_llama, save_llava

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ["README.md", "MODEL_CARD.md", *sorted(f"docs/{file.name}" for file in (REPOSITORY / "docs").glob("*.md"))]
# Scripts that are run. Of the others, which `tests/examples/` run, only the options are parsed.
RUN = ("align_text_encoder", "swap_text_encoder")
OUTPUTS = ("--output", "--output_dir", "--save-grid", "--plot", "--pictures", "--model-index", "--dry-run")


class Parsed(BaseException):
    """Raised instead of running a command whose options are valid."""


def read(file: str) -> str:
    return (REPOSITORY / file).read_text(encoding="utf-8").replace("{{ model_id }}", "checkpoint")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The language and the code of each block."""
    for _indent, language, code in re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL):
        yield language, textwrap.dedent(code)


def commands(code: str) -> list[list[str]]:
    """The words of each command."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, golden: Path, official_checkpoint: Path) -> Path:
    """A folder with everything that the pages read."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("checkpoint", "composed", "lotlip-vit-b-16", "run/towers/checkpoint-80"):
        shutil.copytree(official_checkpoint, folder / name)
    shutil.copytree(REPOSITORY / "recipes", folder / "recipes")
    (folder / "photos").mkdir()
    shutil.copyfile(golden / "images" / "RGB_640x480.png", folder / "photos" / "cat.png")
    shutil.copyfile(golden / "images" / "L_300x200.png", folder / "photos" / "dog.png")
    for animal in ("cat", "dog"):
        (folder / "animals" / animal).mkdir(parents=True)
        shutil.copyfile(folder / "photos" / f"{animal}.png", folder / "animals" / animal / "1.png")
    (folder / "pictures").mkdir()
    with (folder / "pictures" / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number in range(8):
            one = scene(number)
            render(one, image_size=32).save(folder / "pictures" / f"{number}.png")
            captions = {"short_caption": short_caption(one), "long_captions": long_captions(one)}
            file.write(json.dumps({"file_name": f"{number}.png", "id": one.id, **captions}) + "\n")
    (folder / "stamps" / "animals").mkdir(parents=True)
    shutil.copyfile(folder / "photos" / "cat.png", folder / "stamps" / "animals" / "cat.png")
    stamp = "A cat.\nde.utf8=Eine Katze.\nfr.utf8=Un chat.\nja.utf8=猫。\n"
    (folder / "stamps" / "animals" / "cat.txt").write_text(stamp, encoding="utf-8")
    (folder / "entries.txt").write_text("red\nlarge\nblue circle\ngreen\n", encoding="utf-8")
    (folder / "captions.txt").write_text("A cat.\nA dog stands on a lawn. It holds a ball.\n", encoding="utf-8")
    for file in (golden / "official-corners2").iterdir():
        shutil.copyfile(file, folder / file.name)
    shutil.copytree(golden / "tokenizer", folder / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=100)).save_pretrained(folder / "bert")
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(folder / "vit")
    # as if they came from the Hub
    save_instructblip(folder / "Salesforce" / "instructblip-vicuna-7b")
    save_llava(folder / "llava-hf" / "llava-1.5-7b-hf")
    save_llama(folder / "lmsys" / "vicuna-7b-v1.5", chat_template=None)
    save_llama(folder / "Qwen" / "Qwen2.5-7B-Instruct")
    BertTokenizer.from_pretrained(golden / "tokenizer").save_pretrained(folder / "google-bert" / "bert-base-uncased")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0.tar", "w") as shard:
        for file in ("0.png", "1.png"):
            shard.add(folder / "pictures" / file, file)
            shard.add(folder / "captions.txt", file.replace(".png", ".txt"))
    for name in ("clip", "openai/clip-vit-base-patch16"):
        tiny_clip.save_clip(folder / name)
    convert_clip(folder / "clip", folder / "lotlip-clip", max_positions=248)
    tiny_diffusion.pipeline("sd").save_pretrained(folder / "stable-diffusion")
    described = {"prompt": "A red house by a lake, and a cat.", "parts": ["red house", {"text": "a cat"}]}
    (folder / "prompts.jsonl").write_text(json.dumps(described) + "\n", encoding="utf-8")
    prompts = (f"a {first} and the {second} of a house" for first in tiny_clip.WORDS for second in tiny_clip.WORDS)
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    return folder


@pytest.fixture
def cwd(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A writable copy of it. What a page registers is known to the page only."""
    folder = tmp_path / "cwd"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    with contextlib.ExitStack() as stack:
        for registry in (POOLINGS, STRATEGIES, TERMS, TEXT_BACKBONES):
            stack.enter_context(mock.patch.dict(registry))
        yield folder


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable, list[str]], None]:
    """Parses the options of a command without running it."""
    original = argparse.ArgumentParser.parse_known_args

    def stop(*args, **kwargs):
        assert not original(*args, **kwargs)[1]
        raise Parsed

    def parse(main: Callable, words: list[str]) -> None:
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            main(words)

    return parse


def runs(words: list[str]) -> bool:
    """Whether a `lotlip` command finishes in seconds on one process, without a network."""
    is_long = {"demo", "train", "lotlip_hf", "--endpoint", "--quantize"} & set(words)
    is_online = any(word.startswith("weiwu-ww/") for word in words) or "push" in words and "--dry-run" not in words
    return not is_long and not is_online


def run(words: list[str], parse: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command, or only parses its options."""
    script = next((word for word in words if word.endswith(".py")), None)
    program = script or ("lotlip_hf" if "lotlip_hf" in words else "lotlip")
    if program not in words:
        return
    main = load_script(script).main if script else lotlip
    arguments = words[words.index(program) + 1 :]
    if not (Path(script).stem in RUN if script else runs(words)):
        parse(main, arguments)
        return
    if words[:3] == ["lotlip", "convert", "clip"]:
        shutil.rmtree(words[-1], ignore_errors=True)  # made for the other pages
    status = main(arguments)
    assert script or status == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
    for option in set(OUTPUTS) & set(words):
        assert Path(words[words.index(option) + 1]).exists(), shlex.join(words)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_page(file: str, cwd: Path, parse: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """A page's blocks run in their order, its Python as one script."""
    namespace = {"__name__": "__main__"}
    for language, code in blocks(read(file)):
        if language == "python" and ("import faiss" not in code or find_spec("faiss")):
            exec(compile(code, file, "exec"), namespace)
        for words in commands(code) if language == "bash" else []:
            run(words, parse, capsys)


@pytest.mark.parametrize("file", FILES)
def test_names_exist(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of trainings, extras of the package, targets of make."""
    monkeypatch.chdir(REPOSITORY)  # recipes
    code = "".join(code for language, code in blocks(read(file)) if language == "bash")
    for words in commands(code):
        if "train" in words and "--resume" in words:
            with pytest.raises(FileNotFoundError, match="resume"):
                parse_arguments(words[words.index("train") + 1 :])
        elif "train" in words:
            parse_arguments(words[words.index("train") + 1 :])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", read("Makefile"), flags=re.MULTILINE), words[1]
    for extra in re.findall(r"(?:'\.|lotlip-hf)\[([\w-]+)\]", read(file)):
        assert f'"{extra}":' in read("setup.py"), extra


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options of every command and script."""
    texts = [file.read_text() for folder in ("examples", "benchmarks") for file in (REPOSITORY / folder).rglob("*.py")]
    for words in [*([name] for name in COMMANDS), *(["convert", kind] for kind in KINDS)]:
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
            lotlip([*words, "--help"])
        texts.append(output.getvalue())
    return set(re.findall(r"--[a-z][\w-]*", "".join(texts)))


@pytest.mark.parametrize("file", FILES)
def test_options_exist(file: str, options: set[str]) -> None:
    found = re.findall(r"`(--[a-z][^`]*)`", re.sub(r"^```.*?^```$", "", read(file), flags=re.MULTILINE | re.DOTALL))
    assert set(re.findall(r"--[a-z][\w-]*", " ".join(found))) <= options


def headings(file: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", read(file), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere(file: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(file)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found = (REPOSITORY / file).parent / path if path else REPOSITORY / file
            assert found.exists(), target
            assert not anchor or anchor in headings(str(found)), target


def examples(name: str) -> str:
    """The examples in the docstrings of a public object and its methods."""
    value = getattr(lotlip_hf, name)
    members = [one for one in vars(value).values() if inspect.isfunction(one)] if inspect.isclass(value) else []
    texts = [inspect.cleandoc(one.__doc__ or "") for one in (value, *members)]
    return "\n".join(code for text in texts for language, code in blocks(text) if language == "python")


class Checker(doctest.OutputChecker):
    """An example without an output may print anything."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in lotlip_hf.__all__ if examples(name)])
def test_example(name: str, cwd: Path) -> None:
    code = examples(name)
    test = doctest.DocTestParser().get_doctest(code, {}, name, None, None)
    if test.examples:
        runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert runner.run(test).failed == 0
    else:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
