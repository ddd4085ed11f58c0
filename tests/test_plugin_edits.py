"""Folders in which the user has edited, moved or deleted something, before or after `apply`."""

import shutil

import pytest
from sd_scripts_copies import (
    ENGINE,
    TRAIN_NETWORK,
    TRAIN_UTIL,
    apply,
    contents,
    edit,
    miniature,
    refused,
    revert,
    status,
)

from patches.anchors import MARK
from patches.payload import read_payload


def test_edits_elsewhere_in_a_patched_file_survive_the_revert(tree):
    apply(tree)
    edit(tree, TRAIN_NETWORK, b"torch.randn(32, 24)", b"torch.randn(64, 24)")
    assert f"{TRAIN_NETWORK}: edited since; marked lines in place" in status(tree)
    assert f"{TRAIN_NETWORK} keeps the edits" in revert(tree)
    expected = contents(miniature(tree.parent / "expected"))
    edited = contents(tree)
    assert edited.pop(TRAIN_NETWORK) != expected.pop(TRAIN_NETWORK)
    assert edited == expected
    assert b"torch.randn(64, 24)" in (tree / TRAIN_NETWORK).read_bytes()
    assert MARK.encode() not in (tree / TRAIN_NETWORK).read_bytes()


def test_an_edited_marked_line_is_refused_until_mended(tree):
    before = contents(tree)
    apply(tree)
    edit(tree, TRAIN_NETWORK, b"name_groups(args, network", b"name_groups(args, my_network")
    for command in ("revert", "apply"):
        message = refused(command, tree)
        assert f"{TRAIN_NETWORK}, line" in message
        assert "my_network" in message
    edit(tree, TRAIN_NETWORK, b"my_network", b"network")
    revert(tree)
    assert contents(tree) == before


def test_a_line_that_lost_its_mark_is_not_taken_for_stocks(tree):
    apply(tree)
    edit(tree, TRAIN_NETWORK, MARK.encode(), b"")
    for command in ("revert", "apply"):
        assert f"{TRAIN_NETWORK}, line" in refused(command, tree)
    assert f"{TRAIN_NETWORK}: marked lines missing, moved or edited" in status(tree)


def test_lines_in_the_wrong_place_are_put_right(tree):
    """As after a merge that went wrong: names are looked for when the optimizer is there."""
    apply(tree)
    patched = contents(tree)
    file = tree / TRAIN_NETWORK
    lines = file.read_text().splitlines(keepends=True)
    [place] = [k for k, line in enumerate(lines) if MARK in line]
    file.write_text("".join([*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]))
    assert f"{TRAIN_NETWORK}: marked lines missing, moved" in status(tree)
    apply(tree)
    assert contents(tree) == patched


@pytest.mark.parametrize("command", ["revert", "apply"])
def test_an_edited_copy_is_not_deleted(tree, command):
    before = contents(tree)
    apply(tree)
    (tree / ENGINE).write_text("# mine now\n")
    assert f"{ENGINE}: edited since" in status(tree)
    message = refused(command, tree)
    assert ENGINE in message
    assert "delete it" in message
    (tree / ENGINE).unlink()
    if command == "apply":
        apply(tree)
        assert (tree / ENGINE).read_bytes() == read_payload()[ENGINE]
    revert(tree)
    assert contents(tree) == before


def test_a_file_of_the_users_in_our_folder_stays(tree):
    apply(tree)
    mine = tree / "library/optim/techniques/mine.py"
    mine.write_text("# mine\n")
    revert(tree)
    assert mine.read_text() == "# mine\n"
    mine.unlink()
    shutil.rmtree(tree / "library/optim")
    assert contents(tree) == contents(miniature(tree.parent / "expected"))


def test_marked_lines_that_are_gone_come_back(tree):
    """As after `git checkout .`: stock's files are stock's again, ours still lie there."""
    apply(tree)
    patched = contents(tree)
    for path in (TRAIN_UTIL, TRAIN_NETWORK):
        shutil.copy(miniature(tree.parent / path.replace("/", "_")) / path, tree / path)
    assert f"{TRAIN_UTIL}: marked lines missing" in status(tree)
    apply(tree)
    assert contents(tree) == patched


@pytest.mark.parametrize("command", [apply, revert])
def test_lines_without_their_files_are_taken_out(tree, command):
    """As after `git clean -fd`: ours are gone, and stock's files still call them."""
    stock = contents(tree)
    apply(tree)
    patched = contents(tree)
    for path in patched.keys() - stock.keys():
        (tree / path).unlink()
    shutil.rmtree(tree / "library/optim")
    assert "its record is gone" in status(tree)
    command(tree)
    assert contents(tree) == (stock if command is revert else patched)


def test_a_dirty_tree_keeps_its_edits(tree):
    edit(tree, TRAIN_NETWORK, b"torch.randn(32, 24)", b"torch.randn(64, 24)")
    (tree / "networks/lora.py").unlink()
    (tree / "notes.txt").write_text("mine")
    before = contents(tree)
    apply(tree)
    revert(tree)
    assert contents(tree) == before
