"""The plugin in and out of a folder of sd-scripts: every byte, whatever the files are like."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from sd_scripts_copies import (
    ENGINE,
    TRAIN_NETWORK,
    TRAIN_UTIL,
    apply,
    contents,
    folders,
    miniature,
    older_plugin,
    patches,
    revert,
    status,
)

from patches.anchors import MARK
from patches.payload import read_payload, version_of
from patches.tree import RECORD


def test_apply_copies_the_payload_and_adds_three_lines(tree):
    before = contents(tree)
    said = apply(tree)
    after = contents(tree)
    assert after.keys() - before.keys() == {*read_payload(), RECORD}
    assert {path for path in before if before[path] != after[path]} == {TRAIN_UTIL, TRAIN_NETWORK}
    for path, expected in read_payload().items():
        assert (tree / path).read_bytes() == expected
    marked = [
        line
        for path in (TRAIN_UTIL, TRAIN_NETWORK)
        for line in (tree / path).read_text().splitlines()
        if line.endswith(MARK)
    ]
    assert len(marked) == 3
    assert "is applied" in said
    assert "--optimizer_type HinaAdamW" in said


def test_revert_gives_back_every_byte_and_folder(tree):
    before, folders_before = contents(tree), folders(tree)
    apply(tree)
    # What Python compiles while the plugin is in goes with it; what it compiled of stock's stays.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "library"], cwd=tree, check=True)
    said = revert(tree)
    compiled = {path for path in contents(tree) if path.endswith(".pyc")}
    assert {path: sha for path, sha in contents(tree).items() if path not in compiled} == before
    assert {Path(path).name.split(".")[0] for path in compiled} == {"__init__", "train_util"}
    assert folders(tree) == folders_before | {"library/__pycache__"}
    assert "as it was before" in said


def test_an_anchor_on_a_last_line_without_an_ending(tree):
    text = (tree / TRAIN_NETWORK).read_bytes()
    end = text.index(b"(args, trainable_params)") + len(b"(args, trainable_params)")
    (tree / TRAIN_NETWORK).write_bytes(text[:end])
    before = contents(tree)
    apply(tree)
    revert(tree)
    assert contents(tree) == before


def test_the_version_does_not_depend_on_the_systems_line_endings():
    payload = read_payload()
    on_windows = {path: text.replace(b"\n", b"\r\n") for path, text in payload.items()}
    assert version_of(on_windows) == version_of(payload)
    changed = payload | {ENGINE: payload[ENGINE] + b"\n# changed\n"}
    assert version_of(changed) != version_of(payload)


def test_line_endings_are_those_of_the_file(tree):
    for path in (TRAIN_UTIL, TRAIN_NETWORK):
        file = tree / path
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n").rstrip())
    before = contents(tree)
    apply(tree)
    for path in (TRAIN_UTIL, TRAIN_NETWORK):
        assert b"\n" not in (tree / path).read_bytes().replace(b"\r\n", b"")
    revert(tree)
    assert contents(tree) == before


def test_permissions_of_edited_files_stay(tree):
    (tree / TRAIN_NETWORK).chmod(0o755)
    apply(tree)
    assert stat.S_IMODE((tree / TRAIN_NETWORK).stat().st_mode) == 0o755
    revert(tree)
    assert stat.S_IMODE((tree / TRAIN_NETWORK).stat().st_mode) == 0o755


def test_a_link_to_a_file_stays_a_link(tree, tmp_path):
    real = tmp_path / "elsewhere.py"
    (tree / TRAIN_NETWORK).rename(real)
    (tree / TRAIN_NETWORK).symlink_to(real)
    before = real.read_bytes()
    apply(tree)
    assert (tree / TRAIN_NETWORK).is_symlink()
    assert MARK.encode() in real.read_bytes()
    revert(tree)
    assert (tree / TRAIN_NETWORK).is_symlink()
    assert real.read_bytes() == before


def test_applying_twice_changes_nothing(tree):
    apply(tree)
    once = {path: (tree / path).stat().st_mtime_ns for path in contents(tree)}
    assert "is applied" in apply(tree)
    assert {path: (tree / path).stat().st_mtime_ns for path in contents(tree)} == once


def test_reverting_twice_changes_nothing(tree):
    apply(tree)
    revert(tree)
    before = contents(tree)
    assert "nothing to revert" in revert(tree)
    assert contents(tree) == before


def test_a_dry_run_shows_and_changes_nothing(tree):
    before = contents(tree)
    done = patches("apply", "--target", tree, "--dry-run")
    assert contents(tree) == before
    assert "+@hina_plugin.extend" in done.stdout
    assert ENGINE in done.stdout
    assert "Nothing was changed" in done.stdout


def test_an_older_version_is_replaced(tree, tmp_path):
    stock, new = contents(tree), miniature(tmp_path / "new")
    apply(new)
    old = older_plugin(tmp_path / "older")
    apply(tree, root=old)
    assert "@(hina_plugin.extend)" in (tree / TRAIN_UTIL).read_text()
    assert (tree / "library/optim/old_name.py").exists()
    assert "hina plugin 0.0." in status(tree)
    assert "apply would update it" in status(tree)
    apply(tree)
    assert contents(tree) == contents(new)
    revert(tree)
    assert contents(tree) == stock


def test_an_older_version_can_be_reverted_by_a_newer(tree, tmp_path):
    stock = contents(tree)
    apply(tree, root=older_plugin(tmp_path / "older"))
    revert(tree)
    assert contents(tree) == stock


def test_a_console_that_cannot_show_the_path(tmp_path):
    tree = miniature(tmp_path / "スクリプト")
    done = patches("apply", "--target", tree, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
