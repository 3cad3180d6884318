"""The small model for Scenes: its vocabulary, its length, its weights."""

import pytest
import torch
from PIL import Image

from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from lotlip_hf.scenes.small import small_model


def captions(num_scenes: int = 800) -> list[str]:
    scenes = [scene(index, split=split) for split in ("train", "test") for index in range(num_scenes // 2)]
    return [text for one in scenes for text in (short_caption(one), *long_captions(one))]


def records(num_scenes: int) -> list[dict]:
    return [
        {"image": render(one), "short_caption": short_caption(one), "long_captions": long_captions(one), "id": one.id}
        for one in map(scene, range(num_scenes))
    ]


@pytest.mark.slow
def test_every_word_of_scenes_is_a_token_of_its_own():
    _, processor = small_model()
    tokenizer = processor.tokenizer
    number_words = "three four five six seven eight nine ten eleven twelve thirteen"
    texts = [*captions(), number_words]
    encoded = tokenizer(texts, truncation=False)["input_ids"]
    pieces = {token for ids in encoded for token in tokenizer.convert_ids_to_tokens(ids)}
    assert tokenizer.unk_token not in pieces
    assert not [piece for piece in pieces if piece.startswith("##")]
    longest = max(map(len, encoded))
    assert 77 < longest <= tokenizer.model_max_length


def test_other_english_is_spelt():
    _, processor = small_model()
    tokenizer = processor.tokenizer
    tokens = tokenizer.tokenize("Zebras aren't blue-green, 17 of them: naïve?")
    assert tokenizer.unk_token not in tokens
    assert tokens[:6] == ["z", "##e", "##b", "##r", "##a", "##s"]
    assert "blue" in tokens


def test_every_token_has_one_number():
    model, processor = small_model()
    tokens = processor.tokenizer.get_vocab()
    assert sorted(tokens.values()) == list(range(model.config.text_config.vocab_size))


@pytest.mark.parametrize(("num_corner_tokens", "max_text_length"), [(0, 192), (4, 32)])
def test_the_limit_holds(num_corner_tokens, max_text_length):
    model, processor = small_model(num_corner_tokens, max_text_length)
    text = "a red star " * 200
    input_ids = processor(text=[text], return_tensors="pt")["input_ids"]
    assert input_ids.shape == (1, max_text_length)
    assert model.config.text_config.max_position_embeddings == max_text_length
    # the last position is there, also behind the corner tokens
    outputs = model.get_text_features(input_ids, output_corner_embeds=True)
    assert outputs.pooler_output.isfinite().all()
    longer = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
    with pytest.raises(ValueError, match=str(max_text_length)):
        model.get_text_features(longer)


def test_the_seed_alone_decides_on_the_weights():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = small_model(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = small_model(seed=3)[0].state_dict(), small_model(seed=4)[0].state_dict()
    for name, weights in first.state_dict().items():
        assert torch.equal(weights, second[name]), name
    assert not torch.equal(first.text_projection.weight, other["text_projection.weight"])
    assert not torch.equal(first.text_model.corner_embeds, other["text_model.corner_embeds"])


def test_positions_near_each_other_begin_alike():
    model, _ = small_model()
    positions = model.text_model.backbone.embeddings.position_embeddings.weight
    similarities = torch.nn.functional.cosine_similarity(positions[50:51], positions)
    assert similarities.argmax() == 50
    assert similarities[51] > similarities[52] > similarities[54] > similarities[60]
    # as large as the word embeddings that they are added to
    deviation = model.config.text_config.initializer_range
    assert positions.square().mean().sqrt().item() == pytest.approx(deviation, rel=1e-3)


def test_colours_and_words_show_from_the_first_step():
    model, processor = small_model()
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("white", "gray", "black", "red", "blue")]
    texts = ["a red star", "a blue star"]
    with torch.inference_mode():
        outputs = model(**processor(text=texts, images=pictures, return_tensors="pt"), output_hidden_states=True)
    patches = outputs.vision_model_output.hidden_states[0][:, 1:]
    # no filter tells one brightness from another, all tell colours
    torch.testing.assert_close(patches[0], patches[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(patches[0], patches[2], atol=1e-4, rtol=0)
    assert (patches[3] - patches[0]).square().mean() > 0.25
    assert (patches[3] - patches[4]).square().mean() > 0.25
    first, second = outputs.text_embeds
    assert first @ second < 0.99


@pytest.mark.slow
def test_learns_the_scenes_of_one_batch():
    model, processor = small_model()
    batch = LoTLIPCollator(processor, SubCaptions(num_long_texts=1))(records(8))
    assert batch["pixel_values"].shape[-2:] == (64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        outputs = model(**batch)
    assert outputs.loss < 1.2  # ln 8 = 2.1 without having learnt anything
    long_texts = outputs.logits_per_image[:, :, 1]
    assert (long_texts.argmax(1) == torch.arange(8)).sum() >= 5
