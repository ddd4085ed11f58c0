r"""Emoji as captioned pictures: what the base model is trained on, and the quickstart's pictures.

The pictures come as SVG in npm packages; fetch them once into any folder:

    npm install @iconify-json/noto @iconify-json/fluent-emoji-flat \
        @iconify-json/fluent-emoji-high-contrast

and pass `--icons node_modules/@iconify-json`. Run as a script, this writes `configs/quickstart/`:

    python tools/emoji_dataset.py --icons node_modules/@iconify-json

Needs `resvg-py` (the SVG renderer) besides the project's own requirements.
"""

import argparse
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

SIZE = 64  # pixels a side

# Package → the style word of its captions. The base model learns these two.
BASE_STYLES = {"noto": "noto", "fluent-emoji-flat": "flat"}
# The style that the quickstart's adapter is to learn: the base model never sees it.
QUICKSTART_PACKAGE, QUICKSTART_STYLE = "fluent-emoji-high-contrast", "ink"

# Names left out of training. Variants of one picture (skin tones, genders, clock hands) would crowd
# out the objects; letters and buttons with text can't be drawn at this size.
SKIN_TONE = re.compile(r"skin-tone|-tone\d|-(light|medium-light|medium|medium-dark|dark)$")
PERSON_VARIANT = re.compile(
    r"^(man|woman|men|women)-|^(family|kiss|couple-with-heart)-|^deaf-(wo)?man"
)
CLOCK_FACE = re.compile(r"-(oclock|thirty)$")
TEXT = re.compile(
    r"^(keycap|letter|input|digit)\b|^japanese-.*(button|beginner)$|-button(-blood-type)?$"
    r"|^(back|end|on|on-exclamation|soon|top)-arrow$|^(atm-sign|circled-m|copyright|registered|trade-mark)$"
    r"|^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)$"
)

# Chosen for variety and for shapes that read in black on white; every one has colourful siblings
# in the training pictures.
# fmt: off
QUICKSTART_NAMES = [
    "cat", "dog-face", "elephant", "fish", "butterfly", "owl", "snail", "turtle", "rabbit-face",
    "red-apple", "banana", "cherries", "hamburger", "pizza", "birthday-cake", "ice-cream",
    "mushroom", "house", "automobile", "bicycle", "airplane", "sailboat", "umbrella", "key",
    "guitar", "hammer", "grinning-face", "smiling-face-with-sunglasses", "ghost", "robot",
]
QUICKSTART_HELD_OUT_NAMES = [
    "pear", "penguin", "rocket", "light-bulb", "hot-beverage", "crying-face",
]
# fmt: on


@dataclass(frozen=True)
class Picture:
    """One emoji: its name in the package, its caption, and `[64, 64, 3]` uint8 RGB on white."""

    name: str
    caption: str
    rgb: npt.NDArray[np.uint8]


class IconPackage:
    """Icons in Iconify's JSON form: `icons.json` has SVG bodies, `metadata.json` categories."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "icons.json").is_file():
            raise SystemExit(
                f"{folder} has no icons.json: run `npm install @iconify-json/{folder.name}` first."
            )
        self._data: dict[str, Any] = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        # Uncategorised icons are old aliases of the others.
        self.categories: dict[str, str] = {
            name: category for category, names in metadata["categories"].items() for name in names
        }

    def names(self) -> list[str]:
        return sorted(name for name in self._data["icons"] if name in self.categories)

    def render(self, name: str, size: int = SIZE) -> npt.NDArray[np.uint8]:
        """The icon as `[size, size, 3]` uint8 RGB on white."""
        import resvg_py

        icon = self._data["icons"][name]
        width = icon.get("width", self._data["width"])
        height = icon.get("height", self._data["height"])
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{size}" height="{size}" viewBox="0 0 {width} {height}" color="black">'
            f"{icon['body']}</svg>"
        )
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
        return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def caption(name: str, style: str) -> str:
    """'red-apple', 'flat' → 'red apple, flat style'."""
    return f"{name.replace('-', ' ')}, {style} style"


def is_trainable(name: str, category: str) -> bool:
    """Whether the base model is to learn this icon; see the patterns above for what it isn't."""
    if category == "Flags" or (category == "People & Body" and PERSON_VARIANT.search(name)):
        return False
    return not any(pattern.search(name) for pattern in (SKIN_TONE, CLOCK_FACE, TEXT))


def load_training_pictures(icons: Path) -> list[Picture]:
    """Every picture the base model is trained on, in a fixed order."""
    pictures = []
    for package_name, style in BASE_STYLES.items():
        package = IconPackage(icons / package_name)
        for name in package.names():
            if is_trainable(name, package.categories[name]):
                pictures.append(Picture(name, caption(name, style), package.render(name)))
    return pictures


def write_captioned(folder: Path, package: IconPackage, names: list[str], style: str) -> None:
    """`NAME.png` with `NAME.txt` beside it for each name, as sd-scripts' users have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(package.render(name)).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(caption(name, style) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's pictures and captions.")
    parser.add_argument(
        "--icons", type=Path, required=True, help="the folder node_modules/@iconify-json"
    )
    parser.add_argument("--out", type=Path, default=Path("configs/quickstart"))
    args = parser.parse_args()
    package = IconPackage(args.icons / QUICKSTART_PACKAGE)
    write_captioned(args.out / "images", package, QUICKSTART_NAMES, QUICKSTART_STYLE)
    write_captioned(args.out / "validation", package, QUICKSTART_HELD_OUT_NAMES, QUICKSTART_STYLE)
    held_out = len(QUICKSTART_HELD_OUT_NAMES)
    print(f"{len(QUICKSTART_NAMES)} pictures and {held_out} held out, in {args.out}")


if __name__ == "__main__":
    main()
