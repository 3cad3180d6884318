"""Photographs ranked by a long description, with nothing from outside: `make quickstart`.

Converts the tiny official checkpoint that the tests compare with, collects the photographs that come with
scikit-image, and searches them twice: the second search finds every photograph embedded already.

    python examples/quickstart.py --output quickstart
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import join

from lotlip_hf.cli import main as lotlip
from lotlip_hf.search import INDEX_FOLDER

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
RELEASED = "weiwu-ww/LoTLIP-ViT-B-16-100M"

# scikit-image's other pictures are drawings, or are not photographs of anything one would describe.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
DESCRIPTION = (
    "A ginger cat looks straight into the camera with its green eyes. Its fur has dark stripes across the forehead "
    "and its long white whiskers reach to both edges of the picture. Behind its ears the background is soft and pale."
)
SECOND_DESCRIPTION = (
    "A cup of coffee stands on a red saucer. A small spoon lies beside the cup, and below it is the grain of a wooden "
    "table top."
)


def collect_photographs(folder: Path) -> list[Path]:
    """Copy the photographs that come with scikit-image.

    Args:
        folder: Where to put them; it is made if it is not there. One that is there already is left as it is.

    Returns:
        The files in `folder`.

    Raises:
        RuntimeError: scikit-image is not installed.
    """
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise RuntimeError("The photographs come with scikit-image: pip install scikit-image, or make quickstart.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        if not (folder / name).exists():
            shutil.copyfile(Path(package.origin).parent / "data" / name, folder / name)
    return [folder / name for name in PHOTOGRAPHS]


def index_files(images: Path) -> dict[Path, bytes]:
    """The files of a folder's index. They only grow: each embedding is added at their end."""
    return {path: path.read_bytes() for path in (images / INDEX_FOLDER).rglob("*") if path.is_file()}


def run(*arguments: str | Path) -> None:
    """Show a `lotlip` command and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ {join(['lotlip', *words])}", flush=True)
    if status := lotlip(words):
        raise SystemExit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, search, search again.

    Args:
        argv: Arguments of the command line; by default those of the process.

    Returns:
        0, the exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for everything it makes")
    output = parser.parse_args(argv).output
    checkpoint, images, picture = output / "checkpoint", output / "images", output / "ranked.png"

    photographs = collect_photographs(images)
    print(f"{len(photographs)} photographs are in {images}.")

    # Made anew each time: an older one may be of an older version of this package.
    shutil.rmtree(checkpoint, ignore_errors=True)
    golden = GOLDEN.relative_to(Path.cwd()) if GOLDEN.is_relative_to(Path.cwd()) else GOLDEN
    official = golden / "official-corners2"
    run(
        *("convert", "--checkpoint", official / "model.pt", "--open-clip-config", official / "open_clip_config.json"),
        *("--tokenizer", golden / "tokenizer", "--output", checkpoint),
    )
    run("search", "--model", checkpoint, "--images", images, "--save-grid", picture, DESCRIPTION)

    before = index_files(images)
    run("search", "--model", checkpoint, "--images", images, SECOND_DESCRIPTION)
    if not before or index_files(images) != before:
        print("\nThe second search embedded photographs again, which it should not.", file=sys.stderr)
        return 1

    print(f"""
The second search embedded no photograph: it read the index that the first one left in {images / INDEX_FOLDER}.
The ranked photographs are drawn in {picture}.

This checkpoint is a tiny one with random weights, made to compare numbers with: its ranking means nothing. With the
released weights it does:

  lotlip convert --checkpoint {RELEASED} --output lotlip-vit-b-16
  lotlip search --model lotlip-vit-b-16 --images {images} "{SECOND_DESCRIPTION}"
""")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
