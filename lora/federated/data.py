"""The example's pictures, and how they are dealt out to the clients.

scikit-learn ships 1,797 handwritten digits of 8x8 pixels, ten classes (UCI's "Optical Recognition
of Handwritten Digits", test part, CC BY 4.0), so that nothing is downloaded. The shipped tiny CLIP
was pretrained on some of the digits 0-4; the clients hold all ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from library.training.errors import UserError
from utils.packages import missing_package

# The small CLIP that ships with the project; tools/make_tiny_clip.py makes it.
TINY_CLIP = Path(__file__).resolve().parents[2] / "assets" / "tiny_clip"

SIDE = 8  # pixels of a digit as scikit-learn ships it
BRIGHTEST = 16  # its pixels are 0 ... 16
# What CLIP's image processors subtract from, and divide by, each of red, green and blue.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

PRETRAINING_CLASSES = range(5)  # so that the clients meet five digits that the model never saw
PRETRAINING_SHARE = 0.5  # of what the test share leaves of these classes
TEST_SHARE = 0.2
SPLIT_SEED = 7  # fixed: the shipped model must never have seen a test picture

# NumPy froze the streams of RandomState (NEP 19): every version and machine deals alike.
Random = np.random.RandomState


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes.

    Attributes:
        images: [N, 3, S, S], float32, normalised as CLIP expects.
        labels: [N], int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Pictures:
        """Those at `indices`, [M] int64 (or a mask, [N] bool), in that order."""
        return Pictures(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Shares:
    """Three disjoint shares of the digits; `shares` says how large."""

    pretraining: Pictures
    clients: Pictures
    test: Pictures


def digits(image_size: int) -> Pictures:
    """All 1,797 digits, grey on all three channels, resized where `image_size` isn't 8 pixels.

    Raises:
        ImportError: scikit-learn isn't installed.
        UserError: `image_size` isn't positive.
    """
    if image_size < 1:
        raise UserError(f"A picture can't be {image_size} pixels wide: give at least 1.")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    pixels, labels = load_digits(return_X_y=True)
    grey = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, SIDE, SIDE) / BRIGHTEST
    if image_size != SIDE:
        size = (image_size, image_size)
        grey = F.interpolate(grey, size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return Pictures((grey - mean) / std, torch.tensor(labels, dtype=torch.int64))


def shares(image_size: int) -> Shares:
    """The digits in three: always the same pictures, whatever their size.

    A fifth of each class is for tests; half of the rest of the digits 0-4 is for pretraining; all
    else is the clients'.
    """
    pictures = digits(image_size)
    random = Random(SPLIT_SEED)
    pretraining: list[Tensor] = []
    clients: list[Tensor] = []
    test: list[Tensor] = []
    for label in range(10):
        indices = _shuffled(pictures.labels, label, random)
        tested = round(TEST_SHARE * len(indices))
        rest = len(indices) - tested
        seen = round(PRETRAINING_SHARE * rest) if label in PRETRAINING_CLASSES else 0
        for share, part in zip(
            (test, pretraining, clients), indices.split([tested, seen, rest - seen]), strict=True
        ):
            share.append(part)
    return Shares(*(pictures[torch.cat(share)] for share in (pretraining, clients, test)))


def dirichlet(
    labels: Tensor, clients: int, alpha: float, seed: int, least: int = 8
) -> list[Tensor]:
    """Deal pictures out with label skew: what a client holds of each class differs by client.

    Each class is cut by proportions drawn from Dir(alpha, ..., alpha) over the clients: the smaller
    alpha, the fewer clients share a class; a large one comes near an even deal. So do Yurochkin et
    al. (2019, arXiv 1905.12022); Hsu, Qi, Brown (2019, arXiv 1909.06335) draw the classes'
    proportions within each client instead, which need not use every picture. Clients left with
    fewer than `least` get pictures from whoever holds most.

    Args:
        labels: [N], int64.
        clients: how many to deal to.
        alpha: concentration, above 0.
        seed: the same seed, the same deal, on any machine.
        least: the fewest pictures a client may hold.

    Returns:
        for each client its indices into `labels`, ascending; disjoint, and together all of them.

    Raises:
        UserError: an argument out of range, or fewer pictures than `clients` times `least`.
    """
    if clients < 1:
        raise UserError(f"{clients} clients: there must be at least 1.")
    if not 0 < alpha < float("inf"):
        raise UserError(f"Dirichlet's alpha must be above 0 and finite, not {alpha}.")
    if least < 0:
        raise UserError(f"A client can't hold {least} pictures: give 0 or more.")
    if clients * least > len(labels):
        raise UserError(
            f"{len(labels)} pictures are too few for {clients} clients with at least {least} each: "
            "take fewer clients, or ask for less of each."
        )
    random = Random(seed)
    hands: list[list[int]] = [[] for _ in range(clients)]
    for label in labels.unique().tolist():
        indices = _shuffled(labels, label, random)
        proportions = _dirichlet_sample(clients, alpha, random)
        cuts = np.rint(proportions.cumsum()[:-1] * len(indices)).astype(int).tolist()
        for hand, part in zip(hands, indices.tensor_split(cuts), strict=True):
            hand.extend(part.tolist())
    _fill_up(hands, least)
    return [torch.tensor(sorted(hand), dtype=torch.int64) for hand in hands]


def _shuffled(labels: Tensor, label: int, random: np.random.RandomState) -> Tensor:
    """The indices of one class, shuffled."""
    indices = torch.nonzero(labels == label).flatten()
    return indices[torch.from_numpy(random.permutation(len(indices)))]


def _dirichlet_sample(
    size: int, alpha: float, random: np.random.RandomState
) -> npt.NDArray[np.float64]:
    """One draw from the symmetric Dirichlet distribution, [size], adding up to 1.

    Normalised gammas, kept as logarithms because for a small alpha all of them would underflow:
    log Gamma(alpha) = log Gamma(alpha + 1) + log(U) / alpha (Marsaglia & Tsang 2000, section 6).
    """
    uniform = 1 - random.random_sample(size)  # never 0
    logs = np.log(random.standard_gamma(alpha + 1, size)) + np.log(uniform) / alpha
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()


def _fill_up(hands: list[list[int]], least: int) -> None:
    """Give hands below `least` a picture at a time, the last of the hand that then holds most."""
    for hand in hands:
        while len(hand) < least:
            hand.append(max(hands, key=len).pop())
