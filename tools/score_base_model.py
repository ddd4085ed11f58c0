"""Measures whether the base model draws what it is asked, and shows it.

    python tools/score_base_model.py --icons node_modules/@iconify-json --sheet samples.png

`--references tests/data/emoji_16px.png` writes what the tests need of the training pictures.

For prompts drawn by lot from the training captions: is the picture drawn nearer to its true picture
than to 90 % of the other training pictures? Near is the cosine distance of the pictures shrunk to
16×16 RGB. On the CPU, in float32, from the float16 files, 25 steps, a fixed seed.
"""

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
from emoji_dataset import Picture, load_training_pictures
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.uint8]  # [n, 64, 64, 3] RGB

NOVEL_PROMPTS = [  # captions that no training picture has
    "blue apple, flat style",
    "green cat face, flat style",
    "purple umbrella, noto style",
    "red elephant, flat style",
    "pink car, noto style",
    "black rabbit face, flat style",
    "dog with sunglasses, flat style",
    "pear, ink style",
    "owl",
    "yellow heart on fire, noto style",
]


def load_pipeline(folder: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompts: list[str], steps: int, guidance: float) -> Pixels:
    """A 64×64 picture for each prompt; the n-th prompt starts from seed n."""
    pictures = []
    for start in range(0, len(prompts), 25):
        part = prompts[start : start + 25]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        drawn = pipeline(
            part,
            width=64,
            height=64,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeds,
            output_type="np",
        ).images
        pictures.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def fingerprints(pictures: Pixels) -> npt.NDArray[np.float64]:
    """Unit vectors of the pictures shrunk to 16×16 RGB."""
    small = [
        np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX)) for p in pictures
    ]
    flat = np.stack(small).reshape(len(small), -1).astype(np.float64)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def write_references(path: Path, pictures: Pixels, captions: list[str], columns: int = 20) -> None:
    """The pictures shrunk to 16×16 in one PNG, their captions a line each beside it."""
    small = [Image.fromarray(p).resize((16, 16), Image.Resampling.BOX) for p in pictures]
    image = Image.new("RGB", (16 * columns, 16 * math.ceil(len(small) / columns)), "white")
    for i, picture in enumerate(small):
        image.paste(picture, (16 * (i % columns), 16 * (i // columns)))
    image.save(path, optimize=True)
    path.with_suffix(".txt").write_text("\n".join([*captions, ""]), encoding="utf-8")


def read_references(path: Path) -> tuple[Pixels, list[str]]:
    """What `write_references` wrote: `[n, 16, 16, 3]` and the captions."""
    captions = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    image = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = image.shape[0] // 16, image.shape[1] // 16
    tiles = image.reshape(rows, 16, columns, 16, 3).swapaxes(1, 2).reshape(-1, 16, 16, 3)
    return tiles[: len(captions)], captions


def share_farther(drawn: Pixels, all_true: Pixels, own: list[int]) -> npt.NDArray[np.float64]:
    """For each drawn picture, the share of the other true pictures farther than its own."""
    similarity = fingerprints(drawn) @ fingerprints(all_true).T
    of_own = similarity[np.arange(len(own)), own]
    return (similarity < of_own[:, None]).sum(axis=1) / (len(all_true) - 1)


def sheet(rows: list[tuple[Pixels, list[str]]], cell: int = 96, columns: int = 10) -> Image.Image:
    """Pictures in rows, each with its caption beneath; every entry starts a new row."""
    lines = [
        (pictures[i : i + columns], captions[i : i + columns])
        for pictures, captions in rows
        for i in range(0, len(captions), columns)
    ]
    height = cell + 26
    image = Image.new("RGB", (columns * cell, len(lines) * height), "white")
    write = ImageDraw.Draw(image)
    for row, (pictures, captions) in enumerate(lines):
        for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            x, y = column * cell, row * height
            image.paste(Image.fromarray(picture).resize((cell - 8, cell - 8)), (x + 4, y))
            half = caption.rfind(" ", 0, 17) if len(caption) > 16 else len(caption)
            write.text(
                (x + 3, y + cell - 8),
                f"{caption[:half]}\n{caption[half:].strip()}",
                "black",
                font_size=9,
            )
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure and show what the base model draws.")
    parser.add_argument(
        "--icons", type=Path, required=True, help="the folder node_modules/@iconify-json"
    )
    parser.add_argument("--model", type=Path, default=Path("assets/base_model"))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0, help="of the lot that chooses the prompts")
    parser.add_argument("--references", type=Path, help="write 400 shrunk pictures here, no more")
    parser.add_argument("--sheet", type=Path, help="write drawn and true pictures here")
    args = parser.parse_args()

    pictures: list[Picture] = load_training_pictures(args.icons)
    true = np.stack([picture.rgb for picture in pictures])
    if args.references:
        some = random.Random(args.seed).sample(range(len(pictures)), 400)
        write_references(args.references, true[some], [pictures[i].caption for i in some])
        return
    own = random.Random(args.seed).sample(range(len(pictures)), args.prompts)
    prompts = [pictures[i].caption for i in own]

    pipeline = load_pipeline(args.model)
    start = time.monotonic()
    drawn = draw(pipeline, prompts, args.steps, args.guidance)
    seconds = time.monotonic() - start
    shares = share_farther(drawn, true, own)
    for share, prompt in sorted(zip(shares, prompts, strict=True)):
        if share < 0.9:
            print(f"  {share:5.0%} of the others are farther: {prompt}")
    good = (shares >= 0.9).sum()
    print(f"nearer to its own picture than to 90 % of the others: {good} of {len(own)}")
    print(f"median share {np.median(shares):.1%}; drawn in {seconds:.0f} s")

    if args.sheet:
        rows = [(draw(pipeline, NOVEL_PROMPTS, args.steps, args.guidance), NOVEL_PROMPTS)]
        for i in range(0, min(40, len(own)), 10):
            rows += [
                (drawn[i : i + 10], prompts[i : i + 10]),
                (true[own[i : i + 10]], ["true"] * 10),
            ]
        image = sheet(rows).quantize(192, dither=Image.Dither.NONE)
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        image.save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
