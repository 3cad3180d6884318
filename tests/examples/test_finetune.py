"""`examples/finetune_with_trainer.py` and `examples/finetune_lora.py`, run as they are on a tiny checkpoint."""

import io
import json
import math
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import tiny
from lotlip_hf import LoTLIPModel, lora_targets
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.records import load_records
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from processes import finish
from scripts import load_script

pytestmark = pytest.mark.slow
NUM_RECORDS = 8
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own for `datasets`, and none of accelerate's state for the next test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trainer_example() -> ModuleType:
    return load_script("examples/finetune_with_trainer.py")


@pytest.fixture(scope="module")
def lora_example() -> ModuleType:
    return load_script("examples/finetune_lora.py")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with metadata."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for one in map(scene, range(NUM_RECORDS)):
        render(one, image_size=32).save(folder / f"{one.id.replace('/', '-')}.png")
        captions = {"short_caption": short_caption(one), "long_captions": long_captions(one)}
        rows.append({"file_name": f"{one.id.replace('/', '-')}.png", "id": one.id, **captions})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(folder: Path, other: Path) -> float:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def losses_of_epochs(still_checkpoint: Path, pictures: Path, sampling: SubCaptions, seed: int) -> list[float]:
    """What a model makes of the texts of three epochs, by the loss that it has itself."""
    model, processor = AutoModel.from_pretrained(still_checkpoint), AutoProcessor.from_pretrained(still_checkpoint)
    collator = LoTLIPCollator(processor, sampling, seed)
    losses = []
    for epoch in range(3):
        collator.set_epoch(epoch)
        with torch.no_grad():
            losses.append(float(model(**collator(list(load_records(pictures)))).loss))
    assert len(set(losses)) == 3
    return losses


def printed_losses(text: str) -> list[float]:
    """What `finetune_lora.py` printed."""
    return [float(loss) for loss in re.findall(r"^epoch \d: loss ([\d.]+)$", text, flags=re.MULTILINE)]


# with Trainer


def test_trainer_trains_evaluates_and_goes_on(
    trainer_example: ModuleType, still_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(still_checkpoint), "--data", str(pictures), "--eval_data", str(pictures)]
    arguments += ["--output_dir", str(tmp_path / "run"), *"--bf16 --grad_cache_chunk 2 --learning_rate 1e-2".split()]
    arguments += "--eval_strategy steps --eval_steps 2 --save_steps 2 --load_best_model_at_end".split()
    arguments += "--metric_for_best_model long_image_to_text_r1 --max_steps".split()
    saved = trainer_example.main([*arguments, "2"])
    assert largest_difference(saved, still_checkpoint) > 1e-3
    assert trainer_example.main([*arguments, "4", "--resume"]) == saved
    _, info = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    state = json.loads((saved / "checkpoint-4" / "trainer_state.json").read_text())
    values = [line["eval_long_image_to_text_r1"] for line in state["log_history"] if "eval_loss" in line]
    assert len(values) == 2
    measured = json.loads((saved / "eval_results.json").read_text())
    assert measured["eval_long_image_to_text_r1"] == max(values)


# with PEFT


def test_lora_trains_on_the_objective_with_other_texts_each_epoch(
    lora_example: ModuleType,
    still_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What LoRA adds is nothing before the first step, and nothing is learnt.
    options = f"--batch-size {NUM_RECORDS} --num-epochs 3 --learning-rate 0 --seed 5"
    paths = ["--model", str(still_checkpoint), "--data", str(pictures), "--output", str(tmp_path)]
    arguments = [*paths, *options.split()]
    assert largest_difference(lora_example.main(arguments), still_checkpoint) == 0
    expected = losses_of_epochs(still_checkpoint, pictures, SubCaptions(), seed=5)
    assert printed_losses(capsys.readouterr().out) == pytest.approx(expected, abs=1e-4)  # as printed


@pytest.mark.parametrize("vision", [False, True])
def test_lora_trains_what_it_saves(
    lora_example: ModuleType, official_checkpoint: Path, pictures: Path, tmp_path: Path, vision: bool
) -> None:
    arguments = ["--model", str(official_checkpoint), "--data", str(pictures), "--output", str(tmp_path / "lora")]
    options = "--rank 2 --batch-size 3 --num-epochs 2 --learning-rate 1e-2"
    merged = lora_example.main([*arguments, *options.split(), *(["--vision"] if vision else [])])
    assert merged == tmp_path / "lora" / "merged"

    before, after = weights(official_checkpoint), weights(merged)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapter = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    assert {"text_model.corner_embeds", "text_projection.weight", "logit_scale"} <= changed
    # nothing else but what LoRA was put on
    wrapped = len({name.split(".lora_")[0] for name in adapter if ".lora_" in name})
    targets = lora_targets(AutoModel.from_pretrained(official_checkpoint))
    on_text = [name for name in targets if name.startswith("text_model.")]
    on_images = [name for name in targets if name.startswith("vision_model.")]
    assert len(changed) == 3 + wrapped
    assert {name.split(".")[0] for name in changed} == {
        *("text_model", "text_projection", "logit_scale"),
        *(["vision_model"] if vision else []),
    }
    assert wrapped == len(on_text) + (len(on_images) if vision else 0)

    # What is saved gives the trained model, whichever way it is loaded.
    model, info = AutoModel.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values())
    base = AutoModel.from_pretrained(official_checkpoint)
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora" / "adapter").eval()
    batch = LoTLIPCollator(AutoProcessor.from_pretrained(tmp_path / "lora" / "adapter"))(list(load_records(pictures)))
    with torch.no_grad():
        expected, answers = model(**batch), adapted(**batch)
    for name in ("text_embeds", "image_embeds", "corner_embeds", "loss"):
        torch.testing.assert_close(answers[name], expected[name], **TOLERANCE)
    assert torch.equal(adapted.logit_scale, model.logit_scale)


@pytest.mark.parametrize("text_backbone", tiny.TEXT_BACKBONES)
@pytest.mark.parametrize("vision_backbone", tiny.VISION_BACKBONES)
def test_lora_leaves_no_parameter_idle(lora_example: ModuleType, text_backbone: str, vision_backbone: str) -> None:
    base = LoTLIPModel(tiny.config(text_backbone, vision_backbone))
    projections = [name for name in lora_example.PROJECTIONS if list(base.get_submodule(name).parameters())]
    model = lora_example.add_lora(base, rank=2, vision=True).train()
    batch = {"input_ids": tiny.input_ids(3, 7), "long_input_ids": tiny.input_ids(3, 2, 9)}
    batch["pixel_values"] = tiny.pixel_values(3)
    objective = lora_example.Objective({"infonce": lora_example.InfoNCE()})
    lora_example.batch_loss(model, batch, objective)["loss"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    others = {name.removeprefix("base_model.model.") for name in trained if ".lora_" not in name}
    assert others == {*lora_example.PARAMETERS, *(f"{name}.modules_to_save.default.weight" for name in projections)}


def test_lora_of_two_processes_is_that_of_one(
    lora_example: ModuleType,
    still_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A batch is the whole of the data, whatever the order.
    arguments = ["--model", still_checkpoint, "--data", pictures, "--num-epochs", "3", "--rank", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    lora_example.main([str(word) for word in (*arguments, "--output", one, "--batch-size", NUM_RECORDS)])
    argv = [str(word) for word in (*arguments, "--output", two, "--batch-size", NUM_RECORDS // 2)]
    printed = finish("examples/finetune_lora.py", argv, tmp_path, num_processes=2).stdout
    losses = printed_losses(capsys.readouterr().out)
    assert len(losses) == 3
    assert printed_losses(printed) == pytest.approx(losses, abs=2e-4)  # as printed
    assert largest_difference(one / "merged", still_checkpoint) > 1e-4
    assert largest_difference(one / "merged", two / "merged") < TOLERANCE["atol"]


def test_weights_are_trained_in_float32_and_the_scale_is_clamped(
    lora_example: ModuleType, still_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(still_checkpoint)
    model.logit_scale.data.fill_(5.0)
    start = tmp_path / "start"
    model.bfloat16().save_pretrained(start)
    AutoProcessor.from_pretrained(still_checkpoint).save_pretrained(start)
    saved = lora_example.main(["--model", str(start), "--data", str(pictures), "--output", str(tmp_path / "saved")])
    assert {tensor.dtype for tensor in weights(saved).values()} == {torch.float32}
    assert weights(start)["logit_scale"] == 5
    assert math.log(100) - 1e-3 < float(weights(saved)["logit_scale"]) < math.log(100) + 1e-6


@pytest.fixture
def shard(pictures: Path, tmp_path: Path) -> Path:
    """The pictures in a WebDataset shard."""
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, row in enumerate(rows):
            tar.add(pictures / row.pop("file_name"), f"{number}.png")
            member, content = tarfile.TarInfo(f"{number}.json"), json.dumps(row).encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return tmp_path / "shard.tar"


@pytest.mark.parametrize("name", ["finetune_with_trainer", "finetune_lora"])
def test_the_data_may_be_shards(name: str, still_checkpoint: Path, shard: Path, tmp_path: Path) -> None:
    output = ["--output"] if name == "finetune_lora" else ["--max_steps", "3", "--output_dir"]
    arguments = ["--model", str(still_checkpoint), "--data", str(shard), *output, str(tmp_path / "saved")]
    assert largest_difference(load_script(f"examples/{name}.py").main(arguments), still_checkpoint) > 1e-5
