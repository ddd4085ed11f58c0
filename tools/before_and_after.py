"""The README's picture: what a run drew first, and below it what it drew last.

    python tools/before_and_after.py output/quickstart docs/images/quickstart.png

Prints how colourful the two rows are: the mean of max - min over the channels, 0 for greys.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from score_base_model import sheet


def drawings(folder: Path) -> list[list[Path]]:
    """The sample pictures of a run by step, in the prompts' order: `NAME_STEP_INDEX_TIME_SEED`.

    Of several runs in one folder those of the last.
    """
    newest: dict[str, dict[str, Path]] = defaultdict(dict)
    for picture in sorted((folder / "sample").glob("*_[0-9]*_[0-9][0-9]_*.png")):
        step, index = picture.stem.split("_")[-4:-2]
        newest[step][index] = picture
    return [list(newest[step].values()) for step in sorted(newest)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a run's first and last sample pictures.")
    parser.add_argument("folder", type=Path, help="the run's --output_dir")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("configs/quickstart/prompts.txt"))
    args = parser.parse_args()

    steps = drawings(args.folder)
    if not steps:
        parser.error(f"{args.folder} has no sample pictures; is it a run's --output_dir?")
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    captions = [line.split(" --")[0] for line in lines if line and not line.startswith("#")]
    first, last = (
        np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        for files in (steps[0], steps[-1])
    )
    for name, pixels in (("first", first), ("last", last)):
        print(f"{name}: saturation {(pixels.max(-1) - pixels.min(-1)).mean() / 255:.3f}")
    rows = [(first, ["before"] * len(captions)), (last, captions)]
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, columns=len(captions), cell=120).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
