"""Studies: rows are what encoding every text anew gives, FLOPs are those of a formula, and plots draw the rows."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BertTokenizer, SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

import lotlip_hf.encoder
import tiny_clip
from lotlip_hf import Encoder, LoTLIPModel
from lotlip_hf.evaluation import embeddings, studies
from lotlip_hf.evaluation.embeddings import TextEmbeddings, image_digests
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.evaluation.studies import length_study, plot_length_study, plot_sentence_ablation, sentence_ablation
from lotlip_hf.evaluation.tasks import RetrievalData

WORDS = tiny_clip.WORDS


def long_texts(count: int) -> list[str]:
    """Texts of one to six sentences of one to nine words."""
    generator = torch.Generator().manual_seed(1)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    return [
        ". ".join(" ".join(WORDS[draw(len(WORDS)) - 1] for _ in range(draw(9))) for _ in range(draw(6)))
        for _ in range(count)
    ]


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (count, 40, 40, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in pixels]


def retrieval_data(texts: Sequence[str] | None = None) -> RetrievalData:
    """Ten images, two of which have several texts."""
    texts = [*long_texts(13), "a cat. " * 40 + "a dog"] if texts is None else texts
    owners = [min(index, 9) if index < 12 else 3 for index in range(len(texts))]
    images = pictures(max(owners) + 1)
    return RetrievalData("own", "Own", images, [str(index) for index in range(len(images))], texts, owners)


def token_counts(encoder: Encoder, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in encoder.engine.tokenizer(list(texts), verbose=False)["input_ids"]]


@pytest.fixture
def siglip(golden: Path) -> Encoder:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = SiglipConfig(
        text_config=SiglipTextConfig(**size, vocab_size=30522, max_position_embeddings=20, pad_token_id=0),
        vision_config=SiglipVisionConfig(**size, image_size=32, patch_size=16),
    )
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer", model_max_length=20)
    tokenizer.model_input_names = ["input_ids"]
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=tiny_clip.image_processor())
    return Encoder(SiglipModel(config), processor)


def layers_flops(config: Any, tokens: int) -> int:
    """The matrix products of a transformer's layers: four projections, two of attention, two of the MLP."""
    return 2 * config.num_hidden_layers * layer_products(config, tokens, tokens)


def layer_products(config: Any, tokens: int, computed: int) -> int:
    """Multiplications of a layer whose keys and values are of all tokens, and all else of those that are computed."""
    width = config.hidden_size
    projections = 2 * width * width * (tokens + computed)
    return projections + 2 * computed * tokens * width + 2 * computed * width * config.intermediate_size


def lotlip_flops(model: Any, tokens: int, pooled_only: bool) -> int:
    config = model.config.text_config
    backbone = config.backbone_config
    pooler, projection = config.hidden_size**2, config.hidden_size * model.config.projection_dim
    flops = layers_flops(backbone, tokens) + 2 * (2 * pooler + projection)  # BERT's forward pass runs its pooler, too
    if pooled_only:  # the last layer computes [CLS] alone
        flops -= 2 * (layer_products(backbone, tokens, tokens) - layer_products(backbone, tokens, 1))
    return flops


def clip_flops(model: Any, tokens: int) -> int:
    config = model.config.text_config
    return layers_flops(config, tokens) + 2 * config.hidden_size * model.config.projection_dim


# The length study.


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["lotlip", "clip"])
def test_flops_are_those_of_a_formula(kind: str, attention: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(kind)
    model, data = encoder.engine.model, retrieval_data()
    own = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        rows = length_study(encoder, data, [5, 12, 40], progress=False)
    finally:
        model.set_attn_implementation(own)
    lengths = token_counts(encoder, data.texts)
    assert len(set(lengths)) > 5
    for row in rows:
        kept = [min(length, row["max_length"]) for length in lengths]
        if kind == "lotlip":
            expected = [lotlip_flops(model, tokens, pooled_only=attention == "sdpa") for tokens in kept]
        else:
            expected = [clip_flops(model, tokens) for tokens in kept]
        assert row["text_flops"] == sum(expected) / len(expected)


def test_flops_of_a_model_that_pads(siglip: Encoder) -> None:
    (row,) = length_study(siglip, retrieval_data(), [20], progress=False)
    config = siglip.engine.model.config.text_config
    head = 2 * config.hidden_size * config.projection_size
    assert row["text_flops"] == layers_flops(config, 20) + head  # whatever the texts' own lengths
    assert row["mean_tokens"] < 20


class FusedLayers(nn.Module):
    """A text tower of PyTorch's own layers, which have a fused kernel for inference."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.device, self.dtype = config, torch.device("cpu"), torch.float32
        own = config.text_config
        self.embedding = nn.Embedding(own.vocab_size, own.hidden_size)
        layer = nn.TransformerEncoderLayer(
            own.hidden_size, own.num_attention_heads, own.intermediate_size, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, own.num_hidden_layers, enable_nested_tensor=False)

    def get_text_features(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.layers(self.embedding(input_ids))[:, 0]

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean((2, 3)).repeat(1, self.config.text_config.hidden_size)[:, ::3]


def test_flops_of_fused_layers(clip: Encoder) -> None:
    config = clip.engine.model.config
    fused = Encoder(cast(Any, FusedLayers(config)), clip.engine.processor)
    rows = length_study(fused, retrieval_data(["a cat a cat a cat"] * 3), [8], progress=False)
    assert rows[0]["text_flops"] == layers_flops(config.text_config, 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_long_texts_have_more_limits(modernbert: Encoder) -> None:
    data = retrieval_data([*long_texts(4), "a cat sits on a mat. " * 100, "a dog. " * 250])
    rows = length_study(modernbert, data, progress=False)
    assert [row["max_length"] for row in rows] == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024]
    assert [row["texts_cut"] for row in rows[-3:]] == [2 / 6, 2 / 6, 0]
    assert rows[-1]["text_flops"] > rows[-2]["text_flops"]
    longer = [row["max_length"] for row in length_study(modernbert, retrieval_data(["a dog. " * 500]), progress=False)]
    assert longer == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048]


def test_long_texts_are_encoded_as_alone_and_in_few_tokens(
    modernbert: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = modernbert.engine.model, modernbert.engine.processor
    assert model.text_model.backbone.config._attn_implementation == "unpadded"
    texts = ["a dog. " * count for count in (3, 400, 500, 30, 31, 390)]
    shapes: list[torch.Size] = []
    monkeypatch.setattr(lotlip_hf.encoder, "CPU_TOKENS", 10**9)  # as on a GPU
    monkeypatch.setattr(model.text_model, "forward", spy(model.text_model.forward, shapes))
    embeddings = modernbert.encode_texts(texts, batch_size=4, progress=False)
    assert max(rows * width for rows, width in shapes) <= 4 * 512
    stock = LoTLIPModel.from_pretrained(modernbert.name)
    for text, embedding in zip(texts, embeddings, strict=True):
        inputs = processor.tokenizer([text], truncation=True, verbose=False, return_tensors="pt")
        with torch.no_grad():
            expected = nn.functional.normalize(stock.get_text_features(**inputs).pooler_output[0], dim=0)
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)


def spy(forward: Callable[..., Any], shapes: list[torch.Size]) -> Callable[..., Any]:
    """`forward`, which adds the shape of `input_ids` to `shapes`."""

    def spied(input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(input_ids.shape)
        return forward(input_ids, *args, **options)

    return spied


@pytest.mark.parametrize("kind", ["lotlip", "clip", "modernbert"])
def test_length_study_is_encoding_all_anew(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, data = request.getfixturevalue(kind), retrieval_data()
    lengths = token_counts(encoder, data.texts)
    longest = encoder.max_text_length
    with monkeypatch.context() as patch:
        encoded = count_texts(patch, encoder)
        rows = length_study(encoder, data, [30, 12, 18, 18, longest], progress=False)
    # only texts that change are encoded again
    assert encoded == [sum(length > limit for length in lengths) or len(lengths) for limit in (10_000, 30, 18, 12)]
    assert [row["max_length"] for row in rows] == [12, 18, 30, longest]
    images = encoder.encode_images(data.images, progress=False)
    for row in rows:
        limit = row["max_length"]
        texts = encoder.encode_texts(data.texts, max_length=limit, progress=False)
        expected = recalls(images, texts, data.text_to_image, ks=[1])
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert row["texts_cut"] == sum(length > limit for length in lengths) / len(lengths)
        assert row["mean_tokens"] == pytest.approx(sum(min(length, limit) for length in lengths) / len(lengths))
    assert rows[0]["texts_cut"] > rows[1]["texts_cut"] > rows[2]["texts_cut"] > 0
    assert json.loads(json.dumps(rows)) == rows


def count_texts(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> list[int]:
    """How many texts each call encodes from now on, where it is more than one, as to count FLOPs."""
    sizes: list[int] = []
    iterate = encoder.iterate_texts

    def counted(texts: Sequence[str], **kwargs: Any) -> Any:
        sizes.extend([len(texts)] if len(texts) > 1 else [])
        return iterate(texts, **kwargs)

    monkeypatch.setattr(encoder, "iterate_texts", counted)
    return sizes


def test_default_limits_end_where_the_model_does(lotlip: Encoder, clip: Encoder) -> None:
    data = retrieval_data([*long_texts(3), "a cat. " * 300])
    for encoder, expected in ((lotlip, [16, 32, 48, 64, 96, 126]), (clip, [16, 32, 48, 64, 77])):
        rows = length_study(encoder, data, progress=False)
        assert [row["max_length"] for row in rows] == expected
        assert rows[-1]["texts_cut"] == 0.25  # at the model's own end, too


def test_a_model_without_flops(lotlip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as one on ONNX Runtime: PyTorch sees no products
    rows_of_unit_matrix = torch.eye(lotlip.dim)
    embed = lotlip.engine.embed

    def embed_texts(modality: str, inputs: dict[str, np.ndarray], pooled: bool) -> torch.Tensor:
        rows = inputs["input_ids"][:, 1] % lotlip.dim if modality == "text" else None
        return embed(modality, inputs, pooled) if rows is None else rows_of_unit_matrix[rows]

    monkeypatch.setattr(lotlip.engine, "embed", embed_texts)
    rows = length_study(lotlip, retrieval_data(), [5, 20], progress=False)
    assert [row["text_flops"] for row in rows] == [None, None]
    plot_length_study(rows, tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 1000


@pytest.mark.parametrize("study", [length_study, sentence_ablation])
def test_one_warning_of_cut_texts(study: Any, clip: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    texts = [*long_texts(13), "a cat. " * 40 + "a dog", "a cat. " * 50 + "a dog", long_texts(1)[0]]
    study(clip, retrieval_data(texts), progress=False)
    cut = [message for message in caplog.messages if "cut" in message]
    assert cut == ["2 of 16 texts were cut at 77 tokens."]


@pytest.mark.slow
@pytest.mark.parametrize("study", [length_study, sentence_ablation])
def test_embeddings_are_kept(study: Any, lotlip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an evaluation of the same data keeps, too, in units of four."""
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 4)
    monkeypatch.setattr(studies, "UNIT_SIZE", 4)
    data, fingerprints = retrieval_data(), []
    rows = study(lotlip, data, progress=False)
    options = {"digests": image_digests(data.images, progress=False), "cache": tmp_path, "progress": False}
    embeddings.embed_texts(lotlip, data.texts, cache=tmp_path, progress=False)
    fingerprint = lotlip.fingerprint
    monkeypatch.setattr(lotlip, "fingerprint", lambda modality: fingerprints.append(modality) or fingerprint(modality))
    encoded = count_texts(monkeypatch, lotlip)
    for row, expected in zip(study(lotlip, data, **options), rows, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)  # a text that is kept was encoded beside others
    assert len(data.texts) not in encoded
    assert sorted(fingerprints) == ["image", "text"]  # once, as they take seconds
    encoded.clear()
    study(lotlip, data, **options)
    assert encoded == []


@pytest.mark.parametrize("limits", [[2, 10], [10, 127]])
def test_limits_that_the_model_does_not_take(lotlip: Encoder, limits: list[int]) -> None:
    with pytest.raises(ValueError, match="`limits`"):
        length_study(lotlip, retrieval_data(), limits, progress=False)


def test_flash_attention_is_not_counted(lotlip: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = lotlip.engine.model.text_model.backbone.config
    monkeypatch.setattr(backbone, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="attn_implementation"):
        length_study(lotlip, retrieval_data(), progress=False)


# The sentence ablation.


@pytest.mark.parametrize("kind", ["lotlip", "clip"])
def test_sentence_ablation_is_encoding_all_anew(kind: str, request: pytest.FixtureRequest) -> None:
    encoder, data = request.getfixturevalue(kind), retrieval_data(long_texts(13))
    sentences = [text.split(". ") for text in data.texts]
    images = encoder.encode_images(data.images, progress=False).double()
    owners = torch.tensor(data.text_to_image)

    def measured(texts: Sequence[str]) -> dict[str, float]:
        scores = images @ encoder.encode_texts(texts, progress=False).double().T
        own = scores[owners, torch.arange(len(texts))]
        text_ranks = 1 + (scores > own + 1e-6).sum(0).double()
        best = torch.stack([own[owners == image].max() for image in range(len(images))])
        image_ranks = 1 + (scores > best[:, None] + 1e-6).sum(1).double()
        return {
            "image_to_text_r1": (image_ranks == 1).double().mean().item(),
            "text_to_image_r1": (text_ranks == 1).double().mean().item(),
            "image_to_text_mean_rank": image_ranks.mean().item(),
            "text_to_image_mean_rank": text_ranks.mean().item(),
            "score": own.mean().item(),
        }

    rows = sentence_ablation(encoder, data, progress=False)
    assert [row["sentence"] for row in rows] == list(range(max(map(len, sentences)) + 1))
    whole = measured(data.texts)
    for k, row in enumerate(rows):
        shorter = [
            ". ".join(part for number, part in enumerate(parts, 1) if number != k) if len(parts) > 1 else parts[0]
            for parts in sentences
        ]
        changed = [index for index, parts in enumerate(sentences) if 1 <= k <= len(parts) > 1]
        now = measured(shorter)
        assert row["num_texts"] == row["num_read"] == len(changed)
        for name, value in now.items():
            assert row[name] == pytest.approx(value, abs=1e-5), name
            scale = len(images) / len({data.text_to_image[index] for index in changed} or "1")
            if not name.startswith("image"):
                scale = len(sentences) / max(1, len(changed))
            lost = (value - whole[name]) * (1 if name.endswith("rank") else -1) * scale
            assert row[f"{name}_lost"] == pytest.approx(lost, abs=1e-4), name
    assert any(abs(row["score_lost"]) > 1e-3 for row in rows[1:])
    assert json.loads(json.dumps(rows)) == rows


def bag_of_words(texts: Sequence[str]) -> torch.Tensor:
    counts = torch.tensor(
        [[text.replace(".", "").split().count(word) for word in WORDS] for text in texts], dtype=torch.float32
    )
    return torch.nn.functional.normalize(counts, dim=1)


def test_what_a_sentence_is_worth(lotlip: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every text's second sentence alone tells its image: the others are the same in all texts.
    own = WORDS[:4]
    texts = [f"red house. {word} {word}. car and" for word in own] + ["the"]
    data = retrieval_data(texts)
    monkeypatch.setattr(studies, "embed_images", lambda *args, **kwargs: bag_of_words([*own, "the"]))
    monkeypatch.setattr(
        studies,
        "embed_texts",
        lambda encoder, texts, **kwargs: TextEmbeddings(bag_of_words(texts), torch.zeros(len(texts))),
    )
    whole, first, second, third = sentence_ablation(lotlip, data, progress=False)
    assert whole["text_to_image_r1"] == whole["image_to_text_r1"] == 1
    assert whole["text_to_image_mean_rank"] == 1
    assert [row["num_texts"] for row in (whole, first, second, third)] == [0, 4, 4, 4]  # one sentence stays
    for row in (first, third):
        assert row["text_to_image_r1"] == 1
        assert row["text_to_image_r1_lost"] == row["image_to_text_r1_lost"] == row["text_to_image_mean_rank_lost"] == 0
        assert row["score_lost"] < 0  # it told nothing of the image
    # Without it a text is as far from all five images: rank 3 and a fifth of a hit. An image's own text then is as far
    # as the other four, and "the" too.
    assert second["text_to_image_r1_lost"] == pytest.approx(0.8, abs=1e-9)
    assert second["text_to_image_r1"] == pytest.approx((4 * 0.2 + 1) / 5, abs=1e-9)
    assert second["text_to_image_mean_rank_lost"] == pytest.approx(2, abs=1e-9)
    assert second["image_to_text_r1_lost"] == pytest.approx(0.8, abs=1e-9)
    assert second["image_to_text_mean_rank_lost"] == pytest.approx(2, abs=1e-9)
    whole_score = 2 / 8**0.5  # [1, 1, 2, 1, 1] and its image's word
    assert second["score_lost"] == pytest.approx(whole_score, abs=1e-6)


def test_sentences_behind_the_models_end_are_not_read(clip: Encoder) -> None:
    beyond = ". ".join(["a cat " * 20, "the dog " * 20, "a red car", "a house"])  # the first two fill 77 tokens
    data = retrieval_data([beyond, "a cat. the dog. a red car. a house"])
    rows = sentence_ablation(clip, data, progress=False)
    assert [(row["num_texts"], row["num_read"]) for row in rows] == [(0, 0), (2, 2), (2, 2), (2, 1), (2, 1)]


def test_fewer_sentences(lotlip: Encoder) -> None:
    data = retrieval_data(long_texts(6))
    everything = sentence_ablation(lotlip, data, progress=False)
    assert sentence_ablation(lotlip, data, 2, progress=False) == everything[:3]
    with pytest.raises(ValueError, match="Own"):
        sentence_ablation(lotlip, retrieval_data(["a cat", "a dog."]), progress=False)


# Plots.

LENGTH_ROWS = [
    {"max_length": 16, "image_to_text_r1": 0.2, "text_to_image_r1": 0.25, "texts_cut": 0.9, "text_flops": 1e9},
    {"max_length": 64, "image_to_text_r1": 0.5, "text_to_image_r1": 0.4, "texts_cut": 0.1, "text_flops": 3e9},
]
LOST = ("image_to_text_r1", "text_to_image_r1", "image_to_text_mean_rank", "text_to_image_mean_rank", "score")
SENTENCE_ROWS = [
    {
        "sentence": k,
        "num_texts": 10 - k,
        "num_read": 9 - k,
        **{f"{name}_lost": 0.01 * (k + index) for index, name in enumerate(LOST)},
    }
    for k in range(4)
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = studies.save

    def keep(figure: Any, file: Any) -> None:
        figures.append(figure)
        save(figure, file)

    monkeypatch.setattr(studies, "save", keep)
    return figures


def test_length_plot_draws_the_rows(drawn: list[Any], tmp_path: Path) -> None:
    plot_length_study(LENGTH_ROWS, tmp_path / "length.png", "a model on Own")
    recall, flops = drawn[0].axes
    assert recall.get_title() == "a model on Own"
    by_label = {line.get_label(): line.get_xydata().tolist() for line in recall.lines}
    assert by_label == {
        "R@1, image to text": [[16, 20], [64, 50]],
        "R@1, text to image": [[16, 25], [64, 40]],
    }
    assert [line.get_xydata().tolist() for line in flops.lines] == [[[16, 1], [64, 3]]]
    assert [label.get_text() for label in recall.get_xticklabels()] == ["16\n90%", "64\n10%"]
    assert Image.open(tmp_path / "length.png").size[0] > 500


def test_sentence_plot_draws_the_rows(drawn: list[Any], tmp_path: Path) -> None:
    plot_sentence_ablation(SENTENCE_ROWS, tmp_path / "sentences.svg", 30 * "a model on Own ")
    first = drawn[0].axes[0]
    assert first.get_title().split() == (30 * "a model on Own ").split()
    drawn[0].draw_without_rendering()
    assert drawn[0].get_tightbbox().width <= drawn[0].get_figwidth()
    heights = [[bar.get_height() for bars in axes.containers for bar in bars] for axes in drawn[0].axes]
    assert heights[0] == pytest.approx([1, 2, 3, 2, 3, 4])  # both directions of sentences 1 to 3, in points
    assert heights[1] == pytest.approx([0.03, 0.04, 0.05, 0.04, 0.05, 0.06])
    assert heights[2] == pytest.approx([0.05, 0.06, 0.07])
    assert [label.get_text() for label in drawn[0].axes[-1].get_xticklabels()] == ["1\n9\n8", "2\n8\n7", "3\n7\n6"]
    assert (tmp_path / "sentences.svg").read_text().startswith("<?xml")
