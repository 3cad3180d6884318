"""`lotlip prompts`: learns prompts for classes from a few pictures of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..files import check_output, parse_json, printable, read_regular
from ..options import Parser, make_parser, option, parse
from ..terminal import print_tables, text_table
from .model import ModelOptions

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Learn prompts for classes from a few pictures of each (CoOp): vectors in place of words, for a model that stays as it
is. The file has a few KB. The table compares the prompts with the template 'a photo of a {}.'.

  lotlip prompts --model checkpoint --data animals --shots 8 --output animals.safetensors
  lotlip evaluate --model checkpoint --task classification --data animals --prompts animals.safetensors

Several prompts, of which a router chooses for each picture (MoCoOp), start from templates in a file such as
[["a photo of a {}.", "a picture of a {}."], ["a drawing of a {}."]].

  lotlip prompts --model checkpoint --data animals --groups groups.json --top-k 2 --output animals.safetensors
"""
MAX_GROUPS = 1 << 20  # bytes of a file of templates
DATA = ("split", "class_names", "image_column", "label_column")


@dataclass(kw_only=True)
class PromptsOptions(ModelOptions):
    """Options of `lotlip prompts`."""

    data: str | None = option(
        "Folder with a folder of pictures for each class, or the id of a data set on the Hub", None, group="Data"
    )
    task: str = option("Classification task of `lotlip evaluate --list-tasks`", "classification")
    split: str | None = option("Split of the data, where it has several", None)
    class_names: str | None = option("File of class names, one per line; or `openai`", None, metavar="FILE")
    image_column: str | None = option("Column of the images", None)
    label_column: str | None = option("Column of the classes", None)
    shots: int = option("Pictures of each class to learn from. As many others are held out", 16, at_least=1)
    seed: int = option("Seed of the choice of pictures, the first vectors and the order", 0)

    num_context: int | None = option("Vectors of a prompt (default: 16)", None, group="Prompts", at_least=1)
    init: str | None = option("Words that the vectors start from, such as 'a photo of a' (default: random)", None)
    position: Literal["end", "middle", "front"] = option("Where the class name is", "end")
    class_specific: bool = option("Learn vectors for each class", False)
    groups: str | None = option("JSON file of groups of templates with {}: a prompt for each", None, metavar="FILE")
    top_k: int | None = option("Prompts of --groups for each picture (default: 1)", None, at_least=1)

    epochs: int | None = option(
        "Epochs (default: 200 from 8 pictures of a class, 100 from 2, 50 from 1)", None, group="Learning", at_least=1
    )
    learning_rate: float = option("Highest learning rate", 0.002, above=0)
    augment: list[str] | None = option(
        "Random changes of the pictures: crop:0.08 flip:0.5 is CoOp's (default: none, pictures are read once)", None
    )
    patience: int | None = option(
        "Stop after so many epochs without a higher accuracy of the held-out pictures, and keep the best",
        None,
        at_least=1,
    )

    output: str = option("File to write", group="Output", metavar="FILE")
    overwrite: bool = option("Replace an existing output", False)

    revision: str | None = option("Revision of the model on the Hub (default: main)", None, group="Model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_context is not None and self.init is not None:
            raise ValueError("Pass either --num-context or --init, whose words are the vectors.")
        if self.init is not None and "{}" in self.init and self.position != "end":
            raise ValueError("--position has no effect with {} in --init, which says it. Leave one of them out.")
        if self.groups is None and self.top_k is not None:
            raise ValueError("--top-k needs --groups. Pass a file of groups of templates.")
        of_one = {"--num-context": self.num_context, "--init": self.init, "--class-specific": self.class_specific}
        of_one["--position"] = self.position != "end"
        for name, value in of_one.items():
            if self.groups is not None and value:
                raise ValueError(f"{name} has no effect with --groups, whose templates say it. Leave it out.")


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(PromptsOptions, prog="lotlip prompts", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Learns prompts, writes them and prints their accuracies."""
    options = parse(PromptsOptions, argv, parser())
    check_output(options.output, overwrite=options.overwrite)
    groups = None if options.groups is None else _read_groups(options.groups)

    import torch

    from ..data.augment import parse_augment
    from ..evaluation.benchmarks.registry import load_benchmark
    from ..evaluation.embeddings import embed_images
    from ..evaluation.tasks import ClassificationData
    from ..evaluation.zero_shot import class_embeddings
    from ..prompts import MixedPrompts, PromptedClasses, few_shots, learn_prompts

    augment = parse_augment(options.augment or ())
    data = load_benchmark(options.task, options.data, **{name: getattr(options, name) for name in DATA})
    if not isinstance(data, ClassificationData):
        raise ValueError(f"--task {options.task} has no classes. Pass a task of classification.")
    shots = few_shots(data.labels, options.shots, options.seed)
    learnt, held_out = shots
    has_pictures = {data.labels[index] for index in learnt}
    for label, name in enumerate(data.class_names):
        if label not in has_pictures:
            raise ValueError(f"--data has no picture of {name!r}. Add one, or remove the class.")
    if options.patience is not None and not held_out:
        raise ValueError(f"--patience needs held-out pictures: classes with more than {options.shots} (--shots).")
    encoder = options.load(options.revision)
    torch.manual_seed(options.seed)
    if groups is not None:
        prompts = MixedPrompts(encoder, data.class_names, groups, options.top_k or 1)
    else:
        settings = (options.num_context or 16, options.class_specific, options.init, options.position)
        prompts = PromptedClasses(encoder, data.class_names, *settings)
    embeds = embed_images(
        encoder,
        [data.images[index] for index in (*learnt, *held_out)],
        names=[data.image_names[index] for index in (*learnt, *held_out)],
        batch_size=options.batch_size or 32,
    ).split([len(learnt), len(held_out)])
    labels = [[data.labels[index] for index in part] for part in shots]
    log = learn_prompts(
        prompts,
        embeds[0] if augment is None else [data.images[index] for index in learnt],
        labels[0],
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        augment=augment,
        held_out=(embeds[1], labels[1]),
        patience=options.patience,
        seed=options.seed,
    )
    prompts.save(options.output)
    template = class_embeddings(encoder, data.class_names, progress=False).T
    with torch.no_grad():
        scores = {
            "a photo of a {}.": [part @ template for part in embeds],
            "prompts": [prompts(part).cpu() for part in embeds],
        }
    rows = [[name, *map(_accuracy, parts, labels)] for name, parts in scores.items()]
    head = ["accuracy (%)", f"{len(learnt)} learnt from", f"{len(held_out)} held out"]
    print_tables(text_table([head], rows))
    print(f"\n{len(log)} epochs. {printable(options.output)} has the prompts.")


def _accuracy(scores: "Tensor", labels: Sequence[int]) -> str:
    """Top-1 accuracy in percent, or a dash without images."""
    from ..evaluation.retrieval import accuracies

    return f"{100 * accuracies(scores, labels, [1])['accuracy_top1']:.1f}" if labels else "-"


def _read_groups(file: str) -> list[list[str]]:
    """Reads groups of templates."""
    try:
        groups = parse_json(read_regular(file, MAX_GROUPS))
    except ValueError as error:
        raise ValueError(f"--groups: {error}") from error
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(isinstance(one, str) for one in group) for group in groups
    ):
        raise ValueError(
            f'--groups {printable(file)} is not a list of lists of templates. Write [["a photo of a {{}}."], ...].'
        )
    return groups
