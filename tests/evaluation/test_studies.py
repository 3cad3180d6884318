"""Studies: rows are what encoding every text anew gives, FLOPs are those of a formula, and plots draw the rows."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import BertTokenizer, SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

import tiny_clip
from lotlip_hf import Encoder
from lotlip_hf.evaluation import embeddings, studies
from lotlip_hf.evaluation.embeddings import TextEmbeddings, embed_texts, image_digests
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.evaluation.studies import (
    length_study,
    plot_length_study,
    plot_sentence_ablation,
    sentence_ablation,
)
from lotlip_hf.evaluation.tasks import RetrievalData
from lotlip_hf.loading import load_model

WORDS = tiny_clip.WORDS

Pair = tuple[Any, Any]


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
    owners = [min(place, 9) if place < 12 else 3 for place in range(len(texts))]
    images = pictures(max(owners) + 1)
    return RetrievalData("own", "Own", images, [str(place) for place in range(len(images))], texts, owners)


@pytest.fixture(scope="module")
def lotlip(official_checkpoint: Path) -> Pair:
    return load_model(official_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save_clip(folder)
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def siglip(golden: Path) -> Pair:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = SiglipConfig(
        text_config=SiglipTextConfig(**size, vocab_size=30522, max_position_embeddings=20, pad_token_id=0),
        vision_config=SiglipVisionConfig(**size, image_size=32, patch_size=16),
    )
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer", model_max_length=20)
    tokenizer.model_input_names = ["input_ids"]

    class Processor:
        def __init__(self) -> None:
            self.tokenizer, self.image_processor = tokenizer, tiny_clip.image_processor()

    return SiglipModel(config).eval(), Processor()


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["lotlip", "clip"])
def test_flops_are_those_of_a_formula(kind: str, attention: str, request: pytest.FixtureRequest) -> None:
    model, processor = request.getfixturevalue(kind)
    own = model.config._attn_implementation
    data = retrieval_data()
    model.set_attn_implementation(attention)
    try:
        rows = length_study(Encoder(model, processor), data, [5, 12, 40], progress=False)
    finally:
        model.set_attn_implementation(own)
    lengths = [len(ids) for ids in processor.tokenizer(list(data.texts), verbose=False)["input_ids"]]
    assert len(set(lengths)) > 5
    for row in rows:
        kept = [min(length, row["max_length"]) for length in lengths]
        pooled_only = attention == "sdpa"
        expected = [
            lotlip_flops(model, tokens, pooled_only) if kind == "lotlip" else clip_flops(model, tokens)
            for tokens in kept
        ]
        assert row["text_flops"] == sum(expected) / len(expected)


def test_flops_of_a_model_that_pads(siglip: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = siglip
    widths: list[int] = []
    features = model.get_text_features

    def recorded(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        widths.append(input_ids.shape[1])
        return features(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "get_text_features", recorded)
    rows = length_study(Encoder(model, processor), retrieval_data(), [20], progress=False)
    assert set(widths) == {20}
    assert len(widths) == 2  # a batch, and once to count
    config = model.config.text_config
    head = 2 * config.hidden_size * config.projection_size
    assert [row["text_flops"] for row in rows] == [layers_flops(config, 20) + head]  # whatever the texts' own lengths
    assert rows[0]["mean_tokens"] < 20


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


def test_flops_of_fused_layers(clip: Pair) -> None:
    model, processor = clip
    fused = FusedLayers(model.config)
    rows = length_study(
        Encoder(cast(Any, fused), processor), retrieval_data(["a cat a cat a cat"] * 3), [8], progress=False
    )
    assert rows[0]["text_flops"] == layers_flops(model.config.text_config, 8)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", ["lotlip", "clip"])
def test_length_study_is_encoding_all_anew(kind: str, request: pytest.FixtureRequest) -> None:
    model, processor = request.getfixturevalue(kind)
    data = retrieval_data()
    rows = length_study(Encoder(model, processor), data, [30, 12, 18, 18], progress=False)
    assert [row["max_length"] for row in rows] == [12, 18, 30]
    images = Encoder(model, processor).encode_images(data.images, progress=False)
    lengths = [len(ids) for ids in processor.tokenizer(list(data.texts), verbose=False)["input_ids"]]
    for row in rows:
        limit = row["max_length"]
        texts = Encoder(model, processor).encode_texts(data.texts, max_length=limit, progress=False)
        expected = recalls(images, texts, data.text_to_image, ks=[1])
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert row["texts_cut"] == sum(length > limit for length in lengths) / len(lengths)
        assert row["mean_tokens"] == pytest.approx(sum(min(length, limit) for length in lengths) / len(lengths))
    assert rows[0]["texts_cut"] > rows[1]["texts_cut"] > rows[2]["texts_cut"] > 0
    assert json.loads(json.dumps(rows)) == rows


def test_default_limits_end_where_the_model_does(lotlip: Pair, clip: Pair) -> None:
    data = retrieval_data([*long_texts(3), "a cat. " * 300])
    for (model, processor), expected in ((lotlip, [16, 32, 48, 64, 96, 126]), (clip, [16, 32, 48, 64, 77])):
        rows = length_study(Encoder(model, processor), data, progress=False)
        assert [row["max_length"] for row in rows] == expected
        assert rows[-1]["texts_cut"] == 0.25  # at the model's own end, too


def test_only_texts_that_change_are_encoded_again(lotlip: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = lotlip
    data = retrieval_data()
    lengths = [len(ids) for ids in processor.tokenizer(list(data.texts), verbose=False)["input_ids"]]
    encoded: list[tuple[int | None, int]] = []
    embed_texts = studies.embed_texts

    def counting(model: Any, processor: Any, texts: list[str], **kwargs: Any) -> TextEmbeddings:
        encoded.append((kwargs["max_length"], len(texts)))
        return embed_texts(Encoder(model, processor), texts, **kwargs)

    monkeypatch.setattr(studies, "embed_texts", counting)
    length_study(Encoder(model, processor), data, [10, 50, 100, 126], progress=False)
    assert encoded[0] == (126, len(data.texts))
    longer = {limit: sum(length > limit for length in lengths) for limit in (100, 50, 10)}
    assert all(number for _, number in encoded)
    assert encoded[1:] == [(limit, number) for limit, number in longer.items() if number]


def test_a_model_without_flops(lotlip: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as one on ONNX Runtime: PyTorch sees none of its products
    monkeypatch.setattr(studies, "iterate_text_embeddings", lambda *args, **kwargs: iter([]))
    rows = length_study(Encoder(*lotlip), retrieval_data(), [5, 20], progress=False)
    assert [row["text_flops"] for row in rows] == [None, None]
    plot_length_study(rows, tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 1000


@pytest.mark.slow
def test_length_study_keeps_embeddings(lotlip: Pair, tmp_path: Path) -> None:
    data = retrieval_data()
    first = length_study(Encoder(*lotlip), data, [5, 20], cache=tmp_path, batch_size=3, progress=False)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 3  # the images, and the texts at both limits
    assert length_study(Encoder(*lotlip), data, [5, 20], cache=tmp_path, batch_size=3, progress=False) == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == kept


class Bars:
    """Bars that are shown, and how many others were asked for."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.hidden = 0

    def __call__(self, *args: Any, disable: bool, **kwargs: Any) -> Any:
        bar = tqdm(*args, **kwargs, disable=disable, file=io.StringIO())
        if disable:
            self.hidden += 1
        else:
            self.shown.append(bar)
        return bar


@pytest.mark.slow
@pytest.mark.parametrize("study", [length_study, sentence_ablation])
def test_one_bar_and_one_warning(
    study: Any, clip: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two units at a time, with texts that stand twice, and some that are read as before."""
    bars, own_bars = Bars(), Bars()
    monkeypatch.setattr(studies, "tqdm", bars)
    monkeypatch.setattr(embeddings, "tqdm", own_bars)
    monkeypatch.setattr(studies, "UNIT_SIZE", 4)
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 4)
    texts = [*long_texts(13), "a cat. " * 40 + "a dog", "a cat. " * 50 + "a dog", long_texts(1)[0]]
    study(Encoder(*clip), retrieval_data(texts))
    (bar,) = bars.shown
    assert bar.n == bar.total > 2 * len(texts)
    assert {bar.desc for bar in own_bars.shown} == {"Reading images", "Encoding images"}
    assert len(own_bars.shown) == 2
    assert own_bars.hidden > 4
    assert [record.getMessage() for record in caplog.records if "cut" in record.getMessage()] == [
        "2 of 16 texts were cut at 77 tokens."
    ]
    study(Encoder(*clip), retrieval_data(texts), progress=False)
    assert len(bars.shown) == 1
    assert len(own_bars.shown) == 2


@pytest.mark.slow
@pytest.mark.parametrize("study", [length_study, sentence_ablation])
def test_what_is_known_is_not_computed_again(
    study: Any, lotlip: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(model: Any, processor: Any, modality: Any) -> str:
        asked.append(modality)
        return Encoder(model, processor).fingerprint(modality)

    monkeypatch.setattr(studies, "fingerprint", counted)
    monkeypatch.setattr(embeddings, "fingerprint", counted)
    monkeypatch.setattr(studies, "UNIT_SIZE", 4)
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 4)
    data = retrieval_data()
    rows = study(Encoder(*lotlip), data, progress=False)
    assert asked == []
    digests = image_digests(data.images, progress=False)
    monkeypatch.setattr(embeddings, "image_digests", None)
    assert study(Encoder(*lotlip), data, digests=digests, cache=tmp_path, progress=False) == rows
    assert sorted(asked) == ["image", "text"]
    # what is kept is what `embed_texts` keeps of all texts at once
    kept = sorted(tmp_path.rglob("*.safetensors"))
    embed_texts(Encoder(*lotlip), data.texts, cache=tmp_path, progress=False)
    assert sorted(tmp_path.rglob("*.safetensors")) == kept


@pytest.mark.parametrize("limits", [[2, 10], [10, 127]])
def test_limits_that_the_model_does_not_take(lotlip: Pair, limits: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"`limits` must be from 3 to the 126 tokens that the model takes, got \[.*\]"
    ):
        length_study(Encoder(*lotlip), retrieval_data(), limits, progress=False)


def test_flash_attention_is_not_counted(lotlip: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = lotlip
    backbone = model.text_model.backbone.config
    monkeypatch.setattr(backbone, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match='flash attention are not counted.*attn_implementation="sdpa"'):
        length_study(Encoder(model, processor), retrieval_data(), progress=False)


# The sentence ablation.


@pytest.mark.parametrize("kind", ["lotlip", "clip"])
def test_sentence_ablation_is_encoding_all_anew(kind: str, request: pytest.FixtureRequest) -> None:
    model, processor = request.getfixturevalue(kind)
    data = retrieval_data(long_texts(13))
    sentences = [text.split(". ") for text in data.texts]
    images = Encoder(model, processor).encode_images(data.images, progress=False).double()
    owners = torch.tensor(data.text_to_image)

    def measured(texts: Sequence[str]) -> dict[str, float]:
        scores = images @ Encoder(model, processor).encode_texts(texts, progress=False).double().T
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

    rows = sentence_ablation(Encoder(model, processor), data, progress=False)
    assert [row["sentence"] for row in rows] == list(range(max(map(len, sentences)) + 1))
    whole = measured(data.texts)
    for k, row in enumerate(rows):
        shorter = [
            ". ".join(part for place, part in enumerate(parts, 1) if place != k) if len(parts) > 1 else parts[0]
            for parts in sentences
        ]
        changed = [place for place, parts in enumerate(sentences) if 1 <= k <= len(parts) > 1]
        now = measured(shorter)
        assert row["num_texts"] == row["num_read"] == len(changed)
        for name, value in now.items():
            assert row[name] == pytest.approx(value, abs=1e-5), name
            scale = len(images) / len({data.text_to_image[place] for place in changed} or "1")
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


def test_what_a_sentence_is_worth(lotlip: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every text's second sentence alone tells its image: the others are the same in all texts.
    own = WORDS[:4]
    texts = [f"red house. {word} {word}. car and" for word in own] + ["the"]
    data = retrieval_data(texts)
    monkeypatch.setattr(studies, "embed_images", lambda *args, **kwargs: bag_of_words([*own, "the"]))
    monkeypatch.setattr(
        studies,
        "embed_texts",
        lambda model, processor, texts, **kwargs: TextEmbeddings(bag_of_words(texts), torch.zeros(len(texts))),
    )
    whole, first, second, third = sentence_ablation(Encoder(*lotlip), data, progress=False)
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


def test_sentences_behind_the_models_end_are_not_read(clip: Pair) -> None:
    model, processor = clip
    beyond = ". ".join(["a cat " * 20, "the dog " * 20, "a red car", "a house"])  # the first two fill 77 tokens
    data = retrieval_data([beyond, "a cat. the dog. a red car. a house"])
    rows = sentence_ablation(Encoder(model, processor), data, progress=False)
    assert [(row["num_texts"], row["num_read"]) for row in rows] == [(0, 0), (2, 2), (2, 2), (2, 1), (2, 1)]


def test_fewer_sentences(lotlip: Pair) -> None:
    data = retrieval_data(long_texts(6))
    everything = sentence_ablation(Encoder(*lotlip), data, progress=False)
    assert sentence_ablation(Encoder(*lotlip), data, 2, progress=False) == everything[:3]
    with pytest.raises(ValueError, match="`max_sentences` must be at least 1, got 0"):
        sentence_ablation(Encoder(*lotlip), data, 0, progress=False)
    with pytest.raises(ValueError, match="No text of Own has two sentences"):
        sentence_ablation(Encoder(*lotlip), retrieval_data(["a cat", "a dog."]), progress=False)


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
        **{f"{name}_lost": 0.01 * (k + place) for place, name in enumerate(LOST)},
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


@pytest.mark.parametrize(("plot", "rows"), [(plot_length_study, LENGTH_ROWS), (plot_sentence_ablation, SENTENCE_ROWS)])
def test_plots_that_cannot_be_drawn(plot: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`rows` is empty"):
        plot([], tmp_path / "plot.png")
    with pytest.raises(ValueError, match="plot.doc: expected a picture that ends in .*png"):
        plot(rows, tmp_path / "plot.doc")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lotlip-hf\[evaluation\]'"):
        plot(rows, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []
