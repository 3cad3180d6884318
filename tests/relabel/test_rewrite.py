"""Captioners that read texts, and the roles of their answers."""

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from lotlip_hf.cli import main
from lotlip_hf.data.records import load_records
from lotlip_hf.options import Parser
from lotlip_hf.relabel.captioners.base import Answer, CaptionerConfig
from lotlip_hf.relabel.captioners.local import LocalCaptioner
from lotlip_hf.relabel.config import RelabelConfig, add_arguments, read_config
from lotlip_hf.relabel.quality import judge_list
from lotlip_hf.relabel.run import relabel
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.training.config import recipes
from openai_server import describe, openai_server, use_in_process
from processes import Started, finish
from scripts import load_script
from tiny_captioners import counting_tokenizer, save_llama, save_llava

NUMBER = 11
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FUSE = "Fuse: {caption} / {captions}"
# what random weights say is no good caption
KEEP = dict.fromkeys(
    ("empty", "refusal", "copied_prompt", "loop", "repeated_sentence", "cut_off", "too_short"), "keep"
)


def raw(number: int) -> str:
    """Captions with braces, which are no placeholders and no formats."""
    return f"toy {number} {{caption}} {{captions}} {{0}} \\1 %s </s> <image>"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings with raw captions and all other fields. The record 3 has no raw caption, and `7.png` is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = scenes_dataset(NUMBER)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for number in range(NUMBER):
            scenes[number]["image"].save(folder / f"{number}.png")
            line = {
                "file_name": f"{number}.png",
                "short_caption": raw(number) if number != 3 else None,
                "long_captions": [f"A long text {{caption}} of {number}.", ""],
                "rewrites": [f"old rewrite {number}"],
                "negatives": [f"old negative {number}"],
                "tags": ["old", "tag"],
                "regions": [{"box": [0.0, 0.0, 0.5, 1.0], "text": "a corner"}],
                "group": "toys",
            }
            metadata.write(json.dumps(line) + "\n")
    (folder / "7.png").write_bytes(b"no image")
    return folder


class Writer:
    """A captioner that answers by what it reads; `asked` holds prompts and whether there was an image."""

    group_size, concurrency, revision = 4, 1, "0123abc"
    asked: list[tuple[str, str, bool]]

    def __init__(self, config: CaptionerConfig) -> None:
        self.config, self.asked = config, []

    def answer(
        self,
        images: Sequence[Image.Image | None],
        settings: Mapping[str, Any],
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
    ) -> list[Answer]:
        assert (prompts is None) == (self.config.input == "image")
        texts = prompts or [self.config.prompt] * len(images)
        assert len(texts) == len(images) == len(seeds) <= self.group_size
        answers = []
        for image, text in zip(images, texts, strict=True):
            assert (image is None) == (self.config.input == "text")
            self.asked.append((self.config.model, text, image is not None))
            answers.append(self.one(image, text))
        return answers

    def one(self, image: Image.Image | None, prompt: str) -> Answer:
        model = self.config.model
        if model == "describer" and image is not None:
            return Answer(f"A drawing with the mean colour {image.resize((1, 1)).getpixel((0, 0))}, and more of it.")
        return Answer({"lister": f"1. {model} one\n2) {model} two\n", "tagger": "- cat\n* dog, Cat"}[model], True)

    def close(self) -> None:
        pass


def config(data: Path, output: Path, *captioners: CaptionerConfig, **options: Any) -> RelabelConfig:
    defaults = {"tokenizer": counting_tokenizer(), "shard_size": 5, "captioners": list(captioners)}
    return RelabelConfig(data=str(data), output=str(output), **{**defaults, **options})


def run(options: RelabelConfig, make: Any = Writer) -> tuple[dict[str, Any], list[Any]]:
    made: list[Any] = []

    def keep(captioner: CaptionerConfig) -> Any:
        made.append(make(captioner))
        return made[-1]

    statistics = relabel(options, make_captioner=keep, progress=False)
    assert statistics is not None
    return statistics, made


def rows(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((output / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


ROLES = [
    ("rewrite", "lister", "rewrites", ["lister one", "lister two"]),
    ("negative", "lister", "negatives", ["lister one", "lister two"]),
    ("tags", "tagger", "tags", ["cat", "dog"]),
]


@pytest.mark.parametrize("input", ["image", "text", "both"])
@pytest.mark.parametrize(("role", "model", "field", "expected"), ROLES)
def test_answers_of_a_role(
    role: str, model: str, field: str, expected: list[str], input: str, pictures: Path, tmp_path: Path
) -> None:
    """They become the field of the role; the other fields of the records stay."""
    prompt = "List." if input == "image" else "List: {caption}"
    captioner = CaptionerConfig(model, prompt=prompt, input=input, role=role)
    run(config(pictures, tmp_path / "out", captioner))
    written = {row["id"]: row for row in rows(tmp_path / "out")}
    # A captioner that reads only texts does not open the images.
    assert written.keys() == {f"{n}.png" for n in range(NUMBER) if n != 7 or input == "text"}
    for name, row in written.items():
        number = int(name.removesuffix(".png"))
        is_asked = input == "image" or number != 3
        old = {"rewrites": [f"old rewrite {number}"], "negatives": [f"old negative {number}"], "tags": ["old", "tag"]}
        for other, texts in old.items():
            assert row[other] == ((expected if is_asked else []) if other == field else texts)
        assert row["long_captions"] == [f"A long text {{caption}} of {number}.", ""]
        assert row["short_caption"] == (raw(number) if number != 3 else "A long text {caption} of 3")
        assert (row["group"], row["regions"][0]["text"]) == ("toys", "a corner")
        [details] = row["captions"]
        assert [details[key] for key in ("role", "input", "prompt")] == [role, input, prompt]
        assert details["reasons"] == ([] if is_asked else ["no_text"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {input} | {field} |" in card
    records = load_records(tmp_path / "out", image_folder=pictures)
    assert records[0][field] == expected


def test_prompts_hold_the_texts_of_the_record_literally(pictures: Path, tmp_path: Path) -> None:
    captioner = CaptionerConfig("lister", prompt="{captions} | {caption} | {other} {{}}", input="text", role="rewrite")
    _, [made] = run(config(pictures, tmp_path / "out", captioner))
    texts = [f"A long text {{caption}} of {n}. | {raw(n)} | {{other}} {{{{}}}}" for n in range(NUMBER) if n != 3]
    assert [prompt for _, prompt, _ in made.asked] == texts


def test_the_second_captioner_reads_the_answer_of_the_first(pictures: Path, tmp_path: Path) -> None:
    """The two steps of VeCLIP. Answers with other roles are no captions of the image."""
    captioners = [
        CaptionerConfig("describer", prompt="Describe."),
        CaptionerConfig("lister", prompt="Name {caption} others.", input="text", role="negative"),
        CaptionerConfig("lister", prompt=FUSE, input="both", role="rewrite"),
    ]
    statistics, (first, second, third) = run(config(pictures, tmp_path / "out", *captioners))
    written = {row["id"]: row for row in rows(tmp_path / "out")}
    assert len(written) == NUMBER - 1
    prompts = [prompt for _, prompt, _ in third.asked]
    assert prompts == [
        f"Fuse: {raw(n)} / A long text {{caption}} of {n}.\n{written[f'{n}.png']['long_captions'][0]}"
        for n in range(NUMBER)
        if n not in (3, 7)
    ]
    assert len(second.asked) == NUMBER - 2  # neither the record without a text nor the one that the first skipped
    assert all(len(row["long_captions"]) == 1 for row in written.values())
    assert written["0.png"]["rewrites"] == written["0.png"]["negatives"] == ["lister one", "lister two"]
    names = [row["name"] for row in statistics["captions"]]
    assert names == ["raw captions", "describer", "lister (negative)", "lister (rewrite)", "all long captions"]
    assert statistics["captions"][-1]["texts"] == len(written)
    assert statistics["captions"][3]["dropped_for"] == {"no_text": 1}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_stopped_between_the_captioners(format: str, pictures: Path, tmp_path: Path) -> None:
    """The second captioner reads the first's answers from the journal of the run before."""
    captioners = [
        CaptionerConfig("describer", prompt="Describe."),
        CaptionerConfig("lister", prompt=FUSE, input="text", role="rewrite"),
    ]
    run(config(pictures, tmp_path / "expected", *captioners, format=format))
    asked: Counter[tuple[str, str, bool]] = Counter()

    class Stopping(Writer):
        calls: Counter[str] = Counter()

        def answer(self, *arguments: Any) -> list[Answer]:
            model = self.config.model
            self.calls[model] += 1
            if (model, self.calls[model]) in (("describer", 2), ("lister", 1), ("lister", 4)):
                raise Interrupted
            answers = super().answer(*arguments)
            asked.update(self.asked[-len(answers) :])
            return answers

    for _ in range(3):
        with pytest.raises(Interrupted):
            run(config(pictures, tmp_path / "out", *captioners, format=format), Stopping)
    run(config(pictures, tmp_path / "out", *captioners, format=format), Stopping)
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert {count for (model, *_), count in asked.items() if model == "lister"} == {1}


def test_a_changed_role_is_another_run(pictures: Path, tmp_path: Path) -> None:
    def captioner(role: str) -> CaptionerConfig:
        return CaptionerConfig("lister", prompt="{caption}", input="text", role=role)

    run(config(pictures, tmp_path / "out", captioner("rewrite")))
    with pytest.raises(ValueError, match="role"):
        run(config(pictures, tmp_path / "out", captioner("negative")))


def test_data_with_raw_captions_alone(pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(pictures / "0.png", data)
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "short_caption": "a toy"}))
    captioner = CaptionerConfig("lister", prompt="{caption}", input="text", role="rewrite")
    run(config(data, tmp_path / "out", captioner))
    [row] = rows(tmp_path / "out")
    assert (row["long_captions"], row["rewrites"]) == ([], ["lister one", "lister two"])
    assert (row["negatives"], row["regions"], row["group"]) == ([], [], None)


# Lists


@pytest.mark.parametrize(
    ("answer", "finished", "texts", "reasons"),
    [
        (
            "- A red cat.\n* A blue cat.\n• A cat.\n–  A dog.",
            True,
            ["A red cat.", "A blue cat.", "A cat.", "A dog."],
            (),
        ),
        ("1. A\n2) B\n(3) C\n 10.  D", True, ["A", "B", "C", "D"], ()),
        ("3 dogs on a beach\n2.5 litres of milk\n-5 degrees", True, None, ()),
        ("Here are two captions:\n\n1. A cat.\n\n2. A dog.</s>", True, ["A cat.", "A dog."], ()),
        ("A cat.\nA  CAT.\nA dog.", True, ["A cat.", "A dog."], ()),
        ("A toy.\nA dog.", True, ["A dog."], ()),
        ("A toy.", True, ["A toy."], ("copied_prompt",)),
        ("A cat.\nA dog.\nA ho", False, ["A cat.", "A dog."], ("cut_off",)),
        ("A cat sleeps. A dog ba", False, ["A cat sleeps."], ("cut_off",)),
        ("---\n***\n1.", True, [], ("empty",)),
        ("", None, [], ("empty",)),
        ("I'm sorry, but I can't help with that.", True, None, ("refusal",)),
        ("cat dog cat dog cat dog cat dog", True, None, ("loop",)),
        ("a" * 10_001, True, None, ("too_long",)),
    ],
)
def test_lists(answer: str, finished: bool | None, texts: list[str] | None, reasons: tuple[str, ...]) -> None:
    judged = judge_list(answer, "Rewrite the caption.", finished, known=["a toy."])
    assert (judged.text.split("\n") if judged.text else []) == (answer.split("\n") if texts is None else texts)
    assert judged.reasons == reasons


def test_a_rewrite_may_have_words_of_the_caption_but_not_of_the_prompt(pictures: Path, tmp_path: Path) -> None:
    prompt = "Rewrite as: an old boat on the sandy beach => a boat of wood lies on the sand. {caption} =>"

    class Copier(Writer):
        def one(self, image: Image.Image | None, prompt: str) -> Answer:
            copies = "toy 1 " in prompt
            return Answer("a boat of wood lies on the sand" if copies else prompt.split("sand. ")[1] + " anew", True)

    captioner = CaptionerConfig("copier", prompt=prompt, input="text", role="rewrite")
    run(config(pictures, tmp_path / "out", captioner), Copier)
    reasons = {row["id"]: row["captions"][0]["reasons"] for row in rows(tmp_path / "out")}
    assert reasons.pop("1.png") == ["copied_prompt"]
    assert reasons.pop("3.png") == ["no_text"]
    assert set(map(tuple, reasons.values())) == {()}


# Endpoints


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process(monkeypatch)


@pytest.mark.usefixtures("endpoint")
def test_an_endpoint_reads_texts(pictures: Path, tmp_path: Path) -> None:
    with openai_server() as server:
        captioners = [
            CaptionerConfig("tiny", endpoint=server.url, prompt="Describe."),
            CaptionerConfig("tiny", endpoint=server.url, prompt=FUSE, input="text", role="rewrite"),
            CaptionerConfig("tiny", endpoint=server.url, prompt="Other: {caption}", input="both", role="negative"),
        ]
        relabel(config(pictures, tmp_path / "out", *captioners), progress=False)
        assert not server.malformed
        kinds = Counter((request.prompt.split(":")[0], request.parts) for request in server.requests)
    asked = NUMBER - 2  # without the damaged image, and without the record that has no raw caption
    image = ("image_url", "text")
    assert kinds == {("Describe.", image): asked + 1, ("Fuse", ()): asked, ("Other", image): asked}
    for row in rows(tmp_path / "out"):
        number = int(row["id"].removesuffix(".png"))
        prompt = f"Fuse: {raw(number)} / A long text {{caption}} of {number}.\n{row['long_captions'][0]}"
        assert row["rewrites"] == ([describe(None, prompt, "tiny")] if number != 3 else [])


@pytest.mark.usefixtures("endpoint")
def test_an_endpoint_that_rejects_one_text(pictures: Path, tmp_path: Path) -> None:
    def reject(number: int, image: Any, body: dict[str, Any]) -> str | None:
        return "400" if "toy 5" in body["messages"][0]["content"] else None

    with openai_server(fault=reject) as server:
        captioner = CaptionerConfig("tiny", endpoint=server.url, prompt="Say {caption}", input="text", role="rewrite")
        statistics = relabel(config(pictures, tmp_path / "out", captioner), progress=False)
    assert statistics is not None
    assert statistics["captions"][1]["dropped_for"] == {"no_answer": 1, "no_text": 1}


# Models of transformers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """LLaVA, and language models with and without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    save_llava(folder / "llava", seed=2)
    save_llama(folder / "chat", seed=4)
    save_llama(folder / "base", seed=4, chat_template=None)
    return {name: str(folder / name) for name in ("llava", "chat", "base")}


def local(model: str, **options: Any) -> CaptionerConfig:
    return CaptionerConfig(model, **{"dtype": "float32", "max_new_tokens": 12, "batch_size": 3, **options})


@pytest.mark.parametrize("name", ["llava", "chat", "base"])
def test_local_models_read_texts(name: str, models: dict[str, str]) -> None:
    """Each text of a batch is answered as alone, after the tokens of the template and the text."""
    one = LocalCaptioner(local(models[name], prompt="describe {caption}", input="text"), device="cpu")
    prompts = ["describe a red car", "describe two dogs near the old house .", "describe a tree"]
    answers = one.answer([None] * 3, one.config.settings(), [0, 1, 2], prompts)
    alone = [one.answer([None], one.config.settings(), [0], [prompt])[0] for prompt in prompts]
    assert answers == alone
    assert len({answer.text for answer in answers}) > 1
    words = one._tokenizer
    text = f"user : {prompts[1]} assistant :" if name != "base" else prompts[1]
    ids = words(text, add_special_tokens=name != "chat", return_tensors="pt")["input_ids"]
    tokens = one.model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert answers[1].text == words.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_local_model_reads_text_and_image(models: dict[str, str]) -> None:
    one = LocalCaptioner(local(models["llava"], prompt="describe {caption}", input="both"), device="cpu")
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "white")]
    settings, prompts = one.config.settings(), ["describe a red car", "describe the sky"]
    answers = one.answer(images, settings, [0, 1], prompts)
    assert answers == [one.answer([i], settings, [0], [p])[0] for i, p in zip(images, prompts, strict=True)]
    fixed = LocalCaptioner(local(models["llava"], prompt=prompts[0]), device="cpu")
    assert fixed.answer(images[:1], settings, [0]) == answers[:1]


def test_a_text_too_long_for_the_model_is_left_out(models: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    texts = ["a red car", "dog " * 600, "two dogs"]
    lines = [{"id": str(n), "image": "a.png", "short_caption": text} for n, text in enumerate(texts)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    captioner = local(models["chat"], prompt="what is {caption}", input="text", role="rewrite")
    relabel(config(data, tmp_path / "out", captioner, policies=KEEP), progress=False)
    reasons = {row["id"]: row["captions"][0]["reasons"] for row in rows(tmp_path / "out")}
    assert reasons["1"] == ["no_answer"]
    assert "no_answer" not in (*reasons["0"], *reasons["2"])


def test_a_language_model_describes_no_image(models: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="llama"):
        LocalCaptioner(local(models["chat"]))


# Recipes, processes and interruptions


def options_of(recipe: str, *flags: str) -> RelabelConfig:
    parser = Parser()
    add_arguments(parser)
    return read_config(parser.parse_args([f"--config={RECIPES / recipe}", "--data=d", "--output=o", *flags]))


def test_recipes() -> None:
    first, second = options_of("veclip-relabel.yaml").captioners
    assert (first.input, first.role, second.input, second.role) == ("image", "long", "text", "rewrite")
    assert "{caption}" in second.prompt
    assert "{captions}" in second.prompt
    [one] = options_of("laclip-relabel.yaml").captioners
    assert (one.input, one.role, one.temperature, one.top_p) == ("text", "rewrite", 0.9, 0.95)
    assert one.prompt.count("=>") == 4
    assert not any(name.endswith("-relabel") for name in recipes())  # those of `lotlip train`


def write_recipe(file: Path, models: dict[str, str], pictures: Path) -> list[str]:
    """VeCLIP's recipe with tiny models."""
    content = yaml.safe_load((RECIPES / "veclip-relabel.yaml").read_text())
    for captioner, model in zip(content["captioners"], (models["llava"], models["chat"]), strict=True):
        captioner["model"] = model
    content |= {"data": str(pictures), "tokenizer": counting_tokenizer(), "policies": KEEP}
    file.write_text(yaml.safe_dump(content))
    return [f"--config={file}", "--shard-size=2", "--dtype=float32", "--max-new-tokens=12", "--batch-size=2"]


@pytest.mark.slow
def test_the_recipe_of_veclip_killed_and_in_two_processes(
    models: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    arguments = write_recipe(tmp_path / "recipe.yaml", models, pictures)
    assert main(["relabel", *arguments, f"--output={tmp_path / 'expected'}"]) == 0
    output = tmp_path / "out"
    argv = ["relabel", *arguments, f"--output={output}"]
    killed = Started("lotlip_hf.cli", argv, tmp_path, 1)
    killed.wait_until(lambda: any(output.glob(".relabel/*-captioner-1.*")))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait().codes == [-signal.SIGKILL]
    assert not (output / "README.md").exists()
    time.sleep(0.1)
    ended = Started("lotlip_hf.cli", argv, tmp_path, 1).wait()
    assert ended.codes == [0], ended.text
    assert files(output) == files(tmp_path / "expected")
    finish("lotlip_hf.cli", ["relabel", *arguments, f"--output={tmp_path / 'two'}"], tmp_path, num_processes=2)
    assert files(tmp_path / "two") == files(tmp_path / "expected")


@pytest.mark.slow
def test_training_reads_rewrites_without_long_captions(pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"file_name": f"{n}.png", "short_caption": f"toy {n}"} for n in range(6)]
    for line in lines:
        shutil.copy(pictures / str(line["file_name"]), data)
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    captioner = CaptionerConfig("lister", prompt="{caption}", input="text", role="rewrite")
    run(config(data, tmp_path / "out", captioner))
    arguments = ["--model=scenes", f"--data={tmp_path / 'out'}", f"--output={tmp_path / 'run'}", "--max-steps=2"]
    arguments += ["--batch-size=3", "--num-workers=0", "--trackers=none", f"--image-folder={data}"]
    assert load_script("examples/train.py").main([*arguments, "--num-long-texts=0"]) == 0


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--input=text"], "prompt"),
        (["--prompt=Say {caption}"], "input"),
        (["--input=both", "--prompt=Say {texts}"], "prompt"),
        (["--role=tags"], "role"),
        (["--role=caption"], "role"),
        (["--input=video"], "input"),
    ],
)
def test_wrong_options_are_named(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relabel", "--data=d", "--output=o", "--captioner=a", *flags]) == 2
    assert word in capsys.readouterr().err
