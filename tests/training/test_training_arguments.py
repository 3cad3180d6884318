"""The options of a run: flags, a YAML file, both, and those that a resumed run goes on with."""

import re
from pathlib import Path

import pytest
import yaml

from lotlip_hf.training.config import CONFIG_NAME, TrainingConfig, check_resumed, parse_arguments
from lotlip_hf.training.terms import TERMS


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_defaults_are_those_of_the_class() -> None:
    assert parse_arguments([]) == TrainingConfig()


def test_no_tracker_and_no_mixed_precision(tmp_path: Path) -> None:
    file = write(tmp_path / "train.yaml", "mixed_precision: no\ntrackers: []\n")
    for config in (
        parse_arguments(["--config", file]),
        parse_arguments("--mixed_precision no --trackers none".split()),
    ):
        assert (config.mixed_precision, config.trackers) == ("no", [])


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    argv = (
        "--trackers none --mixed-precision no --long-columns a b --ema-decay 0.99 --learning-rate 3e-5 --captioners 0"
    )
    config = parse_arguments(["--output", str(tmp_path), *argv.split(), "--lock-vision", "--data", "x: y # z"])
    config.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]
    assert parse_arguments(["--config", str(tmp_path / CONFIG_NAME)]) == config
    config.save(tmp_path)
    assert "resume" not in yaml.safe_load((tmp_path / CONFIG_NAME).read_text())


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--num-epochs", "0"], "num_epochs"),
        (["--beta1", "1"], "beta1"),
        (["--ema-decay", "1.5"], "ema_decay"),
        (["--term-options", "infonce.short_loss_weight=-1"], "short_loss_weight"),
        (["--mapping", "nope"], "mapping"),
        (["--captioners", "1", "1"], "captioners"),
        (["--warmup-steps", "5", "--max-steps", "3"], "warmup_steps"),
        (["--warmup-steps", "1.5"], "warmup_steps"),
        (["--eval-steps", "3"], "eval_data"),
        (["--eval-share", "1"], "eval_share"),
        (["--eval-share", "0.1", "--eval-data", "d"], "eval_data"),
        (["--eval-share", "0.1", "--streaming", "--max-steps", "1"], "streaming"),
        (["--patience", "2", "--eval-share", "0.1"], "eval_steps"),
        (["--recipe", "nope"], "bert-vit"),
        (["--recipe", "bert-vit", "--config", "train.yaml"], "--config"),
        (["--streaming"], "max_steps"),
        (["--unlocked-vision-layers", "1"], "lock_vision"),
        (["--unlocked-text-layers", "1"], "lock_text"),
        (["--text-dtype", "bfloat16"], "lock_text"),
        (["--lock-text", "--text-dtype", "bfloat16", "--unlocked-text-layers", "1"], "unlocked_text_layers"),
        (["--layer-decay", "0"], "layer_decay"),
        (["--temperature", "0"], "temperature"),
        (["--text-projection-layers", "2"], "text_projection"),
        (["--cache", "states", "--no-cache"], "no_cache"),
        (["--resume", "--output", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_named_in_one_line(
    argv: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=name) as caught:
        parse_arguments(argv)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_goes_on_with_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    first = parse_arguments(["--batch-size", "8", "--data", "d", "--save-steps", "5"])
    first.save("run")
    resumed = parse_arguments(["--resume", "--save-steps", "7"])
    assert (resumed.resume, resumed.batch_size, resumed.data, resumed.save_steps) == (True, 8, "d", 7)
    # the same once more is no change, not even from a file that is not in the run's folder
    file = write(tmp_path / "train.yaml", "batch_size: 8\noutput: run\n")
    assert parse_arguments(["--config", file, "--resume"]).batch_size == 8
    for flag, value in (("--batch-size", "9"), ("--seed", "1"), ("--ema-decay", "0.5"), ("--terms", "sigmoid")):
        with pytest.raises(ValueError, match=flag[2:].replace("-", "_")):
            parse_arguments(["--resume", flag, value])
    first.resume, first.learning_rate = True, 1.0
    with pytest.raises(ValueError, match="learning_rate"):
        check_resumed(first)


def test_help_names_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"], description="What it does.")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does." in shown
    for name in ("recipe", *vars(TrainingConfig()).keys() - {"stages"}):
        assert f"--{name.replace('_', '-')}" in shown, name
    assert all(term in shown for term in TERMS)
    assert not re.search(r"--\w+_", shown)
