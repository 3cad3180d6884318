"""WebDataset shards of records."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_shard(file: Path, samples: Iterable[tuple[bytes, Mapping[str, Any]]]) -> None:
    """Writes samples, each a picture and a row with an `id`."""
    with tarfile.open(file, "w") as tar:
        for picture, row in samples:
            for extension, content in (("png", picture), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{row['id']}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
