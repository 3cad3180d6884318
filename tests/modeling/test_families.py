"""Every family of text encoders against its own stock class and against masks that are written out."""

import itertools
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, ViTConfig, ViTImageProcessorPil, ViTModel

import tiny
import tiny_families
import tiny_vision
from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPTextConfig, LoTLIPTextModel, cli, from_backbones
from lotlip_hf.adapter_check import check_adapter
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.modeling.backbones_lotlip import TEXT_BACKBONES
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.log import read_log
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import batch_loss, make_objective
from scripts import WITHOUT_LOTLIP
from tiny_families import BERT, FAMILIES, LONGEST, Family, marked, naive, spread, texts

LENGTHS = (9, 5, 12)
EXACT = {"rtol": 0.0, "atol": 1e-6}
CLOSE = {"rtol": 0.0, "atol": 1e-5}

all_families = pytest.mark.parametrize("name", marked(FAMILIES))
MODEL_TYPES = [name for name in FAMILIES if "," not in name]  # one row each
all_model_types = pytest.mark.parametrize("name", marked(MODEL_TYPES))
NUM_CORNERS = 3


def text_config(family: Family, **kwargs: Any) -> LoTLIPTextConfig:
    return LoTLIPTextConfig(backbone_config=family.stock_config(), **kwargs)


@cache
def tower(name: str) -> LoTLIPTextModel:
    """A text tower in evaluation mode, which tests do not change."""
    return spread(LoTLIPTextModel(text_config(FAMILIES[name])))


@cache
def scenes() -> list[Any]:
    return [*scenes_dataset(4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock text encoders, in folders with the names of `FAMILIES`, and an image encoder."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, family in FAMILIES.items():
        family.save(folder / name)
    config = ViTConfig(**tiny.SIZE, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "image")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "image")
    return folder


def pooled_by_hand(family: Family, stock: Any, mask: torch.Tensor) -> torch.Tensor:
    states = stock.last_hidden_state
    if family.pooling == "pooler":
        return stock.pooler_output
    if family.pooling == "mean":
        return torch.stack([row[kept.bool()].mean(0) for row, kept in zip(states, mask, strict=True)])
    if family.pooling == "last":
        return torch.stack([row[kept.bool()][-1] for row, kept in zip(states, mask, strict=True)])
    return states[:, 0]


def test_every_family_has_a_row() -> None:
    rows = {family.model_type for family in FAMILIES.values()}
    assert TEXT_BACKBONES.keys() - {"clip_text_model"} <= rows  # CLIP has its own tests


@all_families
def test_a_new_model_has_the_features_of_its_encoder(name: str, folders: Path, tmp_path: Path) -> None:
    """Corner tokens move no word, and need length only behind a text. Saving and loading changes nothing."""
    family = FAMILIES[name]
    stock = family.stock_auto_class().from_pretrained(folders / name)
    model = from_backbones(folders / name, folders / "image", NUM_CORNERS).eval()
    assert model.config.text_config.pooling == family.pooling
    longest = LONGEST - family.offset - (NUM_CORNERS if family.positions == "behind" else 0)
    assert min(model.config.text_config.max_position_embeddings, LONGEST) == longest
    ids, mask = texts(longest, *LENGTHS)
    text = mask.bool()
    with torch.no_grad():
        expected, answer = stock(input_ids=ids, attention_mask=mask), model.text_model(ids, mask)
    torch.testing.assert_close(answer.last_hidden_state[text], expected.last_hidden_state[text], **EXACT)
    torch.testing.assert_close(answer.pooler_output, pooled_by_hand(family, expected, mask), **EXACT)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LoTLIPModel
    assert not any(info.values())
    torch.testing.assert_close(text_features(loaded, ids, mask), text_features(model, ids, mask), **EXACT)


@all_families
def test_corner_tokens_follow_the_rule(name: str) -> None:
    """Each text alone, in the stock encoder with masks and positions written out, against a padded batch."""
    family, model = FAMILIES[name], tower(name)
    ids, mask = texts(*LENGTHS)
    with torch.no_grad():
        plain, answer = model(ids, mask), model(ids, mask, output_corner_embeds=True)
        torch.testing.assert_close(
            answer.last_hidden_state[mask.bool()], plain.last_hidden_state[mask.bool()], **CLOSE
        )
        for row, length in enumerate(LENGTHS):
            expected = naive(family, model.backbone, model.corner_embeds, ids[row, :length])
            torch.testing.assert_close(answer.last_hidden_state[row, :length], expected[:length], **CLOSE)
            corners = expected[length:]
            if family.pooling == "pooler":
                corners = model.backbone.pooler(corners.unsqueeze(1))
            torch.testing.assert_close(answer.corner_embeds[row], corners, **CLOSE)
    assert torch.pdist(answer.corner_embeds[0]).min() > 1e-2


@all_families
def test_a_token_is_pooled_as_a_text_of_its_own(name: str) -> None:
    family, model = FAMILIES[name], tower(name)
    ids, mask = texts(*LENGTHS)
    with torch.no_grad():
        answer = model(ids, mask, pooled_only=True, output_token_embeds=True, output_corner_embeds=True)
        states = model(ids, mask, output_corner_embeds=True).last_hidden_state
        expected = model.backbone.pooler.dense(states).tanh() if family.pooling == "pooler" else states
    torch.testing.assert_close(answer.token_embeds[mask.bool()], expected[mask.bool()], **CLOSE)
    assert model(ids, mask).token_embeds is None


@all_families
def test_padding_and_the_rest_of_the_batch_do_not_matter(name: str) -> None:
    family, model = FAMILIES[name], tower(name)
    ids, mask = texts(*LENGTHS, width=15)
    left_ids, left_mask = torch.full_like(ids, tiny_families.PAD), mask.flip(1)
    left_ids[left_mask.bool()] = ids[mask.bool()]
    with torch.no_grad():
        expected = model(ids, mask, output_corner_embeds=True)
        if family.corners_first:
            with pytest.raises(ValueError, match="padding_side"):
                model(left_ids, left_mask, output_corner_embeds=True)
            left = {"pooler_output": model(left_ids, left_mask).pooler_output}
        else:
            left = model(left_ids, left_mask, output_corner_embeds=True)
        for key in left.keys() & {"pooler_output", "corner_embeds"}:
            torch.testing.assert_close(left[key], expected[key], **CLOSE)
        for row, length in enumerate(LENGTHS):
            alone = model(ids[row : row + 1, :length], output_corner_embeds=True)
            for key in ("pooler_output", "corner_embeds"):
                torch.testing.assert_close(alone[key][0], expected[key][row], **CLOSE)


@pytest.mark.parametrize("name", marked(name for name, family in FAMILIES.items() if family.rows))
def test_texts_share_a_row_without_padding(name: str) -> None:
    model = spread(LoTLIPTextModel(text_config(FAMILIES[name])))
    assert model.config.family.takes_rows
    ids, mask = texts(*LENGTHS)
    with torch.no_grad():
        expected = tower(name)(ids, mask, output_corner_embeds=True)
        model.set_attn_implementation("unpadded")
        answer = model(ids, mask, output_corner_embeds=True)
    for key in ("pooler_output", "corner_embeds"):
        torch.testing.assert_close(answer[key], expected[key], **CLOSE)


@all_model_types
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    ids, mask = texts(*LENGTHS)
    gradients = []
    for enabled in (False, True):
        model = spread(LoTLIPTextModel(text_config(FAMILIES[name]))).train()
        if enabled:
            model.gradient_checkpointing_enable()
            model.config.backbone_config.use_cache = False
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.modules())
        outputs = model(ids, mask)
        (outputs.pooler_output.square().sum() + outputs.corner_embeds.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "corner_embeds" in gradients[0]
    untrained = {name for name, p in model.named_parameters() if p.requires_grad} - gradients[0].keys()
    assert untrained == set()
    scale = max(gradient.abs().max() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.0, atol=float(1e-5 * scale))


@all_model_types
def test_bfloat16_is_close(name: str) -> None:
    ids, mask = texts(*LENGTHS)
    model = LoTLIPTextModel(text_config(FAMILIES[name])).eval()
    with torch.no_grad():
        expected = model(ids, mask, output_corner_embeds=True)
        answer = model.to(torch.bfloat16)(ids, mask, output_corner_embeds=True)
    for key in ("pooler_output", "corner_embeds"):
        assert answer[key].dtype == torch.bfloat16
        cosines = nn.functional.cosine_similarity(answer[key].float(), expected[key], dim=-1)
        assert cosines.min() > 0.98


REMOTE = (
    WITHOUT_LOTLIP
    + """
import sys, torch
from transformers import AutoModel
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids, images, expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        texts = model.get_text_features(ids, output_corner_embeds=True)
        answer = texts.pooler_output, texts.corner_embeds, model.get_image_features(**images).pooler_output
    torch.testing.assert_close(answer, expected, rtol=0.0, atol=1e-5)
"""
)


def text_features(
    model: LoTLIPModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        outputs = model.get_text_features(ids, mask, output_corner_embeds=True)
    return outputs.pooler_output, outputs.corner_embeds


@pytest.mark.slow
def test_loaded_without_the_package(tmp_path: Path) -> None:
    """All kinds of text encoders and, of the image encoders, all but timm's, whose torchvision has a stand-in here."""
    texts_of = [name for name in tiny_families.QUICK if name in MODEL_TYPES]
    images_of = [family for family in tiny_vision.FAMILIES if family.model_type != "timm_wrapper"]
    assert len(images_of) <= len(texts_of)
    ids, _ = texts(7, 7)
    folders = []
    for name, family in zip(texts_of, itertools.cycle(images_of)):
        text = text_config(FAMILIES[name], projection_dim=24)
        vision = family.config(**family.variants[-1], projection_dim=24)
        model = LoTLIPModel(LoTLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        spread(model.text_model)
        tiny_vision.spread(model.vision_model)
        folders.append(tmp_path / f"family_{len(folders)}")
        model.eval().save_pretrained(folders[-1])
        images = family.inputs()
        with torch.no_grad():
            expected = (*text_features(model, ids), model.get_image_features(**images).pooler_output)
        torch.save((ids, images, expected), folders[-1] / "expected.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REMOTE, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]


@all_model_types
def test_two_training_steps_on_scenes(name: str, folders: Path) -> None:
    encoders = {"text_model": str(folders / name), "image_model": str(folders / "image")}
    config = TrainingConfig(**encoders, data="scenes", output="unused")
    model, processor = load_or_start_model(config)
    batch, objective = LoTLIPCollator(processor)(scenes()), make_objective(config, model.config)
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
    for _ in range(2):
        loss = batch_loss(model, batch, objective)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mpnet", "t5"])  # test_recipes.py has the other mechanisms
def test_a_run_of_two_steps(name: str, folders: Path, tmp_path: Path) -> None:
    flags = "--data scenes --num-scenes 8 --batch-size 4 --max-steps 2 --log-steps 1 --num-workers 0 --trackers none"
    encoders = ["--text-model", str(folders / name), "--image-model", str(folders / "image")]
    assert cli.main(["train", "--output", str(tmp_path / "run"), *encoders, *flags.split()]) == 0
    losses = [line["loss"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    (saved,) = (tmp_path / "run").glob("checkpoint-2")
    assert AutoModel.from_pretrained(saved).config.text_config.backbone_config.model_type == FAMILIES[name].model_type


# Encoders without a row: an adapter from the signature of their class


def other_config(model_type: str, **fields: Any) -> Any:
    return CONFIG_MAPPING[model_type](**{**BERT, **fields})


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ernie": ({}, {"corners_first": False, "has_segments": True}),
    "megatron-bert": ({}, {"corners_first": False, "has_segments": True}),
    "rembert": ({"input_embedding_size": 16}, {"corners_first": False, "has_segments": True}),
    "roformer": ({"embedding_size": 16}, {"corners_first": True, "takes_positions": False}),
    "cohere2": ({"num_key_value_heads": 2, "sliding_window": 8}, {"is_causal": True}),
    "gpt2": ({"n_inner": 37}, {"is_causal": True}),
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_an_adapter_of_another_encoder(model_type: str, folders: Path, tmp_path: Path) -> None:
    fields, expected = OTHERS[model_type]
    stock = spread(AutoModel.from_config(other_config(model_type, **fields)))
    stock.save_pretrained(tmp_path)
    model = from_backbones(tmp_path, folders / "image").eval()
    assert {name: getattr(model.config.text_config.family, name) for name in expected} == expected
    ids, mask = texts(*LENGTHS)
    with torch.no_grad():
        states = stock(input_ids=ids, attention_mask=mask).last_hidden_state
        answer = model.text_model(ids, mask, output_corner_embeds=True).last_hidden_state
    torch.testing.assert_close(answer[mask.bool()], states[mask.bool()], **CLOSE)


def test_the_weights_of_experts_are_loaded_in_a_resumed_run() -> None:
    """Files name each expert. The model has one weight for all."""
    sizes = {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16}
    config = LoTLIPTextConfig(backbone_config=other_config("qwen2_moe", **sizes))
    model, other = spread(LoTLIPTextModel(config)), LoTLIPTextModel(config)
    other.load_state_dict(model.state_dict())
    assert all(map(torch.equal, other.parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("fnet", "attention_mask"),
        ("perceiver", "inputs_embeds"),
        ("vit", "images"),
        ("bart", "decoder"),
        ("big_bird", "block-sparse"),
        ("funnel", "merges"),
        ("xlnet", "permutations"),
        ("lotlip_text_model", "lotlip_text_model"),
        ("nothing", "nothing"),
    ],
)
def test_refused_by_the_class(model_type: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LoTLIPTextConfig(backbone_config={"model_type": model_type})


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("longformer", {"attention_window": 4}),
        ("convbert", {}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40}),
        ("mamba", {"num_hidden_layers": 1}),
    ],
)
def test_refused_by_the_check(model_type: str, fields: dict[str, Any]) -> None:
    model = spread(LoTLIPTextModel(LoTLIPTextConfig(backbone_config=other_config(model_type, **fields))))
    with pytest.raises(ValueError, match=model_type):
        check_adapter(model)


def test_a_deberta_with_a_convolution_is_refused() -> None:
    config = FAMILIES["deberta-v2"].stock_config(conv_kernel_size=3)
    with pytest.raises(ValueError, match="conv_kernel_size"):
        LoTLIPTextModel(LoTLIPTextConfig(backbone_config=config))


def test_default_poolings_of_a_configuration() -> None:
    mean = FAMILIES["modernbert"].stock_config(classifier_pooling="mean")
    assert LoTLIPTextConfig(backbone_config=mean).pooling == "mean"
    bidirectional = FAMILIES["gemma3_text, bidirectional"].stock_config()
    assert LoTLIPTextConfig(backbone_config=bidirectional).attention == "bidirectional"
    with pytest.raises(StrictDataclassClassValidationError, match="use_bidirectional_attention"):
        LoTLIPTextConfig(backbone_config=bidirectional, attention="causal")


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_the_encoder_of_a_whole_t5(model_type: str, folders: Path, tmp_path: Path) -> None:
    config = FAMILIES[model_type].stock_config(num_decoder_layers=1)
    whole = spread(AutoModel.from_config(config))
    whole.save_pretrained(tmp_path)
    model = from_backbones(tmp_path, folders / "image").eval()
    ids, mask = texts(*LENGTHS)
    with torch.no_grad():
        states = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        answer = model.text_model(ids, mask).last_hidden_state
    torch.testing.assert_close(answer[mask.bool()], states[mask.bool()], **EXACT)
    assert model.config.text_config.max_position_embeddings > 100_000
    embeddings = [name for name in model.state_dict() if name.endswith(("shared.weight", "embed_tokens.weight"))]
    assert len({model.get_parameter(name).data_ptr() for name in embeddings}) == 1
