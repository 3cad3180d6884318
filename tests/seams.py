"""Runs of the commands with a part of a test's own: by one process, and by two that share the batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPTextConfig
from lotlip_hf.distributed import world_size
from lotlip_hf.scenes.small import small_model
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.grad_cache import cached_backward
from lotlip_hf.training.log import read_log
from lotlip_hf.training.objective import Objective, batch_loss
from lotlip_hf.training.terms.views import Views
from processes import finish

# With a small epsilon AdamW makes whole steps of gradients that are rounding errors.
FLAGS = (
    "--data scenes --num-scenes 24 --eval-data scenes --eval-samples 8 --max-steps 3 --log-steps 1 --num-workers 0 "
    "--trackers none --learning-rate 1e-3 --epsilon 1e-3"
).split()


def train_alone_and_together(program: str, folder: Path, *flags: str) -> Path:
    """
    Trains twice, and checks that two processes log, recall and save what one does.

    Args:
        program: A module whose `main(argv)` registers the part and calls the command: a test's `__name__`.
        folder: For the runs.
        flags: Of `lotlip train`, beside `FLAGS`.

    Returns:
        The last checkpoint of the one process.
    """
    outputs = [folder / "alone", folder / "together"]
    for number, output in enumerate(outputs, 1):
        argv = ["train", "--output", str(output), "--batch-size", str(8 // number), *FLAGS, *flags]
        finish(program, argv, folder, number)
    alone, together = (
        [{name: value for name, value in line.items() if name != "samples_per_second"} for line in read_log(output)]
        for output in outputs
    )
    for expected, line in zip(alone, together, strict=True):
        assert line == pytest.approx(expected, abs=1e-5, rel=0)
    assert any("long_image_to_text_r1" in line for line in alone)
    one, two = (list_checkpoints(output)[-1] for output in outputs)
    weights, others = (
        {**load_file(path / "model.safetensors"), **torch.load(path / "state" / "objective.pt")} for path in (one, two)
    )
    torch.testing.assert_close(others, weights, atol=1e-5, rtol=0)
    return one


def assert_same_in_chunks(model: Any, batch: Mapping[str, Any], objective: Objective, name: str) -> torch.Tensor:
    """Checks that gradient caching gives the gradients of the whole batch, and its loss `name`, which is returned."""
    answers = []
    for chunk in (None, 2):
        model.zero_grad()
        if chunk is None:
            losses = batch_loss(model, batch, objective)
            losses["loss"].backward()
        else:
            losses = cached_backward(model, batch, chunk, objective)
        gradients = {one: each.grad.clone() for one, each in model.named_parameters() if each.grad is not None}
        answers.append({"loss": losses[name].detach(), **gradients})
    torch.testing.assert_close(answers[1], answers[0], atol=1e-6, rtol=1e-4)
    return answers[0]["loss"]


def save_model(folder: Path, **text_config: Any) -> Path:
    """A tiny model for Scenes with another text tower; its image tower and processor are those of the small model."""
    small, processor = small_model(hidden_size=32, num_hidden_layers=1)
    own = {"backbone_config": small.config.text_config.backbone_config, "num_corner_tokens": 2, "projection_dim": 32}
    config = LoTLIPConfig(
        text_config=LoTLIPTextConfig(**{**own, **text_config}),
        vision_config=small.config.vision_config,
        projection_dim=32,
    )
    LoTLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Near(nn.Module):
    """The distance of each token of a text from the most similar patch of its image."""

    needs = frozenset({"patch_embeds", "token_embeds", "token_mask"})

    def forward(self, views: Views) -> torch.Tensor:
        cosines = torch.einsum("btld, bpd -> btlp", views["token_embeds"], views["patch_embeds"]).amax(3)
        mask = views["token_mask"]
        return ((1 - cosines) * mask).sum((1, 2)).div(mask.sum((1, 2))).sum() * world_size() / views.num_samples
