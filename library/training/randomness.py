"""Randomness that depends on what is drawn, not on what was drawn before.

Every random choice about a sample (caption order, crop, noise, timestep, …) comes from a stream of
its own, seeded by the run's seed and by which sample it is. A batch is therefore the same after a
resume in mid-epoch, with another number of workers, or split over several processes, and nothing
about it has to be saved.
"""

from __future__ import annotations

import hashlib
import random

import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream that `keys` name, under the run's `seed`."""
    text = "\x1f".join([str(seed), *(str(key) for key in keys)])
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def torch_stream(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for tensors. Drawing on the CPU gives the same numbers on every machine."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def python_stream(seed: int, *keys: int | str) -> random.Random:
    """A generator for choices and shuffles."""
    return random.Random(derive_seed(seed, *keys))
