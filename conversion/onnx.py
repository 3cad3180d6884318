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
from transformers import PreTrainedModel

from lotlip_hf import LoTLIPModel
from lotlip_hf.engines.onnx import FILES, open_tower
from lotlip_hf.files import all_or_nothing, one_line
from lotlip_hf.options import Parser
from lotlip_hf.terminal import run

from .common import ConversionError, check_output
from .towers import (
    INPUTS,
    OUTPUTS,
    ExportedTower,
    Tower,
    check_cosine,
    check_difference,
    check_packages,
    example_of,
    features_of,
    load_towers,
    torch_features,
    tower_parser,
    without_messages,
    write_settings,
)

# First version with attention as one operator, which ONNX Runtime computes without storing the attention weights.
OPSET = 23
# Key of the metadata of both files: the logarithm of the factor on the cosine similarities.
LOGIT_SCALE = "logit_scale"


@dataclass(frozen=True)
class OnnxCheckpoint:
    """
    The folder that [`convert`] wrote.

    Args:
        folder (`Path`): The folder.
        opset (`int`): Version of ONNX's operators.
        towers (`tuple[ExportedTower, ...]`): Files of the towers.
        processor (`tuple[str, ...]`): Classes of the saved processor, tokenizer or image processor.
    """

    folder: Path
    opset: int
    towers: tuple[ExportedTower, ...]
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
    check_packages("ONNX", "pip install 'lotlip-hf[onnx]'", "onnx", "onnxscript", "onnxruntime")
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
) -> ExportedTower:
    file = folder / FILES[tower]
    module, batches, expected = torch_features(lotlip, tower, processors)
    # Compare the features in float32, then the cosines of quantised features, which are less exact.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        full = file if quantize is None else Path(temporary) / file.name
        _export(module, batches[0], opset, full)
        given = features_of(open_tower, full.parent, tower, batches)
        difference = check_difference(file.name, "ONNX Runtime", given, expected, report, advice=", or change --opset")
        cosine = None
        if quantize is not None:
            _quantize(full, file)
            quantised = torch.cat(features_of(open_tower, file.parent, tower, batches))
            cosine = check_cosine(file.name, quantised, torch.cat(expected), report)
    size = sum(path.stat().st_size for path in (file, _data_file(file)) if path.is_file())
    return ExportedTower(file.name, size, difference, cosine)


def _export(module: Tower, batch: Sequence[torch.Tensor], opset: int, file: Path) -> None:
    """Writes the graph and the weights. Weights that are too large for the file go to a second file."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    example, axes = example_of(module, batch)
    try:
        with without_messages(), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                example,
                input_names=INPUTS[module.tower],
                output_names=[OUTPUTS[module.tower]],
                dynamic_shapes=((axes,) * len(example),),
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
    flags, group = tower_parser(prog, DESCRIPTION, "Store linear layers in 8 bits: a smaller and faster model")
    group.add_argument(
        "--opset", type=int, default=OPSET, metavar="N", help="ONNX operator set version (default: %(default)s)"
    )
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
        print(f"  {tower}")
    print(
        f"  {', '.join(written.processor) or 'no tokenizer and no image processor, because the checkpoint has none'}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
