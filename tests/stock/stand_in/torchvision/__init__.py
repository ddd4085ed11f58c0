"""Stands in for torchvision where it is not installed: the transforms that sd-scripts needs to
train, and nothing else. Not for use outside these tests."""

from . import transforms

__all__ = ["transforms"]
__version__ = "0.0.0"
