"""Where the plugin's lines stand in stock's files, and how they get in and out.

Lines are only ever put whole in front of a line of stock's, with that line's indentation and
ending: taking them out gives back every byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import Refusal

MARK = "# hina-plugin"
_OURS = re.compile(rb"hina[-_]plugin")


@dataclass(frozen=True)
class Anchor:
    """A line of stock's, and what is put in front of it.

    Attributes:
        file: relative to the folder of sd-scripts, with forward slashes.
        pattern: matches the line; its first group is the indentation.
        looked_for: the line in words, for the message when it is not there.
        lines: what is put in front, without indentation and mark.
    """

    file: str
    pattern: re.Pattern[bytes]
    looked_for: str
    lines: tuple[str, ...]

    @property
    def marked(self) -> list[str]:
        """The lines as they are put in, without indentation."""
        return [f"{line}  {MARK}" for line in self.lines]


# In the order in which they are put in: what the second uses, the first has made.
ANCHORS = (
    Anchor(
        "library/train_util.py",
        re.compile(rb"()def get_optimizer\(args, trainable_params\).*:\s*"),
        "def get_optimizer(args, trainable_params):",
        ("from library import hina_plugin", "@hina_plugin.extend"),
    ),
    Anchor(
        "train_network.py",
        re.compile(rb"([ \t]+)[\w, ]+= train_util\.get_optimizer\(args, trainable_params\)\s*"),
        "… = train_util.get_optimizer(args, trainable_params)",
        ("trainable_params = train_util.hina_plugin.name_groups(args, network, trainable_params)",),
    ),
)


def insert(anchor: Anchor, content: bytes, marked: Sequence[str]) -> bytes:
    """The file with the `marked` lines in front of the anchor's.

    Raises:
        Refusal: the anchor's line is not there, or more than once; or lines of the plugin are.
    """
    _refuse_strays(anchor.file, content, known=())
    lines = content.splitlines(keepends=True)
    found = [
        (k, match) for k, line in enumerate(lines) if (match := anchor.pattern.fullmatch(line))
    ]
    if len(found) != 1:
        how_often = "is not there" if not found else f"is there {len(found)} times"
        raise Refusal(
            f"{anchor.file}: the plugin's place is in front of the line\n    {anchor.looked_for}\n"
            f"which {how_often}. Versions of sd-scripts from 0.8 on have it once. If the file was "
            "edited, take that edit back; if sd-scripts is newer than this plugin, get a newer one."
        )
    [(place, match)] = found
    ending = lines[place][len(lines[place].rstrip(b"\r\n")) :] or b"\n"
    lines[place:place] = [match[1] + text.encode() + ending for text in marked]
    return b"".join(lines)


def remove(file: str, content: bytes, marked: Sequence[str]) -> bytes:
    """The file without the `marked` lines, however they are indented; those that are not there any
    more are not missed.

    Raises:
        Refusal: a line of the plugin was edited, so that it cannot be told from the user's own.
    """
    _refuse_strays(file, content, marked)
    ours = {text.encode() for text in marked}
    return b"".join(x for x in content.splitlines(keepends=True) if x.strip() not in ours)


def in_place(anchor: Anchor, content: bytes, marked: Sequence[str]) -> bool:
    """Whether the `marked` lines stand where they belong, once, and none is edited."""
    try:
        return insert(anchor, remove(anchor.file, content, marked), marked) == content
    except Refusal:
        return False


def _refuse_strays(file: str, content: bytes, known: Sequence[str]) -> None:
    """Refuse a file with a line that speaks of the plugin and is none of the `known` ones."""
    for number, line in enumerate(content.splitlines(), 1):
        text = line.decode(errors="replace").strip()
        if _OURS.search(line) and text not in known:
            raise Refusal(
                f"{file}, line {number} names the plugin, but is not as it was put there:\n"
                f"    {text}\nNothing was changed. Take that edit back or delete the line, and "
                "call the command again."
            )
