"""Commands that are killed, interrupted, or run out of disk in the middle."""

import subprocess
import sys

import pytest
from sd_scripts_copies import (
    apply,
    contents,
    folders,
    miniature,
    older_plugin,
    revert,
    status,
)

from patches.payload import ROOT, read_payload

_INTERFERE = """
import os, signal, sys
from pathlib import Path
from patches.__main__ import main
original, calls = {function}, 0
def counting(*arguments, **keywords):
    global calls
    calls += 1
    if {condition}:
        {do}
    return original(*arguments, **keywords)
{function} = counting
sys.exit(main([{command!r}, "--target", {tree!r}]))
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def run_with(tree, command, do, at, function="os.replace", condition="calls == {at}"):
    """A command in which the call number `at` of a function does something else first."""
    program = _INTERFERE.format(
        do=do,
        command=command,
        tree=str(tree),
        function=function,
        condition=condition.format(at=at),
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def killed(tree, command, at, function="os.replace"):
    """Whether the command was killed at its call number `at` of a function."""
    return run_with(tree, command, KILL, at, function).returncode == -9


def stock_runs(tree):
    """Python finds all that the tree's scripts import, whatever of the plugin is there."""
    check = "import train_network; print(train_network.train_util.get_optimizer)"
    done = subprocess.run([sys.executable, "-Bc", check], cwd=tree, capture_output=True, text=True)
    return done.returncode == 0


def writes():
    """The numbers of some writes of `apply`: all around an edit, a few between copies."""
    total = len(read_payload()) + 4  # the record twice, two edits
    return [1, 2, 3, total // 2, total - 3, total - 2, total - 1, total]


def test_a_disk_that_is_full_leaves_stock(tree):
    """From some write on no new file can be made; what is there can still go."""
    before, folders_before = contents(tree), folders(tree)
    full = "raise OSError(28, 'No space left on device')"
    done = run_with(tree, "apply", full, 30, "Path.write_bytes", condition="calls >= {at}")
    assert done.returncode == 1
    assert f"{tree / 'library'}" in done.stderr
    assert "No space left on device" in done.stderr
    assert "as it was without the plugin" in done.stderr
    assert contents(tree) == before
    assert folders(tree) == folders_before


def test_ctrl_c_in_the_middle_leaves_stock(tree):
    before, folders_before = contents(tree), folders(tree)
    done = run_with(tree, "apply", "raise KeyboardInterrupt", len(read_payload()) + 2)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tree) == before
    assert folders(tree) == folders_before


@pytest.mark.parametrize("at", writes())
@pytest.mark.parametrize("then", [apply, revert])
def test_apply_killed_in_the_middle(tree, tmp_path, at, then):
    stock, whole = contents(tree), miniature(tmp_path / "whole")
    apply(whole)
    assert killed(tree, "apply", at)
    assert "was interrupted" in status(tree)
    if at in (2, len(read_payload()) + 3):  # nothing copied yet; between the two edits
        assert stock_runs(tree)
    then(tree)
    assert contents(tree) == (stock if then is revert else contents(whole))


@pytest.mark.parametrize(
    ("function", "at"),
    [
        ("os.replace", 1),
        ("os.replace", 2),
        ("os.replace", 3),
        ("Path.unlink", 8),
        ("Path.unlink", 60),
        ("Path.rmdir", 1),
    ],
)
@pytest.mark.parametrize("then", [apply, revert])
def test_revert_killed_in_the_middle(tree, function, at, then):
    stock = contents(tree)
    apply(tree)
    whole = contents(tree)
    assert killed(tree, "revert", at, function)
    assert stock_runs(tree)
    then(tree)
    assert contents(tree) == (stock if then is revert else whole)


def test_an_update_killed_in_the_middle(tree, tmp_path):
    whole = miniature(tmp_path / "whole")
    apply(whole)
    older = older_plugin(tmp_path / "older")
    for at in (1, 2, 3, 4, 5, 20, len(read_payload()) + 6):
        copy = miniature(tmp_path / str(at))
        apply(copy, root=older)
        assert killed(copy, "apply", at)
        apply(copy)
        assert contents(copy) == contents(whole)
