"""Fixtures for all tests."""

from tiny_models import tiny_sd1, tiny_sd2, tiny_sdxl

__all__ = ["tiny_sd1", "tiny_sd2", "tiny_sdxl"]
