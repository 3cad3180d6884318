"""Train a small adapter on prompts, so that a BERT LoTLIP can replace the CLIP text encoder of a diffusion pipeline.

    python examples/align_text_encoder.py --student checkpoint --teacher stable-diffusion --slot text_encoder \\
        --prompts prompts.txt --adapter linear mlp resampler --output aligned
    python examples/swap_text_encoder.py --pipeline stable-diffusion --model aligned/mlp --prompt "a red house"

Only the adapter is trained, not the pipeline or LoTLIP. The example writes one folder per adapter, for `--model` of
`swap_text_encoder.py`. `report.json` and `report.png` (with `pip install 'lotlip-hf[train]'`) compare each adapter
with the text encoder of the pipeline on held-out prompts, next to two baselines that do not use the prompt. Ctrl-C
ends the training early, but the adapters and the report are still written.

"linear" and "mlp" match hidden states word by word. "resampler" matches them by position and returns as many states as
the teacher. Stable Diffusion XL and 3 need "resampler", as `lotlip_hf.diffusion.align.Alignment` explains.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

from lotlip_hf import LoTLIPTextEncoder
from lotlip_hf.diffusion.align import (
    Alignment,
    Report,
    batches,
    draw_report,
    load_student,
    load_teacher,
    read_prompts,
    report_table,
    tokenize_prompts,
    train,
)
from lotlip_hf.files import write_json
from lotlip_hf.terminal import printable_output

SAMPLE = 512  # number of training prompts for the means and standard deviations of the teacher


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--student", required=True, help="LoTLIP checkpoint: a folder or a Hub id")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a pipeline or of a CLIP text encoder")
    parser.add_argument("--slot", default="text_encoder", help="slot of the text encoder in the pipeline")
    parser.add_argument(
        "--teacher-tokenizer", type=Path, help="folder of the teacher's tokenizer; by default that of the pipeline"
    )
    parser.add_argument(
        "--target-layer", type=int, choices=(-1, -2), help="hidden state to match; by default that of the pipeline"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="a text file with one prompt per line, or .jsonl")
    parser.add_argument("--field", default="prompt", help="field of the prompt in a .jsonl file")
    parser.add_argument(
        "--adapter", nargs="+", choices=("linear", "mlp", "resampler"), default=["mlp"], help="adapters to train"
    )
    parser.add_argument("--output", type=Path, default=Path("aligned"), help="new folder for adapters and report")
    parser.add_argument("--max-length", type=int, help="maximum prompt length of the student in tokens")
    parser.add_argument("--held-out", type=float, default=0.1, help="fraction of the prompts for the report")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts per batch")
    parser.add_argument("--num-epochs", type=int, default=3, help="number of epochs")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--device", default=device, help="device of the computation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the adapters, the order and the held-out prompts")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the options before any model is loaded."""
    for option, value, fits, expected in (
        ("--max-length", args.max_length, args.max_length is None or args.max_length >= 3, "3 or more"),
        ("--batch-size", args.batch_size, args.batch_size >= 1, "1 or more"),
        ("--num-epochs", args.num_epochs, args.num_epochs >= 1, "1 or more"),
        ("--held-out", args.held_out, 0 < args.held_out < 1, "a fraction between 0 and 1"),
        ("--learning-rate", args.learning_rate, 0 < args.learning_rate < float("inf"), "a number above 0"),
        ("--seed", args.seed, 0 <= args.seed < 2**32, f"0 to {2**32 - 1}"),
    ):
        if not fits:
            raise ValueError(f"{option} {value}: expected {expected}.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not available: {error}.") from error
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} already exists. Choose a new or an empty folder.")


@printable_output()
def main(argv: Sequence[str] | None = None) -> Report:
    """Trains and saves the adapters and returns the report."""
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        set_seed(args.seed)
        texts = read_prompts(args.prompts, args.field)
        teacher = load_teacher(args.teacher, args.slot, args.teacher_tokenizer, args.target_layer, args.device)
        tower, tokenizer = load_student(args.student, args.max_length, args.device)
        prompts = tokenize_prompts(texts, teacher.tokenizer, tokenizer)
        num_held_out = round(args.held_out * len(prompts))
        if not 2 <= num_held_out < len(prompts):
            raise ValueError(f"{args.prompts}: {num_held_out} of {len(prompts)} prompts are held out. Add prompts.")
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"Using {len(prompts)} of {len(texts)} prompts. The others are too long or differ between the tokenizers.")
    if teacher.read_together and set(args.adapter) != {"resampler"}:
        print(
            f"Warning: this pipeline joins {' and '.join(teacher.read_together)} token by token. With linear and mlp, "
            "the tokens of different words are joined. Use `--adapter resampler`."
        )
    random.shuffle(prompts)
    held_out, prompts = prompts[:num_held_out], prompts[num_held_out:]

    sample = batches(prompts[:SAMPLE], args.batch_size, args.device)
    alignment = Alignment(teacher.encoder, tower, teacher.target_layer, sample)
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
    steps, num_steps = train(encoders, alignment, prompts, args.batch_size, args.num_epochs, args.learning_rate)
    if steps < num_steps:
        print(f"Interrupted after {steps} of {num_steps} steps. Saving the adapters and the report.")

    rotated = held_out[1:] + held_out[:1]
    report = alignment.report(encoders, *(batches(part, args.batch_size, args.device) for part in (held_out, rotated)))
    for kind, encoder in encoders.items():
        alignment.finish(encoder)
        encoder.save_pretrained(args.output / kind)
        tokenizer.save_pretrained(args.output / kind)
    counts = {"prompts": len(prompts), "held_out": len(held_out), "steps": steps, "interrupted": steps < num_steps}
    write_json(args.output / "report.json", {**counts, "report": report})
    print(f"On {len(held_out)} held-out prompts:\n{report_table(report)}")
    try:
        draw_report(report, args.output / "report.png")
    except ImportError as error:
        print(f"report.png was not drawn: {error}")
    return report


if __name__ == "__main__":
    main()
