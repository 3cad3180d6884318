"""Put a BERT LoTLIP in the place of a pipeline's CLIP text encoder: train, from prompts alone, a small adapter.

    python examples/align_text_encoder.py --student checkpoint --teacher stable-diffusion --slot text_encoder \\
        --prompts prompts.txt --adapter linear mlp resampler --output aligned
    python examples/swap_text_encoder.py --pipeline stable-diffusion --model aligned/mlp --prompt "a red house"

Neither the denoiser nor the student is trained. Leaves a folder for each adapter, which `swap_text_encoder` takes, and
`report.json` and `report.png` (drawn with `pip install lotlip-hf[train]`): how close each comes to the encoder that it
replaces on prompts that were held out, next to two answers that know nothing of the prompt. Ctrl-C ends the training
early; what was learnt until then is reported on and saved.

"linear" and "mlp" map each token by itself and are matched word by word, "resampler" gives as many states as the
teacher and is matched by position; `lotlip_hf.diffusion.align.Alignment` says why, and why it is the one for Stable
Diffusion XL and 3. It is built like ELLA's connector (https://arxiv.org/abs/2403.05135), without the timestep. All
learn the pooled output too, which Stable Diffusion XL and 3 and Flux read. The teacher says nothing of what lies
behind its last position, so prompts longer than that are left out; of a longer one "linear" and "mlp" give out all
tokens nevertheless, "resampler" reads all and gives a fixed number.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from transformers.utils import logging as transformers_logging

from lotlip_hf import LoTLIPTextEncoder, LoTLIPTextModel
from lotlip_hf.diffusion.align import MEASURES, Alignment, Batch, Words, tokenize_words
from lotlip_hf.diffusion.text_encoder import pipeline_target_layer
from lotlip_hf.encoder import fit_tokenizer
from lotlip_hf.files import check_output
from lotlip_hf.modeling.tokenization_lotlip import clean
from lotlip_hf.options import check, option, parse
from lotlip_hf.terminal import printable_output

SLOT = "text_encoder"
# Training prompts that the teacher's means and deviations are taken from.
SAMPLE = 512

Prompt = tuple[Words, Words]  # as the teacher's and as the student's tokenizer read it
Report = dict[str, dict[str, dict[str, float]]]


class Teacher(NamedTuple):
    """A CLIP text encoder, its tokenizer, and the hidden state that its pipeline reads (-1: the last, normalised)."""

    encoder: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: Any
    target_layer: int


@dataclass(kw_only=True)
class Options:
    """The command line."""

    student: str = option("LoTLIP checkpoint: a folder or a Hub id")
    teacher: Path = option("folder of a pipeline, or of a CLIP text encoder")
    slot: str = option("which text encoder of the pipeline", SLOT)
    teacher_tokenizer: Path | None = option("folder of its tokenizer, where it lies elsewhere", None)
    target_layer: int | None = option("state to match; by default the pipeline's", None, at_least=-2, at_most=-1)
    prompts: Path = option("a text file, one prompt a line, or .jsonl")
    field: str = option("field of a .jsonl file that holds the prompt", "prompt")
    adapter: list[Literal["linear", "mlp", "resampler"]] = option(
        "adapters to train: linear, mlp, resampler (mlp)", default_factory=lambda: ["mlp"]
    )
    output: Path = option("new folder, of adapters and report", Path("aligned"))
    # the first token, the last, and one between them
    max_length: int | None = option("tokens of the student's prompts; by default all it takes", None, at_least=3)
    held_out: float = option("share of the prompts to report on", 0.1, above=0, below=1)
    batch_size: int = option("prompts in a batch", 32, at_least=1)
    num_epochs: int = option("how often to see every prompt", 3, at_least=1)
    learning_rate: float = option("highest learning rate of AdamW", 1e-3, above=0)
    device: str | None = option("where to compute; by default the accelerator, if there is one", None)
    seed: int = option("seed of the adapters, the order and the held-out prompts", 0, at_least=0, below=2**32)

    def __post_init__(self) -> None:
        check(self)
        if self.device is None:
            available = torch.accelerator.is_available()
            self.device = str(torch.accelerator.current_accelerator()) if available else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device}: cannot be used here ({first_line(error)}).") from error
        check_output(self.output, folder=True)


def parse_arguments(argv: Sequence[str] | None) -> Options:
    """The command line."""
    try:
        return parse(Options, argv, description=(__doc__ or "").split("\n")[0])
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_texts(args: Options) -> list[str]:
    """The prompts of the file, cleaned, each once."""
    try:
        lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise SystemExit(f"--prompts {args.prompts}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise SystemExit(f"--prompts {args.prompts}: not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if args.prompts.suffix == ".jsonl" and line.strip():
            try:
                line = json.loads(line)[args.field]
                line.encode("utf-8")
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, object, field, text
                raise SystemExit(
                    f"{args.prompts}, line {number}: no text in the field {args.field!r}; see --field."
                ) from error
        texts.append(clean(line))
    texts = [text for text in dict.fromkeys(texts) if text]
    if not texts:
        raise SystemExit(f"--prompts {args.prompts}: holds no prompts.")
    return texts


def load_model(model_class: Any, option: str, source: str | Path, device: str) -> Any:
    """A model with all its weights, frozen, in evaluation mode."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # else it lists all of a whole model's image tower as unexpected
    try:
        model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # of a damaged file safetensors, torch and transformers each raise their own
        raise SystemExit(f"{option} {source}: no {model_class.__name__} found ({first_line(error)}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise SystemExit(
            f"{option} {source}: {len(missing)} weights of a {model_class.__name__} are missing, {missing[0]} first."
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(source: str | Path, model: Any, advice: str) -> Any:
    """A model's tokenizer, which cuts at as many tokens as both take."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"{source}: no tokenizer found ({reason}); {advice}.") from error
    # some come up with their special tokens alone where there is no file
    if not len(set(tokenizer.all_special_ids)) < len(tokenizer) <= model.config.vocab_size:
        raise SystemExit(
            f"{source}: no tokenizer of the model's found (it has {len(tokenizer)} tokens, the model "
            f"{model.config.vocab_size}); {advice}."
        )
    fit_tokenizer(model, tokenizer)
    return tokenizer


def text_encoders(pipeline: Path) -> dict[str, str]:
    """The slots of a pipeline's folder and the classes of the text encoders in them."""
    try:
        index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
        classes = {name: value[1] for name, value in index.items() if name.startswith("text_encoder")}
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise SystemExit(f"--teacher {pipeline}: its model_index.json is damaged ({first_line(error)}).") from error
    return {name: class_name for name, class_name in classes.items() if class_name is not None}


def has_projection(folder: Path, class_name: str) -> bool:
    """Whether a text encoder of a pipeline has a projection; one that took a CLIP's place says so in its settings."""
    if class_name == "LoTLIPTextEncoder":
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).projection_dim is not None
    return class_name == "CLIPTextModelWithProjection"


def load_teacher(args: Options) -> Teacher:
    """The encoder to be replaced, from the folder of a pipeline or its own."""
    folder, tokenizer_folder, target_layer = args.teacher, args.teacher, -1
    if (args.teacher / "model_index.json").is_file():
        slots = text_encoders(args.teacher)
        if args.slot not in slots:
            raise SystemExit(f"--slot {args.slot}: {args.teacher} has {', '.join(slots) or 'no text encoder'}.")
        folder, tokenizer_folder = folder / args.slot, folder / args.slot.replace("text_encoder", "tokenizer")
        read_together = [name for name, class_name in slots.items() if class_name.startswith(("CLIP", "LoTLIP"))]
        target_layer = pipeline_target_layer(
            has_projection(args.teacher / name, slots[name]) for name in read_together
        )
        if len(read_together) > 1 and set(args.adapter) != {"resampler"}:
            print(
                f"Warning: this pipeline joins token i of {' and '.join(read_together)}, where linear and mlp, which "
                "keep the student's tokens, put different words together; the adapter for it is the resampler."
            )
    elif args.slot != SLOT:
        raise SystemExit(f"--slot {args.slot}: {args.teacher} is no pipeline (it has no model_index.json).")
    try:
        config = (
            AutoConfig.from_pretrained(folder, trust_remote_code=False) if (folder / "config.json").is_file() else None
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"--teacher {folder}: its config.json cannot be read ({reason}).") from error
    if config is None or config.model_type not in ("clip", "clip_text_model"):
        raise SystemExit(f"{folder}: no CLIP text encoder, which --teacher (and --slot, of a pipeline) must name.")
    is_projected = "CLIPTextModelWithProjection" in (config.architectures or [])
    encoder_class = CLIPTextModelWithProjection if is_projected else CLIPTextModel
    encoder = load_model(encoder_class, "--teacher", folder, args.device)
    tokenizer_folder = args.teacher_tokenizer or tokenizer_folder
    tokenizer = load_tokenizer(tokenizer_folder, encoder, "name the folder of the teacher's by --teacher-tokenizer")
    return Teacher(encoder, tokenizer, args.target_layer or target_layer)


def load_student(args: Options) -> tuple[LoTLIPTextModel, Any]:
    """The text tower, frozen, and its tokenizer."""
    tower = load_model(LoTLIPTextModel, "--student", args.student, args.device)
    tokenizer = load_tokenizer(args.student, tower, "save the student's beside it")
    if args.max_length and args.max_length > tokenizer.model_max_length:
        raise SystemExit(f"--max-length {args.max_length}: {args.student} takes {tokenizer.model_max_length} tokens.")
    tokenizer.model_max_length = args.max_length or tokenizer.model_max_length
    return tower, tokenizer


def tokenize(texts: Sequence[str], teacher_tokenizer: Any, student_tokenizer: Any) -> list[Prompt]:
    """The texts as prompts, those of the same tokens once: trained on and held out, they would flatter the report."""
    prompts = {}
    num_left_out = 0
    for text in texts:
        teacher, student = tokenize_words(teacher_tokenizer, text), tokenize_words(student_tokenizer, text)
        if teacher is None or student is None:
            num_left_out += 1
        else:
            prompts[tuple(teacher.input_ids + student.input_ids)] = teacher, student
    print(
        f"{len(prompts)} prompts; {num_left_out} left out: longer than the teacher's "
        f"{teacher_tokenizer.model_max_length} or the student's {student_tokenizer.model_max_length} tokens, or read "
        "as other words."
    )
    return list(prompts.values())


def batches(prompts: Sequence[Prompt], size: int, device: str) -> Iterator[Batch]:
    """All prompts in their order."""
    for start in range(0, len(prompts), size):
        columns = zip(*((*teacher, *student) for teacher, student in prompts[start : start + size]), strict=True)
        yield Batch(*(torch.tensor(column, device=device) for column in columns))


def train(
    encoders: dict[str, LoTLIPTextEncoder],
    alignment: Alignment,
    prompts: list[Prompt],
    num_steps: int,
    args: Options,
) -> int:
    """Trains the adapters of all encoders on the same batches; answers with the steps done, by Ctrl-C too few."""
    groups = [[p for p in encoder.parameters() if p.requires_grad] for encoder in encoders.values()]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
    done = 0
    try:
        with tqdm(total=num_steps, desc="Training", unit="step") as bar:
            for _ in range(args.num_epochs):
                random.shuffle(prompts)
                for batch in batches(prompts, args.batch_size, args.device):
                    tower, teacher = alignment.tower_states(batch), alignment.teacher_states(batch)
                    losses = {name: alignment.loss(encoder, tower, teacher) for name, encoder in encoders.items()}
                    optimizer.zero_grad()
                    torch.stack(list(losses.values())).sum().backward()
                    for group in groups:
                        nn.utils.clip_grad_norm_(group, 1.0)
                    optimizer.step()
                    schedule.step()
                    done += 1
                    bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()}, refresh=False)
                    bar.update()
    except KeyboardInterrupt:
        print(f"Interrupted after {done} of {num_steps} steps; what was learnt until then is reported on and saved.")
    return done


def table(report: Report) -> str:
    """The report as text."""
    lines = [" " * 16 + "".join(f"{name:>18}" for name in MEASURES), " " * 16 + "     error  cosine" * len(MEASURES)]
    for name, row in report.items():
        numbers = "".join(f"{row[measure]['error']:>10.3f}{row[measure]['cosine']:>8.3f}" for measure in MEASURES)
        lines.append(f"{name:<16}{numbers}")
    return "\n".join(lines)


def draw(report: Report, file: Path) -> None:
    """The errors as bars, where there is matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{file} is left out: drawing it needs matplotlib, of `pip install lotlip-hf[train]`.")
        return
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, row) in enumerate(report.items()):
        places = [place + index / (len(report) + 1) for place in range(len(MEASURES))]
        axes.bar(places, [row[measure]["error"] for measure in MEASURES], 0.9 / (len(report) + 1), label=name)
    axes.set_xticks([place + 0.4 for place in range(len(MEASURES))], MEASURES)
    axes.set_ylabel("squared error on held-out prompts, mean = 1")
    axes.legend()
    figure.savefig(file, dpi=120)


@printable_output()
def main(argv: Sequence[str] | None = None) -> Report:
    """Trains, saves and reports as the command line says; answers with the report."""
    args = parse_arguments(argv)
    texts = read_texts(args)
    set_seed(args.seed)
    teacher = load_teacher(args)
    tower, tokenizer = load_student(args)
    prompts = tokenize(texts, teacher.tokenizer, tokenizer)
    random.shuffle(prompts)
    num_held_out = round(args.held_out * len(prompts))
    if not 2 <= num_held_out < len(prompts):
        raise SystemExit(f"{args.prompts}: {num_held_out} of {len(prompts)} prompts held out; give more prompts.")
    held_out, prompts = prompts[:num_held_out], prompts[num_held_out:]
    args.output.mkdir(parents=True, exist_ok=True)

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
    num_steps = args.num_epochs * -(-len(prompts) // args.batch_size)
    steps = train(encoders, alignment, prompts, num_steps, args)

    in_order, moved = (batches(some, args.batch_size, args.device) for some in (held_out, held_out[1:] + held_out[:1]))
    report = alignment.report(encoders, in_order, moved)
    for kind, encoder in encoders.items():
        alignment.finish(encoder)
        encoder.save_pretrained(args.output / kind)
        tokenizer.save_pretrained(args.output / kind)
    counts = {"prompts": len(prompts), "held_out": len(held_out), "steps": steps, "interrupted": steps < num_steps}
    text = json.dumps({**counts, "report": report}, indent=2)
    (args.output / "report.json").write_text(f"{text}\n", encoding="utf-8")
    print(f"On {len(held_out)} held-out prompts:\n{table(report)}")
    draw(report, args.output / "report.png")
    return report


if __name__ == "__main__":
    main()
