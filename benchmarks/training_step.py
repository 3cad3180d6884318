"""How much of a machine a training step of ViT-B/16 + BERT-base uses: samples per second, share of the matmul peak.

    python benchmarks/training_step.py --batch-size 256 --num-long-texts 1

Takes whole steps (forward, loss, backward, AdamW) in bf16 on random input of the released model's shape, counts their
floating-point operations, those that gradient checkpointing repeats included, and sets them against what large matrix
products reach on the same device. Adds a line to `benchmarks/results/training_step.jsonl`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import trange
from transformers import BertConfig, ViTConfig

from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPTextConfig, LoTLIPVisionConfig, __version__
from lotlip_hf.training.objective import Objective, batch_loss, clamp_logit_scale

RESULTS = Path(__file__).resolve().parent / "results" / "training_step.jsonl"
SHORT_LENGTH, LONG_LENGTH = 24, 126
MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}


def make_model(size: str) -> LoTLIPModel:
    """The released ViT-B/16 model's shape, or a tiny one; random weights."""
    vision = {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
    text: dict[str, Any] = {}
    if size == "tiny":
        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        vision, text = {**vision, **small, "image_size": 32}, small
    width = BertConfig(**text).hidden_size
    return LoTLIPModel(
        LoTLIPConfig(
            text_config=LoTLIPTextConfig(
                backbone_config=BertConfig(**text), num_corner_tokens=2, projection_dim=width
            ),
            vision_config=LoTLIPVisionConfig(backbone_config=ViTConfig(**vision), pooling="cls"),
            projection_dim=width,
        )
    )


def make_batch(model: LoTLIPModel, batch_size: int, num_long_texts: int, device: str) -> dict[str, torch.Tensor]:
    """Random images and texts without padding."""
    config = model.config
    size = config.vision_config.backbone_config.image_size

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(1000, config.text_config.backbone_config.vocab_size, shape, device=device)

    batch = {
        "pixel_values": torch.randn(batch_size, 3, size, size, device=device),
        "input_ids": words(batch_size, SHORT_LENGTH),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if num_long_texts:
        batch["long_input_ids"] = words(batch_size, num_long_texts, LONG_LENGTH)
        batch["long_attention_mask"] = torch.ones_like(batch["long_input_ids"])
    return batch


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Wall-clock time of a call, to its end on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the best matmul and the median step, taken in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-long-texts", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", choices=MATRIX_SIZE, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the result is added to")
    arguments = parser.parse_args(argv)
    device = arguments.device

    torch.manual_seed(0)
    model = make_model(arguments.size).to(device).train()
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    batch = make_batch(model, arguments.batch_size, arguments.num_long_texts, device)
    objective = Objective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = batch_loss(model, batch, objective)
        loss.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale(model)

    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    if arguments.compile:
        model.compile()
    for _ in range(3):  # warm-up, and compilation
        step()

    size = MATRIX_SIZE[device]
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    steps, products = [], []
    for _ in trange(arguments.steps, desc="Steps", unit="step"):
        steps.append(seconds_of(step, device))
        products.append(seconds_of(lambda: matrix @ matrix, device))
    peak = 2 * size**3 / min(products)
    seconds = statistics.median(steps)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "lotlip_hf": __version__},
        **{
            name: getattr(arguments, name)
            for name in ("size", "batch_size", "num_long_texts", "compile", "gradient_checkpointing")
        },
        "seconds_per_step": seconds,
        "samples_per_second": arguments.batch_size / seconds,
        "teraflops_per_second": operations / seconds / 1e12,
        "matmul_peak_teraflops_per_second": peak / 1e12,
        "fraction_of_peak": operations / seconds / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{result['samples_per_second']:.1f} samples/s, {result['fraction_of_peak']:.1%} of the matmul peak")
    print(f"({peak / 1e12:.2f} TFLOP/s on {result['device']}); added to {arguments.results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
