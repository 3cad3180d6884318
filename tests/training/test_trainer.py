"""`LoTLIPTrainer` against the training loop, the model's own loss and itself: cached, resumed, in two processes."""

import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from test_training_sharded import FSDP, launched, start_state
from transformers import AutoModel, AutoProcessor, TrainingArguments

from lotlip_hf import LoTLIPModel, LoTLIPTrainer
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.sampling import SubCaptions, WholeCaptions
from lotlip_hf.distributed import world_size
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.training.batches import EpochBatches
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.log import read_log
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model, prepare_model
from lotlip_hf.training.objective import Objective, batch_loss
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.sigmoid import Sigmoid
from lotlip_hf.training.trainer import OBJECTIVE_NAME
from lotlip_hf.training.validation import validate
from processes import run_processes

NUM_RECORDS = 8
BIAS = "terms.sigmoid.logit_bias"
SAMPLING = SubCaptions(num_long_texts=2, num_sentences=1)


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def records() -> Dataset:
    return scenes_dataset(NUM_RECORDS)


def load_model(checkpoint: Path | str) -> LoTLIPModel:
    return AutoModel.from_pretrained(checkpoint, dtype=torch.float32)


def make(
    checkpoint: Path | str,
    output: Path | str,
    records: Any = None,
    *,
    objective: Objective | None = None,
    grad_cache_chunk: int | None = None,
    eval_dataset: Any = None,
    sampling: SubCaptions = SAMPLING,
    **options: Any,
) -> LoTLIPTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": NUM_RECORDS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return LoTLIPTrainer(
        load_model(checkpoint),
        TrainingArguments(str(output), **{**defaults, **options}),
        data_collator=LoTLIPCollator(AutoProcessor.from_pretrained(checkpoint), sampling, seed=5),
        train_dataset=records,
        eval_dataset=eval_dataset,
        objective=objective,
        grad_cache_chunk=grad_cache_chunk,
    )


def logged(trainer: LoTLIPTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def weights(trainer: LoTLIPTrainer) -> dict[str, torch.Tensor]:
    both = {**trainer.model.state_dict(), **trainer.objective.state_dict()}
    return {name: weight.detach().clone() for name, weight in both.items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "chunk"), [("infonce", None), ("sigmoid", None), ("infonce", 3)])
def test_the_same_batches_give_the_numbers_of_the_loop(
    loss: Any, chunk: int | None, still_checkpoint: Path, tmp_path: Path
) -> None:
    records = scenes_dataset(24)
    config = TrainingConfig(
        model=str(still_checkpoint),
        output=str(tmp_path / "loop"),
        terms=[loss],
        grad_cache_chunk=chunk,
        num_long_texts=2,
        num_sentences=1,
        seed=5,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
        weight_decay=0.2,
        epsilon=1e-4,
        max_grad_norm=0.5,
        log_steps=1,
        num_workers=0,
        trackers=["none"],
    )
    _, processor = load_or_start_model(config)
    saved = train(load_model(still_checkpoint), processor, records, config)
    AcceleratorState._reset_state(reset_partial_state=True)

    order = [index for batch in EpochBatches(len(records), config, 0, 0, 0, 1) for index in batch]
    trainer = make(
        still_checkpoint,
        tmp_path / "trainer",
        records.select(order),
        objective=Objective({loss: TERMS[loss]()}),
        grad_cache_chunk=chunk,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.2,
        adam_epsilon=1e-4,
        max_grad_norm=0.5,
    )
    prepare_model(trainer.model, config)
    trainer.train()
    lines = read_log(tmp_path / "loop" / "log.jsonl")
    assert len(lines) == 6
    for name in ("loss", f"loss_{loss}_short", f"loss_{loss}_long"):
        assert logged(trainer, name) == pytest.approx([line[name] for line in lines], abs=1e-6)
    found, expected = weights(trainer), AutoModel.from_pretrained(saved).state_dict()
    bias = found.pop(BIAS, None)
    assert largest_difference(found, expected) < 1e-6
    assert largest_difference(found, load_model(still_checkpoint).state_dict()) > 1e-3
    if bias is not None:
        states = torch.load(saved / "state" / "objective.pt", weights_only=True)
        torch.testing.assert_close(bias, states[BIAS], rtol=0.0, atol=1e-6)


def test_texts_change_with_the_epoch_and_the_logit_scale_is_limited(
    still_checkpoint: Path, records: Dataset, tmp_path: Path
) -> None:
    # A batch is the whole of the data and nothing is learnt, so that the losses are known.
    trainer = make(
        still_checkpoint,
        tmp_path,
        records,
        per_device_train_batch_size=NUM_RECORDS,
        num_train_epochs=3,
        learning_rate=0.0,
        remove_unused_columns=True,  # which is not meant for records
    )
    collator = LoTLIPCollator(AutoProcessor.from_pretrained(still_checkpoint), SAMPLING, seed=5)
    expected = []
    for epoch in range(3):
        collator.set_epoch(epoch)
        with torch.no_grad():
            expected.append(float(trainer.model(**collator(list(records))).loss))
    assert len(set(expected)) == 3
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(expected, abs=1e-5)

    trainer.model.logit_scale.data.fill_(5.0)
    trainer.model.vision_model.requires_grad_(False)
    trainer.train()
    assert trainer.model.text_model.training
    assert not trainer.model.vision_model.training  # frozen: without dropout
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(100))


def test_the_trainer_and_the_loop_know_equal_captions(
    still_checkpoint: Path, records: Dataset, tmp_path: Path
) -> None:
    """Records with the same captions are positives of each other, though other sentences are drawn from them."""
    long = [scene["long_captions"] for scene in records]
    same = Dataset.from_list([{**one, "long_captions": long[i % 3]} for i, one in enumerate(records)])
    objective, plain = (Objective({"infonce": InfoNCE(equal_positives=each)}) for each in (True, False))
    processor, model = AutoProcessor.from_pretrained(still_checkpoint), load_model(still_checkpoint)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough that each word matters
            torch.nn.init.normal_(parameter, std=0.3)
    for each in (model, processor):
        each.save_pretrained(tmp_path / "start")

    def loss(objective: Objective, draw: Any) -> float:
        collator = LoTLIPCollator(processor, draw, seed=5, return_text_keys=True)
        with torch.no_grad():
            return float(batch_loss(model.eval(), collator(list(same)), objective)["loss"])

    expected = loss(objective, SAMPLING)
    assert abs(expected - loss(plain, SAMPLING)) > 1e-4
    trainer = make(
        tmp_path / "start",
        tmp_path / "trainer",
        same,
        objective=objective,
        eval_dataset=same,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=NUM_RECORDS,
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected], abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss(objective, WholeCaptions()), abs=1e-5)

    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainingConfig(
        model=str(tmp_path / "start"),
        output=str(tmp_path / "loop"),
        term_options=["infonce.equal_positives=true"],
        lock_vision=True,  # batches have states instead of images
        cache=str(tmp_path / "cache"),
        num_long_texts=2,
        num_sentences=1,
        seed=5,
        batch_size=NUM_RECORDS,
        grad_cache_chunk=3,
        max_steps=1,
        num_workers=0,
        trackers=["none"],
    )
    train(*load_or_start_model(config), same, config)
    assert read_log(tmp_path / "loop")[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_evaluation_is_that_of_the_loop(still_checkpoint: Path, records: Dataset, tmp_path: Path) -> None:
    several = [{**record, "long_captions": [*record["long_captions"], "Another."]} for record in records]
    trainer = make(still_checkpoint, tmp_path, eval_dataset=several)
    config = TrainingConfig(data="scenes", batch_size=3)
    processor = AutoProcessor.from_pretrained(still_checkpoint)
    expected = validate(load_model(still_checkpoint), processor, Dataset.from_list(several), config)
    with torch.no_grad():
        expected["loss"] = float(
            trainer.model.eval()(**LoTLIPCollator(processor, WholeCaptions())(list(records))).loss
        )
    assert len(expected) == 13
    for prefix, found in (("eval", trainer.evaluate()), ("test", trainer.predict(several).metrics or {})):
        assert {name: found[f"{prefix}_{name}"] for name in expected} == pytest.approx(expected, abs=1e-5)
    trainer.args.prediction_loss_only = True
    assert not [name for name in trainer.evaluate() if name.endswith("r1")]


@pytest.mark.slow
def test_the_best_model_is_loaded_with_its_objective(still_checkpoint: Path, records: Dataset, tmp_path: Path) -> None:
    trainer = make(
        still_checkpoint,
        tmp_path,
        records,
        eval_dataset=records,
        objective=Objective({"sigmoid": Sigmoid()}),
        learning_rate=3e-2,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="long_image_to_text_r1",
    )
    trainer.train()
    values = logged(trainer, "eval_long_image_to_text_r1")
    assert len(values) == 3
    folder = Path(trainer.state.best_model_checkpoint or "")
    assert folder.name == f"checkpoint-{2 * (values.index(max(values)) + 1)}"
    assert trainer.evaluate()["eval_long_image_to_text_r1"] == pytest.approx(max(values), abs=1e-5)
    assert torch.equal(trainer.objective.terms["sigmoid"].logit_bias, load_file(folder / OBJECTIVE_NAME)[BIAS])
    assert trainer.objective.terms["sigmoid"].logit_bias.item() != -10.0


def test_a_plateau_lowers_the_learning_rate(still_checkpoint: Path, records: Dataset, tmp_path: Path) -> None:
    trainer = make(
        still_checkpoint,
        tmp_path,
        records,
        eval_dataset=records,
        learning_rate=1e-9,  # too small for the loss to change
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 0.1, "eps": 0.0},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        prediction_loss_only=True,
    )
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([1e-9, 1e-9, 5e-10])


@pytest.mark.slow
@pytest.mark.same_bits
@pytest.mark.parametrize("interrupted_at", [2, 4])  # within the first epoch, and at its end
@pytest.mark.parametrize("stream", [False, True])
def test_a_resumed_run_ends_as_the_undisturbed_one(
    stream: bool, interrupted_at: int, still_checkpoint: Path, records: Dataset, tmp_path: Path
) -> None:
    source: Dataset | IterableDataset = records.to_iterable_dataset() if stream else records
    ends = {}
    for name in ("undisturbed", "resumed"):
        trainer = make(
            still_checkpoint,
            tmp_path / name,
            source,
            objective=Objective({"sigmoid": Sigmoid()}),
            max_steps=6,
            save_strategy="steps",
            save_steps=interrupted_at,
            learning_rate=1e-2,
        )
        if name == "resumed":
            kept = f"checkpoint-{interrupted_at}"
            shutil.copytree(tmp_path / "undisturbed" / kept, tmp_path / name / kept)
        trainer.train(resume_from_checkpoint=name == "resumed")
        ends[name] = {"weights": weights(trainer), "losses": logged(trainer, "loss")}
    assert ends["resumed"]["losses"] == ends["undisturbed"]["losses"]
    assert largest_difference(ends["resumed"]["weights"], ends["undisturbed"]["weights"]) == 0
    (tmp_path / "resumed" / kept / OBJECTIVE_NAME).unlink()
    with pytest.raises(ValueError, match=OBJECTIVE_NAME):
        trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / kept))


# Two processes


def run(checkpoint: str, output: str, settings: dict[str, str]) -> dict[str, Any]:
    """What a run ends with, whole and cached, by this number of processes."""
    answers: dict[str, Any] = {}
    records, held_out = scenes_dataset(NUM_RECORDS), scenes_dataset(7)
    with (
        mock.patch.dict(os.environ, {**(launched() if world_size() > 1 else {}), **settings}),
        mock.patch.object(AcceleratorState, "__init__", start_state) if settings else nullcontext(),
    ):
        for chunk in (None, 2):
            trainer = make(
                checkpoint,
                f"{output}/{chunk}",
                records,
                objective=Objective({"sigmoid": Sigmoid()}),
                grad_cache_chunk=chunk,
                optim="sgd",  # AdamW's first steps are the gradients' signs, of which some are rounding alone
                learning_rate=0.1,
                max_steps=2,
                per_device_train_batch_size=4 // world_size(),
                per_device_eval_batch_size=2,
                gradient_accumulation_steps=2,
            )
            trainer.train()
            found = trainer.predict(held_out)  # [7, 2, dim] of texts, [7, dim] of images
            answers |= {f"{chunk} texts": torch.as_tensor(found.predictions)}
            answers |= {f"{chunk} images": torch.as_tensor(found.label_ids)}
            trainer.save_model()
            AcceleratorState._reset_state(reset_partial_state=False)
        if settings:
            with mock.patch.dict(os.environ, FSDP), pytest.raises(ValueError, match="FSDP_CPU_RAM_EFFICIENT_LOADING"):
                make(checkpoint, output, records).create_optimizer()
    return answers


def saved_weights(output: Path) -> dict[str, torch.Tensor]:
    answers = {}
    for chunk in (None, 2):
        model, info = AutoModel.from_pretrained(output / f"{chunk}", output_loading_info=True)
        assert not any(info.values())
        assert (output / f"{chunk}" / "modeling_lotlip.py").is_file()
        both = {**model.state_dict(), **load_file(output / f"{chunk}" / OBJECTIVE_NAME)}
        answers |= {f"{chunk} {name}": weight for name, weight in both.items()}
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}], ids=["DDP", "FSDP"])
def test_two_processes_are_one(settings: dict[str, str], still_checkpoint: Path, tmp_path: Path) -> None:
    expected = run(str(still_checkpoint), str(tmp_path / "one"), {})
    for found in run_processes(run, 2, tmp_path, str(still_checkpoint), str(tmp_path / "two"), settings):
        assert largest_difference(found, expected) < 1e-5
    ends = saved_weights(tmp_path / "one")
    for name in ends:  # cached gradients are those of the whole batch
        torch.testing.assert_close(ends[name], ends[name.replace("2 ", "None ", 1)], rtol=0, atol=1e-5)
    assert largest_difference(saved_weights(tmp_path / "two"), ends) < 1e-5
    start = load_model(still_checkpoint).state_dict()
    assert largest_difference({name: ends[f"None {name}"] for name in start}, start) > 1e-3
