"""The command `lotlip`: reads arguments, calls a function of this package, prints what it returns."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .files import printable
from .relabel.config import add_arguments as add_relabel_arguments
from .relabel.config import read_config
from .terminal import run

EXIT_STATUS = """\
exit status:
  0    done, even if images were skipped: they are listed on the standard error output
  2    stopped: wrong arguments, or an error that the message explains
  130  interrupted; what was embedded or captioned is kept, and the same command goes on from there
  141  whoever read the output stopped reading
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; by default those of the process.

    Returns:
        `int`: the exit status, as in `lotlip --help`.
    """
    return run("lotlip", lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def _dispatch(argv: list[str]) -> int | None:
    # The conversions have their own arguments.
    if argv[:1] == ["convert"]:
        from .conversion.official import main as convert

        return convert(argv[1:])
    if argv[:2] == ["export", "onnx"]:
        from .conversion.onnx import main as export

        return export(argv[2:])
    arguments = build_parser().parse_args(argv)
    return arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="lotlip",
        description="LoTLIP: images and long descriptions.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lotlip {version('lotlip-hf')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "convert", help="make a checkpoint folder from an official checkpoint, or back (convert --help)"
    )
    export = commands.add_parser("export", help="write a checkpoint in another format (export onnx --help)")
    export.add_argument("format", choices=("onnx",), help="ONNX, for ONNX Runtime")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, help="checkpoint folder or Hub id: LoTLIP, CLIP, SigLIP, ...")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; by default the accelerator, if there is one")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto, the default, keeps the checkpoint's",
    )
    model.add_argument("--batch-size", type=_positive, help="images, or texts of full length, in a batch")

    pictures = argparse.ArgumentParser(add_help=False)
    pictures.add_argument(
        "--max-image-pixels",
        type=_positive,
        action=_MaxImagePixels,
        metavar="N",
        help="skip images of more pixels, and decode no more at a time (178956970; each takes up to 12 bytes)",
    )
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--image-root", metavar="DIR", help="the folder that pictures must lie in, links followed (--images)"
    )

    search = commands.add_parser(
        "search",
        parents=[model, pictures, folder],
        help="rank the images of a folder by a description",
        description="Rank the images of a folder by how well a description fits them. The images are embedded once; "
        "an index in the folder's hidden .lotlip keeps that, and each search brings it up to date.",
    )
    search.add_argument("--images", required=True, metavar="DIR", help="folder of images, with its subfolders")
    search.add_argument("--top", type=_positive, default=5, help="how many images to show (5)")
    search.add_argument("--save-grid", metavar="FILE", help="draw the ranked images in this picture")
    search.add_argument("--index", metavar="DIR", help="keep the index in this folder instead")
    search.add_argument("text", help="the description")
    search.set_defaults(run=_search)

    embed = commands.add_parser(
        "embed",
        parents=[model, pictures, folder],
        help="write the embeddings of images or texts to a Parquet file",
        description="Write normalised embeddings to a Parquet file with the columns `file` or `text`, and "
        "`embedding`. After an interruption the same command goes on from what is kept in OUTPUT.partial.",
    )
    source = embed.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="folder of images, with its subfolders")
    source.add_argument(
        "--texts", metavar="FILE", help=".txt (a text on each line), .jsonl, .json, .csv, .tsv or .parquet"
    )
    embed.add_argument(
        "--column", default="text", help="column of the texts (text), or a way into one: `conversations[1].value`"
    )
    embed.add_argument("--output", required=True, metavar="FILE", help="the Parquet file to write")
    embed.add_argument("--overwrite", action="store_true", help="replace the output if it is there already")
    embed.set_defaults(run=_embed)

    push = commands.add_parser(
        "push",
        help="publish a checkpoint on the Hub",
        description="Publish a checkpoint on the Hub: weights, configuration, tokenizer, processor, code and model "
        "card, in one commit. After an interruption the same command sends what is missing.",
    )
    push.add_argument("checkpoint", help="checkpoint folder or Hub id of a LoTLIP")
    push.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository, which is made if need be")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", help="branch, which is made if need be (main)")
    push.add_argument("--dry-run", metavar="DIR", help="write what would be published to this folder, and stop")
    push.add_argument("--commit-message", help="of the commit (Upload LoTLIP)")
    push.add_argument("--max-shard-size", help="largest file of weights (5GB)")
    push.add_argument("--license", help="of the weights, such as apache-2.0; without one nobody may use them")
    push.add_argument("--base-model", nargs="+", default=(), help="Hub ids of the models that it was made from")
    push.add_argument("--dataset", nargs="+", default=(), help="Hub ids of the data sets that it was trained on")
    push.add_argument("--language", nargs="+", default=(), help="languages that it reads (en)")
    push.add_argument("--tag", nargs="+", default=(), help="more tags")
    push.add_argument("--results", nargs="+", default=(), metavar="FILE", help="results of evaluations, JSON files")
    push.set_defaults(run=_push)

    evaluate = commands.add_parser(
        "evaluate",
        parents=[model, pictures],
        help="score a model on a benchmark",
        description="Score a model on a benchmark: retrieval in both directions, or zero-shot classification. "
        "Embeddings are kept as they are computed: after an interruption the same command goes on from there. With "
        "several processes (`torchrun --nproc-per-node 2 -m lotlip_hf evaluate ...`) each encodes its share. "
        "Nothing is scored on a part of the data that was not asked for.",
    )
    evaluate.add_argument("--task", required=True, metavar="T", help="what to measure: one of --list-tasks")
    evaluate.add_argument("--list-tasks", action=_ListTasks, nargs=0, help="say what can be measured, and stop")
    evaluate.add_argument("--data", metavar="DIR", help="folder of the data set, or its Hub id")
    evaluate.add_argument("--output", metavar="FILE", help="write the results to this JSON file")
    evaluate.add_argument("--overwrite", action="store_true", help="replace the output if it is there already")
    evaluate.add_argument("--plot", metavar="FILE", help="draw a study's result in this picture")
    evaluate.add_argument("--revision", help="of the model on the Hub")
    evaluate.add_argument("--data-revision", metavar="REVISION", help="of the data set on the Hub")
    evaluate.add_argument(
        "--data-config", metavar="NAME", help="configuration of a data set on the Hub that has several"
    )
    evaluate.add_argument("--split", help="part of the data set, where the task or the data leaves a choice")
    evaluate.add_argument(
        "--num-images", type=_positive, metavar="N", help="the first N images alone, for a quick look"
    )
    evaluate.add_argument(
        "--image-root", metavar="DIR", help="folder that images must lie in, links followed (the data's own)"
    )
    evaluate.add_argument(
        "--max-record-bytes", type=_positive, metavar="N", help="largest line or sample of data of one's own (256 MiB)"
    )
    evaluate.add_argument("--image-column", metavar="NAME", help="column of the images, for data of one's own")
    evaluate.add_argument("--text-column", metavar="NAME", help="column of the texts, for data of one's own")
    evaluate.add_argument("--label-column", metavar="NAME", help="column of the classes, for data of one's own")
    evaluate.add_argument(
        "--captions", choices=("long", "all", "short"), help="which captions, for scenes and data of one's own (long)"
    )
    evaluate.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="clean captions as the paper does; by default all but short ones",
    )
    evaluate.add_argument("--class-names", metavar="FILE", help="names of the classes, one a line; or `openai`")
    evaluate.add_argument("--templates", metavar="FILE", help="prompts with {} in the place of the class; or `openai`")
    evaluate.add_argument(
        "--max-length", type=_positive, metavar="TOKENS", help="cut texts there, not at the model's end"
    )
    evaluate.add_argument(
        "--benchmark", metavar="T", help="for length-study and sentence-ablation: the retrieval task that is studied"
    )
    evaluate.add_argument(
        "--limits", type=_positive, nargs="+", metavar="TOKENS", help="for length-study: where texts are cut"
    )
    evaluate.add_argument("--bootstrap", type=int, help="samples for the intervals of R@1 (1000)")
    kept = evaluate.add_mutually_exclusive_group()
    kept.add_argument("--cache", metavar="DIR", help="keep the embeddings in this folder ($HF_HOME/lotlip)")
    kept.add_argument("--no-cache", action="store_true", help="keep no embeddings")
    evaluate.set_defaults(run=_evaluate)

    relabel = commands.add_parser(
        "relabel",
        parents=[pictures],
        help="write long captions for a set of images",
        description="Write long captions for the images of a data set, by one or several captioning models, as shards "
        "that examples/train.py reads as they are. After an interruption the same command goes on from there. With "
        "several processes (`torchrun --nproc-per-node 2 -m lotlip_hf relabel ...`) each does its share.",
    )
    add_relabel_arguments(relabel)
    relabel.set_defaults(run=_relabel)

    report = commands.add_parser(
        "report",
        help="set results beside the published ones",
        description="Print the paper's table with the results of `lotlip evaluate` beside the published rows.",
    )
    report.add_argument("results", nargs="+", metavar="FILE", help="JSON files that `lotlip evaluate` wrote")
    report.add_argument("--format", choices=("text", "markdown"), default="text", help="of the tables (text)")
    report.add_argument("--model-index", metavar="FILE", help="write the entries of a model card's model-index (YAML)")
    report.add_argument("--plot", metavar="FILE", help="draw the table in this picture")
    report.add_argument("--overwrite", action="store_true", help="replace the model-index file if it is there already")
    report.set_defaults(run=_report)

    return parser


def _search(arguments: argparse.Namespace) -> int:
    from .grid import check_picture, save_grid
    from .search import build_index, encode_query

    if arguments.save_grid:
        check_picture(arguments.save_grid)
    encoder = _load(arguments)
    query = encode_query(encoder, arguments.text)
    index = build_index(
        encoder,
        arguments.images,
        index_folder=arguments.index,
        image_root=arguments.image_root,
        batch_size=arguments.batch_size or 32,
    )
    results = index.search(query, arguments.top)
    print("rank    score  file")
    for rank, result in enumerate(results, 1):
        print(f"{rank:4}  {result.score:7.4f}  {printable(result.path)}")
    _report_skipped(index.skipped)
    if arguments.save_grid:
        save_grid(results, arguments.save_grid, arguments.text, encoder.engine.background)
        print(f"Drawn in {arguments.save_grid}.", file=sys.stderr)
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from .embed import check_output, check_texts, embed_images, embed_texts

    check_output(arguments.output, overwrite=arguments.overwrite)
    if arguments.texts:
        if arguments.image_root:
            raise ValueError("--image-root is of --images, not of --texts.")
        check_texts(arguments.texts, arguments.column)  # before the model is loaded
    encoder = _load(arguments)
    if arguments.images:
        count, skipped = embed_images(
            encoder,
            arguments.images,
            arguments.output,
            image_root=arguments.image_root,
            batch_size=arguments.batch_size or 32,
            overwrite=arguments.overwrite,
        )
        _report_skipped(skipped)
    else:
        count = embed_texts(
            encoder,
            arguments.texts,
            arguments.output,
            column=arguments.column,
            batch_size=arguments.batch_size or 64,
            overwrite=arguments.overwrite,
        )
    print(f"{count} embeddings in {arguments.output}.")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from .hub.push import CardFields, push, write_repository

    card = CardFields(
        license=arguments.license,
        base_model=arguments.base_model,
        datasets=arguments.dataset,
        language=arguments.language,
        tags=arguments.tag,
        results=arguments.results,
    )
    settings = {"card": card, "max_shard_size": arguments.max_shard_size}
    if arguments.dry_run:
        folder = write_repository(arguments.checkpoint, arguments.dry_run, arguments.repo_id, **settings)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:>13,}  {printable(file.relative_to(folder))}")
        print(f"{folder} is what would be published as {arguments.repo_id}.")
        return 0
    commit = push(
        arguments.checkpoint,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        **settings,
    )
    print(commit.commit_url)
    return 0


def _relabel(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    import warnings

    import torch
    from accelerate import PartialState

    from .relabel.card import CARD, statistics_table
    from .relabel.run import SKIPPED, relabel

    # PIL's warnings are of images that it reads all the same, and do not name them.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        statistics = relabel(config)
    except torch.OutOfMemoryError as error:
        raise OSError(f"{error} What was done is kept; the same command goes on from there.") from error
    finally:
        state.destroy_process_group()
    if statistics is None:
        print(f"This process's share of {config.output} is done; the last process to end writes the card.")
        return 0
    print(statistics_table(statistics))
    print(f"{config.output} holds the shards, and what they are in {CARD}.")
    if statistics["skipped"]:
        what = "1 record was" if statistics["skipped"] == 1 else f"{statistics['skipped']} records were"
        print(f"{what} skipped: {os.path.join(config.output, SKIPPED)} says why.", file=sys.stderr)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch
    from accelerate import PartialState

    # without an accelerator, too, it has to be told
    state = PartialState(cpu=arguments.device == "cpu" or not torch.accelerator.is_available())
    try:
        if state.num_processes > 1 and arguments.device is None:
            arguments.device = state.device
        if not state.is_main_process:
            logging.getLogger("lotlip_hf").setLevel(logging.ERROR)  # the first one says it
        return _evaluate_together(arguments, state.is_main_process)
    finally:
        state.destroy_process_group()


def _evaluate_together(arguments: argparse.Namespace, is_main_process: bool) -> int:
    """The part of an evaluation that every process runs; the main one writes and prints."""
    from huggingface_hub.constants import HF_HOME

    from .embed import check_output
    from .evaluation.benchmarks.registry import load_benchmark
    from .evaluation.evaluate import evaluate, results_table, study, write_results
    from .evaluation.studies import plot_length_study, plot_sentence_ablation
    from .evaluation.tasks import RetrievalData
    from .evaluation.zero_shot import read_templates
    from .plots import check_plot

    studies = {
        "length-study": ("length", plot_length_study),
        "sentence-ablation": ("sentences", plot_sentence_ablation),
    }
    kind, plot = studies.get(arguments.task, (None, None))
    if kind is not None and arguments.benchmark is None:
        raise ValueError(f"--task {arguments.task} needs --benchmark: the retrieval task whose texts are studied.")
    _refuse(arguments, () if kind else ("benchmark", "plot"), f"--task {arguments.task}")
    _refuse(arguments, () if kind == "length" else ("limits",), f"--task {arguments.task}")
    if arguments.output is not None:
        check_output(arguments.output, overwrite=arguments.overwrite)
    elif arguments.overwrite:
        raise ValueError("--overwrite is of --output, which is missing.")
    if arguments.plot is not None:
        check_plot(arguments.plot)
        if arguments.output is not None and os.path.realpath(arguments.plot) == os.path.realpath(arguments.output):
            raise ValueError(f"--plot and --output are both {arguments.plot}: choose two files.")
    if kind is not None:
        _refuse(arguments, ("bootstrap", "templates", "max_length", "class_names"), f"--task {arguments.task}")
    settings = {
        "benchmark": arguments.benchmark or arguments.task,
        "model_name": arguments.model,
        "cache": None if arguments.no_cache else arguments.cache or os.path.join(HF_HOME, "lotlip"),
        "batch_size": arguments.batch_size,
        "progress": is_main_process,
    }
    own = {
        name: getattr(arguments, name) for name in ("max_length", "bootstrap") if getattr(arguments, name) is not None
    }
    if arguments.templates is not None:
        own["templates"] = read_templates(arguments.templates)
    data = load_benchmark(
        settings["benchmark"],
        arguments.data,
        num_images=arguments.num_images,
        split=arguments.split,
        revision=arguments.data_revision,
        config=arguments.data_config,
        image_column=arguments.image_column,
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        class_names=arguments.class_names,
        captions=arguments.captions,
        normalize=arguments.normalize,
        image_root=arguments.image_root,
        max_record_bytes=arguments.max_record_bytes,
    )
    _refuse(
        arguments, ("templates",) if isinstance(data, RetrievalData) else ("bootstrap",), f"--task {arguments.task}"
    )
    encoder = _load(arguments)
    if kind is not None:
        results = study(encoder, data, kind, limits=arguments.limits, **settings)
    else:
        results = evaluate(encoder, data, **own, **settings)
    if not is_main_process:
        return 0
    try:
        if arguments.output is not None:
            write_results(results, arguments.output)
        if plot is not None and arguments.plot is not None:
            plot(results["rows"], arguments.plot, title=f"{results['model']} on {results['dataset']['name']}")
    finally:  # the numbers are seen even if they cannot be kept, and kept even if nobody reads them
        print(results_table(results))
    return 0


def _refuse(arguments: argparse.Namespace, options: Sequence[str], what: str) -> None:
    """Raises a `ValueError` if one of these options was given."""
    for option in options:
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} is not for {what}.")


class _MaxImagePixels(argparse.Action):
    """Sets the limit, for every command alike."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        from .images import set_max_image_pixels

        set_max_image_pixels(values)


class _ListTasks(argparse.Action):
    """Prints what `lotlip evaluate` can measure."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .evaluation.benchmarks.registry import describe_tasks

        print(describe_tasks())
        parser.exit()


def _report(arguments: argparse.Namespace) -> int:
    from .evaluation.report import write_report

    print(
        write_report(
            arguments.results,
            arguments.format,
            arguments.model_index,
            arguments.plot,
            overwrite=arguments.overwrite,
        )
    )
    return 0


def _load(arguments: argparse.Namespace):  # noqa: ANN202
    import warnings

    from transformers.utils import logging

    from .encoder import load_encoder

    logging.disable_progress_bar()  # the loading of weights; ours stay
    # PIL's warnings are of images that it reads all the same, and do not name them. What it cannot read is reported.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    revision = getattr(arguments, "revision", None)
    return load_encoder(arguments.model, device=arguments.device, dtype=arguments.dtype, revision=revision)


def _report_skipped(skipped: dict[str, str]) -> None:
    if skipped:
        print(f"{len(skipped)} {'image was' if len(skipped) == 1 else 'images were'} skipped:", file=sys.stderr)
        for name, reason in skipped.items():
            print(f"  {printable(name)}: {printable(reason)}", file=sys.stderr)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
