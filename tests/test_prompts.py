"""Learnt prompts: vectors are where words would be, start as a template, and learn while the model stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_clip
from lotlip_hf import Encoder, load_encoder
from lotlip_hf.cli import main
from lotlip_hf.data.augment import Augment
from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
from lotlip_hf.evaluation.evaluate import evaluate
from lotlip_hf.evaluation.tasks import ClassificationData
from lotlip_hf.evaluation.zero_shot import class_embeddings
from lotlip_hf.prompts import MixedPrompts, PromptedClasses, few_shots, learn_prompts, load_prompts, word_vectors
from lotlip_hf.scenes.dataset import write_classification

CLASSES = ["cat", "red car", "the dog and house"]
GROUPS = [["a photo of a {}.", "the {}"], ["the {} of the house.", "{} and {}"]]
KINDS = ["lotlip", "lotlip on clip", "clip", "siglip"]


def encoder_of(kind: str, golden: Path, official_checkpoint: Path, folder: Path) -> Encoder:
    if kind == "lotlip":
        return load_encoder(official_checkpoint, device="cpu")
    if kind == "siglip":
        tiny_clip.save_siglip(folder, golden / "tokenizer")
        return load_encoder(folder, device="cpu")
    tiny_clip.save_clip(folder / "clip")
    if kind == "clip":
        return load_encoder(folder / "clip", device="cpu")
    from lotlip_hf.conversion.clip import convert

    convert(folder / "clip", folder / "lotlip")
    return load_encoder(folder / "lotlip", device="cpu")


@pytest.fixture(scope="module")
def encoder(official_checkpoint: Path) -> Encoder:
    return load_encoder(official_checkpoint, device="cpu")


@pytest.fixture
def data() -> ClassificationData:
    """Three pictures of each class: plain ones of its colour."""
    images, labels = [], []
    for label, colour in enumerate(("red", "green", "blue")):
        for number in range(3):
            images.append(Image.new("RGB", (32, 32 + number), colour))
            labels.append(label)
    return ClassificationData("me/colours", "Colours", images, [str(i) for i in range(9)], labels, CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_a_template(kind: str, golden: Path, official_checkpoint: Path, tmp_path: Path) -> None:
    encoder = encoder_of(kind, golden, official_checkpoint, tmp_path)
    for arguments, template in (
        ({"init": "a photo of a"}, "a photo of a {}."),
        ({"init": "a photo of a", "class_specific": True}, "a photo of a {}."),
        ({"init": "of the house", "position": "front"}, "{} of the house."),
        ({"init": "a photo of the", "position": "middle"}, "a photo {} of the."),
        ({"init": "the {} of a house."}, "the {} of a house."),
    ):
        prompts = PromptedClasses(encoder, CLASSES, **arguments)
        expected = class_embeddings(encoder, CLASSES, [template], progress=False)
        torch.testing.assert_close(prompts.class_embeddings().detach(), expected, atol=1e-6, rtol=0)


def coop_encoder(made: dict[str, torch.Tensor]) -> Encoder:
    """A CLIP with the word embeddings of the golden file."""
    text = {"hidden_size": made["table"].shape[1], "num_attention_heads": 2}
    model = tiny_clip.clip_model(tiny_clip.clip_config(text)).double()
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[made["ids"]] = made["table"]
        model.text_model.embeddings.position_embedding.weight.zero_()
    return Encoder(model, tiny_clip.clip_tokenizer(16))


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", ["unified", "specific"])
def test_embeddings_are_those_of_coop(kind: str, position: Any, golden: Path) -> None:
    made = load_file(golden / "terms" / "coop.safetensors")
    prompts = PromptedClasses(coop_encoder(made), CLASSES, 5, kind == "specific", position=position)
    prompts.vectors.data = made[f"vectors.{kind}"]
    assert_embedded(prompts, made[f"{kind}.{position}"])


def test_words_are_those_of_coop(golden: Path) -> None:
    made = load_file(golden / "terms" / "coop.safetensors")
    prompts = PromptedClasses(coop_encoder(made), CLASSES, init="a photo of a")
    torch.testing.assert_close(prompts.vectors.detach(), made["words"].float())
    prompts.vectors.data = made["words"]
    assert_embedded(prompts, made["words.end"])


def assert_embedded(prompts: PromptedClasses, expected: torch.Tensor) -> None:
    """What the text tower reads; its positions are zero."""
    read = []
    embeddings = prompts.engine.model.text_model.embeddings
    with embeddings.register_forward_hook(lambda *given: read.append(given[-1])):
        prompts.class_embeddings()
    torch.testing.assert_close(read[0].detach(), expected[:, : read[0].shape[1]])


def test_gradients_reach_the_vectors(golden: Path) -> None:
    encoder = coop_encoder(load_file(golden / "terms" / "coop.safetensors"))
    prompts = PromptedClasses(encoder, CLASSES[:1], 2, position="middle")

    def features(vectors: torch.Tensor) -> torch.Tensor:
        with word_vectors(prompts.engine.model, prompts.at, vectors):
            return prompts.engine.model.get_text_features(**prompts.inputs).pooler_output

    assert torch.autograd.gradcheck(features, torch.randn(2, 4, dtype=torch.float64, requires_grad=True))


def test_only_the_vectors_learn(encoder: Encoder, data: ClassificationData) -> None:
    model = encoder.lotlip()[1].train()
    before = encoder.fingerprint("text"), encoder.fingerprint("image")
    torch.manual_seed(0)
    prompts = PromptedClasses(encoder, CLASSES, num_context=4)
    settings = {"epochs": 20, "learning_rate": 2.0, "batch_size": 9, "progress": False}
    log = learn_prompts(prompts, data.images, data.labels, **settings)
    assert log[-1]["loss"] < log[0]["loss"]
    assert model.training
    model.eval()
    assert all(one.grad is None for one in model.parameters())
    assert (encoder.fingerprint("text"), encoder.fingerprint("image")) == before
    torch.manual_seed(0)
    again = PromptedClasses(encoder, CLASSES, num_context=4)
    assert learn_prompts(again, data.images, data.labels, **settings) == log
    assert torch.equal(again.vectors, prompts.vectors)


def test_learning_follows_coop(encoder: Encoder, data: ClassificationData) -> None:
    """The rates by hand, and steps of SGD on images that are read once."""
    images = encoder.encode_images(data.images, progress=False)
    prompts = PromptedClasses(encoder, CLASSES, init="the")
    expected = prompts.vectors.detach().clone().requires_grad_()
    naive = PromptedClasses(encoder, CLASSES, init="the")
    naive.vectors = torch.nn.Parameter(expected)
    sgd = torch.optim.SGD(naive.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    rates = [1e-5, 0.2, 0.2 * (1 + 0.5**0.5) / 2, 0.1]
    for rate in rates:
        sgd.param_groups[0]["lr"] = rate
        sgd.zero_grad()
        scale = encoder.lotlip()[1].logit_scale.exp().item()
        logits = scale * images @ naive.class_embeddings().T
        torch.nn.functional.cross_entropy(logits, torch.tensor(data.labels)).backward()
        sgd.step()
    log = learn_prompts(prompts, data.images, data.labels, epochs=4, learning_rate=0.2, progress=False)
    assert [one["learning_rate"] for one in log] == pytest.approx(rates)
    torch.testing.assert_close(prompts.vectors, naive.vectors, atol=1e-5, rtol=0)


def test_changed_images_depend_on_the_seed(encoder: Encoder, data: ClassificationData) -> None:
    losses = []
    for seed in (0, 0, 1):
        prompts = PromptedClasses(encoder, CLASSES, init="a photo of a")
        settings = {"augment": Augment(crop=0.2, flip=0.5, jitter=0.5), "epochs": 2, "seed": seed, "progress": False}
        losses.append([one["loss"] for one in learn_prompts(prompts, data.images, data.labels, **settings)])
    assert losses[0] == losses[1] != losses[2]


def test_patience_keeps_the_best_epoch(encoder: Encoder, data: ClassificationData) -> None:
    held_out = encoder.encode_images(data.images, progress=False), data.labels
    prompts = PromptedClasses(encoder, CLASSES, init="a photo of a")
    settings = {"held_out": held_out, "patience": 3, "epochs": 50, "learning_rate": 0.5, "progress": False}
    log = learn_prompts(prompts, data.images, data.labels, **settings)
    accuracies = [one["accuracy"] for one in log]
    best = (prompts(held_out[0]).argmax(1) == torch.tensor(data.labels)).float().mean().item()
    assert best >= max(accuracies)
    assert len(log) < 50
    with pytest.raises(ValueError, match="--patience"):
        learn_prompts(prompts, data.images, data.labels, patience=1, progress=False)


def test_one_group_is_coop(encoder: Encoder, data: ClassificationData) -> None:
    settings = {"epochs": 3, "learning_rate": 0.2, "progress": False}
    prompts = PromptedClasses(encoder, CLASSES, init="a photo of a")
    mixed = MixedPrompts(encoder, CLASSES, GROUPS[:1], top_k=1, text_weight=0.0)
    logs = [learn_prompts(one, data.images, data.labels, **settings) for one in (prompts, mixed)]
    assert [one["loss"] for one in logs[0]] == pytest.approx([one["loss"] for one in logs[1]])
    torch.testing.assert_close(mixed.contexts[0].vectors, prompts.vectors)
    images = encoder.encode_images(data.images, progress=False)
    torch.testing.assert_close(mixed(images), prompts(images))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_router_weights_groups(top_k: int, encoder: Encoder, data: ClassificationData) -> None:
    """Logits and loss by hand."""
    mixed = MixedPrompts(encoder, CLASSES, GROUPS, top_k, gate_weight=0.3, text_weight=0.7)
    mixed.load_state_dict({name: tensor + 0.1 for name, tensor in mixed.state_dict().items()})
    images = encoder.encode_images(data.images, progress=False)
    scale, gates = mixed.logit_scale, mixed.router(images)
    classes = [context.class_embeddings() for context in mixed.contexts]
    templates = [class_embeddings(encoder, CLASSES, group, progress=False) for group in GROUPS]
    rows, gate_loss = [], torch.zeros(())
    for image, gate, label in zip(images, gates, data.labels, strict=True):
        chosen = sorted(range(2), key=lambda group: -gate[group].item())[:top_k]
        weights = torch.stack([gate[group] for group in chosen]).softmax(0)
        rows.append(sum(w * scale * classes[group] @ image for w, group in zip(weights, chosen, strict=True)))
        wanted = torch.stack([scale * one[label] @ image for one in templates]).softmax(0)
        gate_loss = gate_loss - (wanted * gate.log_softmax(0)).sum() / len(images)
    logits = torch.stack(rows)
    torch.testing.assert_close(mixed(images), logits)
    cross_entropy = torch.nn.functional.cross_entropy
    pairs = zip(classes, templates, strict=True)
    text_loss = sum(cross_entropy(scale * one @ other.T, torch.arange(3)) for one, other in pairs) / 2
    expected = cross_entropy(logits, torch.tensor(data.labels)) + 0.3 * gate_loss + 0.7 * text_loss
    torch.testing.assert_close(mixed.loss(images, torch.tensor(data.labels)), expected)


def test_shots_are_drawn_by_seed() -> None:
    labels = [index % 3 for index in range(30)]
    learnt, held_out = few_shots(labels, 4, seed=1)
    for part in (learnt, held_out):
        assert [sum(labels[index] == label for index in part) for label in range(3)] == [4, 4, 4]
    assert not set(learnt) & set(held_out)
    assert few_shots(labels, 4, seed=1) == (learnt, held_out) != few_shots(labels, 4, seed=2)
    assert [len(part) for part in few_shots([0, 1, 1, 1], 2)] == [3, 1]


MAKERS: dict[str, Callable[[Encoder], PromptedClasses | MixedPrompts]] = {
    "random": lambda encoder: PromptedClasses(encoder, CLASSES, 4, position="middle"),
    "specific": lambda encoder: PromptedClasses(encoder, CLASSES, class_specific=True, init="a photo of a"),
    "mixed": lambda encoder: MixedPrompts(encoder, CLASSES, GROUPS, 2),
}


@pytest.mark.parametrize("make", MAKERS)
def test_a_file_gives_the_same_logits(make: str, encoder: Encoder, data: ClassificationData, tmp_path: Path) -> None:
    prompts, file = MAKERS[make](encoder), tmp_path / "prompts.safetensors"
    learn_prompts(prompts, data.images, data.labels, epochs=2, progress=False)
    prompts.save(file)
    assert file.stat().st_size < 8192
    loaded = load_prompts(file, encoder)
    images = encoder.encode_images(data.images, progress=False)
    assert torch.equal(loaded(images), prompts(images))
    assert not loaded(images).requires_grad
    results = evaluate(encoder, data, prompts=loaded, progress=False)
    hits = (prompts(images).argmax(1) == torch.tensor(data.labels)).float().mean().item()
    assert results["metrics"]["accuracy_top1"] == pytest.approx(hits)
    assert results["protocol"]["prompts"]["digest"] == prompts.describe()["digest"]
    assert "templates" not in results["protocol"]


def test_another_model_or_other_classes(
    encoder: Encoder, data: ClassificationData, golden: Path, official_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.safetensors"
    PromptedClasses(encoder, CLASSES[::-1], 4).save(file)
    with pytest.raises(ValueError, match="--prompts"):
        evaluate(encoder, data, prompts=load_prompts(file, encoder), progress=False)
    with pytest.raises(ValueError, match="--prompts"):
        load_prompts(file, encoder_of("clip", golden, official_checkpoint, tmp_path))


def changed(settings: dict[str, Any]) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["settings"] = json.dumps(json.loads(metadata["settings"]) | settings)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, metadata: metadata.clear(),
        lambda tensors, metadata: metadata.update(class_names="[" * 100_000),
        lambda tensors, metadata: metadata.update(class_names='["cat", 3]'),
        lambda tensors, metadata: metadata.update(class_names=json.dumps(["cat"] * (1 << 21))),
        lambda tensors, metadata: metadata.update(settings="[]"),
        lambda tensors, metadata: tensors.update(vectors=tensors["vectors"][:3]),
        lambda tensors, metadata: tensors.update(vectors=tensors["vectors"] * torch.nan),
        lambda tensors, metadata: tensors.update(vectors=tensors["vectors"][:, :3].contiguous()),
        lambda tensors, metadata: tensors.update(others=torch.zeros(1)),
        changed({"num_context": 10**9}),
        changed({"num_context": True}),
        changed({"class_specific": True}),
        changed({"init": 3}),
        changed({"trust_remote_code": True}),
        changed({"groups": [["a {}"]] * 10, "top_k": 1}),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable, encoder: Encoder, tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    PromptedClasses(encoder, CLASSES, 4).save(file)
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata())
    damage(tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"prompts\.safetensors"):
        load_prompts(file, encoder)


def test_a_small_file_claims_no_memory(encoder: Encoder, tmp_path: Path) -> None:
    file, count = tmp_path / "prompts.safetensors", 1 << 20  # 2 GB in this model, of which the file has nothing
    PromptedClasses(encoder, CLASSES, 4).save(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    settings = {"class_specific": True, "init": None, "position": "end", "num_context": 16}
    metadata |= {"class_names": json.dumps(["a"] * count), "settings": json.dumps(settings)}
    save_file({"vectors": torch.zeros(count, 16, 0)}, file, metadata)
    with pytest.raises(ValueError, match=r"prompts\.safetensors"):
        load_prompts(file, encoder)


def test_no_pickle_and_no_header_without_end(encoder: Encoder, tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    torch.save({"vectors": torch.zeros(4, 32)}, file)
    with pytest.raises(ValueError, match=r"prompts\.safetensors"):
        load_prompts(file, encoder)
    file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"prompts\.safetensors"):
        load_prompts(file, encoder)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_context": 0}, "--num-context"),
        ({"num_context": 1000}, "--num-context"),
        ({"init": ""}, "--init"),
        ({"init": "{} and {}"}, "--init"),
        ({"position": "top"}, "--position"),
        ({"class_names": []}, "class_names"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], word: str, encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=word):
        PromptedClasses(encoder, **{"class_names": CLASSES, **arguments})
    exported: Any = SimpleNamespace(name="exported-folder")
    with pytest.raises(ValueError, match="exported-folder.*--model"):
        PromptedClasses(Encoder.from_engine(exported), CLASSES)
    with pytest.raises(ValueError, match="--top-k"):
        MixedPrompts(encoder, CLASSES, GROUPS, top_k=3)
    with pytest.raises(ValueError, match="--groups"):
        MixedPrompts(encoder, CLASSES, [["a photo"]])


def lotlip(words: str) -> int:
    return main(words.split())


def test_the_command(
    official_checkpoint: Path, data: ClassificationData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        (tmp_path / "data" / f"class_{label}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / f"class_{label}" / f"{number}.png")
    model = f"--model {official_checkpoint} --data {tmp_path}/data --device cpu"
    (tmp_path / "groups.json").write_text(json.dumps(GROUPS))
    for options in ("--init the --patience 2 --augment flip:0.5", f"--groups {tmp_path}/groups.json --top-k 2"):
        output = f"--shots 2 --epochs 3 --output {tmp_path}/prompts.safetensors --overwrite"
        assert lotlip(f"prompts {model} {output} {options}") == 0
        assert "6 learnt from  3 held out" in capsys.readouterr().out
        evaluated = f"--prompts {tmp_path}/prompts.safetensors --no-cache --output {tmp_path}/results.json --overwrite"
        assert lotlip(f"evaluate --task classification {model} {evaluated}") == 0
        capsys.readouterr()
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["protocol"]["prompts"].get("top_k") == (2 if "--top-k" in options else None)


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ("prompts --model m --data d --output o --num-context 4 --init the", "--init"),
        ("prompts --model m --data d --output o --top-k 2", "--groups"),
        ("prompts --model m --data d --output o --groups g --position front", "--position"),
        ("prompts --model m --data d --output o --init a-{{}} --position front", "--position"),
        ("prompts --model m --data d --output o --augment turn:1", "augment"),
        ("prompts --model m --task scenes --output {tmp}/o", "--task"),
        ("prompts --model m --data {tmp}/data --shots 1 --patience 3 --output {tmp}/o", "--patience"),
        ("prompts --model m --data {tmp}/data --groups {tmp}/groups.json --output {tmp}/o", "--groups"),
        ("evaluate --model m --task classification --data {tmp}/data --prompts p --templates t", "--templates"),
        ("evaluate --model m --task scenes --num-images 2 --prompts p", "--prompts"),
        ("evaluate --model m --task length-study --benchmark scenes --prompts p", "--prompts"),
    ],
)
def test_wrong_options(words: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / name / "1.png")
    (tmp_path / "groups.json").write_text('["a {}"]')
    assert lotlip(words.format(tmp=tmp_path)) == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
def test_eight_pictures_of_a_class_beat_the_template(trained_on_scenes: Path, tmp_path: Path) -> None:
    """Classes are colours of the large object of Scenes. Mean of three seeds, on new pictures."""
    write_classification(tmp_path / "train", 200, "train", attribute="colour")
    write_classification(tmp_path / "test", 300, "test", attribute="colour")
    encoder = load_encoder(trained_on_scenes, device="cpu")
    train, test = (load_benchmark("classification", tmp_path / part) for part in ("train", "test"))
    images = [encoder.encode_images(part.images, progress=False) for part in (train, test)]
    settings = {"progress": False}
    template = evaluate(encoder, test, **settings)["metrics"]["accuracy_top1"]
    scores = []
    for seed in range(3):
        torch.manual_seed(seed)
        learnt, _ = few_shots(train.labels, 8, seed)
        prompts = PromptedClasses(encoder, train.class_names, init="a photo of a")
        learn_prompts(prompts, images[0][learnt], [train.labels[index] for index in learnt], seed=seed, **settings)
        hits = prompts(images[1]).argmax(1) == torch.tensor(test.labels)
        scores.append(hits.float().mean().item())
    assert sum(scores) / 3 > template + 0.01
