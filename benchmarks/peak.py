"""Measures the share of a device's matmul peak that ViT-B/16 + BERT-base reach in bf16, in training and encoding.

    python benchmarks/peak.py                                # on the GPU, with the largest batch that fits
    python benchmarks/peak.py --batch-size 256 --only sdpa compiled
    python benchmarks/peak.py --device cpu --batch-size 8

All ways to compute take turns in one run, meant to take less than five minutes on a GPU: padded texts with sdpa, texts
in a row with unpadded or flex attention, and padded texts compiled. The model has the shape of the released model.
Images and texts are random; texts have from half to all of the tokens. The share is the operations per second that
texts without padding need (with those that gradient checkpointing repeats), divided by those of large matrix products.
The training step is also compared with that of the official recipe, which pads short and long texts to 128 tokens. The
result is appended to `benchmarks/results/peak.jsonl`.
"""

import argparse
import copy
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
LARGEST_BATCH = 2048
# Ways to compute: attention of the text tower, and whether the model is compiled
WAYS: dict[str, tuple[str, bool]] = {
    "sdpa": ("sdpa", False),
    "unpadded": ("unpadded", False),
    "flex": ("flex_attention", False),
    "compiled": ("sdpa", True),
}
STEP = "training step"


def make_batch(model: LoTLIPModel, batch_size: int, num_long_texts: int, device: str) -> dict[str, torch.Tensor]:
    """Creates random images, and texts that have from half to all of the tokens."""
    config = model.config
    size = config.vision_config.backbone_config.image_size
    generator = torch.Generator().manual_seed(0)

    def texts(prefix: str, length: int, *shape: int) -> dict[str, torch.Tensor]:
        vocabulary = config.text_config.backbone_config.vocab_size
        ids = torch.randint(1000, vocabulary, (*shape, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (*shape, 1), generator=generator)
        mask = torch.arange(length) < lengths
        return {
            f"{prefix}input_ids": ids.where(mask, 0).to(device),
            f"{prefix}attention_mask": mask.long().to(device),
        }

    batch = {"pixel_values": torch.randn(batch_size, 3, size, size, generator=generator).to(device)}
    batch |= texts("", SHORT_LENGTH, batch_size)
    return batch | texts("long_", LONG_LENGTH, batch_size, num_long_texts) if num_long_texts else batch


def make_works(
    model: LoTLIPModel, attention: str, batch_size: int, num_long_texts: int, device: str
) -> dict[str, Callable[[], Any]]:
    """Creates the calls to measure, on `batch_size` samples each. A call sets mode and attention itself."""
    batch = make_batch(model, batch_size, num_long_texts, device)
    objective = Objective({"infonce": InfoNCE()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.train().text_model.set_attn_implementation(attention)
        with torch.autocast(device, torch.bfloat16):
            loss = batch_loss(model, batch, objective)
        loss["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale(model)

    def encode(function: Callable[..., Any], **inputs: torch.Tensor) -> None:
        model.eval().text_model.set_attn_implementation(attention)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            function(**inputs)

    long = {name: ids[:, 0] for name, ids in make_batch(model, batch_size, 1, device).items() if name[:5] == "long_"}
    texts = {name.removeprefix("long_"): ids.contiguous() for name, ids in long.items()}
    works = {STEP: step, "long texts": lambda: encode(model.get_text_features, **texts, pooled_only=True)}
    if attention == "sdpa":  # the attention of images is the same in all ways
        works["images"] = lambda: encode(
            model.get_image_features, pixel_values=batch["pixel_values"], pooled_only=True
        )
    return works


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
    repeats: int = 10,
    only: Sequence[str] | None = None,
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
        repeats (`int`, *optional*, defaults to 10): Number of turns.
        only (`Sequence[str]`, *optional*): Ways to compute; see `WAYS`. Defaults to all, on a CPU without `"flex"`.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Whether to use gradient checkpointing.

    Returns:
        `dict[str, Any]`: By way and work: time, samples per second, operations per second and share of the peak; the
        peak; the time of the official step divided by that of our fastest; and `notes` of ways that failed.
    """
    torch.manual_seed(0)
    model = peers.make_model(size).to(device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if batch_size is None:
        batch_size = largest_that_fits(lambda n: make_works(model, "sdpa", n, num_long_texts, device)[STEP]())
    operations = {}
    for attention in ("unpadded", "sdpa"):  # of texts without padding, and of images
        for name, work in make_works(model, attention, batch_size, num_long_texts, device).items():
            with FlopCounterMode(display=False) as counter:
                work()
            operations.setdefault(name, counter.get_total_flops())
    calls: dict[str, Callable[[], Any]] = {}
    notes = []
    for way in only or [way for way in WAYS if device != "cpu" or way != "flex"]:
        attention, is_compiled = WAYS[way]
        used = copy.deepcopy(model) if is_compiled else model
        if is_compiled:  # the towers, which encoding and training share
            used.text_model.compile(dynamic=True)
            used.vision_model.compile(dynamic=True)
        works = make_works(used, attention, batch_size, num_long_texts, device)
        try:
            for work in works.values():
                work()
        except Exception as error:  # the other ways are worth a run on a GPU
            notes.append(f"{way} was not measured: {type(error).__name__}: {error}")
            continue
        calls |= {f"{way}: {name}": work for name, work in works.items()}
    matrix = torch.randn(MATRIX_SIZE[device], MATRIX_SIZE[device], device=device, dtype=torch.bfloat16)
    timed = {**calls, "matmul": lambda: matrix @ matrix}
    if num_long_texts == 1:
        timed["official step"] = make_official_step(peers.make_model(size).to(device), batch_size, device)
    seconds = in_turns(timed, repeats, device, device)
    peak = 2 * MATRIX_SIZE[device] ** 3 / seconds["matmul"]
    fastest = min((seconds[name] for name in calls if name.endswith(STEP)), default=None)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **{"size": size, "batch_size": batch_size, "num_long_texts": num_long_texts, "repeats": repeats},
        "gradient_checkpointing": gradient_checkpointing,
        "matmul_peak_teraflops_per_second": peak / 1e12,
        "works": {
            name: {
                "seconds": seconds[name],
                "samples_per_second": batch_size / seconds[name],
                "teraflops_per_second": (number := operations[name.partition(": ")[2]]) / seconds[name] / 1e12,
                "fraction_of_peak": number / seconds[name] / peak,
            }
            for name in calls
        },
        "times_the_official_step": seconds["official step"] / fastest if fastest and num_long_texts == 1 else None,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "notes": notes,
        **machine(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, saves and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, help="samples in a batch; default: the largest on a GPU, 8 on a CPU")
    parser.add_argument("--num-long-texts", type=int, default=1, help="long texts per image in the training step")
    parser.add_argument("--repeats", type=int, default=10, help="number of turns")
    parser.add_argument("--size", choices=peers.SIZES, default="base", help="size of the model")
    parser.add_argument("--only", nargs="+", choices=WAYS, help="ways to compute; default: all, on a CPU without flex")
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
    for note in result["notes"]:
        print(note)
    if result["times_the_official_step"]:
        print(f"A training step of the official recipe takes {result['times_the_official_step']:.2f} times as long.")
    print(f"Matmul peak of {result['device']}: {result['matmul_peak_teraflops_per_second']:.2f} TFLOP/s.")
    print(f"Appended to {results}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
