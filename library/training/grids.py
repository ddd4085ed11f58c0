"""A prompt's pictures over time, side by side in one PNG that grows to the right."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from library.training.files import write_atomically

# Pictures outside these longest sides (pixels) are brought to them: readable, but no giant file.
SMALLEST, LARGEST = 128, 256
GAP = 8
LABEL_HEIGHT = 22
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def extend_grid(path: Path, image: Image.Image, step: int) -> Path:
    """Add `image` at the right, labelled with its step; columns of this step and later are cut off.

    The steps are kept in the PNG itself, so a resumed run goes on with the file it finds.
    """
    tile = _tile(image)
    row, steps = _read(path)
    kept = [earlier for earlier in steps if earlier < step]
    column = tile.width + GAP
    grid = Image.new(
        "RGB", (GAP + column * (len(kept) + 1), 2 * GAP + tile.height + LABEL_HEIGHT), BACKGROUND
    )
    if row is not None and row.height == grid.height:
        grid.paste(row.crop((0, 0, GAP + column * len(kept), row.height)), (0, 0))
    left = GAP + column * len(kept)
    grid.paste(tile, (left, GAP))
    label = f"step {step}" if step else "before"
    ImageDraw.Draw(grid).text(
        (left + tile.width / 2, GAP + tile.height + LABEL_HEIGHT / 2),
        label,
        fill=INK,
        font=ImageFont.load_default(13),
        anchor="mm",
    )
    info = PngInfo()
    info.add_text("steps", json.dumps([*kept, step]))
    return write_atomically(path, lambda temporary: grid.save(temporary, pnginfo=info))


def _read(path: Path) -> tuple[Image.Image | None, list[int]]:
    if not path.is_file():
        return None, []
    with Image.open(path) as image:
        steps = json.loads(image.info.get("steps", "[]"))
        return image.convert("RGB"), steps


def _tile(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest > LARGEST:
        scale = LARGEST / longest
        size = (round(image.width * scale), round(image.height * scale))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = -(-SMALLEST // longest)
    # A whole factor and hard edges: small pictures are enlarged, not invented.
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
