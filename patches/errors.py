"""What keeps the plugin out of a folder."""

from __future__ import annotations


class Refusal(Exception):
    """The folder was left as it was; the message says what stands in the way and what to do."""
