"""What `apply`, `status` and `revert` refuse, and that they change nothing then."""

import ctypes
import os
import sys
from pathlib import Path

import pytest
from sd_scripts_copies import (
    ENGINE,
    TRAIN_NETWORK,
    TRAIN_UTIL,
    apply,
    contents,
    edit,
    patches,
    refused,
    revert,
)

from patches.payload import HOOK, ROOT
from patches.tree import RECORD


@pytest.mark.parametrize("path", [TRAIN_UTIL, TRAIN_NETWORK])
def test_a_line_that_is_not_there_is_named(tree, path):
    edit(tree, path, b"(args, trainable_params)", b"(args, params)")
    message = refused("apply", tree)
    assert path in message
    assert "get_optimizer(args, trainable_params)" in message
    assert "is not there" in message


def test_a_line_that_is_there_twice_is_refused(tree):
    line = b"        a, b, optimizer = train_util.get_optimizer(args, trainable_params)\n"
    edit(tree, TRAIN_NETWORK, b"        lr_scheduler =", line + b"        lr_scheduler =")
    assert "is there 2 times" in refused("apply", tree)


def test_a_place_where_the_lines_would_not_be_python_is_refused(tree):
    edit(tree, TRAIN_UTIL, b"def get_optimizer", b"@torch.no_grad()\ndef get_optimizer")
    assert f"{TRAIN_UTIL} is no valid Python with the plugin's lines" in refused("apply", tree)
    (tree / TRAIN_UTIL).write_text("def get_optimizer(args, trainable_params):\n  (\n")
    assert f"{TRAIN_UTIL} is no valid Python even without" in refused("apply", tree)


def folder_at(place):
    place.mkdir(parents=True)


def file_at(place):
    place.parent.mkdir(exist_ok=True)
    place.write_text("# somebody else's\n")


def dead_link_at(place):
    place.symlink_to(place.parent.parent.parent / "nowhere")


@pytest.mark.parametrize(
    ("put", "path"),
    [
        (file_at, ENGINE),
        (folder_at, ENGINE),
        (file_at, HOOK),
        (folder_at, HOOK),
        (dead_link_at, HOOK),
        (file_at, "library/optim.py"),
    ],
)
def test_what_is_in_the_way_is_refused(tree, put, path):
    put(tree / path)
    message = refused("apply", tree)
    assert f"{tree / path} is there already, and not from the plugin" in message
    assert not (tree.parent / "nowhere").exists()


def test_a_file_in_a_folders_place_is_refused(tree):
    file_at(tree / "library/optim")
    assert f"{tree / 'library/optim'} is no folder" in refused("apply", tree)


def test_a_folder_in_the_records_place_is_refused(tree):
    folder_at(tree / RECORD)
    for command in ("apply", "status", "revert"):
        assert RECORD in refused(command, tree)


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_nothing_is_deleted_through_a_link(tree, tmp_path, command):
    """As of somebody who links the plugin's folder to have its newest files."""
    apply(tree)
    (tree / "library/optim").rename(tmp_path / "linked")
    (tree / "library/optim").symlink_to(tmp_path / "linked")
    before = contents(tmp_path / "linked")
    assert f"{tree / 'library/optim'} is a link" in refused(command, tree)
    assert contents(tmp_path / "linked") == before


def test_folders_that_are_none(tmp_path):
    assert "no such folder" in refused("apply", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    message = refused("apply", tmp_path / "empty")
    assert f"no {TRAIN_UTIL} and no {TRAIN_NETWORK}" in message
    assert "this project itself" in patches("apply", "--target", ROOT).stderr
    assert "nobody-of-this-name" in refused("apply", Path("~nobody-of-this-name/x"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in refused("apply", tmp_path / "loop")


def test_a_folder_around_the_right_one_gets_a_hint(tree):
    assert f"--target {tree}" in refused("apply", tree.parent)


def test_a_broken_record_is_refused(tree):
    apply(tree)
    for broken in ('{"version": "0.1', "[]", "null", '{"format": 1, "folders": null}'):
        (tree / RECORD).write_text(broken)
        for command in ("apply", "status", "revert"):
            assert f"{RECORD}, which tells" in refused(command, tree)


def test_a_newer_plugins_record_is_not_touched(tree):
    apply(tree)
    edit(tree, RECORD, b'"format": 1', b'"format": 2, "more": []')
    for command in ("apply", "status", "revert"):
        assert "a newer plugin was applied" in refused(command, tree)


def obey_permissions():
    """Takes from a process of root's the capability to write where permissions forbid it."""
    drop_from_bounding_set, dac_override = 24, 1
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="permissions of a folder are tried on Linux")
@pytest.mark.parametrize("read_only", [".", "library"])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_a_read_only_folder_is_refused(tree, read_only, command):
    if command == "revert":
        apply(tree)
    (tree / read_only).chmod(0o555)
    try:
        message = refused(command, tree, preexec_fn=obey_permissions)
        assert f"{(tree / read_only).resolve()}: no file can be written" in message
    finally:
        (tree / read_only).chmod(0o755)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
def test_files_that_root_writes_belong_to_the_folders_owner(tree):
    for each in (tree, *tree.rglob("*")):
        os.chown(each, 1234, 1235)
    apply(tree)
    assert {(each.stat().st_uid, each.stat().st_gid) for each in tree.rglob("*")} == {(1234, 1235)}
    revert(tree)
    assert {(each.stat().st_uid, each.stat().st_gid) for each in tree.rglob("*")} == {(1234, 1235)}
