"""The plugin in and out of a folder of sd-scripts, in every state that it can be found in."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sd_scripts_copies import contents, folders, miniature, patches

from patches.anchors import ANCHORS, MARK
from patches.payload import HOOK, ROOT, read_payload, version_of
from patches.tree import RECORD

TRAIN_UTIL, TRAIN_NETWORK = (anchor.file for anchor in ANCHORS)
ENGINE = "library/optim/engine.py"


@pytest.fixture
def tree(tmp_path):
    return miniature(tmp_path / "sd-scripts")


def apply(tree, **options):
    done = patches("apply", "--target", tree, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def revert(tree):
    done = patches("revert", "--target", tree)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(tree):
    done = patches("status", "--target", tree)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(command, tree, **options):
    """The message of a command that must change nothing."""
    before = contents(tree) if tree.is_dir() else None
    done = patches(command, "--target", tree, **options)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert before is None or contents(tree) == before
    return done.stderr


def edit(tree, path, old, new):
    file = tree / path
    text = file.read_bytes()
    assert old in text
    file.write_bytes(text.replace(old, new, 1))


def older_plugin(folder):
    """A copy of this project whose plugin is an older one: other texts, one file more, one less."""
    for path in [
        *read_payload(),
        *(f"patches/{file.name}" for file in (ROOT / "patches").glob("*.py")),
    ]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    edit(folder, HOOK, b'VERSION = "', b'VERSION = "0.0.')
    edit(folder, "patches/anchors.py", b"@hina_plugin.extend", b"@(hina_plugin.extend)")
    (folder / "library/optim/old_name.py").write_text("# gone since\n")
    (folder / "library/optim/telemetry.py").unlink()
    return folder


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


# Edits of the user's.


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


# What is refused.


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


def test_a_console_that_cannot_show_the_path(tmp_path):
    tree = miniature(tmp_path / "スクリプト")
    done = patches("apply", "--target", tree, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr


# Killed in the middle.

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
