"""The options of `train_network.py`, typed, in one place: the parser is made from the fields."""

from __future__ import annotations

from library.training.options.fields import Option
from library.training.options.parser import OptionParser, setup_parser
from library.training.options.table import OPTIONS, Options

__all__ = ["OPTIONS", "Option", "OptionParser", "Options", "setup_parser"]
