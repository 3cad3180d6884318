"""Compares the speed and memory of this package with other ways to run LoTLIP, and with its targets.

    make bench                                             # with captions of Scenes; about 25 minutes on two cores
    python benchmarks/bench.py --captions captions.jsonl   # with your captions, {"text": "..."} on each line
    python benchmarks/bench.py --only tokenise images      # only these parts
    python benchmarks/bench.py --table                     # print the last results, as in docs/speed.md

A speed-up is the ratio of the median times of two calls that alternate in one run. The model has random weights and
the shape of the released model (BERT-base and ViT-B/16). The *official recipe* computes like the official code: texts
padded to 128 positions, a dense mask, corner tokens also at inference, and eager attention, because its version of
transformers has no other. Each part appends a line to `benchmarks/results/bench.jsonl`. For a missed target, a profile
is saved in `benchmarks/results/profiles`.
"""

import argparse
import cProfile
import io
import itertools
import json
import logging
import pstats
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F
from transformers import BertModel, ModernBertConfig, PreTrainedModel, ViTModel
from transformers.utils import logging as transformers_logging

import peak
import peers
from lotlip_hf import Encoder, LoTLIPModel, LoTLIPProcessor, LoTLIPTextConfig, LoTLIPTextModel, load_encoder
from lotlip_hf.conversion.onnx import convert as export_onnx
from lotlip_hf.conversion.openvino import convert as export_openvino
from lotlip_hf.conversion.stock import stock_model
from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.encoder import CPU_TOKENS
from lotlip_hf.engines.texts import encode_unpadded
from lotlip_hf.images import load_image, official_image_processor
from lotlip_hf.loading import load_model
from lotlip_hf.modeling.loss_lotlip import lotlip_loss
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.log import read_log
from lotlip_hf.training.loop import train
from lotlip_hf.training.objective import Objective, batch_loss
from lotlip_hf.training.terms.infonce import InfoNCE
from measure import RESULTS as FOLDER
from measure import in_turns, keep, machine, peak_memory

RESULTS = FOLDER / "bench.jsonl"
NUM_SCENES = 600
NUM_PICTURES = 512
OFFICIAL = "official recipe"
Call = Callable[[], Any]


@dataclass
class Row:
    """
    A target and its measured value.

    Args:
        work (`str`): Measured work.
        beside (`str`): Baseline of the comparison.
        ratio (`float`): Measured value: the speed-up, or a value in `unit`.
        target (`float`): Minimum of `ratio`, or its maximum if `at_most` is set.
        at_most (`bool`, *optional*, defaults to `False`): Whether `target` is a maximum.
        unit (`str`, *optional*, defaults to `"x"`): Unit of `ratio` and `target`.
        detail (`str`, *optional*, defaults to `""`): The measurements that `ratio` is computed from.
        profile (`Callable`, *optional*): Call that is profiled if the target is missed.
    """

    work: str
    beside: str
    ratio: float
    target: float
    at_most: bool = False
    unit: str = "x"
    detail: str = ""
    profile: Call | None = field(default=None, repr=False)

    @property
    def holds(self) -> bool:
        """Whether the value meets the target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def values(self) -> dict[str, Any]:
        """Returns the fields that are saved."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "profile"}

    def __str__(self) -> str:
        limit, verdict = ("<=" if self.at_most else ">="), "holds"
        if not self.holds:
            verdict = f"MISSED by {abs(self.ratio / self.target - 1):.0%}"
        target = f"{limit} {self.target:g} {self.unit}"
        measured = f"{self.ratio:.4g} {self.unit} ({self.detail})"
        return f"{self.work}, compared with {self.beside}: {measured}, target {target}: {verdict}"


class Bench:
    """
    Inputs and models that all parts share.

    Args:
        size (`str`): Size of the models; see `peers.SIZES`.
        captions (`list[str]`): Long texts.
        num_texts (`int`): Number of texts to encode in each turn.
        num_mixed (`int`): Number of texts of mixed lengths.
        batch_size (`int`): Number of images in a training step.
        loss_batch_size (`int`): Number of images in the loss.
        repeats (`int`): Number of timed turns.
        folder (`Path`): Folder for temporary checkpoints and images.
    """

    def __init__(
        self,
        size: str,
        captions: list[str],
        num_texts: int,
        num_mixed: int,
        batch_size: int,
        loss_batch_size: int,
        repeats: int,
        folder: Path,
    ) -> None:
        self.size = size
        self.captions = captions
        self.num_texts = num_texts
        self.num_mixed = num_mixed
        self.batch_size = batch_size
        self.loss_batch_size = loss_batch_size
        self.repeats = repeats
        self.folder = folder
        self.rates: dict[str, dict[str, float]] = {}  # texts per second, by kind of text and by encoder
        self.notes: list[str] = []

    @cached_property
    def model(self) -> LoTLIPModel:
        """The model in float32."""
        return peers.make_model(self.size)

    @cached_property
    def processor(self) -> LoTLIPProcessor:
        return peers.make_processor(self.model)

    @cached_property
    def checkpoint(self) -> Path:
        """The folder with the saved model and processor."""
        path = self.folder / "checkpoint"
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)
        return path

    def turns(self, description: str, calls: Mapping[str, Call]) -> dict[str, float]:
        """Returns the median time of each call in seconds."""
        return in_turns(calls, self.repeats, description)

    def encode(self, model: PreTrainedModel, texts: Sequence[str]) -> torch.Tensor:
        """Encodes texts with this package: embeddings [N, P]."""
        return Encoder(model, self.processor).encode_texts(texts, progress=False)

    def batches(self, texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Creates ideal batches: tokenised, sorted by length, with the number of tokens that a CPU encodes fastest."""
        encoded = self.processor.tokenizer(list(texts), truncation=True, verbose=False)["input_ids"]
        ids = sorted(encoded, key=len, reverse=True)
        batches = []
        while ids:
            rows = max(1, CPU_TOKENS // len(ids[0]))
            batch, ids = ids[:rows], ids[rows:]
            batches.append(dict(self.processor.tokenizer.pad({"input_ids": batch}, return_tensors="pt")))
        return batches


@torch.inference_mode()
def run_batches(model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Computes and discards the text features of prepared batches."""
    for batch in batches:
        model.get_text_features(**batch)


def encode(bench: Bench) -> list[Row]:
    """Encodes long texts and first sentences, with this package in three precisions and with all other packages."""
    long = bench.captions[: bench.num_texts]
    kinds = {"long texts": long, "first sentences": [split_sentences(text)[0] + "." for text in long]}
    bf16, _ = load_model(bench.checkpoint, dtype="bfloat16")
    export_onnx(bench.checkpoint, bench.folder / "int8", quantize="int8", towers=["text"])
    int8 = load_encoder(bench.folder / "int8")
    encoders: dict[str, Callable[[Sequence[str]], Any]] = {
        "lotlip-hf": partial(bench.encode, bench.model),
        "lotlip-hf, bfloat16": partial(bench.encode, bf16),
        "lotlip-hf, int8 ONNX": partial(int8.encode_texts, progress=False),
        OFFICIAL: peers.OfficialRecipe(bench.model).encode,
        f"{OFFICIAL}, sdpa": peers.OfficialRecipe(bench.model, "sdpa").encode,
        "VisionTextDualEncoderModel": peers.vision_text_dual_encoder(bench.model).encode,
        "sentence-transformers": partial(
            peers.sentence_transformer(bench.model, bench.folder / "sentence-transformers").encode,
            batch_size=peers.BATCH_SIZE,
        ),
        "CLIPModel (77 tokens)": peers.clip(bench.size).encode,
    }
    try:
        encoders["open_clip (77 tokens)"] = peers.OpenClip().encode
    except Exception as error:  # a torchvision that does not match torch raises many types of errors
        bench.notes.append(f"open_clip was not measured: {error}")
    rows = []
    for kind, texts in kinds.items():
        calls = {name: partial(encoder, texts) for name, encoder in encoders.items()}
        seconds = bench.turns(kind, calls)
        bench.rates[kind] = {name: len(texts) / seconds[name] for name in calls}

        exact = bench.encode(bench.model, texts)
        for name, target, cosine in (
            ("lotlip-hf", 1.1 if kind == "long texts" else 2.5, None),
            ("lotlip-hf, bfloat16", 3, 0.999),
            ("lotlip-hf, int8 ONNX", 5, 0.98),
        ):
            work, rates = f"{kind}, {PRECISION[name]}", bench.rates[kind]
            detail = f"{rates[name]:.1f} and {rates[OFFICIAL]:.1f} texts/s"
            beside = OFFICIAL if cosine is None else f"{OFFICIAL}, fp32"
            ratio = rates[name] / rates[OFFICIAL]
            rows.append(Row(work, beside, ratio, target, detail=detail, profile=calls[name]))
            if cosine is not None:
                cosines = (calls[name]() * exact).sum(-1)
                detail = f"mean {cosines.mean():.5f}"
                rows.append(Row(work, "fp32", cosines.min().item(), cosine, unit="cosine", detail=detail))
    return rows


PRECISION = {"lotlip-hf": "fp32", "lotlip-hf, bfloat16": "bf16", "lotlip-hf, int8 ONNX": "int8 ONNX"}


def engines(bench: Bench) -> list[Row]:
    """Encodes long texts and images with each engine and precision, beside the official recipe and other packages."""
    torch_bf16 = load_encoder(bench.checkpoint, dtype="bfloat16")
    encoders = {"torch fp32": Encoder(bench.model, bench.processor), "torch bf16": torch_bf16}
    for name, export in (("ONNX", export_onnx), ("OpenVINO", export_openvino)):
        for precision in (None, "int8"):
            folder = bench.folder / f"engines-{name}-{precision}"
            export(bench.checkpoint, folder, quantize=precision)
            encoders[f"{name} {precision or 'fp32'}"] = load_encoder(folder)
            if name == "OpenVINO" and precision is None:
                encoders["OpenVINO bf16"] = load_encoder(folder, dtype="bfloat16")
    texts = bench.captions[: bench.num_texts]
    side = bench.model.config.vision_config.image_size
    pictures = [Image.open(path).convert("RGB").resize((side, side)) for path in photographs(bench.folder / "own")]
    pictures *= -(-bench.num_texts // len(pictures))
    others: dict[str, Callable[[Sequence[str]], Any]] = {f"{OFFICIAL} fp32": peers.OfficialRecipe(bench.model).encode}
    for name, make in (
        (
            "sentence-transformers OpenVINO",
            partial(peers.sentence_transformer, bench.model, bench.folder / "st", True),
        ),
        ("open_clip fp32 (77 tokens)", peers.OpenClip),
    ):
        try:
            others[name] = make().encode
        except Exception as error:  # an optional package that is missing, or does not match the others
            bench.notes.append(f"{name} was not measured: {type(error).__name__}: {error}")
    rows = []
    for kind in ("long texts", "images"):
        calls: dict[str, Call] = {}
        for name, encoder in encoders.items():
            encode = encoder.encode_texts if kind == "long texts" else encoder.encode_images
            calls[name] = partial(encode, texts if kind == "long texts" else pictures, progress=False)
        if kind == "long texts":
            calls |= {name: partial(encode, texts) for name, encode in others.items()}
        seconds = bench.turns(f"{kind}, engines", calls)
        number = len(texts if kind == "long texts" else pictures)
        rates = bench.rates[f"{kind}, engines"] = {name: number / each for name, each in seconds.items()}
        for name, beside, target in ENGINE_TARGETS[kind]:
            detail = f"{rates[name]:.1f} and {rates[beside]:.1f} {kind.split()[-1]}/s"
            rows.append(Row(f"{kind}, {name}", beside, rates[name] / rates[beside], target, detail=detail))
        if kind == "long texts":
            rows += shares_of_peak(bench, texts, rates)
        exact = calls["torch fp32"]()
        for name in encoders:
            if name.endswith("int8"):
                cosines = (torch.as_tensor(calls[name]()) * exact).sum(-1)
                detail = f"mean {cosines.mean():.5f}"
                rows.append(Row(f"{kind}, {name}", "fp32", cosines.min().item(), 0.98, unit="cosine", detail=detail))
    return rows


def shares_of_peak(bench: Bench, texts: Sequence[str], rates: Mapping[str, float]) -> list[Row]:
    """How near the encoding of texts is to the speed of bare matrix products, which no engine can exceed by much."""
    layers = [one for one in bench.model.text_model.backbone.modules() if isinstance(one, torch.nn.Linear)]
    weights = sum(one.weight.numel() for one in layers)
    tokens = sum(map(len, bench.processor.tokenizer(list(texts), truncation=True, verbose=False)["input_ids"]))
    needed = 2 * weights * tokens / len(texts)  # operations of a text
    width, inner = layers[0].in_features, max(one.out_features for one in layers)
    left, right = torch.randn(1024, width), torch.randn(width, inner)
    calls: dict[str, Call] = {"fp32": partial(torch.mm, left, right)}
    calls["bf16"] = partial(torch.mm, left.bfloat16(), right.bfloat16())
    calls["int8"] = partial(torch._int_mm, (20 * left).to(torch.int8), (20 * right).to(torch.int8))
    seconds = in_turns(calls, 20, "matrix products")
    rows = []
    for precision, each in seconds.items():
        peak = 2 * left.numel() * inner / each
        for engine in ("torch", "ONNX", "OpenVINO"):
            if (name := f"{engine} {precision}") in rates:
                share = rates[name] * needed / peak
                detail = f"{rates[name] * needed / 1e9:.0f} and {peak / 1e9:.0f} billion operations/s"
                rows.append(
                    Row(f"long texts, {name}", "products of PyTorch", share, 0.7, unit="of them", detail=detail)
                )
    return rows


# Of each kind: an engine, that beside it, and the least ratio of their speeds
ENGINE_TARGETS: dict[str, list[tuple[str, str, float]]] = {
    "long texts": [
        ("OpenVINO fp32", "torch fp32", 1.8),
        ("OpenVINO bf16", "torch bf16", 1.0),
        ("OpenVINO int8", "ONNX int8", 1.4),
        ("OpenVINO int8", f"{OFFICIAL} fp32", 8),
    ],
    "images": [
        ("OpenVINO fp32", "torch fp32", 1.0),
        ("OpenVINO bf16", "torch bf16", 1.0),
        ("OpenVINO int8", "torch fp32", 2.5),
    ],
}


def bare(bench: Bench) -> list[Row]:
    """Encodes long texts, compared with a stock BertModel on the same tokens in ideal batches."""
    texts = bench.captions[: bench.num_texts]
    calls = {
        "ours": partial(bench.encode, bench.model, texts),
        "bare": partial(run_batches, stock_model(bench.model), bench.batches(texts)),
    }
    seconds = bench.turns("bare BertModel", calls)
    detail = f"{len(texts) / seconds['ours']:.1f} and {len(texts) / seconds['bare']:.1f} texts/s"
    ratio = seconds["bare"] / seconds["ours"]
    return [Row("long texts, fp32", "bare BertModel, same tokens", ratio, 0.98, detail=detail, profile=calls["ours"])]


def mixed(bench: Bench) -> list[Row]:
    """Encodes many texts of mixed lengths with a very small BERT, so that the overhead around it is visible."""
    model = bench.model if bench.size == "tiny" else peers.make_model("mini")
    stock = stock_model(model)
    choose = random.Random(0)
    texts = []
    for index in range(bench.num_mixed):
        sentences = split_sentences(bench.captions[index % len(bench.captions)])
        texts.append(". ".join(sentences[: choose.randint(1, len(sentences))]))
    calls = {
        "ours": lambda: Encoder(model, bench.processor).encode_texts(texts, progress=True),
        "ideal": partial(run_batches, stock, bench.batches(texts)),
    }
    seconds = bench.turns("mixed lengths", calls)
    detail = f"{len(texts) / seconds['ours']:.0f} and {len(texts) / seconds['ideal']:.0f} texts/s"
    work = f"encode_texts, {len(texts):,} mixed lengths"
    return [
        Row(work, "its ideal batches", seconds["ideal"] / seconds["ours"], 0.9, detail=detail, profile=calls["ours"])
    ]


def tokenise(bench: Bench) -> list[Row]:
    """Cleans and tokenises texts."""
    recipe = peers.OfficialRecipe(peers.make_model("tiny"))

    tokenizer = bench.processor.tokenizer

    def parallel(function: Callable[..., Any], **arguments: Any) -> None:
        with peers.tokenizers_parallelism(True):
            function(bench.captions, **arguments)

    calls = {
        "tokenise, as encode_texts does": partial(parallel, partial(encode_unpadded, tokenizer)),
        "tokenise, by a call of the tokenizer": partial(parallel, tokenizer, truncation=True, verbose=False),
        "official": lambda: recipe.tokenize(bench.captions),
    }
    seconds = bench.turns("tokenise", calls)
    official = seconds.pop("official")
    rows = []
    for name, each in seconds.items():
        detail = f"{1e3 * each / len(bench.captions):.2f} and {1e3 * official / len(bench.captions):.2f} ms per text"
        rows.append(Row(name, "official loop", official / each, 3, detail=detail, profile=calls[name]))
    return rows


def loss_inputs(batch_size: int) -> list[torch.Tensor]:
    """Creates random embeddings: images [B, 768], texts [B, 2, 768] and corner tokens [B, 1, 2, 768], so K = 4."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch_size, 768), (batch_size, 2, 768), (batch_size, 1, 2, 768))
    return [F.normalize(torch.randn(shape, generator=generator), dim=-1).requires_grad_() for shape in shapes]


def run_loss(name: str, inputs: Sequence[torch.Tensor]) -> None:
    """Runs forward and backward of the tiled objective, or of the loss on the whole matrix of logits."""
    scale = torch.tensor(50.0)
    if name == "tiles":
        names = ("image_embeds", "text_embeds", "corner_embeds")
        loss = Objective({"infonce": InfoNCE()})(dict(zip(names, inputs, strict=True)), scale)["loss"]
    else:
        loss = lotlip_loss(*inputs, scale).loss
    loss.backward()
    for embeds in inputs:
        embeds.grad = None


def make_loss(name: str, batch_size: int) -> Call:
    """Creates a call of `run_loss`; runs a small one first, so that one-time allocations are not measured."""
    run_loss(name, loss_inputs(16))
    return partial(run_loss, name, loss_inputs(batch_size))


def loss(bench: Bench) -> list[Row]:
    """Computes the loss of a large batch in tiles, compared with the whole matrix of logits."""
    held = {name: peak_memory(make_loss, name, bench.loss_batch_size) for name in ("tiles", "whole")}
    inputs = loss_inputs(bench.loss_batch_size)
    calls = {name: partial(run_loss, name, inputs) for name in ("tiles", "whole")}
    seconds = bench.turns("loss", calls)
    work = f"loss at B = {bench.loss_batch_size}, K = 4"
    mebibytes, time = (
        f"{each['tiles']:.{digits}f} and {each['whole']:.{digits}f}" for each, digits in ((held, 0), (seconds, 1))
    )
    return [
        Row(work, "whole logits", held["tiles"] / held["whole"], 1 / 8, True, "of the memory", f"{mebibytes} MiB"),
        Row(
            *(work, "whole logits", seconds["tiles"] / seconds["whole"], 1.3, True, "of the time", f"{time} s"),
            profile=calls["tiles"],
        ),
    ]


def load(bench: Bench) -> list[Row]:
    """Loads the model, compared with the two stock encoders with the same weights."""
    stock = stock_model(bench.model)
    stock.text_model.save_pretrained(bench.folder / "bert")
    stock.vision_model.save_pretrained(bench.folder / "vit")

    def both() -> None:
        BertModel.from_pretrained(bench.folder / "bert")
        ViTModel.from_pretrained(bench.folder / "vit")

    calls = {"ours": partial(LoTLIPModel.from_pretrained, bench.checkpoint), "stock": both}
    seconds = bench.turns("from_pretrained", calls)
    detail = f"{seconds['ours']:.2f} and {seconds['stock']:.2f} s"
    ratio = seconds["ours"] / seconds["stock"]
    return [
        Row(
            *("from_pretrained", "BertModel + ViTModel", ratio, 1.1, True, "of the time", detail),
            profile=calls["ours"],
        )
    ]


def photographs(folder: Path, count: int = 8) -> list[Path]:
    """Writes JPEG files of 12 megapixels, each a mosaic of scikit-learn's two photographs."""
    parts = [np.asarray(image) for image in load_sample_images().images]
    choose = np.random.default_rng(0)
    folder.mkdir()
    paths = []
    for number in range(count):
        canvas = np.empty((3000, 4000, 3), dtype=np.uint8)
        for top, left in itertools.product(range(0, 3000, 400), range(0, 4000, 600)):
            tile = canvas[top : top + 400, left : left + 600]
            part = np.rot90(parts[choose.integers(2)], 2 * choose.integers(2))
            tile[:] = part[: tile.shape[0], : tile.shape[1]]
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(canvas).save(paths[-1], quality=90)
    return paths


def images(bench: Bench) -> list[Row]:
    """Reads JPEG files and computes pixel values, compared with PIL."""
    paths = photographs(bench.folder / "photographs")
    image_processor = official_image_processor(224)

    def usual() -> torch.Tensor:
        batch = [Image.open(path).convert("RGB") for path in paths]
        return image_processor(images=batch, return_tensors="pt")["pixel_values"]

    def ours() -> torch.Tensor:
        batch = [load_image(path, image_processor=image_processor) for path in paths]
        return image_processor(images=batch, return_tensors="pt")["pixel_values"]

    seconds = bench.turns("images", {"ours": ours, "usual": usual})
    difference = (ours() - usual()).abs() * 255 / 2  # pixel values range from -1 to 1
    rates = " and ".join(f"{len(paths) / each:.1f}" for each in seconds.values())
    pixels = f"pixels differ by {difference.mean():.2f} of 255 on average, by {difference.max():.0f} at most"
    detail = f"{rates} images/s; {pixels}"
    ratio = seconds["usual"] / seconds["ours"]
    return [
        Row("JPEGs of 12 megapixels to pixel values", "PIL the usual way", ratio, 1.5, detail=detail, profile=ours)
    ]


def loss_of_batch(
    name: str, size: str, captions: Sequence[str], num_long_texts: int = 1
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """
    Creates a model in training mode and a function that computes the loss of a batch. Each caption gives a random
    image, its first sentence as the short text, and `num_long_texts` sub-captions of three sentences.
    """
    model = peers.make_model(size).train()
    processor = peers.make_processor(model)
    sentences = [split_sentences(caption) for caption in captions]
    choose = random.Random(0)
    starts = [[choose.randrange(max(1, len(one) - 2)) for _ in range(num_long_texts)] for one in sentences]
    short = [one[0] + "." for one in sentences]
    long = [[". ".join(one[i : i + 3]) for i in own] for one, own in zip(sentences, starts, strict=True)]
    side = model.config.vision_config.image_size
    pixel_values = torch.randn(len(captions), 3, side, side)
    if name == OFFICIAL:
        recipe = peers.OfficialTraining(model)
        ids = recipe.text.tokenize(short), torch.stack([recipe.text.tokenize(texts) for texts in long])
        return recipe, lambda: recipe(pixel_values, *ids)
    model.text_model.set_attn_implementation("unpadded")  # as `lotlip_hf.training.loop` does
    of_long = {f"long_{name}": ids for name, ids in processor(text=long, return_tensors="pt").items()}
    batch = {"pixel_values": pixel_values, **processor(text=short, return_tensors="pt"), **of_long}
    objective = Objective({"infonce": InfoNCE()})
    return model, lambda: batch_loss(model, batch, objective)["loss"]


def step(bench: Bench) -> list[Row]:
    """Runs a float32 training step with one short and one long text per image: forward, loss, backward, AdamW."""
    captions = bench.captions[: bench.batch_size]
    calls = {name: training_step(*loss_of_batch(name, bench.size, captions)) for name in ("ours", OFFICIAL)}
    seconds = bench.turns("training step", calls)
    detail = " and ".join(f"{bench.batch_size / each:.2f}" for each in seconds.values()) + " images/s"
    ratio = seconds[OFFICIAL] / seconds["ours"]
    work = f"training step, 1 short + 1 long text, batch {bench.batch_size}"
    return [Row(work, OFFICIAL, ratio, 1.5, detail=detail, profile=calls["ours"])]


def frozen(bench: Bench) -> list[Row]:
    """
    Trains 3 epochs with a locked image tower of ViT-S/16's shape, with states that an earlier run kept, compared with
    states that are computed in every step. The text tower is smaller, and each picture has a short and a long text.
    """
    size, text_size = {"base": ("small", "mini"), "mini": ("mini", "tiny")}.get(bench.size, (bench.size, bench.size))
    records = scenes_dataset(NUM_PICTURES)
    numbers = itertools.count()
    losses: dict[str, list[float]] = {}

    def run(name: str, **options: Any) -> None:
        model = peers.make_model(size, text_size)
        output = bench.folder / f"frozen-{next(numbers)}"
        settings = {"batch_size": 64, "num_epochs": 3, "num_long_texts": 1, "num_workers": 0, "log_steps": 1}
        config = TrainingConfig(output=str(output), lock_vision=True, trackers=[], **settings, **options)
        train(model, peers.make_processor(model), records, config)
        losses[name] = [entry["loss"] for entry in read_log(output)]

    calls = {
        "kept": partial(run, "kept", cache=str(bench.folder / "states")),
        "computed": partial(run, "computed", no_cache=True),
    }
    seconds = in_turns(calls, min(bench.repeats, 2), "locked image tower")
    work = f"locked image tower, 3 epochs over {NUM_PICTURES} pictures, kept states"
    detail = f"{seconds['kept']:.1f} and {seconds['computed']:.1f} s"
    difference = float(np.abs(np.subtract(losses["kept"], losses["computed"])).max())
    return [
        Row(work, "computed states", seconds["computed"] / seconds["kept"], 3, detail=detail, profile=calls["kept"]),
        Row(
            f"{work}: losses",
            "computed states",
            difference,
            1e-5,
            True,
            "of difference",
            f"{len(losses['kept'])} steps",
        ),
    ]


def training_step(model: nn.Module, compute_loss: Callable[[], torch.Tensor]) -> Call:
    """Creates a training step with a new optimiser."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        compute_loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_step(name: str, size: str, captions: Sequence[str], num_long_texts: int) -> Call:
    """Creates a step without an optimiser; runs a small one first, so that one-time allocations are not measured."""
    _, of_small = loss_of_batch(name, "one layer", captions[:2], num_long_texts)
    of_small().backward()
    _, compute_loss = loss_of_batch(name, size, captions, num_long_texts)
    return lambda: compute_loss().backward()


def long_step(attention: str, size: str) -> Call:
    """
    Creates forward and backward of a ModernBERT of four layers, two of them with sliding windows, for eight texts of
    50 to 2,048 tokens and their corner tokens. The other sizes than "base" have shorter texts.
    """
    torch.manual_seed(0)
    longest = 2048 if size == "base" else 100
    names = ("pad", "bos", "cls", "eos", "sep")
    ids = {f"{name}_token_id": index for index, name in enumerate(names)}
    config = ModernBertConfig(**{**peers.SIZES["mini"], "intermediate_size": 384}, **ids, vocab_size=1000)
    model = LoTLIPTextModel(LoTLIPTextConfig(backbone_config=config, projection_dim=None)).train()
    model.set_attn_implementation(attention)
    lengths = [round(50 * (longest / 50) ** (index / 7)) for index in range(8)]
    texts = nn.utils.rnn.pad_sequence([torch.randint(5, 1000, (each,)) for each in lengths], batch_first=True)

    def step() -> None:
        outputs = model(texts, pooled_only=True)
        (outputs.pooler_output.sum() + outputs.corner_embeds.sum()).backward()
        model.zero_grad()

    return step


def long(bench: Bench) -> list[Row]:
    """Trains on texts of very different lengths in a row without padding, compared with padded texts."""
    calls = {attention: long_step(attention, bench.size) for attention in ("unpadded", "sdpa")}
    seconds = bench.turns("long texts", calls)
    held = {attention: peak_memory(long_step, attention, bench.size) for attention in calls}
    work, beside = "training step of ModernBERT, 8 texts of 50 to 2,048 tokens", "padded texts, sdpa"
    time, mebibytes = (" and ".join(f"{each:.1f}" for each in values.values()) for values in (seconds, held))
    return [
        Row(
            *(work, beside, seconds["sdpa"] / seconds["unpadded"], 2),
            detail=f"{time} s",
            profile=calls["unpadded"],
        ),
        Row(work, beside, held["unpadded"] / held["sdpa"], 0.5, True, "of the memory", f"{mebibytes} MiB"),
    ]


def patches(bench: Bench) -> list[Row]:
    """Runs a float32 training step of the image tower on a random half of the patches (`--patch-dropout 0.5`)."""
    model = peers.make_model(bench.size).vision_model.train()
    side, number = model.config.image_size, model.config.num_patches
    pixel_values = torch.randn(bench.batch_size, 3, side, side)
    half = torch.stack([torch.randperm(number)[: number // 2].sort().values for _ in range(bench.batch_size)])

    def compute_loss(kept: torch.Tensor | None) -> torch.Tensor:
        return model(pixel_values, kept_patches=kept, pooled_only=True).pooler_output.square().mean()

    calls = {name: training_step(model, partial(compute_loss, kept)) for name, kept in (("half", half), ("all", None))}
    seconds = bench.turns("patches", calls)
    detail = " and ".join(f"{bench.batch_size / each:.2f}" for each in seconds.values()) + " images/s"
    work = f"training step of the image tower, half of the patches, batch {bench.batch_size}"
    ratio = seconds["half"] / seconds["all"]
    return [Row(work, "all patches", ratio, 0.65, True, "of the time", detail, profile=calls["half"])]


def memory(bench: Bench) -> list[Row]:
    """Measures the peak memory of activations, similarities and gradients in a training step."""
    wide = bench.loss_batch_size // 4
    rows = []
    for size, batch_size, texts, target, towers in (
        (bench.size, bench.batch_size, "1 long text", 0.8, ""),
        ("one layer", wide, "3 long texts", 0.5, ", towers of one layer"),
    ):
        captions = list(itertools.islice(itertools.cycle(bench.captions), batch_size))
        held = {name: peak_memory(make_step, name, size, captions, int(texts[0])) for name in ("ours", OFFICIAL)}
        work = f"training step, 1 short + {texts}, batch {batch_size}{towers}"
        detail = " and ".join(f"{each:.0f}" for each in held.values()) + " MiB"
        rows.append(Row(work, OFFICIAL, held["ours"] / held[OFFICIAL], target, True, "of the memory", detail))
    return rows


def device(bench: Bench) -> list[Row]:
    """Measures the shares of a GPU's matmul peak, if there is a GPU."""
    if not torch.cuda.is_available():
        bench.notes.append("The share of the matmul peak was not measured: there is no GPU.")
        return []
    result = peak.measure(bench.size, "cuda", repeats=bench.repeats)
    bench.notes += result["notes"]
    work = f"ViT-B/16 + BERT-base in bf16, batch {result['batch_size']}"
    rows = [
        Row(
            *(f"{name}, {work}", f"matmul peak of {result['device']}", values["fraction_of_peak"]),
            target=0.5 if name.endswith(peak.STEP) else 0.7,
            unit="of the peak",
            detail=f"{values['samples_per_second']:.0f} samples/s",
        )
        for name, values in result["works"].items()
    ]
    return [*rows, Row(f"training step, {work}", OFFICIAL, result["times_the_official_step"], 3)]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "load": load,
    "tokenise": tokenise,
    "images": images,
    "encode": encode,
    "engines": engines,
    "bare": bare,
    "mixed": mixed,
    "step": step,
    "long": long,
    "patches": patches,
    "frozen": frozen,
    "loss": loss,
    "memory": memory,
    "device": device,
}


def read_captions(path: Path | None) -> list[str]:
    """Reads texts from a JSONL file with `{"text": "..."}` on each line, or returns long captions of Scenes."""
    if path is None:
        return [captions[0] for captions in scenes_dataset(NUM_SCENES, split="test")["long_captions"]]
    captions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            caption = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: expected {{"text": "..."}} ({error!r}).') from error
        if not isinstance(caption, str) or not split_sentences(caption):
            raise ValueError(f"{path}, line {number}: `text` must be a caption, got {caption!r}.")
        captions.append(caption)
    if not captions:
        raise ValueError(f'{path}: no captions. Write {{"text": "..."}} on each line.')
    return captions


def profile(call: Call) -> str:
    """Profiles a call: Python functions, then PyTorch operations, both sorted by time without nested calls."""
    python = cProfile.Profile()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operations:
        python.runcall(call)
    text = io.StringIO()
    pstats.Stats(python, stream=text).strip_dirs().sort_stats("tottime").print_stats(15)
    table = operations.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
    return f"{text.getvalue()}\n{table}\n"


def tables(results: Path) -> str:
    """Formats the last result of each part in Markdown: first the targets, then texts per second."""
    latest = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        latest[entry["part"]] = entry
    lines = ["| work | beside | target | measured | |", "| --- | --- | --- | --- | --- |"]
    for part in PARTS:
        for values in latest.get(part, {"rows": []})["rows"]:
            row = Row(**values)
            limit = "<=" if row.at_most else ">="
            verdict = "holds" if row.holds else "**missed**"
            measured = f"{row.ratio:.4g} {row.unit}"
            lines.append(
                f"| {row.work} | {row.beside} | {limit} {row.target:.3g} {row.unit} | {measured} | {verdict} |"
            )
    for part, unit in (("encode", "texts"), ("engines", "texts or images")):
        rates = latest.get(part, {}).get("rates", {})
        if rates:
            lines += ["", f"| {unit} a second | {' | '.join(rates)} |", f"| --- |{' --- |' * len(rates)}"]
        for name in next(iter(rates.values()), ()):
            shown = (f"{kind[name]:.1f}" if name in kind else "" for kind in rates.values())
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, saves and prints all parts. Missed targets do not change the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help='file with {"text": "..."} on each line; default: Scenes')
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure; default: all")
    parser.add_argument("--size", choices=peers.SIZES, default="base", help="size of the models")
    parser.add_argument("--num-texts", type=int, default=64, help="number of texts to encode in each turn")
    parser.add_argument("--num-mixed", type=int, default=10_000, help="number of texts of mixed lengths")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a training step")
    parser.add_argument("--loss-batch-size", type=int, default=8192, help="images in the loss")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to which results are appended")
    parser.add_argument("--table", action="store_true", help="only print the last results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.table:
        print(tables(arguments.results))
        return 0
    try:
        captions = read_captions(arguments.captions)
    except (OSError, ValueError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    sizes = {
        name: getattr(arguments, name)
        for name in ("size", "num_texts", "num_mixed", "batch_size", "loss_batch_size", "repeats")
    }
    missed = []
    with quiet(), tempfile.TemporaryDirectory() as folder:
        bench = Bench(captions=captions, folder=Path(folder), **sizes)
        for part in arguments.only or PARTS:
            bench.rates = {}
            rows = PARTS[part](bench)
            for row in rows:
                print(row, flush=True)
                if not row.holds and row.profile is not None:
                    missed.append(write_profile(row, arguments.results.parent / "profiles"))
            entry = {
                "part": part,
                "captions": {
                    "file": arguments.captions.name if arguments.captions else "Scenes",
                    "count": len(captions),
                },
                **sizes,
                "rows": [row.values() for row in rows],
                **({"rates": bench.rates} if bench.rates else {}),
                **machine("sentence-transformers", "onnxruntime", "openvino", "open_clip_torch", "tokenizers"),
            }
            keep(entry, arguments.results)
        for note in bench.notes:
            print(note)
    print(f"\n{tables(arguments.results)}\n\nAppended to {arguments.results}")
    for file in missed:
        print(f"Profile of a missed target: {file}")
    return 0


@contextmanager
def quiet() -> Iterator[None]:
    """Hides log messages about truncated texts, and messages and progress bars about loading."""
    logger = logging.getLogger("lotlip_hf")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    has_bar = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()


def write_profile(row: Row, folder: Path) -> Path:
    """Writes the profile of a missed target to a file named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{re.sub('[^a-z0-9]+', '-', row.work.lower()).strip('-')}.txt"
    file.write_text(f"{row}\n\n{profile(row.profile)}", encoding="utf-8")
    return file


if __name__ == "__main__":
    raise SystemExit(main())
