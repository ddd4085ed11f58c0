"""DreamBooth folders: `10_cat` is ten repeats of pictures of a "cat"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from library.training.paths import missing
from library.training.picture_files import find_pictures


def numbered_folders(
    option: str, root: str | None, is_reg: bool, problems: list[str], notes: list[str]
) -> list[dict[str, Any]]:
    """The subsets in `root`, one a folder named like 10_cat; what else lies there is explained.

    It is explained in `notes`, or in `problems` where nothing is left to train on.
    """
    if root is None:
        return []
    if not os.path.isdir(root):
        problems.append(missing(option, root, "folder"))
        return []
    subsets, misnamed = [], []
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        if folder.name.startswith((".", "__")):  # .ipynb_checkpoints, __MACOSX
            continue
        number, _, words = folder.name.partition("_")
        if number.isdecimal():
            subsets.append(
                {
                    "image_dir": str(folder),
                    "num_repeats": int(number),
                    "is_reg": is_reg,
                    "class_tokens": words,
                }
            )
        elif find_pictures(str(folder)):
            misnamed.append(folder.name)
    remarks = _remarks_on_root(option, root, len(find_pictures(root)), misnamed)
    if subsets:
        notes.extend(remarks)
    else:
        problems.append(
            f"{option}: {root} has no folders named like '10_cat' (repeats, '_', the words for "
            "pictures without a caption)" + "".join(f"\n      {remark}" for remark in remarks)
        )
    return subsets


def _remarks_on_root(option: str, root: str, loose: int, misnamed: list[str]) -> list[str]:
    remarks = [
        f"the pictures in {os.path.join(root, name)} are not used: rename the folder to "
        f"'1_{name}', or to another number of repeats"
        for name in misnamed
    ]
    name = Path(root).resolve().name
    if loose and name.partition("_")[0].isdecimal():
        remarks.append(
            f"{loose} pictures lie in {root} itself: give its parent, "
            f"{option} {Path(root).resolve().parent}"
        )
    elif loose:
        remarks.append(
            f"{loose} pictures lie in {root} itself and are not used: move them to a folder "
            f"in it, such as {os.path.join(root, '10_cat')}"
        )
    return remarks
