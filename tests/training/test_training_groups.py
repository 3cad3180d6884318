"""Groups in training: the batches that hold them together, and runs with the terms that need them."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_training import config, log_of

from lotlip_hf import cli
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.training.batches import EpochBatches, groups_of, hold_together
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from seams import train_alone_and_together

pytestmark = pytest.mark.usefixtures("alone")
TERMS = ["infonce", "groups:0.5", "margin:0.1", "caption_margin:0.1"]
SIZES = [1] * 7 + [2] * 6 + [3] * 5 + [5, 8]  # of groups
GROUPS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))


def main(argv: list[str]) -> int:
    """The command, as a process runs it."""
    return cli.main(argv)


def batches(group_size: int, epoch: int = 0, num_processes: int = 1, batch_size: int = 6) -> list[list[int]]:
    """The global batches of an epoch."""
    made = TrainingConfig(batch_size=batch_size // num_processes, group_size=group_size, seed=3)
    shares = [
        [*EpochBatches(len(GROUPS), made, epoch, 0, rank, num_processes, GROUPS)] for rank in range(num_processes)
    ]
    return [[record for share in of_step for record in share] for of_step in zip(*shares, strict=True)]


@pytest.mark.parametrize("group_size", [2, 3])
def test_batches_hold_groups_together(group_size: int) -> None:
    """Every record once, the same ones for any number of processes, and another epoch has another order."""
    made = batches(group_size)
    assert sorted(sum(made, [])) == [*range(len(GROUPS))]
    assert [len(batch) for batch in made[:-1]] == [6] * (len(made) - 1)
    assert made == batches(group_size) == batches(group_size, num_processes=2) == batches(group_size, num_processes=3)
    assert made != batches(group_size, epoch=1)
    assert [set(batch) for batch in made] != [set(batch) for batch in batches(group_size, epoch=1)]
    parts = Counter((number, GROUPS[record]) for number, batch in enumerate(made) for record in batch)
    alone = sum(count == 1 for count in parts.values())
    rests = sum(size % group_size == 1 for size in SIZES)
    assert alone <= rests  # no group was cut


def test_a_group_that_fits_nowhere_is_cut() -> None:
    order = hold_together(np.arange(9), np.arange(9) // 3, 3, 4).tolist()
    assert sorted(order) == [*range(9)]
    assert order == [*range(9)]  # 3 + 1, 2 + 2, 1


def test_a_record_without_a_group_is_alone() -> None:
    rows = [{"id": name, "group": group} for name, group in zip("abcde", ("x", None, "x", "", "d"), strict=True)]
    groups = groups_of(Dataset.from_list(rows))
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 4
    with pytest.raises(ValueError, match="group_size"):
        groups_of(Dataset.from_list(rows[1:]))


def test_a_stream_has_no_groups_to_hold() -> None:
    with pytest.raises(ValueError, match="group_size"):
        TrainingConfig(group_size=2, streaming=True, max_steps=1)


def options_of_terms(folder: Path) -> list[str]:
    """The options of the terms, with a file of the groups of Scenes."""
    names = dict.fromkeys(scenes_dataset(24, split="validation")["group"])
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return [f"margin.classes={folder / 'classes.txt'}", "groups.hard_negatives=3"]


def test_a_resumed_run_goes_on_with_its_prototypes(tmp_path: Path) -> None:
    options = {"model": "scenes", "data": "scenes", "split": "validation", "num_scenes": 24, "group_size": 2}
    options |= {"terms": TERMS, "term_options": options_of_terms(tmp_path), "max_steps": 4, "save_steps": 2}

    def run(**more: Any) -> list[dict[str, Any]]:
        made = config(tmp_path / "run", **options, **more)
        train(*load_or_start_model(made), load_data(made)[0], made)
        return log_of(tmp_path / "run")

    expected = run()
    assert all(line["loss_groups"] > 0 for line in expected)
    last = list_checkpoints(tmp_path / "run")[-1]
    states = [load_file(last / "model.safetensors"), torch.load(last / "state" / "objective.pt")]
    assert any("margin.prototypes" in name for name in states[1])
    shutil.rmtree(last)
    assert run(resume=True) == expected
    for state, path in zip(states, ("model.safetensors", "state/objective.pt"), strict=True):
        again = load_file(last / path) if path.endswith("safetensors") else torch.load(last / path)
        assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--num-long-texts 1", "--num-long-texts 0 --grad-cache-chunk 3"])
def test_one_process_and_two_train_with_groups(flags: str, tmp_path: Path) -> None:
    words = ("--model", "scenes", "--split", "validation", "--group-size", "4", "--terms", *TERMS)
    options = ("--term-options", *options_of_terms(tmp_path))
    train_alone_and_together(__name__, tmp_path, *words, *options, *flags.split())
