"""Score the words of captions by their images, for `lotlip train --word-scores`.

    python examples/score_words.py --model checkpoint --data pictures --output scores.jsonl
    lotlip train --model checkpoint --data pictures --word-scores scores.jsonl --terms infonce masked_words:0.3

The file has a line for each record: its id, and the words of each of its captions with the part that they have in the
cosine with the image (`lotlip_hf.metrics.word_alignment`). GA-DMS, the source of the method, scores the words anew in
each epoch: train some steps, score with the new checkpoint, and train on.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lotlip_hf.data.collator import read_record
from lotlip_hf.encoder import Encoder, load_encoder
from lotlip_hf.files import check_output, replacing
from lotlip_hf.metrics import word_alignment
from lotlip_hf.terminal import printable_output
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data


def score_records(encoder: Encoder, records: Any, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yields a line for each record."""
    rows = map(read_record, records)
    while some := [*islice(rows, batch_size)]:
        texts = [
            [text for text in (record["short_caption"], *record["long_captions"], *record.get("rewrites", [])) if text]
            for record, _ in some
        ]
        images = [image for (_, image), own in zip(some, texts, strict=True) for _ in own]
        found = iter(word_alignment(images, [text for own in texts for text in own], encoder))
        for (record, _), own in zip(some, texts, strict=True):
            scores = [[(word.text, word.value) for word in next(found)] for _ in own]
            yield {"id": record["id"], "texts": scores}


@printable_output()
def main(argv: Sequence[str] | None = None) -> Path:
    """Writes the file and returns its path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="records, as for lotlip train")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--batch-size", type=int, default=8, help="records in a batch")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(argv)
    try:
        check_output(options.output, overwrite=options.overwrite)
    except OSError as error:
        parser.error(str(error))
    records, _ = load_data(TrainingConfig(data=options.data))
    with replacing(options.output) as file:
        for line in score_records(load_encoder(options.model), records, options.batch_size):
            file.write(json.dumps(line).encode() + b"\n")
    return options.output


if __name__ == "__main__":
    main()
