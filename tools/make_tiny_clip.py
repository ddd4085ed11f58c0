"""Trains the tiny CLIP that ships in `assets/tiny_clip/`, from nothing, on pictures of digits.

CLIP's own contrastive pretraining (Radford et al. 2021, arXiv 2103.00020, figure 3) of both towers,
on half of what the test share leaves of scikit-learn's handwritten digits 0 to 4, with captions
such as "a photo of the digit three". The digits 5 to 9 are never shown, so that federated clients
have something to teach it.

    python tools/make_tiny_clip.py --out output/tiny_clip

Two minutes on two cores; the same seed and threads on the same machine give the same weights.
`--out` gets a folder that transformers' `from_pretrained` loads, weights in float16. Accuracies are
printed at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from base_model_parts import MAX_TOKENS, make_tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lora.federated.data import MEAN, PRETRAINING_CLASSES, SIDE, STD, Pictures, shares

WIDTH = 192
PER_CLASS = 4  # pictures of each class in a batch
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {}",
    "a small picture of a {}",
    "a grey drawing of the digit {}",
    "{}, written by hand",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    captions = [template.format(name) for template in TEMPLATES for name in NAMES]
    tokenizer = make_tokenizer(captions, arguments.out)
    model = CLIPModel(make_config(tokenizer))
    pretrain(model, tokenizer, shares(SIDE).pretraining, arguments.steps, arguments.lr)
    tokenizer.save_pretrained(arguments.out)
    model.half().save_pretrained(arguments.out)

    shipped = CLIPModel.from_pretrained(arguments.out, dtype=torch.float32)
    tested = shares(SIDE).test
    seen = tested[torch.isin(tested.labels, torch.tensor(PRETRAINING_CLASSES))]
    for pictures, classes in ((seen, PRETRAINING_CLASSES), (tested, range(10))):
        accuracy = zero_shot_accuracy(shipped, tokenizer, pictures, classes)
        print(f"zero-shot, {len(pictures)} test pictures of {classes}: {accuracy:.1%}")


def make_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """CLIP's architecture for 8x8 pixels in patches of 2x2."""
    layer = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 6,
    }
    return CLIPConfig(
        text_config={
            **layer,
            "num_hidden_layers": 3,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**layer, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 2},
        projection_dim=64,
    )


def pretrain(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, steps: int, lr: float
) -> None:
    """Contrastive training by transformers' own CLIP loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    begun, mean = time.monotonic(), 0.0
    for step, batch in enumerate(batches(pictures, steps), 1):
        tokens = tokenizer(captions_of(batch.labels), padding=True, return_tensors="pt")
        loss = model(**tokens, pixel_values=shifted(batch.images), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step, 100)
        if step % 100 == 0 or step == steps:
            took = time.monotonic() - begun
            print(f"step {step}/{steps}: loss {mean:.4f}, {took:.0f} s", flush=True)
    model.eval()


def batches(pictures: Pictures, steps: int) -> Iterator[Pictures]:
    """`steps` batches with as many of each class; a class starts anew when it is used up.

    A caption fits the other pictures of its class too, which the loss counts as wrong: with five
    classes it can't fall below log(PER_CLASS), the same for every picture of a class.
    """
    classes = [torch.nonzero(pictures.labels == label).flatten() for label in PRETRAINING_CLASSES]
    left: list[list[int]] = [[] for _ in classes]
    for _ in range(steps):
        for indices, waiting in zip(classes, left, strict=True):
            if len(waiting) < PER_CLASS:
                waiting.extend(indices[torch.randperm(len(indices))].tolist())
        yield pictures[torch.tensor([waiting.pop() for waiting in left for _ in range(PER_CLASS)])]


def captions_of(labels: Tensor) -> list[str]:
    """A caption for each, from a template drawn at random."""
    drawn = torch.randint(len(TEMPLATES), (len(labels),)).tolist()
    return [
        TEMPLATES[one].format(NAMES[label])
        for one, label in zip(drawn, labels.tolist(), strict=True)
    ]


def shifted(images: Tensor) -> Tensor:
    """Each of [N, 3, S, S] moved by up to a pixel each way, black where it left."""
    black = (-torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1)
    padded = F.pad(images - black, (1, 1, 1, 1)) + black
    side = images.shape[-1]
    corners = torch.randint(3, (len(images), 2)).tolist()
    return torch.stack(
        [one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, corners, strict=True)]
    )


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, classes: range
) -> float:
    """How many pictures are nearest to a caption of their class, by the first template."""
    captions = [TEMPLATES[0].format(NAMES[label]) for label in classes]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    nearest = model(**tokens, pixel_values=pictures.images).logits_per_image.argmax(1)
    return (torch.tensor(classes)[nearest] == pictures.labels).float().mean().item()


if __name__ == "__main__":
    main()
