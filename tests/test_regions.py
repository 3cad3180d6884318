"""Boxes, their matching, and the heads of regions without a run; with one: tests/training/test_training_regions.py."""

from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from lotlip_hf.files import FileError
from lotlip_hf.regions import (
    RegionPooler,
    RegionQueries,
    load_pooler,
    load_queries,
    match,
    overlaps,
    to_centres,
    to_corners,
)
from lotlip_hf.training.terms.region_text import RegionText
from lotlip_hf.training.terms.regions import Regions
from lotlip_hf.training.terms.views import Views

SQUARE = [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("other", "iou", "generalised"),
    [
        (SQUARE, 1.0, 1.0),
        ([0.0, 0.0, 0.5, 0.25], 0.5, 0.5),
        ([0.25, 0.25, 0.75, 0.75], 1 / 7, 1 / 7 - 1 / 8 * 16 / 9),
        ([0.5, 0.5, 1.0, 1.0], 0.0, -0.5),
        ([0.25, 0.25, 0.25, 0.25], 0.0, 0.0),  # without an area
    ],
)
def test_overlaps(other: list[float], iou: float, generalised: float) -> None:
    one, two = (torch.tensor(box, dtype=torch.float64, requires_grad=True) for box in (SQUARE, other))
    found = overlaps(one, two)
    assert found[0].item() == pytest.approx(iou)
    assert found[1].item() == pytest.approx(generalised)
    assert overlaps(two, one)[1].item() == pytest.approx(generalised)
    found[1].backward()
    assert one.grad.isfinite().all()
    torch.testing.assert_close(to_corners(to_centres(two)), two)


def test_points_have_finite_overlaps() -> None:
    point = torch.full([4], 0.5, requires_grad=True)
    overlaps(point, point.detach())[1].backward()
    assert point.grad.isfinite().all()


@pytest.mark.parametrize(("num_queries", "num_regions"), [(5, 1), (5, 4), (4, 4), (6, 2)])
def test_the_matching_is_scipys(num_queries: int, num_regions: int) -> None:
    torch.manual_seed(0)
    costs = torch.randn(7, num_queries, num_regions)
    for own, queries in zip(costs, match(costs), strict=True):
        rows, columns = linear_sum_assignment(own.t())
        assert queries[torch.from_numpy(rows)].tolist() == columns.tolist()


@pytest.mark.parametrize(("num_queries", "num_regions"), [(2, 3), (1, 4), (20, 10)])
def test_a_matching_that_cannot_be_is_refused(num_queries: int, num_regions: int) -> None:
    with pytest.raises(ValueError, match="queries"):
        match(torch.zeros(1, num_queries, num_regions))


def test_a_region_depends_on_its_box_and_its_image_alone() -> None:
    torch.manual_seed(0)
    pooler = RegionPooler(12, width=8, locates=True).double().eval()
    patches, texts = torch.randn(2, 9, 12).double(), torch.randn(2, 3, 12).double()
    boxes = torch.rand(2, 3, 2, 2).double().sort(dim=2).values.flatten(2)
    embeds, found = pooler(patches, boxes), pooler.locate(patches, texts)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2, 3).double())
    assert ((0 < found) & (found < 1)).all()
    for i in range(2):
        for j in range(3):
            alone = patches[i, None], boxes[i, None, j, None]
            torch.testing.assert_close(pooler(*alone)[0, 0], embeds[i, j])
            torch.testing.assert_close(pooler.locate(alone[0], texts[i, None, j, None])[0, 0], found[i, j])
    with pytest.raises(ValueError, match="grounding"):
        RegionPooler(12, width=8).locate(patches, texts)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("is_training", [True, False])
def test_padding_of_patches_is_not_seen(number: int, is_training: bool) -> None:
    """Also in a process without samples, and with patch dropout."""
    terms = [RegionText(grounding=0.5, width=8, projection_dim=8), Regions(projection_dim=8, width=8, layers=1)]
    tensors = {
        "region_embeds": torch.randn(number, 3, 8),
        "region_keys": torch.arange(3 * number).view(number, 3),
        "boxes": torch.tensor([0.1, 0.2, 0.6, 0.9]).expand(number, 3, 4),
        "box_mask": torch.ones(number, 3, dtype=torch.bool),
    }
    patches, padding = torch.randn(number, 7, 8), torch.randn(number, 2, 8)
    padded = {
        "patch_embeds": torch.cat([patches, padding], 1),
        "pixel_attention_mask": torch.tensor([1] * 9 + [0] * 3).expand(number, 12),
        "kept_patches": torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 10]).expand(number, 9),
    }
    for term in terms:
        term.train(is_training)
        assert padded.keys() <= term.needs
        expected = term(Views({**tensors, "patch_embeds": patches}, torch.tensor(10.0)))
        torch.testing.assert_close(term(Views({**tensors, **padded}, torch.tensor(10.0))), expected)


def test_heads_of_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pooler, queries = RegionPooler(12, 128, locates=True).eval(), RegionQueries(12, 3, 2, width=8).eval()
    state = {f"terms.region_text.pooler.{name}": value for name, value in pooler.state_dict().items()}
    state |= {f"terms.regions.head.{name}": value for name, value in queries.state_dict().items()}
    (tmp_path / "state").mkdir()
    torch.save(state, tmp_path / "state" / "objective.pt")
    patches, boxes = torch.randn(2, 9, 12), torch.rand(2, 1, 4)
    with torch.no_grad():
        assert torch.equal(load_pooler(tmp_path)(patches, boxes), pooler(patches, boxes))
        assert torch.equal(load_pooler(tmp_path).locate(patches, patches), pooler.locate(patches, patches))
        for found, expected in zip(load_queries(tmp_path)(patches), queries(patches), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("content", [None, {}, b"no file of torch"])
def test_a_checkpoint_without_heads_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    file = tmp_path / "state" / "objective.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    for load in (load_pooler, load_queries):
        with pytest.raises(FileError, match="objective"):
            load(tmp_path)
