"""
Exports a LoTLIP checkpoint to OpenVINO, which is fast on the CPUs of Intel and AMD.

    lotlip convert openvino --model lotlip-vit-b-16 --output lotlip-openvino
    lotlip convert openvino --model lotlip-vit-b-16 --output lotlip-int8 --quantize int8 \\
        --texts captions.txt --images photos

The folder contains `text_model.xml` (`input_ids` and `attention_mask`, [batch, length] int64, to `text_embeds`
[batch, projection_dim]) and `vision_model.xml` (`pixel_values` [batch, channels, height, width] to `image_embeds`
[batch, projection_dim]), with the weights beside each in a file that ends in `.bin`. The features are projected, but
not normalised, as in an export to ONNX. Configuration, tokenizer and image processor complete the folder.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lotlip_hf.embed import read_texts
from lotlip_hf.engines.openvino import FILES, core, open_tower, without_telemetry
from lotlip_hf.engines.torch import ProcessorInputs
from lotlip_hf.files import all_or_nothing, one_line
from lotlip_hf.images import ImageError, find_images
from lotlip_hf.options import Parser
from lotlip_hf.scenes.dataset import scenes_dataset
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

# Captions and pictures for int8: every third is held out to compare the features, the others calibrate.
NUM_SAMPLES = 192


@dataclass(frozen=True)
class OpenVINOCheckpoint:
    """
    The folder that [`convert`] wrote.

    Args:
        folder (`Path`): The folder.
        towers (`tuple[ExportedTower, ...]`): Files of the towers.
        recall (`tuple[float, float]`, *optional*): R@1 from long captions to pictures among held-out Scenes, in
            PyTorch and in int8, between 0 and 1. Only if Scenes calibrated both towers.
    """

    folder: Path
    towers: tuple[ExportedTower, ...]
    recall: tuple[float, float] | None = None


def convert(
    model: str | Path,
    output: str | Path,
    quantize: str | None = None,
    texts: str | Path | None = None,
    images: str | Path | None = None,
    towers: Sequence[str] = ("text", "vision"),
    report: Callable[[str], None] = lambda line: None,
) -> OpenVINOCheckpoint:
    """
    Exports a LoTLIP checkpoint to OpenVINO in float32. OpenVINO's features are compared with PyTorch's for random
    texts (of all lengths, with and without padding) and random images, in several batch sizes. The folder is created
    only if all checks pass.

    The image tower accepts images of the processor's size, or, without a processor, of the configuration's size.
    DINOv2 and DINOv3 accept any size. SigLIP 2 NaFlex cannot be exported.

    Args:
        model (`str` or `Path`): Folder or Hub id of a [`LoTLIPModel`], or of a tower with or without projection.
        output (`str` or `Path`): Folder to create. It must not exist or must be empty.
        quantize (`str`, *optional*): `"int8"` quantises weights and activations of linear layers to 8 bits by NNCF.
            Captions and pictures calibrate the ranges of the activations: two of three in 192. The others are compared
            with PyTorch. The default is float32.
        texts (`str` or `Path`, *optional*): File of captions for int8, see [`~lotlip_hf.embed.read_texts`]. Defaults
            to the long captions of Scenes.
        images (`str` or `Path`, *optional*): Folder of pictures for int8. Defaults to the pictures of Scenes.
        towers (`Sequence[str]`, *optional*): Towers to export, `"text"` and `"vision"`. Defaults to all that the
            checkpoint has.
        report (`Callable`, *optional*): Function that is called with each line of progress.

    Returns:
        [`OpenVINOCheckpoint`]: Summary of the export.

    Raises:
        `ConversionError`: If a package or part of the checkpoint is missing; if the exporter fails; if OpenVINO's
            features differ from PyTorch's by more than 1e-4 of a feature's norm; if there are fewer than 2 captions
            or pictures; or if the cosine between a quantised feature and PyTorch's is below 0.98.
    """
    needed = ("openvino",) if quantize is None else ("openvino", "nncf")
    check_packages("OpenVINO", "pip install 'lotlip-hf[openvino]'", *needed)
    if quantize not in (None, "int8"):
        raise ConversionError(f"--quantize {quantize} is not supported. Use int8.")
    if quantize is None and (texts or images):
        raise ConversionError("--texts and --images are for the calibration of int8. Pass --quantize int8, too.")
    target = check_output(output)
    lotlip, processors, chosen = load_towers(model, towers, "OpenVINO")
    samples = {}
    if quantize is not None:
        inputs = {tower: _inputs(lotlip, processors, tower) for tower in chosen}  # fail before the work
        if "text" in chosen:
            samples["text"] = _texts(inputs["text"], texts)
        if "vision" in chosen:
            samples["vision"] = _images(inputs["vision"], images)

    held_out: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    written = []
    with all_or_nothing(target) as folder:
        write_settings(lotlip, processors, folder)
        for tower in chosen:
            report(f"Exporting {FILES[tower]} ...")
            difference, cosine = _write_tower(lotlip, tower, processors, folder, samples.get(tower), held_out, report)
            file = folder / FILES[tower]
            size = file.stat().st_size + file.with_suffix(".bin").stat().st_size
            written.append(ExportedTower(file.name, size, difference, cosine))
    recall = None
    if len(held_out) == 2 and not texts and not images:
        in_torch, in_int8 = (_recall(held_out["text"][which], held_out["vision"][which]) for which in (0, 1))
        recall = in_torch, in_int8
    return OpenVINOCheckpoint(Path(output), tuple(written), recall)


def _write_tower(
    lotlip: PreTrainedModel,
    tower: str,
    processors: Sequence[Any],
    folder: Path,
    samples: Sequence[tuple[torch.Tensor, ...]] | None,
    held_out: dict[str, tuple[torch.Tensor, torch.Tensor]],
    report: Callable[[str], None],
) -> tuple[float, float | None]:
    """Writes a tower, in int8 if there are `samples`. Returns the difference to PyTorch and the cosine, and adds the
    features of the held-out samples in PyTorch and in int8 to `held_out`."""
    module, batches, expected = torch_features(lotlip, tower, processors)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        full = folder if samples is None else Path(temporary)
        _export(module, batches[0], full / FILES[tower])
        in_float32 = partial(open_tower, dtype="float32", is_kept=False)
        given = features_of(in_float32, full, tower, batches)
        difference = check_difference(FILES[tower], "OpenVINO", given, expected, report)
        if samples is None:
            return difference, None
        kept = samples[1::3]
        report(f"  calibrating int8 by {len(samples) - len(kept)} samples, {len(kept)} others are held out ...")
        _quantize(full, folder, tower, [one for index, one in enumerate(samples) if index % 3 != 1])
        with torch.inference_mode():
            in_torch = torch.cat([module(*sample) for sample in kept])
        in_int8 = torch.cat(features_of(partial(open_tower, is_kept=False), folder, tower, kept))
    cosine = check_cosine(FILES[tower], in_int8, in_torch, report, advice=", for bfloat16")
    held_out[tower] = in_torch, in_int8
    return difference, cosine


def _export(module: Tower, batch: Sequence[torch.Tensor], file: Path) -> None:
    """Writes the graph and the weights in float32."""
    with without_telemetry():
        import openvino
    tower = module.tower
    example, axes = example_of(module, batch)
    sizes = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    try:
        with without_messages(), without_telemetry(), _finite_masks(), torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=((sizes,) * len(example),), strict=False)
            graph = openvino.convert_model(program)
            for node, name in zip(graph.inputs, INPUTS[tower], strict=True):
                node.get_node().set_friendly_name(name)
                node.get_tensor().set_names({name})
            graph.outputs[0].get_tensor().set_names({OUTPUTS[tower]})
            if tower == "vision":  # refuse images of other sizes by name
                height, width = (-1, -1) if 2 in sizes else batch[0].shape[2:]
                graph.reshape({INPUTS[tower][0]: [-1, batch[0].shape[1], height, width]})
            openvino.save_model(graph, file, compress_to_fp16=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PyTorch's exporter and OpenVINO raise many classes
        raise ConversionError(f"{file.name}: the export to OpenVINO failed ({one_line(error)}).") from error


@contextlib.contextmanager
def _finite_masks() -> Iterator[None]:
    """Context in which masks of attention are finite. In OpenVINO, a row that is masked as a whole, such as padding
    outside of all windows, gives NaN otherwise, and 0 times NaN in a pooling."""
    function = nn.functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *arguments: Any, **options: Any) -> Any:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min / 2
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, lowest)
        return function(query, key, value, attn_mask, *arguments, **options)

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attention):
        yield


def _quantize(full: Path, folder: Path, tower: str, samples: Sequence[tuple[torch.Tensor, ...]]) -> None:
    """Quantises a tower of the folder `full` to int8, and writes it to `folder`."""
    with without_messages(), without_telemetry(), contextlib.redirect_stdout(io.StringIO()):
        import nncf
        import openvino

        nncf.set_log_level(40)
        rows = [dict(zip(INPUTS[tower], (one.numpy() for one in sample), strict=True)) for sample in samples]
        graph = core().read_model(full / FILES[tower])
        quantised = nncf.quantize(
            graph, nncf.Dataset(rows), subset_size=len(rows), model_type=nncf.ModelType.TRANSFORMER
        )
        openvino.save_model(quantised, folder / FILES[tower], compress_to_fp16=False)


def _inputs(lotlip: PreTrainedModel, processors: Sequence[Any], tower: str) -> ProcessorInputs:
    """What prepares the inputs of a tower, or an error if the checkpoint has no processor for it."""
    for processor in processors:
        part = getattr(processor, "tokenizer" if tower == "text" else "image_processor", processor)
        if INPUTS[tower][0] in part.model_input_names:
            return ProcessorInputs(lotlip, processor)
    needed = "tokenizer" if tower == "text" else "image processor"
    raise ConversionError(f"--quantize int8 needs the checkpoint's {needed}, which is missing.")


def _texts(inputs: ProcessorInputs, file: str | Path | None) -> list[tuple[torch.Tensor, ...]]:
    """Ids and mask of each caption, without padding."""
    if file is None:
        texts = [captions[0] for captions in _scenes()["long_captions"]]
    else:
        texts = list(islice(read_texts(file), NUM_SAMPLES))
    _check_number(texts, "--texts", file)
    samples = []
    for text in texts:
        padded = inputs.pad(inputs.tokenize([text], inputs.max_text_length)[0])
        input_ids = padded["input_ids"]
        mask = padded.get("attention_mask", np.ones_like(input_ids))
        samples.append((torch.from_numpy(input_ids), torch.from_numpy(mask)))
    return samples


def _images(inputs: ProcessorInputs, folder: str | Path | None) -> list[tuple[torch.Tensor, ...]]:
    """Pixels of each picture. Pictures that cannot be read are skipped."""
    if folder is None:
        pictures = _scenes()["image"]
    else:
        pictures = (Path(folder, name) for name in find_images(folder)[0])
    samples: list[tuple[torch.Tensor, ...]] = []
    for picture in pictures:
        with contextlib.suppress(ImageError):
            samples.append((torch.from_numpy(inputs.pixels(picture)["pixel_values"]),))
        if len(samples) == NUM_SAMPLES:
            break
    _check_number(samples, "--images", folder)
    return samples


def _scenes() -> Any:
    with without_messages():
        return scenes_dataset(NUM_SAMPLES, split="validation")


def _check_number(samples: Sequence[Any], option: str, source: str | Path | None) -> None:
    if len(samples) < 2:
        raise ConversionError(
            f"{option} {source} has {len(samples)} samples. Calibration needs at least 2: one is held out."
        )


def _recall(texts: torch.Tensor, images: torch.Tensor) -> float:
    """Fraction of captions whose picture, in the same row, has the highest cosine."""
    cosines = nn.functional.normalize(texts) @ nn.functional.normalize(images).T
    return (cosines.argmax(1) == torch.arange(len(texts))).float().mean().item()


DESCRIPTION = """\
Convert both towers of a LoTLIP to OpenVINO, with the tokenizer and the image processor.

  lotlip convert openvino --model checkpoint --output lotlip-openvino
  lotlip convert openvino --model checkpoint --output lotlip-int8 --quantize int8 --texts captions.txt --images photos
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in the module's docstring. Returns the exit status: 0, or 2 after a printed error."""
    return run("lotlip convert openvino", lambda: _main(argv))


def parser(prog: str = "lotlip convert openvino") -> Parser:
    """Returns the parser of the command."""
    flags, group = tower_parser(prog, DESCRIPTION, "Compute linear layers in 8 bits: a smaller and faster model")
    group.add_argument(
        "--texts", metavar="FILE", help="Captions that calibrate int8, one a line (default: captions of Scenes)"
    )
    group.add_argument("--images", metavar="FOLDER", help="Pictures that calibrate int8 (default: pictures of Scenes)")
    return flags


def _main(argv: Sequence[str] | None) -> None:
    arguments = parser().parse_args(argv)
    written = convert(
        arguments.model,
        arguments.output,
        arguments.quantize,
        arguments.texts,
        arguments.images,
        arguments.towers,
        report=lambda line: print(line, flush=True),
    )
    print(f"Wrote {written.folder}")
    for tower in written.towers:
        print(f"  {tower}")
    if written.recall is not None:
        print(f"  R@1 of held-out Scenes: {written.recall[0]:.1%} in PyTorch, {written.recall[1]:.1%} in int8")


if __name__ == "__main__":
    raise SystemExit(main())
