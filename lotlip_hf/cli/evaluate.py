"""`lotlip evaluate`: the scores of a model on a benchmark."""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..files import check_output
from ..options import Parser, add_options, build, option, options_of
from .model import ModelOptions

DESCRIPTION = """\
Score a model on a benchmark: retrieval in both directions, or zero-shot classification. Embeddings are kept as they
are computed: after an interruption the same command goes on from there. With several processes
(`torchrun --nproc-per-node 2 -m lotlip_hf evaluate ...`) each encodes its share. Nothing is scored on a part of the
data that was not asked for."""
# The studies of a retrieval task, as `--task` and as results name them
STUDIES: dict[str, Literal["length", "sentences"]] = {"length-study": "length", "sentence-ablation": "sentences"}
DATA = (
    "num_images split image_column text_column label_column class_names captions normalize image_root max_record_bytes"
).split()


@dataclass(kw_only=True)
class EvaluationConfig(ModelOptions):
    """Every option of an evaluation, `lotlip evaluate --help` in Python."""

    revision: str | None = option("of the model on the Hub", None)
    task: str = option("what to measure: one of --list-tasks")
    benchmark: str | None = option("for length-study and sentence-ablation: the retrieval task that is studied", None)

    # The data
    data: str | None = option("folder of the data set, or its Hub id", None)
    data_revision: str | None = option("of the data set on the Hub", None)
    data_config: str | None = option("configuration of a data set on the Hub that has several", None)
    split: str | None = option("part of the data set, where the task or the data leaves a choice", None)
    num_images: int | None = option("the first N images alone, for a quick look", None, at_least=1)
    image_root: str | None = option("folder that images must lie in, links followed (the data's own)", None)
    max_record_bytes: int | None = option("largest line or sample of data of one's own (256 MiB)", None, at_least=1)
    image_column: str | None = option("column of the images, for data of one's own", None)
    text_column: str | None = option("column of the texts, for data of one's own", None)
    label_column: str | None = option("column of the classes, for data of one's own", None)
    captions: Literal["long", "all", "short"] | None = option(
        "which captions, for scenes and data of one's own (long)", None
    )
    normalize: bool | None = option("clean captions as the paper does; by default all but short ones", None)
    class_names: str | None = option("names of the classes, one a line; or `openai`", None)

    # The scores
    templates: str | None = option("prompts with {} in the place of the class; or `openai`", None)
    max_length: int | None = option("cut texts there, not at the model's end", None, at_least=1)
    limits: list[int] | None = option("for length-study: where texts are cut", None, at_least=1)
    bootstrap: int | None = option("samples for the intervals of R@1 (1000)", None, at_least=0)

    # What is written
    output: str | None = option("write the results to this JSON file", None)
    overwrite: bool = option("replace the output if it is there already", False)
    plot: str | None = option("draw a study's result in this picture", None)
    cache: str | None = option("keep the embeddings in this folder ($HF_HOME/lotlip)", None)
    no_cache: bool = option("keep no embeddings", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        study = STUDIES.get(self.task)
        if study is not None and self.benchmark is None:
            raise ValueError(f"--task {self.task} needs --benchmark: the retrieval task whose texts are studied.")
        self.refuse(() if study else ("benchmark", "plot"))
        self.refuse(("bootstrap", "templates", "max_length", "class_names") if study else ())
        self.refuse(() if study == "length" else ("limits",))
        if self.overwrite and self.output is None:
            raise ValueError("--overwrite is of --output, which is missing.")
        if self.no_cache and self.cache is not None:
            raise ValueError("--cache and --no-cache are not allowed together.")
        if self.plot and self.output and os.path.realpath(self.plot) == os.path.realpath(self.output):
            raise ValueError(f"--plot and --output are both {self.plot}: choose two files.")

    def refuse(self, names: Sequence[str]) -> None:
        """Raises a `ValueError` if one of these options is set, which the task does not have."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is not for --task {self.task}.")


class _ListTasks(argparse.Action):
    """Prints what can be measured."""

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

    # without an accelerator, too, it has to be told
    state = PartialState(cpu=config.device == "cpu" or not torch.accelerator.is_available())
    try:
        if state.num_processes > 1 and config.device is None:
            config.device = str(state.device)
        if not state.is_main_process:
            logging.getLogger("lotlip_hf").setLevel(logging.ERROR)  # the first one says it
        _evaluate(config, state.is_main_process)
    finally:
        state.destroy_process_group()


def _evaluate(config: EvaluationConfig, is_main_process: bool) -> None:
    """The part of an evaluation that every process runs; the main one writes and prints."""
    from huggingface_hub.constants import HF_HOME

    from ..evaluation.benchmarks.registry import load_benchmark
    from ..evaluation.evaluate import evaluate, results_table, study, write_results
    from ..evaluation.studies import plot_length_study, plot_sentence_ablation
    from ..evaluation.tasks import RetrievalData
    from ..evaluation.zero_shot import read_templates
    from ..plots import check_plot

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
    of_data = {name: getattr(config, name) for name in DATA}
    of_data |= {"revision": config.data_revision, "config": config.data_config}
    data = load_benchmark(settings["benchmark"], config.data, **of_data)
    config.refuse(("templates",) if isinstance(data, RetrievalData) else ("bootstrap",))
    encoder = config.load(config.revision)
    if kind is not None:
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
        print(results_table(results))
