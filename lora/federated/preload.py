"""Imported by the process that clients are forked from: all that a client needs, without a word."""

from library.training.log import hush_imports

hush_imports()

from . import client  # noqa: E402, F401
