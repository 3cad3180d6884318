"""Measures the share of a device's matmul peak that ViT-B/16 + BERT-base reach in bf16, in training and encoding.

    python benchmarks/peak.py                                # on the GPU, with the largest batch that fits
    python benchmarks/peak.py --batch-size 256 --compile
    python benchmarks/peak.py --device cpu --batch-size 8

The model has the shape of the released model. The inputs are random and without padding. The share is the model's
floating-point operations per second (with those that gradient checkpointing repeats), divided by those of large matrix
products. Both alternate on the same device. The training step is also compared with that of the official recipe, which
pads short and long texts to 128 tokens. The result is appended to `benchmarks/results/peak.jsonl`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import peers
from lotlip_hf import LoTLIPModel
from lotlip_hf.training.objective import Objective, batch_loss, clamp_logit_scale
from lotlip_hf.training.terms.infonce import InfoNCE
from measure import RESULTS as FOLDER
from measure import in_turns, keep, machine

RESULTS = FOLDER / "peak.jsonl"
SHORT_LENGTH, LONG_LENGTH = 24, peers.CONTEXT_LENGTH - peers.NUM_CORNER_TOKENS
MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}
LARGEST_BATCH = 4096


def make_batch(model: LoTLIPModel, batch_size: int, num_long_texts: int, device: str) -> dict[str, torch.Tensor]:
    """Creates random images and texts without padding."""
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


def make_works(model: LoTLIPModel, batch_size: int, num_long_texts: int, device: str) -> dict[str, Callable[[], Any]]:
    """Creates the calls to measure, on `batch_size` samples each. A call sets training or evaluation mode itself."""
    batch = make_batch(model, batch_size, num_long_texts, device)
    objective = Objective({"infonce": InfoNCE()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.train()
        with torch.autocast(device, torch.bfloat16):
            loss = batch_loss(model, batch, objective)
        loss["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale(model)

    def encode(function: Callable[..., Any], **inputs: torch.Tensor) -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            function(**inputs)

    texts = make_batch(model, batch_size, 1, device)["long_input_ids"][:, 0]
    mask = torch.ones_like(texts)
    return {
        "training step": step,
        "long texts": lambda: encode(model.get_text_features, input_ids=texts, attention_mask=mask),
        "images": lambda: encode(model.get_image_features, pixel_values=batch["pixel_values"]),
    }


def make_official_step(model: LoTLIPModel, batch_size: int, device: str) -> Callable[[], None]:
    """Creates a training step of the official recipe with one long text per image, on a copy of the text tower."""
    recipe = peers.OfficialTraining(model.train()).to(device)
    optimizer = torch.optim.AdamW(recipe.parameters(), lr=1e-4, fused=True)
    pixel_values = make_batch(model, batch_size, 0, device)["pixel_values"]
    short, long = (torch.zeros(batch_size, peers.CONTEXT_LENGTH, dtype=torch.int64, device=device) for _ in range(2))
    short[:, :SHORT_LENGTH] = long[:] = 1000

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = recipe(pixel_values, short, long[:, None])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def largest_that_fits(run: Callable[[int], Any], largest: int = LARGEST_BATCH) -> int:
    """Halves `largest` until `run` fits in the memory of the device, and returns the batch size."""
    batch_size = largest
    while True:
        try:
            run(batch_size)
            return batch_size
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            torch.cuda.empty_cache()
        batch_size //= 2


def measure(
    size: str,
    device: str,
    batch_size: int | None = None,
    num_long_texts: int = 1,
    repeats: int = 20,
    compile: bool = False,
    gradient_checkpointing: bool = False,
) -> dict[str, Any]:
    """
    Measures training and encoding, as described in the docstring of the module.

    Args:
        size (`str`): Size of the model; see `peers.SIZES`.
        device (`str`): `"cuda"` or `"cpu"`.
        batch_size (`int`, *optional*): Number of samples. By default the largest number for which a training step fits
            in the memory of the GPU.
        num_long_texts (`int`, *optional*, defaults to 1): Number of long texts per image in the training step.
        repeats (`int`, *optional*, defaults to 20): Number of turns.
        compile (`bool`, *optional*, defaults to `False`): Whether to compile the model.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Whether to use gradient checkpointing.

    Returns:
        `dict[str, Any]`: Time, samples per second, operations per second and share of the peak for each call; the
        peak; and the time of the official step divided by that of ours.
    """
    torch.manual_seed(0)
    model = peers.make_model(size).to(device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if batch_size is None:
        batch_size = largest_that_fits(lambda n: make_works(model, n, num_long_texts, device)["training step"]())
    works = make_works(model, batch_size, num_long_texts, device)
    operations = {}
    for name, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        operations[name] = counter.get_total_flops()
    if compile:
        model.compile()
        for work in works.values():
            work()
    matrix = torch.randn(MATRIX_SIZE[device], MATRIX_SIZE[device], device=device, dtype=torch.bfloat16)
    calls = {**works, "matmul": lambda: matrix @ matrix}
    if num_long_texts == 1:
        calls["official step"] = make_official_step(peers.make_model(size).to(device), batch_size, device)
    seconds = in_turns(calls, repeats, device, device)
    peak = 2 * MATRIX_SIZE[device] ** 3 / seconds["matmul"]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **{"size": size, "batch_size": batch_size, "num_long_texts": num_long_texts, "repeats": repeats},
        **{"compile": compile, "gradient_checkpointing": gradient_checkpointing},
        "matmul_peak_teraflops_per_second": peak / 1e12,
        "works": {
            name: {
                "seconds": seconds[name],
                "samples_per_second": batch_size / seconds[name],
                "teraflops_per_second": operations[name] / seconds[name] / 1e12,
                "fraction_of_peak": operations[name] / seconds[name] / peak,
            }
            for name in works
        },
        "times_the_official_step": seconds["official step"] / seconds["training step"]
        if num_long_texts == 1
        else None,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        **machine(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, saves and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, help="samples in a batch; default: the largest on a GPU, 8 on a CPU")
    parser.add_argument("--num-long-texts", type=int, default=1, help="long texts per image in the training step")
    parser.add_argument("--repeats", type=int, default=20, help="number of turns")
    parser.add_argument("--size", choices=peers.SIZES, default="base", help="size of the model")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="use gradient checkpointing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=MATRIX_SIZE, default=device, help="device of the model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to which the result is appended")
    arguments = vars(parser.parse_args(argv))
    results = arguments.pop("results")
    if arguments["batch_size"] is None and arguments["device"] == "cpu":
        arguments["batch_size"] = 8
    result = measure(**arguments)
    keep(result, results)
    for name, work in result["works"].items():
        rate, share = work["samples_per_second"], work["fraction_of_peak"]
        print(f"{name}: {rate:.1f} samples/s, {share:.1%} of the matmul peak")
    if result["times_the_official_step"]:
        print(f"A training step of the official recipe takes {result['times_the_official_step']:.2f} times as long.")
    print(f"Matmul peak of {result['device']}: {result['matmul_peak_teraflops_per_second']:.2f} TFLOP/s.")
    print(f"Appended to {results}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
