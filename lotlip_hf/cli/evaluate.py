"""`lotlip evaluate`: evaluates a model on a benchmark."""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..files import check_output
from ..options import Parser, add_options, build, option, options_of
from ..terminal import print_tables
from .model import PatchOptions

DESCRIPTION = """\
Evaluate a model on a benchmark: retrieval in both directions, zero-shot classification or zero-shot segmentation; or
with a model the pictures of a diffusion pipeline. Embeddings and pictures are kept, so an interrupted command
continues when it is run again.

  lotlip evaluate --list-tasks
  lotlip evaluate --model checkpoint --task urban1k --data Urban1k --output urban1k.json
  lotlip evaluate --model checkpoint --task prompts --data prompts.jsonl --pipeline stable-diffusion --pictures drawn

Several processes can share the work.

  torchrun --nproc-per-node 2 -m lotlip_hf evaluate --model checkpoint --task coco
"""
# Studies of a retrieval task: name of `--task`, and name in results
STUDIES: dict[str, Literal["length", "sentences"]] = {"length-study": "length", "sentence-ablation": "sentences"}
DATA = (
    "num_images split image_column text_column label_column class_names captions normalize image_root max_record_bytes"
).split()


@dataclass(kw_only=True)
class EvaluationConfig(PatchOptions):
    """Options of an evaluation. `lotlip evaluate --help` describes them."""

    task: str = option("Task to evaluate, one of --list-tasks", group="Task")
    benchmark: str | None = option("Retrieval task that length-study and sentence-ablation use", None)
    max_length: int | None = option(
        "Length in tokens at which texts are cut (default: that of the model)", None, at_least=1
    )
    limits: list[int] | None = option("Lengths in tokens that length-study compares", None, at_least=1)
    templates: str | None = option(
        "File of prompts with {} for the class, one per line; or `openai` (default: 'a photo of a {}.')",
        None,
        metavar="FILE",
    )
    class_descriptions: str | None = option(
        'JSON file of texts for each class, {"cat": ["A cat has ..."]}, instead of the default prompt',
        None,
        metavar="FILE",
    )
    prompts: str | None = option(
        "File of `lotlip prompts`, in place of templates, for classification", None, metavar="FILE"
    )
    bootstrap: int | None = option(
        "Samples for the intervals of R@1; 0 for no intervals (default: 1000)", None, at_least=0
    )

    pipeline: str | None = option("Folder or Hub id of a diffusion pipeline that draws the prompts", None)
    pictures: str | None = option("Folder of the drawn pictures, from which a run continues", None, metavar="FOLDER")
    seed: int | None = option(
        "Seed of the first drawn picture; the next has the next seed (default: 0)", None, at_least=0
    )

    data: str | None = option("Folder of the data set, its Hub id, or the file of prompts", None, group="Data")
    data_revision: str | None = option("Revision of the data set on the Hub (default: main)", None)
    data_config: str | None = option("Configuration of a data set on the Hub that has several", None)
    split: str | None = option("Split of the data set, where the task or the data has several", None)
    num_images: int | None = option("Evaluate the first N images only (default: all)", None, at_least=1)
    image_column: str | None = option("Column of the images, for your own data", None)
    text_column: str | None = option("Column of the texts, for your own data", None)
    label_column: str | None = option("Column of the classes, for your own data", None)
    captions: Literal["long", "all", "short"] | None = option(
        "Captions to use, for scenes and your own data (default: long)", None
    )
    normalize: bool | None = option("Clean captions as the paper does (default: all but short captions)", None)
    class_names: str | None = option("File of class names, one per line; or `openai`", None, metavar="FILE")
    max_record_bytes: int | None = option(
        "Maximum size of a line or sample of your own data, in bytes (default: 268435456)", None, at_least=1
    )
    image_root: str | None = option(
        "Folder that images must be in, after links are followed (default: the folder of the data)",
        None,
        metavar="FOLDER",
    )

    output: str | None = option("Write the results to this JSON file", None, group="Output", metavar="FILE")
    overwrite: bool = option("Replace an existing output", False)
    plot: str | None = option("Draw the result of a study in this picture file", None, metavar="FILE")
    cache: str | None = option("Folder that keeps embeddings (default: $HF_HOME/lotlip)", None, metavar="FOLDER")
    no_cache: bool = option("Keep no embeddings", False)

    revision: str | None = option("Revision of the model on the Hub (default: main)", None, group="Model")

    def __post_init__(self) -> None:
        super().__post_init__()
        study = STUDIES.get(self.task)
        if study is not None and self.benchmark is None:
            raise ValueError(f"--task {self.task} needs --benchmark. Pass a retrieval task, such as scenes.")
        self.refuse(() if study else ("benchmark", "plot"))
        self.refuse(
            ("bootstrap", "templates", "class_descriptions", "prompts", "max_length", "class_names") if study else ()
        )
        self.refuse(() if study == "length" else ("limits",))
        if self.prompts is not None:
            for name in ("templates", "class_descriptions", "max_length"):
                if getattr(self, name) is not None:
                    raise ValueError(f"Pass either --prompts or --{name.replace('_', '-')}.")
        is_drawn = self.task == "prompts"
        self.refuse(
            ("bootstrap", "max_length", "templates", "class_descriptions", "prompts")
            if is_drawn
            else ("pipeline", "pictures", "seed")
        )
        if (self.pipeline is None) != (self.pictures is None) or (self.pipeline is None and self.seed is not None):
            raise ValueError("--pipeline and --pictures need each other, and --seed needs both. Pass them together.")
        if self.overwrite and self.output is None:
            raise ValueError("--overwrite needs --output. Pass the file to write.")
        if self.no_cache and self.cache is not None:
            raise ValueError("Pass either --cache or --no-cache.")
        if self.plot and self.output and os.path.realpath(self.plot) == os.path.realpath(self.output):
            raise ValueError(f"--plot and --output are the same file {self.plot}. Pass two different files.")

    def refuse(self, names: Sequence[str]) -> None:
        """Raises a `ValueError` if one of these options is set, because the task does not use it."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --task {self.task}. Leave it out.")


class _ListTasks(argparse.Action):
    """Prints the tasks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ..evaluation.benchmarks.registry import describe_tasks

        print(describe_tasks())
        parser.exit()


def parser() -> Parser:
    """Returns the parser of the command."""
    flags = Parser(prog="lotlip evaluate", description=DESCRIPTION)
    add_options(flags, EvaluationConfig)
    flags.add_argument("--list-tasks", action=_ListTasks, nargs=0, help="List the tasks and exit")
    return flags


def run(argv: Sequence[str]) -> None:
    """Evaluates a model. The main process writes and prints the results."""
    config = build(EvaluationConfig, options_of(parser().parse_args(argv), EvaluationConfig))

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=config.device == "cpu" or not torch.accelerator.is_available())
    try:
        if state.num_processes > 1 and config.device is None:
            config.device = str(state.device)
        if not state.is_main_process:
            logging.getLogger("lotlip_hf").setLevel(logging.ERROR)  # the main process logs
        _evaluate(config, state.is_main_process)
    finally:
        state.destroy_process_group()


def _evaluate(config: EvaluationConfig, is_main_process: bool) -> None:
    """Evaluates in each process. The main process writes and prints the results."""
    from huggingface_hub.constants import HF_HOME

    from ..evaluation.benchmarks.registry import load_benchmark
    from ..evaluation.evaluate import evaluate, results_table, study, write_results
    from ..evaluation.studies import plot_length_study, plot_sentence_ablation
    from ..evaluation.tasks import ClassificationData, PromptData, RetrievalData
    from ..evaluation.zero_shot import read_class_descriptions, read_templates
    from ..pictures import draw_prompts, evaluate_prompts
    from ..plots import check_plot
    from ..prompts import load_prompts

    kind = STUDIES.get(config.task)
    if config.output is not None:
        check_output(config.output, overwrite=config.overwrite)
    if config.plot is not None:
        check_plot(config.plot)
    settings = {
        "benchmark": config.benchmark or config.task,
        "model_name": config.model,
        "cache": None if config.no_cache else config.cache or os.path.join(HF_HOME, "lotlip"),
        "batch_size": config.batch_size,
        "progress": is_main_process,
    }
    own = {name: getattr(config, name) for name in ("max_length", "bootstrap") if getattr(config, name) is not None}
    if config.templates is not None:
        own["templates"] = read_templates(config.templates)
    if config.class_descriptions is not None:
        own["descriptions"] = read_class_descriptions(config.class_descriptions)
    of_data = {name: getattr(config, name) for name in DATA}
    of_data |= {"revision": config.data_revision, "config": config.data_config}
    data = load_benchmark(settings["benchmark"], config.data, **of_data)
    config.refuse(("templates", "class_descriptions") if isinstance(data, RetrievalData) else ("bootstrap",))
    config.refuse(() if isinstance(data, ClassificationData) else ("prompts",))
    encoder = config.load(config.revision)
    if config.prompts is not None:
        own["prompts"] = load_prompts(config.prompts, encoder)
    if isinstance(data, PromptData) and kind is None:
        if config.pipeline is not None and config.pictures is not None:
            drawing = {"seed": config.seed or 0, "device": encoder.device, "progress": is_main_process}
            data = draw_prompts(data, config.pipeline, config.pictures, **drawing)
        results = evaluate_prompts(encoder, data, **settings)
    elif kind is not None:
        results = study(encoder, data, kind, limits=config.limits, **settings)
    else:
        results = evaluate(encoder, data, **own, **settings)
    if not is_main_process:
        return
    try:
        if config.output is not None:
            write_results(results, config.output)
        if config.plot is not None:
            plot = plot_length_study if kind == "length" else plot_sentence_ablation
            plot(results["rows"], config.plot, title=f"{results['model']} on {results['dataset']['name']}")
    finally:  # print the numbers even if the file cannot be written
        print_tables(results_table(results))
