"""Runs of stages, held-out shares of the data, and runs that stop when retrieval no longer rises."""

import json
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import Moment, arguments, assert_same_run, at, finish, log_of, make_checkpoint, make_folder, run

from lotlip_hf.cli import main
from lotlip_hf.data.records import load_records
from lotlip_hf.store import FILE
from lotlip_hf.training import loop
from lotlip_hf.training.checkpoint import CheckpointError, list_checkpoints
from lotlip_hf.training.config import TrainingConfig, parse_arguments
from lotlip_hf.training.data import hold_out
from lotlip_hf.training.loop import train
from lotlip_hf.training.outcome import logged_recalls
from lotlip_hf.training.stages import STAGES_NAME, train_config
from lotlip_hf.training.validation import RECALL_KEYS

pytestmark = pytest.mark.usefixtures("alone")

STAGES: dict[str, dict[str, Any]] = {
    "heads": {"lock_vision": True, "batch_size": 8, "max_steps": 8, "eval_steps": 2, "patience": 3, "save_steps": 2},
    "rest": {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2, "lock_vision": True},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, with dropout, `plain`, without, and `records`. Read-only."""
    folder = tmp_path_factory.mktemp("stages")
    make_checkpoint(folder / "model", dropout=0.2)
    make_checkpoint(folder / "plain")
    make_folder(folder / "records", 40)
    return folder


def command(output: Path, start: Path, stages: dict[str, dict[str, Any]] = STAGES, **options: Any) -> list[str]:
    """Arguments of a short run with these stages."""
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    common = {"model": start / "model", "data": start / "records", "eval_share": 0.2, "config": file}
    left = {"batch_size": None, "max_steps": None}  # a flag would replace those of the stages
    return arguments(output, **{**common, "cache": output.parent / "cache", **left, **options})


def ended(output: Path) -> dict[str, str]:
    return json.loads((output / STAGES_NAME).read_text())


def checkpoints(output: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output)]


# Options


def write(folder: Path, stages: Any, **options: Any) -> str:
    (folder / "train.yaml").write_text(yaml.safe_dump({**options, "stages": stages}, sort_keys=False))
    return str(folder / "train.yaml")


def test_options_of_a_stage_replace_those_of_the_file_and_a_flag_both(tmp_path: Path) -> None:
    stages = {"one": {"batch_size": 8, "lock_text": True}, "two": {"batch_size": 4}}
    file = write(tmp_path, stages, batch_size=2, learning_rate=0.5, unlocked_vision_layers=0)
    config = parse_arguments(["--config", file, "--output", "run"])
    one, two = config.stage_configs().values()
    assert (one.batch_size, one.lock_text, one.learning_rate) == (8, True, 0.5)
    assert (two.batch_size, two.lock_text, two.learning_rate) == (4, False, 0.5)
    assert (Path(one.output), Path(two.output)) == (Path("run", "one"), Path("run", "two"))
    config = parse_arguments(["--config", file, "--batch-size", "3", "--output", str(tmp_path)])
    assert [stage.batch_size for stage in config.stage_configs().values()] == [3, 3]
    config.save(tmp_path)
    assert parse_arguments(["--config", str(tmp_path / "training_config.yaml")]) == config
    assert TrainingConfig(batch_size=2).stage_configs() == {}
    assert parse_arguments(["--config", write(tmp_path, {1: {}})]).stages == {"1": {}}  # as YAML reads it


@pytest.mark.parametrize(
    ("stages", "name"),
    [
        (["one"], "stages"),
        ({"one": [1]}, "stages"),
        ({"../one": {}}, "stages"),
        ({"checkpoint-1": {}}, "checkpoint-1"),
        ({"one": {"lerning_rate": 1}}, "lerning_rate"),
        ({"one": {"batch_size": 0}}, "one.*batch_size"),
        ({"one": {"patience": 1}}, "one.*eval_steps"),
        ({"one": {"seed": 1}}, "seed"),
        ({"one": {"output": "x"}}, "output"),
        ({"one": {"report": True}}, "report"),
        ({"one": {"stages": {}}}, "stages"),
        ({"one": {}, "two": {"text_pooling": "mean"}}, "two.*text_pooling"),
    ],
    ids=str,
)
def test_wrong_stages_are_named(stages: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        parse_arguments(["--config", write(tmp_path, stages)])


def test_a_resumed_run_keeps_its_stages(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path)]
    config = parse_arguments([*output, "--config", write(tmp_path, STAGES, eval_share=0.1)])
    config.save(tmp_path)
    resumed = parse_arguments([*output, "--resume", "--save-steps", "5"])
    assert [stage.save_steps for stage in resumed.stage_configs().values()] == [5, 5]
    assert parse_arguments([*output, "--resume", "--config", write(tmp_path, STAGES)]).stages == STAGES
    changed = {**STAGES, "rest": {**STAGES["rest"], "learning_rate": 1.0}}
    for stages, name in ((changed, "rest.*learning_rate"), ({"heads": STAGES["heads"]}, "stages")):
        with pytest.raises(ValueError, match=name):
            parse_arguments([*output, "--resume", "--config", write(tmp_path, stages)])
    with pytest.raises(ValueError, match="batch_size"):
        parse_arguments([*output, "--resume", "--batch-size", "8"])  # of the first stage alone
    with pytest.raises(ValueError, match="stages"):
        train(None, None, None, config)  # pyright: ignore[reportArgumentType]


# Held-out records


def test_a_seed_holds_out_the_same_records_in_any_order(start: Path) -> None:
    records: Any = load_records(start / "records")
    rest, held_out = hold_out(records, 0.2, seed=3)
    ids = [record["id"] for record in held_out]
    assert (len(rest), len(held_out)) == (32, 8)
    assert {*ids, *(record["id"] for record in rest)} == {record["id"] for record in records}
    turned = records.select(range(len(records) - 1, -1, -1))
    assert [record["id"] for record in hold_out(turned, 0.2, seed=3)[1]] == ids
    assert {record["id"] for record in hold_out(records, 0.2, seed=4)[1]} != set(ids)
    assert [len(part) for part in hold_out(records, 0.001, seed=3)] == [39, 1]
    assert [len(part) for part in hold_out(records, 0.999, seed=3)] == [1, 39]
    for unfit in (records.select([0]), load_records(start / "records", streaming=True)):
        with pytest.raises(ValueError, match="eval_share"):
            hold_out(unfit, 0.2, seed=3)


# Stages


def test_a_stage_is_a_run_from_the_best_checkpoint_before(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["train", *command(output, start)]) == 0
    heads, rest = (output / name / checkpoint for name, checkpoint in ended(output).items())
    scores = {
        line["step"]: sum(line[name] for name in RECALL_KEYS["long"])
        for line in log_of(output / "heads")
        if "long_image_to_text_r1" in line
    }
    assert heads.name == f"checkpoint-{max(scores, key=scores.__getitem__)}"
    assert rest == output / "rest" / "checkpoint-4"
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (40,)  # each picture once
    by_hand = {**STAGES["rest"], "model": heads, "data": start / "records", "cache": tmp_path / "cache"}
    assert main(["train", *arguments(tmp_path / "hand", **by_hand, eval_share=0.2)]) == 0
    assert_same_run(tmp_path / "hand", output / "rest")
    # an ended run has nothing left to do, and another does not replace it
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    assert main(["train", "--output", str(output), "--resume"]) == 0
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == before
    assert main(["train", *command(output, start)]) == 2
    assert "rest/checkpoint-4" in capsys.readouterr().err
    # without the list of ended stages each of them finds that it has ended
    list_of_ended = (output / STAGES_NAME).read_text()
    for damaged in ("[", "1", '[[1, "checkpoint-1"]]'):
        (output / STAGES_NAME).write_text(damaged)
        assert main(["train", "--output", str(output), "--resume"]) == 2
        assert STAGES_NAME in capsys.readouterr().err
    (output / STAGES_NAME).unlink()
    assert main(["train", "--output", str(output), "--resume"]) == 0
    assert (output / STAGES_NAME).read_text() == list_of_ended


KILLS = [
    Moment("evaluation", 1),  # that of the start, before there is a checkpoint
    Moment("all but named", 1),  # the evaluation is in the log
    Moment("evaluation", 1),
    Moment("all but named", 2),
    Moment("stage kept", 2),  # the first is that of the start
    Moment("step", 3),
    Moment("all but named", 1),
    Moment("stage kept", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_stages_resume_bitwise(num_processes: int, start: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(command(undisturbed, start), tmp_path, num_processes)
    argv = command(killed, start)
    for moment in KILLS if num_processes == 1 else [KILLS[1], *KILLS[3:6]]:
        text = run(argv, tmp_path, num_processes, at, moment)
        assert text.codes[0] == -signal.SIGKILL, (moment, text.text)
        argv = ["--output", str(killed), "--resume"]
    finish(argv, tmp_path, num_processes)
    assert ended(killed) == ended(undisturbed)
    for stage in STAGES:
        assert checkpoints(killed / stage) == checkpoints(undisturbed / stage)
        assert_same_run(undisturbed / stage, killed / stage)


@pytest.mark.slow
def test_two_processes_run_stages_as_one(start: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finish(command(alone, start, model=start / "plain", epsilon=1e-3), tmp_path)
    halved = {name: {**own, "batch_size": own["batch_size"] // 2} for name, own in STAGES.items()}
    text = finish(command(shared, start, halved, model=start / "plain", epsilon=1e-3), tmp_path, 2)
    assert text.count("The model is in") == 1
    assert ended(shared) == ended(alone)
    for stage in STAGES:
        for expected, line in zip(log_of(alone / stage), log_of(shared / stage), strict=True):
            assert line == pytest.approx(expected, abs=1e-5, rel=0)


# Patience


@pytest.mark.parametrize(("limit", "ema_decay"), [(0, None), (1, 0.5)])
def test_a_run_stops_when_retrieval_no_longer_rises(
    limit: int, ema_decay: float | None, start: Path, tmp_path: Path
) -> None:
    """A learning rate of 0: no evaluation is above that of the start."""
    given = {"model": start / "model", "data": start / "records", "eval_share": 0.2, "learning_rate": 0}
    given |= {
        "eval_steps": 2,
        "patience": 3,
        "save_steps": 2,
        "save_total_limit": limit,
        "max_steps": 50,
        "ema_decay": ema_decay,
    }
    output = tmp_path / "run"
    config = parse_arguments(arguments(output, **given))
    assert train_config(config) == output / "checkpoint-0"
    scored = [line["step"] for line in log_of(output) if RECALL_KEYS["long"][0] in line]
    assert scored == [0, 2, 4, 6]
    assert logged_recalls(output / "checkpoint-0") == logged_recalls(output / "checkpoint-6")
    assert max(line["step"] for line in log_of(output)) == 6
    before, after = (load_file(folder / "model.safetensors") for folder in (start / "model", output / "checkpoint-0"))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    kept = [0, 6] if limit else [0, 2, 4, 6]
    assert checkpoints(output) == [f"checkpoint-{step}" for step in kept]
    # resumed, it has nothing left to do; without its last checkpoint it stops at the same step
    config.resume = True
    for name in ("checkpoint-6", "checkpoint-4")[: 1 + (not limit)]:
        assert train_config(config) == output / "checkpoint-0"
        assert checkpoints(output)[-1] == "checkpoint-6"
        assert max(line["step"] for line in log_of(output)) == 6
        for path in list_checkpoints(output):
            if path.name >= name:
                shutil.rmtree(path)
    # without the best one it has nothing to continue with
    assert train_config(config) == output / "checkpoint-0"
    shutil.rmtree(output / "checkpoint-0")
    with pytest.raises(CheckpointError, match="checkpoint-0"):
        train_config(config)


def test_a_signal_in_the_last_evaluation_of_a_stage_stops_the_run(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    stages = {"heads": {"max_steps": 1}, "rest": {"max_steps": 1}}
    config = parse_arguments(command(output, start, stages))
    with monkeypatch.context() as patch:

        def signalled(*arguments: Any) -> dict[str, float]:
            signal.raise_signal(signal.SIGTERM)
            return loop_validate(*arguments)

        loop_validate = loop.validate
        patch.setattr(loop, "validate", signalled)
        with pytest.raises(loop.Interrupted):
            train_config(config)
    assert not (output / "rest").exists()
    assert train_config(parse_arguments(["--output", str(output), "--resume"])) == output / "rest" / "checkpoint-1"


def test_without_patience_a_run_returns_its_last_checkpoint(start: Path, tmp_path: Path) -> None:
    given = {"model": start / "model", "data": start / "records", "eval_share": 0.2, "learning_rate": 0}
    config = parse_arguments(arguments(tmp_path / "run", **given, eval_steps=2, max_steps=6))
    assert train_config(config) == tmp_path / "run" / "checkpoint-6"
    assert checkpoints(tmp_path / "run") == ["checkpoint-6"]
