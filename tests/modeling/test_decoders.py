"""Decoders as text towers: poolings, masks, token prepending, language models, tokenizers, LoRA, quantised weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import tiny
from lotlip_hf import (
    Encoder,
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTokenizer,
    cli,
    from_backbones,
    lora_targets,
)
from lotlip_hf.loading import load_model
from lotlip_hf.modeling.backbones_lotlip import POOLINGS
from lotlip_hf.modeling.projection_lotlip import ResidualMLP
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.model import append_end_token, load_or_start_model
from scripts import load_script
from tiny_families import DECODER, FAMILIES, MROPE, spread, texts
from tiny_tokenizers import toy_llama, toy_qwen, toy_qwen_embedding, toy_roberta

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "terms"
EXACT = {"rtol": 0.0, "atol": 1e-6}
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def tower(name: str = "llama", layers: int = 2, **config: Any) -> LoTLIPTextModel:
    backbone = FAMILIES[name].stock_config(num_hidden_layers=layers)
    return spread(LoTLIPTextModel(LoTLIPTextConfig(backbone_config=backbone, **config)))


# LLM2CLIP


def test_the_adapter_is_that_of_llm2clip() -> None:
    """
    The file is the input, weights and output of `TextProj(6, 4, num_layers_text=2)` of llm2clip/eva_clip/model.py,
    microsoft/LLM2CLIP at commit cba3b45ba3d9bdaaf8ad640156dedbdbcb60353a, with random weights in float64.
    """
    golden = load_file(GOLDEN / "llm2clip_adapter.safetensors")
    adapter = ResidualMLP(6, 4, num_layers=2, expansion=2).double()
    renamed = {"fn.0": "up", "fn.3": "down", "ln": "norm"}
    weights = {}
    for number in range(2):
        for theirs, ours in renamed.items():
            for kind in ("weight", "bias"):
                weights[f"blocks.{number}.{ours}.{kind}"] = golden[f"text_adaptor.{number}.{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"] = golden[f"text_adaptor.2.{kind}"]
        weights[f"linear.{kind}"] = golden[f"text_adaptor.3.{kind}"]
    adapter.load_state_dict(weights)
    torch.testing.assert_close(adapter(golden["input"]), golden["output"], **EXACT)


def test_poolings_are_those_of_llm2clip_with_padding_on_the_left() -> None:
    """Its `get_pooling`, as formulas on the last `length` states of each row."""
    states, lengths = torch.randn(3, 7, 5), (7, 4, 1)
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths])
    texts = [row[-length:] for row, length in zip(states, lengths, strict=True)]
    weights = [torch.arange(1.0, length + 1) for length in lengths]
    expected = {
        "mean": [text.mean(0) for text in texts],
        "weighted_mean": [one @ text / one.sum() for one, text in zip(weights, texts, strict=True)],
    }
    for name, rows in expected.items():
        torch.testing.assert_close(POOLINGS[name](states, mask, None), torch.stack(rows), **EXACT)
    flipped = POOLINGS["mean"](states.flip(1), mask.flip(1), None)
    torch.testing.assert_close(flipped, torch.stack(expected["mean"]), **EXACT)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_poolings_of_long_texts_in_float16(pooling: str) -> None:
    """The largest float16 is 65,504, less than the sum of the weights 1, 2, ..., 400 and than 2,000 states of 40."""
    states, mask = torch.rand(2, 2000, 5) + 40, torch.ones(2, 2000, dtype=torch.int64)
    pooled = POOLINGS[pooling](states.half(), mask, None)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.float(), POOLINGS[pooling](states, mask, None), rtol=1e-3, atol=0.0)


# Attention


@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_only_bidirectional_words_see_what_follows(name: str, pooling: str, tmp_path: Path) -> None:
    """The same weights in both attentions; the choice is saved."""
    causal = tower(name, pooling=pooling)
    both = tower(name, pooling=pooling, attention="bidirectional")
    both.load_state_dict(causal.state_dict())
    both.save_pretrained(tmp_path)
    loaded = LoTLIPTextModel.from_pretrained(tmp_path)
    assert loaded.config.attention == "bidirectional"
    ids, mask = texts(9)
    changed = ids.clone()
    changed[:, -2] = ids[:, -2] % 90 + 5
    with torch.no_grad():
        first, other = causal(ids, mask).last_hidden_state, causal(changed, mask).last_hidden_state
        torch.testing.assert_close(first[:, :7], other[:, :7], **EXACT)
        first, other = both(ids, mask), both(changed, mask)
        assert (first.last_hidden_state - other.last_hidden_state)[0].abs().amax(-1).min() > 1e-3
        torch.testing.assert_close(loaded(ids, mask).pooler_output, first.pooler_output, **EXACT)


def test_a_window_that_the_decoder_ignores() -> None:
    """Llama has no sliding windows, but a configuration may name one."""
    backbone = FAMILIES["llama"].stock_config(sliding_window=3)
    model = spread(LoTLIPTextModel(LoTLIPTextConfig(backbone_config=backbone)))
    ids, mask = texts(9, 12)
    with torch.no_grad():
        pooled, with_corners = (model(ids, mask, output_corner_embeds=one).pooler_output for one in (False, True))
    torch.testing.assert_close(with_corners, pooled, **CLOSE)


def test_attention_that_does_not_fit_is_refused() -> None:
    with pytest.raises(StrictDataclassClassValidationError, match="attention"):
        LoTLIPTextConfig(attention="causal")
    with pytest.raises(StrictDataclassClassValidationError, match="use_bidirectional_attention"):
        gemma = FAMILIES["gemma"].stock_config(use_bidirectional_attention=True)
        LoTLIPTextConfig(backbone_config=gemma, attention="causal")


@pytest.mark.parametrize(("pad", "count"), [(3, 1), (None, 2)])
def test_a_default_mask_that_could_be_wrong_is_refused(pad: int | None, count: int) -> None:
    """Without a padding token, or with the end token for it, padding and text look alike."""
    config = FAMILIES["llama"].stock_config(pad_token_id=pad)
    model = spread(LoTLIPTextModel(LoTLIPTextConfig(backbone_config=config)))
    ids, mask = texts(*[6] * count)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids)
    answer = model(ids, mask).pooler_output
    if pad is None:
        torch.testing.assert_close(model(ids[:1]).pooler_output, answer[:1], **CLOSE)


# Token prepending


def prepending(layers: tuple[int, int], depth: int = 3, **config: Any) -> LoTLIPTextModel:
    return tower("llama", depth, token_prepending=layers, placeholder_token_id=7, **config)


def placed(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts with the placeholder 7 as their second token and as a word of one text, and in one text a word instead."""
    ids, mask = texts(*lengths)
    ids[ids == 7] = 8
    ids[:-1, 1] = 7
    ids[0, 4] = 7
    return ids, mask


def test_the_placeholder_starts_from_the_last_token() -> None:
    """By hand on three layers, for each text alone."""
    model, lengths = prepending((1, 2)), (9, 6, 7)
    ids, mask = placed(*lengths)
    backbone = model.backbone
    with torch.no_grad():
        answer = model(ids, mask, output_corner_embeds=True)
        for row, length in enumerate(lengths):
            states, positions = backbone.embed_tokens(ids[row : row + 1, :length]), torch.arange(length).unsqueeze(0)
            rotary = backbone.rotary_emb(states, positions)
            causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            for number, layer in enumerate(backbone.layers):
                if number > 0 and row < 2:
                    states = torch.cat([states[:, :1], states[:, -1:], states[:, 2:]], dim=1)
                states = layer(states, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
            torch.testing.assert_close(answer.pooler_output[row], backbone.norm(states)[0, -1], **CLOSE)


@pytest.mark.parametrize("layers", [(1, 0), (3, 9)])
def test_an_empty_range_changes_no_bit(layers: tuple[int, int]) -> None:
    model, plain = prepending(layers), tower("llama", 3)
    ids, mask = placed(9, 6, 7)
    for corners in (False, True):
        answer, expected = (one(ids, mask, output_corner_embeds=corners) for one in (model, plain))
        assert torch.equal(answer.last_hidden_state, expected.last_hidden_state)
        if corners:
            assert torch.equal(answer.corner_embeds, expected.corner_embeds)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "unpadded"])
def test_prepending_in_a_batch(attention: str) -> None:
    """Padding, other texts and corner tokens do not matter; corner tokens see the placeholder as a word."""
    model = prepending((1, 1))
    model.set_attn_implementation(attention)
    ids, mask = placed(9, 6, 7)
    with torch.no_grad():
        batch, without = model(ids, mask, output_corner_embeds=True), model(ids, mask)
        left = model(ids[1:2].roll(3, 1), mask[1:2].roll(3, 1), output_corner_embeds=True)
        alone = model(ids[1:2, :6], output_corner_embeds=True)
    torch.testing.assert_close(batch.pooler_output, without.pooler_output, **CLOSE)
    for one in (left, alone):
        torch.testing.assert_close(one.pooler_output[0], batch.pooler_output[1], **CLOSE)
        torch.testing.assert_close(one.corner_embeds[0], batch.corner_embeds[1], **CLOSE)


def test_prepending_is_saved_and_trains(tmp_path: Path) -> None:
    ids, mask = placed(9, 6, 7)
    gradients = []
    for checkpointing in (False, True):
        model = prepending((1, 2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, mask).pooler_output.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    model.eval().save_pretrained(tmp_path)
    loaded = LoTLIPTextModel.from_pretrained(tmp_path)
    assert loaded.config.token_prepending == (1, 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, mask).pooler_output, model(ids, mask).pooler_output, **EXACT)
        assert copy.deepcopy(model)(ids, mask).pooler_output.equal(model(ids, mask).pooler_output)
        with pytest.raises(ValueError, match="token_prepending"):
            model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize(
    "settings",
    [{"token_prepending": (1, 1)}, {"token_prepending": (0, 1), "placeholder_token_id": 7}],
)
def test_prepending_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match="token_prepending"):
        tower(**settings)
    with pytest.raises(StrictDataclassClassValidationError, match="token_prepending"):
        LoTLIPTextConfig(token_prepending=(1, 1), placeholder_token_id=7)


# Language models


def vision() -> ViTModel:
    return ViTModel(ViTConfig(**tiny.SIZE, image_size=32, patch_size=8), add_pooling_layer=False)


def language_model(kind: str) -> PreTrainedModel:
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**DECODER))
    side = {"hidden_size": 32, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    if kind == "gemma3":
        side |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        tokens = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}
        config = {key: value for key, value in DECODER.items() if key != "rope_parameters"}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=config, vision_config=side, mm_tokens_per_image=4, **tokens)
        )
    side = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    side["deepstack_visual_indexes"] = [0]
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=copy.deepcopy({**DECODER, **MROPE}), vision_config=side)
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3_vl"])
def test_the_decoder_of_a_language_model(kind: str, tmp_path: Path) -> None:
    """Without the head, and without the image encoder of a model that sees images; from memory and from a folder."""
    whole = language_model(kind).eval()
    whole.save_pretrained(tmp_path)
    ids, mask = texts(8, 5)
    with torch.no_grad():
        states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        for source in (whole, tmp_path):
            model = from_backbones(source, vision(), text_pooling="mean").eval()
            answer = model.text_model(ids, mask).last_hidden_state
            torch.testing.assert_close(answer[mask.bool()], states[mask.bool()], **CLOSE)
            assert not [name for name in model.state_dict() if "lm_head" in name or "visual." in name]


def test_a_new_model_with_prepending() -> None:
    """The placeholder is a special token of the decoder's tokenizer, in the template before the text."""
    stock = toy_qwen()
    template, placeholder = 'This sentence: <PST> "{}" means:', stock.convert_tokens_to_ids("<PST>")
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(stock, split_sentences=False, prompt_template=template)
    decoder = spread(AutoModel.from_config(FAMILIES["llama"].stock_config(vocab_size=len(tokenizer))))
    inputs = tokenizer(["a cat", "a cat <PST>"], padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == placeholder).sum(-1).tolist() == [1, 1]
    plain = from_backbones(decoder, vision()).eval()
    model = from_backbones(decoder, vision(), token_prepending=(1, 1), placeholder_token_id=placeholder).eval()
    with torch.no_grad():
        features, expected = model.text_model(**inputs), plain.text_model(**inputs)
    first = int((inputs["input_ids"][0] == placeholder).nonzero())
    same, changed = slice(0, first), slice(first, None)
    states = features.last_hidden_state[0], expected.last_hidden_state[0]
    torch.testing.assert_close(states[0][same], states[1][same], **EXACT)
    assert (states[0][changed] - states[1][changed]).abs().amax(-1).min() > 1e-3


def test_the_states_of_an_intermediate_layer(tmp_path: Path) -> None:
    """A decoder loaded with fewer layers; its last norm is applied."""
    whole = FAMILIES["llama"].stock_model()
    whole.save_pretrained(tmp_path)
    ids, mask = texts(8, 5)
    model = from_backbones(AutoModel.from_pretrained(tmp_path, num_hidden_layers=1), vision()).eval()
    with torch.no_grad():
        states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
        answer = model.text_model(ids, mask).last_hidden_state
        torch.testing.assert_close(answer[mask.bool()], whole.norm(states)[mask.bool()], **CLOSE)


# Tokenizers

QUERY = "Instruct: find the picture\nQuery:{}"


@pytest.mark.parametrize(
    ("stock", "tokens"),
    [
        (toy_qwen, ["a", "Ġcat", "<|im_end|>"]),
        (toy_qwen_embedding, ["a", "Ġcat", "<|endoftext|>"]),
        (toy_llama, ["<s>", "▁a", "▁", "c", "a", "t", "</s>"]),
        (toy_roberta, ["<s>", "a", "Ġ", "c", "a", "t", "</s>"]),
    ],
)
def test_an_end_token_is_appended_once(stock: Any, tokens: list[str], tmp_path: Path) -> None:
    tokenizer = stock()
    for _ in range(2):
        append_end_token(tokenizer)
    wrapped = LoTLIPTokenizer.from_backbone_tokenizer(tokenizer, split_sentences=False)
    wrapped.save_pretrained(tmp_path)
    for one in (wrapped, LoTLIPTokenizer.from_pretrained(tmp_path)):
        assert one.convert_ids_to_tokens(one("a cat")["input_ids"]) == tokens
        cut = one("a cat a cat a", truncation=True, max_length=5)["input_ids"]
        assert len(cut) == 5
        assert one.convert_ids_to_tokens(cut)[-1] == tokens[-1]


def test_a_query_of_qwen3_embedding() -> None:
    """Its instruction, cut texts and the end token, which pads, too: the mask tells them apart."""
    stock = toy_qwen_embedding()
    append_end_token(stock)
    settings: dict[str, Any] = {"split_sentences": False, "prompt_template": QUERY, "padding_side": "right"}
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(stock, **settings)
    captions = ["a cat", "a cat a cat a cat"]
    whole = [stock(QUERY.replace("{}", one))["input_ids"] for one in captions]
    limit = len(whole[0]) + 1
    batch = tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[*whole[0], tokenizer.pad_token_id], [*whole[1][: limit - 1], whole[1][-1]]]
    config = FAMILIES["llama"].stock_config(vocab_size=len(tokenizer), pad_token_id=None)
    model = spread(LoTLIPTextModel(LoTLIPTextConfig(backbone_config=config)))
    with torch.no_grad():
        answer, alone = model(**batch).pooler_output, model(torch.tensor(whole[:1])).pooler_output
    torch.testing.assert_close(answer[:1], alone, **CLOSE)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a Llama without a padding token, of a Qwen3, and of an image encoder."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, stock in (("llama", toy_llama), ("qwen3", toy_qwen)):
        tokenizer = stock()
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = FAMILIES[name].stock_config(vocab_size=len(tokenizer), max_position_embeddings=80, **special)
        spread(AutoModelForCausalLM.from_config(config)).save_pretrained(folder / name)
        tokenizer.padding_side = "left"
        tokenizer.save_pretrained(folder / name)
    vision().save_pretrained(folder / "image")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "image")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), [("llama", "causal"), ("qwen3", "bidirectional")])
def test_lotlip_train_starts_from_a_decoder(name: str, attention: str, encoders: Path, tmp_path: Path) -> None:
    """The run's model has the attention, the template and the end token; texts of any padding get its features."""
    flags = "--data scenes --num-scenes 8 --batch-size 4 --max-steps 2 --num-workers 0 --trackers none".split()
    flags += ["--text-model", str(encoders / name), "--image-model", str(encoders / "image")]
    flags += ["--text-attention", attention, "--prompt-template", QUERY, "--output", str(tmp_path / "run")]
    assert cli.main(["train", *flags]) == 0
    (saved,) = (tmp_path / "run").glob("checkpoint-2")
    encoder = Encoder(*load_model(saved, device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.prompt_template == QUERY
    assert tokenizer.padding_side == "right"
    model = AutoModel.from_pretrained(saved)
    assert model.config.text_config.attention == attention
    captions = ["a cat", "a. cat &amp; a bat", "a cat " * 60]
    expected = []
    for caption in ("a cat", "a. cat & a bat"):
        stock = AutoTokenizer.from_pretrained(encoders / name)
        ids = torch.tensor([[*stock(QUERY.replace("{}", caption))["input_ids"], stock.eos_token_id]])
        with torch.no_grad():
            features = model.get_text_features(ids, torch.ones_like(ids)).pooler_output
        expected.append(nn.functional.normalize(features, dim=-1)[0])
    found = torch.as_tensor(encoder.encode_texts(captions)).float()
    torch.testing.assert_close(found[:2], torch.stack(expected), **CLOSE)
    assert len(tokenizer(captions[2], truncation=True)["input_ids"]) == tokenizer.model_max_length == 78


@pytest.mark.parametrize(
    ("option", "text_model"),
    [("text_attention", "scenes"), ("prompt_template", "scenes"), ("cleaning", "llama"), ("text_attention", "bert")],
)
def test_options_that_do_not_fit_are_refused(option: str, text_model: str, encoders: Path, tmp_path: Path) -> None:
    values = {"text_attention": "causal", "prompt_template": "a {}", "cleaning": "official"}
    models = {"model": "scenes"}
    if text_model != "scenes":
        models = {"text_model": str(encoders / text_model), "image_model": str(encoders / "image")}
    if text_model == "bert":
        FAMILIES["bert"].save(encoders / "bert")
    config = TrainingConfig(output=str(tmp_path), data="scenes", max_steps=1, **models, **{option: values[option]})
    with pytest.raises(ValueError, match=option.removeprefix("text_")):
        load_or_start_model(config)


# LoRA and quantised weights


def whole(name: str, width: int = 32) -> LoTLIPModel:
    size = {"hidden_size": width, "intermediate_size": width, "head_dim": width // 4}
    text = LoTLIPTextConfig(backbone_config=FAMILIES[name].stock_config(**size), projection_dim=24)
    return LoTLIPModel(LoTLIPConfig(text_config=text, vision_config=tiny.vision_config(), projection_dim=24)).eval()


def batch() -> dict[str, torch.Tensor]:
    ids, mask = texts(9, 6, 4)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny.pixel_values(3)}


@pytest.mark.parametrize(
    ("name", "projections"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("phi3", {"qkv_proj", "o_proj"}),
    ],
)
def test_the_example_of_lora_on_a_decoder(name: str, projections: set[str]) -> None:
    """The attention projections of all layers by default, and other layers by their names."""
    add_lora = load_script("examples/finetune_lora.py").add_lora
    for targets in (None, ["q_proj", "down_proj"]) if "q_proj" in projections else (None,):
        model = add_lora(whole(name), 2, False, targets)
        found = {n.split(".lora_A")[0].split(".")[-1] for n, _ in model.named_parameters() if ".lora_A." in n}
        assert found == (projections if targets is None else set(targets))
        model.train()(**batch(), return_loss=True).loss.backward()
        trained = [n for n, p in model.named_parameters() if p.grad is not None]
        assert any("lora_B" in n for n in trained)
        assert not [n for n in trained if "backbone" in n and "lora_" not in n]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama"])
def test_the_example_of_lora_runs_and_merges(name: str, encoders: Path, tmp_path: Path) -> None:
    start = {"text_model": str(encoders / name), "image_model": str(encoders / "image"), "prompt_template": "a {}"}
    model, processor = load_or_start_model(TrainingConfig(output=str(tmp_path), data="scenes", max_steps=1, **start))
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    flags = "--data scenes --num-scenes 8 --batch-size 4 --rank 2".split()
    example = load_script("examples/finetune_lora.py")
    merged = example.main(["--model", str(tmp_path / "start"), "--output", str(tmp_path / "lora"), *flags])
    found, loaded = load_model(merged, device="cpu")
    assert loaded.tokenizer.prompt_template == "a {}"
    changed = [n for n, p in found.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert {n.split(".")[-2] for n in changed if "backbone" in n} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library"), [("llama", "bitsandbytes-8"), ("qwen3", "bitsandbytes-4"), ("llama", "quanto")]
)
def test_a_quantised_decoder_loads_and_trains_lora(name: str, library: str, tmp_path: Path) -> None:
    start = whole(name, width=64)
    start.save_pretrained(tmp_path)
    kept = ["text_projection", "visual_projection", "vision_model"]
    if library == "quanto":
        pytest.importorskip("optimum.quanto", reason="needs `pip install optimum-quanto`")
        from transformers import QuantoConfig

        config: Any = QuantoConfig(weights="int8", modules_to_not_convert=kept)
    else:
        pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
        bits = int(library[-1])
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=kept)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=config)
    linear = [m for m in model.text_model.backbone.layers.modules() if isinstance(m, nn.Linear)]
    assert linear
    assert not [m for m in linear if type(m.weight) is nn.Parameter]
    inputs = batch()
    with torch.no_grad():
        expected, found = start(**inputs).text_embeds, model.eval()(**inputs).text_embeds
    least = 0.75 if library.endswith("4") else 0.99
    assert nn.functional.cosine_similarity(found.float(), expected).min() > least

    lora = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model.text_model)))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        loss = lora(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
