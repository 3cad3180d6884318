"""Embed a data set on a Ray cluster: readers, a pool of actors with a model each, and Parquet files.

    python examples/embed_with_ray.py --model checkpoint --data photos --output embeddings --actors 2
    python examples/embed_with_ray.py --model checkpoint --data 'tables/*.parquet' --keep url --output embeddings

The data is a folder of images, or Parquet files with the columns `image` (bytes of a file, or `{bytes, path}`) and
`id`. The output has the columns, types and metadata of `lotlip embed --data`. Broken images are listed in
`embeddings/_skipped`. Ray starts a killed actor again, and repeats its batches. `--gpus 1` gives each actor a GPU.
With `RAY_ADDRESS` the example uses a running cluster, whose machines must see the same files.
"""

import argparse
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from lotlip_hf import load_encoder
from lotlip_hf.embed import embedding_schema
from lotlip_hf.files import check_output, replacing
from lotlip_hf.images import ImageError, find_images, image_source

SHARD_SIZE = 10_000  # minimum number of rows in a file


class Embed:
    """
    An actor that turns a table of images into a table of embeddings.

    Args:
        model (`str`): Checkpoint folder or Hub id.
        skipped (`str`): Folder for the lists of broken images.
    """

    def __init__(self, model: str, skipped: str) -> None:
        self.encoder, self.skipped = load_encoder(model), Path(skipped)
        self.fingerprint = self.encoder.fingerprint("image")
        self.dim = self.encoder.encode_images([], progress=False).shape[1]

    def __call__(self, batch: pa.Table) -> pa.Table:
        ids = [str(one) for one in batch["id"].to_pylist()]
        images = [image_source(image).source for image in batch["image"].to_pylist()]
        good: list[int] = []
        rows: list[np.ndarray] = []
        broken: list[dict[str, str]] = []
        for index, result in self.encoder.image_rows(image or b"" for image in images):
            if isinstance(result, ImageError):
                broken.append({"id": ids[index], "reason": result.reason})
            else:
                good.append(index)
                rows.append(result)
        if broken:
            # A batch that Ray repeats writes the same file again.
            name = hashlib.blake2b("\n".join(ids).encode(), digest_size=16).hexdigest()
            with replacing(self.skipped / f"{name}.jsonl") as file:
                file.writelines(json.dumps(one).encode() + b"\n" for one in broken)
        kept = batch.select([name for name in batch.column_names if name not in ("id", "image")]).take(good)
        types = {field.name: field.type for field in kept.schema}
        schema = embedding_schema(self.encoder, self.fingerprint, self.dim, {"id": pa.string()}, types)
        vectors = np.concatenate(rows) if rows else np.zeros(0, np.float32)
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors), self.dim)
        return pa.table([[ids[index] for index in good], embeddings, *kept.columns], schema=schema)


def read(data: str, keep: list[str]) -> ray.data.Dataset:
    """Opens a folder of images, or Parquet files, as rows with `id`, `image` and the columns to copy."""
    if not Path(data).is_dir():
        return ray.data.read_parquet(sorted(glob.glob(data))).select_columns(["id", "image", *keep])
    images, _ = find_images(data)
    return ray.data.from_items([{"id": name, "image": os.path.abspath(Path(data, name))} for name in images])


def main(argv: Sequence[str] | None = None) -> None:
    """Embeds a data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Checkpoint folder or Hub id")
    parser.add_argument("--data", required=True, help="Folder of images, or pattern of Parquet files")
    parser.add_argument("--output", required=True, help="New folder for the Parquet files")
    parser.add_argument("--keep", nargs="+", default=[], help="Columns of the Parquet files to copy")
    parser.add_argument("--batch-size", type=int, default=256, help="Images in a task of an actor (default: 256)")
    parser.add_argument("--actors", type=int, default=1, help="Number of actors (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an actor (default: 0)")
    options = parser.parse_args(argv)
    try:
        check_output(options.output, folder=True)
    except OSError as error:
        parser.error(str(error))
    ray.init()
    if options.actors >= (cpus := int(ray.cluster_resources().get("CPU", 1))):
        parser.error(f"--actors {options.actors}: the readers need one of the {cpus} CPUs. Pass --actors {cpus - 1}.")
    output = Path(options.output).resolve()
    skipped = output / "_skipped"
    skipped.mkdir(parents=True)
    embeddings = read(options.data, options.keep).map_batches(
        Embed,
        batch_format="pyarrow",
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        fn_constructor_args=(options.model, str(skipped)),
        num_gpus=options.gpus,
    )
    embeddings.write_parquet(str(output), min_rows_per_file=SHARD_SIZE)
    lines = sum(len(file.read_bytes().splitlines()) for file in skipped.iterdir())
    print(f"The embeddings are in {output}. {lines} images were skipped.")


if __name__ == "__main__":
    main()
