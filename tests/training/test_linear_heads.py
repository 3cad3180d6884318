"""The linear heads: the numbers of the plain program that they stand for."""

import pytest
import torch
from torch.nn import functional as F

from lotlip_hf.training.linear_heads import PairStates, linear_heads


def drawn(number: int) -> PairStates:
    """States of images from which those of texts can partly be told."""
    meaning = torch.randn(number, 6)
    image = 3 + torch.cat([meaning, torch.randn(number, 4)], 1) @ torch.randn(10, 20, generator=seeded(1))
    texts = [meaning @ torch.randn(6, 12, generator=seeded(2)) + noise * torch.randn(number, 12) for noise in (2, 1)]
    return PairStates(image, *texts)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(train: PairStates, held_out: PairStates, steps: int) -> dict[str, float]:
    """The heads as a page of code has them, with texts that are normalised before and recalls counted by hand."""
    (x, short, long), (dx, dshort, dlong) = train, held_out
    short, long, dshort, dlong = (F.normalize(states, dim=-1) for states in (short, long, dshort, dlong))
    mean, std = x.mean(0), x.std(0)
    x, dx = (x - mean) / std, (dx - mean) / std
    torch.manual_seed(0)
    image_head, text_head = torch.nn.Linear(20, 12), torch.nn.Linear(12, 12)
    scale = torch.nn.Parameter(torch.tensor(3.5))
    optimizer = torch.optim.AdamW([*image_head.parameters(), *text_head.parameters(), scale], 1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows, target, loss = torch.randint(0, len(x), (512,)), torch.arange(512), torch.zeros(())
        images = F.normalize(image_head(x[rows]), dim=-1)
        for texts in (short, long):
            logits = scale.exp() * images @ F.normalize(text_head(texts[rows]), dim=-1).T
            loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    values = {}
    for kind, texts in (("long", dlong), ("short", dshort)):
        scores = F.normalize(image_head(dx), dim=-1) @ F.normalize(text_head(texts), dim=-1).T
        for direction, each in (("image_to_text", scores), ("text_to_image", scores.T)):
            better = (each > each.diag()[:, None]).sum(1)
            values |= {f"{kind}_{direction}_r{k}": (better < k).float().mean().item() for k in (1, 5, 10)}
    return values


def test_heads_have_the_numbers_of_the_plain_program() -> None:
    train, held_out = drawn(300), drawn(100)
    expected = plain(train, held_out, 60)
    assert linear_heads(train, held_out, steps=60) == pytest.approx(expected, abs=1e-6)
    assert 0.05 < expected["long_image_to_text_r10"] < 1


def test_heads_leave_the_random_numbers_of_a_run_alone() -> None:
    train = drawn(20)
    state = torch.get_rng_state()
    with torch.no_grad():  # as at the end of a run
        first = linear_heads(train, train, steps=3)
    assert torch.equal(state, torch.get_rng_state())
    assert first == linear_heads(train, train, steps=3)
    assert first != linear_heads(train, train, seed=1, steps=3)


def test_a_constant_feature_is_no_division_by_zero() -> None:
    train = drawn(50)
    train.image[:, 0] = 1
    assert linear_heads(train, train, steps=3)["long_image_to_text_r10"] > 0  # NaN would be an error
    one = PairStates(*(each[:1] for each in train))
    assert linear_heads(one, train, steps=3)["long_image_to_text_r10"] > 0
