"""
Exports a LoTLIP checkpoint to ONNX, for ONNX Runtime and other readers.

    lotlip convert onnx --model lotlip-vit-b-16 --output lotlip-onnx
    lotlip convert onnx --model lotlip-vit-b-16 --output lotlip-int8 --quantize int8

The folder contains `text_model.onnx` (`input_ids` and `attention_mask`, [batch, length] int64, to `text_embeds`
[batch, projection_dim]) and `vision_model.onnx` (`pixel_values` [batch, channels, height, width] to `image_embeds`
[batch, projection_dim]). The features are those of `get_text_features` and `get_image_features`: projected, but not
normalised. `encode_texts` and `encode_images` normalise them. Corner tokens do not change features at inference and
are left out. The folder also contains configuration, tokenizer and image processor for
`lotlip_hf.load_encoder` and `AutoProcessor`.

Readers of `tokenizer.json` (fastembed, Transformers.js, text-embeddings-inference) split sentences, collapse white
space and straighten quotation marks as LoTLIP does. These readers do not repair broken encodings (ftfy) and HTML
entities, and encode a text that is only "[SEP]" as the special token. Repair texts beforehand with
`lotlip_hf.modeling.cleaning_lotlip.clean`.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lotlip_hf import LoTLIPModel
from lotlip_hf.engines.onnx import FILES, missing_packages, open_tower
from lotlip_hf.files import all_or_nothing, one_line
from lotlip_hf.options import Parser
from lotlip_hf.terminal import run

from .common import ConversionError, check_output
from .towers import (
    INPUTS,
    LEAST_COSINE,
    OUTPUTS,
    TOLERANCE,
    Tower,
    features_of,
    images_to_check,
    largest_difference,
    load_towers,
    texts_to_check,
    tower_configs,
    without_messages,
    write_settings,
)

# First version with attention as one operator, which ONNX Runtime computes without storing the attention weights.
OPSET = 23
# Key of the metadata of both files: the logarithm of the factor on the cosine similarities.
LOGIT_SCALE = "logit_scale"


@dataclass(frozen=True)
class OnnxTower:
    """
    A file that [`convert`] wrote.

    Args:
        file (`str`): Name of the file.
        size (`int`): Size in bytes, with weights in `<file>.data` if there are any.
        difference (`float`): Largest difference between the features before quantisation and PyTorch's, relative to a
            feature's norm.
        cosine (`float`, *optional*): Smallest cosine between quantised features and PyTorch's.
    """

    file: str
    size: int
    difference: float
    cosine: float | None = None


@dataclass(frozen=True)
class OnnxCheckpoint:
    """
    The folder that [`convert`] wrote.

    Args:
        folder (`Path`): The folder.
        opset (`int`): Version of ONNX's operators.
        towers (`tuple[OnnxTower, ...]`): Files of the towers.
        processor (`tuple[str, ...]`): Classes of the saved processor, tokenizer or image processor.
    """

    folder: Path
    opset: int
    towers: tuple[OnnxTower, ...]
    processor: tuple[str, ...]


def convert(
    model: str | Path,
    output: str | Path,
    quantize: str | None = None,
    opset: int = OPSET,
    towers: Sequence[str] = ("text", "vision"),
    report: Callable[[str], None] = lambda line: None,
) -> OnnxCheckpoint:
    """
    Exports a LoTLIP checkpoint to ONNX in float32. ONNX Runtime's features are compared with PyTorch's for random
    texts (of all lengths, with and without padding) and random images, in several batch sizes. The folder is created
    only if all checks pass.

    The image tower accepts images of the processor's size, or, without a processor, of the configuration's size.
    DINOv2 and DINOv3 accept any size. SigLIP 2 NaFlex cannot be exported.

    Args:
        model (`str` or `Path`): Folder or Hub id of a [`LoTLIPModel`], or of a tower with or without projection.
        output (`str` or `Path`): Folder to create. It must not exist or must be empty.
        quantize (`str`, *optional*): `"int8"` quantises the weights of linear layers to 8 bits (one scale per channel,
            and a range of 7 bits, so that processors without VNNI do not overflow) and activations dynamically. The
            default is float32.
        opset (`int`, *optional*, defaults to 23): Version of ONNX's operators, at least 18. Attention is slower in
            versions below 23.
        towers (`Sequence[str]`, *optional*): Towers to export, `"text"` and `"vision"`. Defaults to all that the
            checkpoint has.
        report (`Callable`, *optional*): Function that is called with each line of progress.

    Returns:
        [`OnnxCheckpoint`]: Summary of the export.

    Raises:
        `ConversionError`: If a package or part of the checkpoint is missing; if the exporter fails; if ONNX Runtime's
            features differ from PyTorch's by more than 1e-4 of a feature's norm; or if the cosine between a quantised
            feature and PyTorch's is below 0.98.
    """
    missing = missing_packages("onnx", "onnxscript", "onnxruntime")
    if missing:
        raise ConversionError(missing)
    if quantize not in (None, "int8"):
        raise ConversionError(f"--quantize {quantize} is not supported. Use int8.")
    target = check_output(output)
    lotlip, processors, chosen = load_towers(model, towers, "ONNX")

    with all_or_nothing(target) as folder:
        write_settings(lotlip, processors, folder)
        written = []
        for tower in chosen:
            report(f"Exporting {FILES[tower]} ...")
            written.append(_write_tower(lotlip, tower, processors, folder, quantize, opset, report))
    return OnnxCheckpoint(Path(output), opset, tuple(written), tuple(type(one).__name__ for one in processors))


def _write_tower(
    lotlip: PreTrainedModel,
    tower: str,
    processors: Sequence[Any],
    folder: Path,
    quantize: str | None,
    opset: int,
    report: Callable[[str], None],
) -> OnnxTower:
    file = folder / FILES[tower]
    module = Tower(lotlip, tower)
    config = tower_configs(lotlip)[tower]
    batches = texts_to_check(config) if tower == "text" else images_to_check(config, processors)
    try:
        with torch.inference_mode():
            expected = [module(*batch) for batch in batches]
    except ValueError as error:  # the processor makes images of a wrong size
        raise ConversionError(f"The {tower} tower does not accept its processor's outputs: {error}") from error

    # Compare the features in float32, then the cosines of quantised features, which are less exact.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        full = file if quantize is None else Path(temporary) / file.name
        _export(module, tower, batches[0], opset, full)
        difference = largest_difference(features_of(open_tower, full.parent, tower, batches), expected)
        report(f"  features differ from PyTorch's by at most {difference:.1e} of their norm")
        if not difference <= TOLERANCE:
            raise ConversionError(
                f"{file.name}: ONNX Runtime's features differ from PyTorch's by {difference:.1e} of their norm, more "
                f"than {TOLERANCE:.0e}. Nothing was written. Check that all weights are finite, or change --opset."
            )
        cosine = None
        if quantize is not None:
            _quantize(full, file)
            features = torch.cat(features_of(open_tower, file.parent, tower, batches))
            cosine = nn.functional.cosine_similarity(features, torch.cat(expected)).min().item()
            report(f"  int8: cosines to PyTorch's features of at least {cosine:.4f}")
            if not cosine >= LEAST_COSINE:
                raise ConversionError(
                    f"{file.name}: a feature in int8 has a cosine of {cosine:.4f} to PyTorch's, less than "
                    f"{LEAST_COSINE}. Nothing was written. Export without --quantize."
                )
    size = sum(path.stat().st_size for path in (file, _data_file(file)) if path.is_file())
    return OnnxTower(file.name, size, difference, cosine)


def _export(module: Tower, tower: str, batch: Sequence[torch.Tensor], opset: int, file: Path) -> None:
    """Writes the graph and the weights. Weights that are too large for the file go to a second file."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # Use no sizes that the exporter would fix: 0, 1, and for any size the configured size and squares.
    config = tower_configs(module.model)[tower]
    if tower == "text":
        example = tuple(torch.ones(2, 3, dtype=torch.long) for _ in INPUTS[tower])
        sizes: Any = {0: "batch", 1: "length"}
    elif config.family.any_size_in_onnx:
        example = (torch.zeros(2, config.num_channels, 5 * config.patch_size, 6 * config.patch_size),)
        sizes = {0: "batch", 2: "height", 3: "width"}
    else:
        example = (torch.zeros(2, *batch[0].shape[1:]),)
        sizes = {0: "batch"}
    try:
        with without_messages(), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                example,
                input_names=INPUTS[tower],
                output_names=[OUTPUTS[tower]],
                dynamic_shapes=((sizes,) * len(example),),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            graph = program.model
            ClearMetadataAndDocStringPass()(graph)  # removes paths of this machine
            if isinstance(module.model, LoTLIPModel):
                graph.metadata_props[LOGIT_SCALE] = repr(module.model.logit_scale.item())
            program.save(file)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PyTorch's exporter and the packages that it uses raise many classes
        raise ConversionError(f"{file.name}: PyTorch's ONNX exporter failed ({one_line(error)}).") from error
    given = graph.opset_imports[""]
    if given != opset:  # if it cannot convert, the exporter keeps another version
        raise ConversionError(f"--opset {opset}: PyTorch's exporter wrote version {given}. Pass --opset {given}.")


def _quantize(full: Path, file: Path) -> None:
    """Quantises the linear layers of `full` to int8. Also changes the file `full`."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The quantiser transposes weights and fails on recorded shapes. Without recorded shapes, it infers the shapes.
    graph = onnx.load(full, load_external_data=False)
    graph.graph.ClearField("value_info")
    onnx.save(graph, full)
    with without_messages():
        quantize_dynamic(
            full,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=_data_file(full).is_file(),
        )


def _data_file(file: Path) -> Path:
    """File for weights that do not fit into `file`, because protobuf is limited to 2 GB."""
    return file.with_name(f"{file.name}.data")


DESCRIPTION = """\
Convert both towers of a LoTLIP to ONNX, with the tokenizer and the image processor.

  lotlip convert onnx --model checkpoint --output lotlip-onnx
  lotlip convert onnx --model checkpoint --output lotlip-int8 --quantize int8
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in the module's docstring. Returns the exit status: 0, or 2 after a printed error."""
    return run("lotlip convert onnx", lambda: _main(argv))


def parser(prog: str = "lotlip convert onnx") -> Parser:
    """Returns the parser of the command."""
    flags = Parser(prog=prog, description=DESCRIPTION)
    group = flags.add_argument_group("Conversion")
    group.add_argument(
        "--model", required=True, metavar="FOLDER", help="Folder of a LoTLIP or of one of its towers (required)"
    )
    group.add_argument("--output", required=True, metavar="FOLDER", help="Folder to write (required)")
    group.add_argument(
        "--quantize", choices=("int8",), help="Store linear layers in 8 bits: a smaller and faster model"
    )
    group.add_argument(
        "--opset", type=int, default=OPSET, metavar="N", help="ONNX operator set version (default: %(default)s)"
    )
    only = group.add_mutually_exclusive_group()
    only.add_argument(
        "--text-only", dest="towers", action="store_const", const=("text",), help="Convert only the text tower"
    )
    only.add_argument(
        "--vision-only", dest="towers", action="store_const", const=("vision",), help="Convert only the image tower"
    )
    flags.set_defaults(towers=tuple(FILES))
    return flags


def _main(argv: Sequence[str] | None) -> None:
    arguments = parser().parse_args(argv)
    written = convert(
        arguments.model,
        arguments.output,
        arguments.quantize,
        arguments.opset,
        arguments.towers,
        report=lambda line: print(line, flush=True),
    )
    print(f"Wrote {written.folder}, opset {written.opset}")
    for tower in written.towers:
        precision = "float32" if tower.cosine is None else f"int8, cosines to float32 from {tower.cosine:.4f} up"
        print(f"  {tower.file}: {tower.size / 1e6:,.1f} MB, {precision}")
    print(
        f"  {', '.join(written.processor) or 'no tokenizer and no image processor, because the checkpoint has none'}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
