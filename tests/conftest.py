"""Fixtures for all tests."""

import torch
from tiny_models import tiny_sd1, tiny_sd2, tiny_sdxl

__all__ = ["tiny_sd1", "tiny_sd2", "tiny_sdxl"]

# The tensors are tiny: a second thread gains nothing, and on a busy machine costs ten times more.
torch.set_num_threads(1)
