"""Put a BERT LoTLIP in the place of a pipeline's CLIP text encoder: train, from prompts alone, a small adapter.

    python examples/align_text_encoder.py --student checkpoint --teacher stable-diffusion --slot text_encoder \
        --prompts prompts.txt --adapter linear mlp resampler --output aligned
    python examples/swap_text_encoder.py --pipeline stable-diffusion --model aligned/mlp --prompt "a red house"

Neither the denoiser nor the student is trained. Leaves a folder for each adapter, which `swap_text_encoder` takes, and
`report.json` and `report.png` (drawn with `pip install lotlip-hf[train]`): how close each comes to the encoder that it
replaces on prompts that were held out, next to two answers that know nothing of the prompt.

"linear" and "mlp" map each token by itself and are matched word by word, "resampler" gives as many states as the
teacher and is matched by position; `lotlip_hf.alignment.Alignment` says why. It is built like ELLA's connector
(https://arxiv.org/abs/2403.05135), without the timestep. All learn the pooled output too, which Stable Diffusion XL
and 3 and Flux read. The teacher says nothing of what lies behind its last position, so prompts longer than that are
left out; of a longer one "linear" and "mlp" give out all tokens nevertheless, "resampler" reads all and gives a fixed
number.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from lotlip_hf import LoTLIPTextEncoder, LoTLIPTextModel
from lotlip_hf.alignment import MEASURES, Alignment, Batch, Words, tokenize_words
from lotlip_hf.modeling.tokenization_lotlip import clean

ADAPTERS = ("linear", "mlp", "resampler")
# Training prompts that the teacher's means and deviations are taken from.
SAMPLE = 512

Prompt = tuple[Words, Words]  # as the teacher's and as the student's tokenizer read it
Report = dict[str, dict[str, dict[str, float]]]


class Teacher(NamedTuple):
    """A CLIP text encoder, its tokenizer, and the hidden state that its pipeline reads (-1: the last, normalised)."""

    encoder: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: Any
    target_layer: int


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--student", required=True, help="LoTLIP checkpoint: a folder or a Hub id")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a pipeline, or of a CLIP text encoder")
    parser.add_argument("--slot", default="text_encoder", help="which text encoder of the pipeline")
    parser.add_argument("--teacher-tokenizer", type=Path, help="folder of its tokenizer, where it lies elsewhere")
    parser.add_argument("--target-layer", type=int, choices=(-1, -2), help="state to match; by default the pipeline's")
    parser.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt a line, or .jsonl")
    parser.add_argument("--field", default="prompt", help="field of a .jsonl file that holds the prompt")
    parser.add_argument("--adapter", nargs="+", choices=ADAPTERS, default=["mlp"], help="adapters to train")
    parser.add_argument("--output", type=Path, default=Path("aligned"), help="folder of the adapters and the report")
    parser.add_argument("--max-length", type=int, help="tokens of the student's prompts; by default all it takes")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the prompts to report on")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts in a batch")
    parser.add_argument("--num-epochs", type=int, default=3, help="how often to see every prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--device", default=device, help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="seed of the adapters, the order and the held-out prompts")
    return parser.parse_args(argv)


def load_teacher(args: argparse.Namespace) -> Teacher:
    """The encoder to be replaced, from the folder of a pipeline or its own."""
    folder, tokenizer_folder, target_layer = args.teacher, args.teacher_tokenizer or args.teacher, -1
    index = folder / "model_index.json"
    if index.is_file():
        folder, tokenizer_folder = folder / args.slot, folder / args.slot.replace("text_encoder", "tokenizer")
        # where the second encoder is a CLIP too, as in Stable Diffusion XL and 3, the last state but one is read
        second = json.loads(index.read_text(encoding="utf-8")).get("text_encoder_2") or (None, None)
        target_layer = -2 if (second[1] or "").startswith("CLIP") else -1
    config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
    if config is None or config.model_type not in ("clip", "clip_text_model"):
        raise SystemExit(f"{folder}: no CLIP text encoder, which --teacher (and --slot, of a pipeline) must name.")
    with_projection = "CLIPTextModelWithProjection" in (config.architectures or [])
    encoder_class = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    encoder = encoder_class.from_pretrained(folder, dtype=torch.float32).to(args.device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return Teacher(encoder, tokenizer, args.target_layer or target_layer)


def load_student(args: argparse.Namespace) -> tuple[LoTLIPTextModel, Any]:
    """The text tower, frozen, and its tokenizer."""
    tower = LoTLIPTextModel.from_pretrained(args.student, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    longest = min(tokenizer.model_max_length, tower.config.max_position_embeddings)
    if args.max_length and args.max_length > longest:
        raise SystemExit(f"--max-length {args.max_length}: {args.student} takes {longest} tokens.")
    tokenizer.model_max_length = args.max_length or longest
    return tower.requires_grad_(False), tokenizer


def read_prompts(args: argparse.Namespace, teacher_tokenizer: Any, student_tokenizer: Any) -> list[Prompt]:
    """The prompts, each once: one that is both trained on and held out would flatter the report."""
    texts = []
    for number, line in enumerate(args.prompts.read_text(encoding="utf-8").split("\n"), start=1):
        if args.prompts.suffix == ".jsonl" and line.strip():
            try:
                line = json.loads(line)[args.field]
            except (ValueError, TypeError, KeyError):  # no JSON, no object, no such field
                line = None
            if not isinstance(line, str):
                raise SystemExit(f"{args.prompts}, line {number}: no text in the field {args.field!r}; see --field.")
        texts.append(clean(line))
    texts = [text for text in dict.fromkeys(texts) if text]
    prompts = []
    for text in texts:
        words = tokenize_words(teacher_tokenizer, text), tokenize_words(student_tokenizer, text)
        if words[0] is not None and words[1] is not None:
            prompts.append(words)
    print(
        f"{len(prompts)} prompts; {len(texts) - len(prompts)} left out: longer than the teacher's "
        f"{teacher_tokenizer.model_max_length} or the student's {student_tokenizer.model_max_length} tokens, or read "
        "as other words."
    )
    return prompts


def batches(prompts: Sequence[Prompt], size: int, device: str) -> Iterator[Batch]:
    """All prompts in their order."""
    for start in range(0, len(prompts), size):
        columns = zip(*((*teacher, *student) for teacher, student in prompts[start : start + size]), strict=True)
        yield Batch(*(torch.tensor(column, device=device) for column in columns))


def train(encoders: dict[str, LoTLIPTextEncoder], alignment: Alignment, prompts: list[Prompt], args: Any) -> None:
    """Trains the adapters of all encoders on the same batches."""
    groups = []
    for encoder in encoders.values():
        groups.append([p for name, p in encoder.named_parameters() if not name.startswith("text_model.")])
        for parameter in groups[-1]:
            parameter.requires_grad_(True)
    steps = args.num_epochs * -(-len(prompts) // args.batch_size)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    with tqdm(total=steps, desc="Training", unit="step") as bar:
        for _ in range(args.num_epochs):
            random.shuffle(prompts)
            for batch in batches(prompts, args.batch_size, args.device):
                targets = alignment.teacher_states(batch)
                losses = {name: alignment.loss(encoder, batch, targets) for name, encoder in encoders.items()}
                optimizer.zero_grad()
                torch.stack(list(losses.values())).sum().backward()
                for group in groups:
                    nn.utils.clip_grad_norm_(group, 1.0)
                optimizer.step()
                schedule.step()
                bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()}, refresh=False)
                bar.update()


def table(report: Report) -> str:
    """The report as text."""
    lines = [" " * 16 + "".join(f"{name:>18}" for name in MEASURES), " " * 16 + "     error  cosine" * len(MEASURES)]
    for name, row in report.items():
        numbers = "".join(f"{row[measure]['error']:>10.3f}{row[measure]['cosine']:>8.3f}" for measure in MEASURES)
        lines.append(f"{name:<16}{numbers}")
    return "\n".join(lines)


def draw(report: Report, file: Path) -> None:
    """The errors as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, row) in enumerate(report.items()):
        places = [place + index / (len(report) + 1) for place in range(len(MEASURES))]
        axes.bar(places, [row[measure]["error"] for measure in MEASURES], 0.9 / (len(report) + 1), label=name)
    axes.set_xticks([place + 0.4 for place in range(len(MEASURES))], MEASURES)
    axes.set_ylabel("squared error on held-out prompts, mean = 1")
    axes.legend()
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> Report:
    """Trains, saves and reports as the command line says; answers with the report."""
    args = parse_arguments(argv)
    set_seed(args.seed)
    teacher = load_teacher(args)
    tower, tokenizer = load_student(args)
    prompts = read_prompts(args, teacher.tokenizer, tokenizer)
    random.shuffle(prompts)
    num_held_out = round(args.held_out * len(prompts))
    if not 2 <= num_held_out < len(prompts):
        raise SystemExit(f"{args.prompts}: {num_held_out} of {len(prompts)} prompts held out; give more prompts.")
    held_out, prompts = prompts[:num_held_out], prompts[num_held_out:]
    args.output.mkdir(parents=True, exist_ok=True)

    sample = batches(prompts[:SAMPLE], args.batch_size, args.device)
    alignment = Alignment(teacher.encoder, teacher.target_layer, sample)
    encoders = {
        kind: LoTLIPTextEncoder.from_text_model(
            tower,
            adapter=kind,
            hidden_size=teacher.encoder.config.hidden_size,
            target_layer=teacher.target_layer,
            num_queries=teacher.tokenizer.model_max_length,
            num_adapter_heads=teacher.encoder.config.num_attention_heads,
        )
        for kind in args.adapter
    }
    train(encoders, alignment, prompts, args)

    in_order, moved = (batches(some, args.batch_size, args.device) for some in (held_out, held_out[1:] + held_out[:1]))
    report = alignment.report(encoders, in_order, moved)
    for kind, encoder in encoders.items():
        alignment.finish(encoder)
        encoder.save_pretrained(args.output / kind)
        tokenizer.save_pretrained(args.output / kind)
    text = {"prompts": len(prompts), "held_out": len(held_out), "report": report}
    (args.output / "report.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    print(f"On {len(held_out)} held-out prompts:\n{table(report)}")
    draw(report, args.output / "report.png")
    return report


if __name__ == "__main__":
    main()
