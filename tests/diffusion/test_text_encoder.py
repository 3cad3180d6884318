"""A LoTLIP text tower in a CLIP text encoder's place: the outputs that pipelines read, in each of its forms."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel

import tiny
import tiny_clip
import tiny_families
from lotlip_hf import (
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextEncoder,
    LoTLIPTextEncoderConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPTokenizer,
)

ADAPTERS = ("linear", "mlp", "resampler")
NUM_QUERIES = 9
WIDTH = 48
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def text_encoder(backbone: str = "bert", adapter: str | None = "linear", seed: int = 0, **kwargs: Any) -> Any:
    """An encoder in evaluation mode with weights large enough that every part shows."""
    own = {} if adapter is None else {"hidden_size": WIDTH, "num_queries": NUM_QUERIES}
    config = LoTLIPTextEncoderConfig(text_config=tiny.text_config(backbone), adapter=adapter, **own, **kwargs)
    encoder = LoTLIPTextEncoder(config)
    tiny_clip.random_weights(encoder, seed)
    return encoder.eval()


def padded_ids(backbone: str = "bert", length: int = 12) -> torch.Tensor:
    """[3, 12]: texts of 12, 9 and 4 tokens; CLIP pads with its [EOT]."""
    ids = tiny.input_ids(3, length)
    pad_token_id = {"clip": 6, "bert": 0}.get(backbone, 1)
    for row, end in ((1, 9), (2, 4)):
        ids[row, end - 1], ids[row, end:] = 6, pad_token_id
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("projection_dim", [None, 24])
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
@pytest.mark.parametrize("backbone", ["bert", "roberta", "clip"])
def test_the_outputs_stand_as_clips_do(backbone: str, adapter: str | None, projection_dim: int | None) -> None:
    encoder = text_encoder(backbone, adapter, projection_dim=projection_dim)
    ids = padded_ids(backbone)
    width, length = (32, 12) if adapter is None else (WIDTH, NUM_QUERIES if adapter == "resampler" else 12)
    with torch.no_grad():
        outputs = encoder(ids, output_hidden_states=True)
        short = encoder(ids)
        in_tuple = encoder(ids, output_hidden_states=True, return_dict=False)
    if projection_dim is None:
        assert list(outputs) == ["last_hidden_state", "pooler_output", "hidden_states"]
        assert outputs.pooler_output.shape == (3, width)
    else:
        assert list(outputs) == ["text_embeds", "last_hidden_state", "hidden_states"]
        assert outputs.text_embeds.shape == (3, 24)
    assert list(short) == list(outputs)[:2]
    assert outputs.last_hidden_state.shape == (3, length, width)
    assert len(outputs.hidden_states) == 3  # the embeddings and two layers
    assert all(states.shape == (3, length, width) for states in outputs.hidden_states)
    for one, two in zip(outputs.to_tuple()[:2], short.to_tuple(), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
    torch.testing.assert_close(in_tuple[0], outputs[0], **CLOSE)
    torch.testing.assert_close(in_tuple[-1][0], outputs.hidden_states[0], **CLOSE)
    # nothing of it is empty or the same for every text
    assert all(states.std(0).max() > 1e-3 for states in outputs.to_tuple()[:2])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("target_layer", [-1, -2])
def test_the_adapted_last_state_stands_where_the_pipeline_reads(target_layer: int, adapter: str) -> None:
    encoder = text_encoder(adapter=adapter, target_layer=target_layer)
    ids = padded_ids()
    with torch.no_grad():
        outputs = encoder(ids, output_hidden_states=True)
        states = encoder.text_model(ids, output_hidden_states=True).hidden_states
        mask = (ids != 0,) if adapter == "resampler" else ()
        expected = [encoder.adapter(state, *mask) for state in states]
    torch.testing.assert_close(outputs.hidden_states[target_layer], outputs.last_hidden_state, **CLOSE)
    for clip_skip in range(3):
        # diffusers counts from the layer it reads by default, and Stable Diffusion 1.x puts the state through the norm
        state = outputs.hidden_states[target_layer - clip_skip]
        torch.testing.assert_close(encoder.text_model.final_layer_norm(state), expected[-1 - clip_skip], **CLOSE)


def test_over_clip_without_adapter_it_is_clip() -> None:
    encoder = text_encoder("clip", None)
    clip = CLIPTextModel(encoder.config.text_config.backbone_config).eval()
    clip.load_state_dict(encoder.text_model.backbone.state_dict())
    ids = padded_ids("clip")
    with torch.no_grad():
        outputs, expected = encoder(ids, output_hidden_states=True), clip(ids, output_hidden_states=True)
        torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, **CLOSE)
        torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, **CLOSE)
        for clip_skip in (1, 2):  # as Stable Diffusion 1.x reads it
            skipped = encoder.text_model.final_layer_norm(outputs[-1][-(clip_skip + 1)])
            in_clip = clip.final_layer_norm(expected[-1][-(clip_skip + 1)])
            torch.testing.assert_close(skipped, in_clip, **CLOSE)


@pytest.mark.parametrize("name", ["modernbert", "t5", "qwen3", "gemma3_text, bidirectional"])
def test_modern_towers(name: str) -> None:
    """Without an adapter, the states are the tower's. Those of earlier layers get the final norm, as with CLIP."""
    text_config = LoTLIPTextConfig(backbone_config=tiny_families.FAMILIES[name].stock_config())
    tower = tiny_families.spread(LoTLIPTextModel(text_config))
    encoder = LoTLIPTextEncoder.from_text_model(tower)
    ids, mask = tiny_families.texts(9, 4, 6)
    with torch.no_grad():
        outputs, expected = encoder(ids, output_hidden_states=True), tower(ids, mask, output_hidden_states=True)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, **CLOSE)
    is_text = mask.bool()
    torch.testing.assert_close(outputs.last_hidden_state[is_text], expected.last_hidden_state[is_text], **CLOSE)
    norm = next(
        module
        for path, module in tower.named_modules()
        if path.endswith(("final_layer_norm", "final_norm")) or path == "backbone.norm"
    )
    for ours, theirs in zip(outputs.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        with torch.no_grad():
            torch.testing.assert_close(ours[is_text], norm(theirs)[is_text], **CLOSE)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
@pytest.mark.parametrize("backbone", ["bert", "roberta", "clip"])
def test_a_prompt_does_not_depend_on_padding_or_its_neighbours(backbone: str, adapter: str | None) -> None:
    encoder = text_encoder(backbone, adapter)
    ids = padded_ids(backbone)
    lengths = [12, 9, 4]
    with torch.no_grad():
        outputs = encoder(ids)
        # a mask says what the padding says
        mask = torch.arange(12) < torch.tensor(lengths).unsqueeze(1)
        masked = encoder(ids, attention_mask=mask.long())
    assert outputs.last_hidden_state.isfinite().all()
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = encoder(ids[row : row + 1, :length])
        for other, answers in ((alone, outputs), (alone, masked)):
            kept = slice(None) if adapter == "resampler" else slice(length)
            torch.testing.assert_close(answers.last_hidden_state[row, kept], other.last_hidden_state[0, kept], **CLOSE)
            torch.testing.assert_close(answers.pooler_output[row], other.pooler_output[0], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("projection_dim", [None, 24])
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
@pytest.mark.parametrize("backbone", ["bert", "roberta", "clip"])
def test_padding_is_never_visible(backbone: str, adapter: str | None, projection_dim: int | None) -> None:
    """A mask of ones, as compel gives it, says no more than none or the right one, at padded positions too."""
    encoder = text_encoder(backbone, adapter, projection_dim=projection_dim, target_layer=-2)
    ids = padded_ids(backbone)
    right = (torch.arange(12) < torch.tensor([12, 9, 4]).unsqueeze(1)).long()
    with torch.no_grad():
        expected = encoder(ids, output_hidden_states=True)
        for mask in (torch.ones_like(ids), right, right.bool()):
            given = encoder(ids, attention_mask=mask, output_hidden_states=True)
            for one, other in zip(given.to_tuple()[:2], expected.to_tuple()[:2], strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
            torch.testing.assert_close(given.hidden_states[-2], expected.hidden_states[-2], **CLOSE)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
@pytest.mark.parametrize("backbone", ["bert", "clip"])
def test_a_mask_leaves_out_words(backbone: str, adapter: str | None) -> None:
    """What a caller hides of the text stays hidden, and padding before a text too."""
    encoder = text_encoder(backbone, adapter)
    ids = padded_ids(backbone)
    mask = torch.ones_like(ids)
    mask[:, 2] = 0
    other = ids.clone()
    other[:, 2] = 50
    left = torch.cat([torch.full((3, 2), 6 if backbone == "clip" else 0), ids], dim=1)
    left_mask = torch.cat([torch.zeros(3, 2, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        pooled = [encoder(one, attention_mask=mask).pooler_output for one in (ids, other)]
        torch.testing.assert_close(*pooled, **CLOSE)
        assert (pooled[0] - encoder(ids).pooler_output).abs().max() > 1e-3
        torch.testing.assert_close(
            encoder(left, attention_mask=left_mask).pooler_output, encoder(ids).pooler_output, **CLOSE
        )


def test_the_resampler_ends_at_the_eot_of_old_configurations() -> None:
    encoder = text_encoder("clip", "resampler")
    encoder.config.text_config.backbone_config.eos_token_id = 2
    ids = padded_ids("clip").masked_fill(padded_ids("clip") == 6, 98)  # there, [EOT] has the highest id
    ids[:, -1] = 98
    ids[2, 3:] = 98
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).last_hidden_state[2:], encoder(ids[2:, :4]).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_nothing_but_padding_is_finite(adapter: str | None) -> None:
    encoder = text_encoder(adapter=adapter)
    with torch.no_grad():
        outputs = encoder(torch.zeros(2, 5, dtype=torch.long), output_hidden_states=True)
    assert all(state.isfinite().all() for state in (*outputs[:2], *outputs.hidden_states))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_saving_and_loading(adapter: str | None, tmp_path: Path, golden: Path) -> None:
    encoder = text_encoder(adapter=adapter, projection_dim=24, target_layer=-2)
    encoder.save_pretrained(tmp_path)
    LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=38).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LoTLIPTextEncoder
    assert not any(info.values())
    assert not loaded.training
    ids = padded_ids()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).to_tuple(), encoder(ids).to_tuple(), **CLOSE)
    config = AutoConfig.from_pretrained(tmp_path)
    assert {**config.to_dict(), "_name_or_path": ""} == encoder.config.to_dict()
    assert (config.max_position_embeddings, config.vocab_size) == (38, 99)
    assert config.output_length == (NUM_QUERIES if adapter == "resampler" else None)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), LoTLIPTokenizer)
    copied = pickle.loads(pickle.dumps(encoder))  # by the name `lotlip_hf.LoTLIPTextEncoder`
    with torch.no_grad():
        torch.testing.assert_close(copied(ids).to_tuple(), encoder(ids).to_tuple(), **CLOSE)


def test_more_tokens(tmp_path: Path) -> None:
    encoder = text_encoder()
    ids = padded_ids()
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
        encoder.resize_token_embeddings(101)
        encoder.get_input_embeddings().weight[100] = 1.0  # what textual inversion does
        torch.testing.assert_close(encoder(ids).last_hidden_state, before, **CLOSE)
        ids[:, 1] = 100
        expected = encoder(ids).last_hidden_state
        encoder.save_pretrained(tmp_path)
        loaded = LoTLIPTextEncoder.from_pretrained(tmp_path)
        assert loaded.config.vocab_size == 101
        torch.testing.assert_close(loaded(ids).last_hidden_state, expected, **CLOSE)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_from_a_model_the_weights_are_shared_and_the_adapter_is_new(adapter: str) -> None:
    model = LoTLIPModel(tiny.config())
    names = [name for name, _ in model.named_modules()]
    encoder = LoTLIPTextEncoder.from_text_model(model, adapter=adapter, hidden_size=WIDTH, num_queries=NUM_QUERIES)
    assert encoder.training
    assert [name for name, _ in model.named_modules()] == names
    shared = model.text_model.state_dict()
    for name, tensor in encoder.text_model.state_dict().items():
        assert tensor.data_ptr() == shared[name].data_ptr(), name
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    for name, parameter in (*encoder.adapter.named_parameters(), *encoder.pooled_adapter.named_parameters()):
        if "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert 0.015 < parameter.std().item() < 0.025, name
    ids = padded_ids()
    encoder.eval(), model.eval()
    with torch.no_grad():
        expected = encoder.pooled_adapter(model.text_model(ids).pooler_output)
        torch.testing.assert_close(encoder(ids).pooler_output, expected, **CLOSE)


def test_what_is_frozen_in_the_model_is_frozen_in_the_encoder() -> None:
    model = LoTLIPTextModelWithProjection(tiny.text_config())
    model.text_model.backbone.encoder.requires_grad_(False)
    model.text_projection.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    encoder = LoTLIPTextEncoder.from_text_model(model, projection_dim=24)
    assert {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad} == frozen
    assert len(frozen) > 10
    model.requires_grad_(False)
    encoder = LoTLIPTextEncoder.from_text_model(model, adapter="resampler", projection_dim=24)
    trained = {name.split(".")[0] for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {"adapter", "pooled_adapter", "text_projection"}
    assert not any(parameter.requires_grad for parameter in encoder.text_model.parameters())


def test_where_the_model_lay_is_not_saved(tmp_path: Path) -> None:
    LoTLIPTextModel(tiny.text_config()).save_pretrained(tmp_path / "private")
    model = LoTLIPTextModel.from_pretrained(tmp_path / "private")
    model.config.backbone_config._name_or_path = "private/bert"
    LoTLIPTextEncoder.from_text_model(model, adapter="linear").save_pretrained(tmp_path / "public")
    assert "private" not in (tmp_path / "public" / "config.json").read_text(encoding="utf-8")
    assert model.config._name_or_path == str(tmp_path / "private")  # the model's own stays


@pytest.mark.parametrize("model_class", [LoTLIPModel, LoTLIPTextModelWithProjection])
def test_from_a_model_without_adapter_it_answers_as_the_model(model_class: type) -> None:
    model = model_class(tiny.config() if model_class is LoTLIPModel else tiny.text_config()).eval()
    tiny_clip.random_weights(model)
    encoder = LoTLIPTextEncoder.from_text_model(model, projection_dim=24)
    ids = padded_ids()
    with torch.no_grad():
        expected = model.get_text_features(ids).pooler_output if model_class is LoTLIPModel else model(ids).text_embeds
        torch.testing.assert_close(encoder(ids).text_embeds, expected, **CLOSE)
        last_hidden_state = model.text_model(ids).last_hidden_state
        torch.testing.assert_close(encoder(ids).last_hidden_state, last_hidden_state, **CLOSE)
    assert not encoder.training


def test_what_does_not_fit() -> None:
    for fields, name in (
        ({"hidden_size": 48}, "hidden_size"),
        ({"adapter": "resampler", "adapter_size": 30}, "adapter_size"),
    ):
        with pytest.raises(StrictDataclassClassValidationError, match=name):
            LoTLIPTextEncoderConfig(text_config=tiny.text_config(), **fields)
    with pytest.raises(ValueError, match="39"):
        text_encoder()(tiny.input_ids(1, 39))
    with pytest.raises(ValueError, match="projection_dim"):
        LoTLIPTextEncoder.from_text_model(LoTLIPTextModelWithProjection(tiny.text_config()), projection_dim=16)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_bfloat16(adapter: str | None) -> None:
    encoder = text_encoder(adapter=adapter, projection_dim=24)
    ids = padded_ids()
    with torch.no_grad():
        expected = encoder(ids, output_hidden_states=True)
        outputs = encoder.to(torch.bfloat16)(ids, output_hidden_states=True)
    for name in ("text_embeds", "last_hidden_state"):
        assert outputs[name].dtype == torch.bfloat16
        difference = (outputs[name].float() - expected[name]).norm() / expected[name].norm()
        assert difference < 0.03, name
    assert all(states.dtype == torch.bfloat16 for states in outputs.hidden_states)


@pytest.mark.parametrize("backbone", ["bert", "clip"])
def test_gradient_checkpointing_gives_the_same_gradients(backbone: str) -> None:
    encoder = text_encoder(backbone, "resampler", projection_dim=24).train()
    ids = padded_ids(backbone)

    def gradients() -> dict[str, torch.Tensor]:
        encoder.zero_grad()
        outputs = encoder(ids)
        (outputs.last_hidden_state.square().mean() + outputs.text_embeds.square().mean()).backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    expected = gradients()
    encoder.gradient_checkpointing_enable()
    calls = []
    for layer in encoder.adapter.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
        assert layer.gradient_checkpointing
    answers = gradients()
    assert len(calls) == 2
    assert answers.keys() == expected.keys()
    assert {name.split(".")[0] for name in answers} == {"text_model", "adapter", "pooled_adapter", "text_projection"}
    for name, gradient in expected.items():
        torch.testing.assert_close(answers[name], gradient, **CLOSE)


def test_lora_of_peft(tmp_path: Path) -> None:
    ids = padded_ids()
    with torch.no_grad():
        before = text_encoder(adapter="resampler")(ids).last_hidden_state
    config = LoraConfig(r=2, target_modules=["query", "value", "q_proj", "output_projection"])
    lora = get_peft_model(text_encoder(adapter="resampler"), config)
    torch.testing.assert_close(lora(ids).last_hidden_state, before, **CLOSE)  # LoRA starts out as nothing
    trained = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    assert any("text_model" in name for name in trained)
    assert any("adapter.layers" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        lora(ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.eval()
    with torch.no_grad():
        after = lora(ids).last_hidden_state
        assert (after - before).abs().max() > 1e-3
        lora.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(text_encoder(adapter="resampler"), str(tmp_path)).eval()
        torch.testing.assert_close(loaded(ids).last_hidden_state, after, **CLOSE)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).last_hidden_state, after, **CLOSE)
        encoder = text_encoder(adapter="resampler")
        encoder.load_adapter(str(tmp_path))  # transformers' own way to load the same, without a wrapper
        torch.testing.assert_close(encoder(ids).last_hidden_state, after, **CLOSE)
        encoder.disable_adapters()
        torch.testing.assert_close(encoder(ids).last_hidden_state, before, **CLOSE)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_weights_that_are_elsewhere_until_used(adapter: str | None) -> None:
    encoder = text_encoder(adapter=adapter, projection_dim=24)
    ids = padded_ids()
    with torch.no_grad():
        expected = encoder(ids).to_tuple()
        cpu_offload(encoder, execution_device=torch.device("cpu"))
        assert all(p.device.type == "meta" for p in encoder.parameters())
        torch.testing.assert_close(encoder(ids).to_tuple(), expected, **CLOSE)
        remove_hook_from_submodules(encoder)
