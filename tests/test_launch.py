"""`launch.py` with real virtual environments, but requirements that need no network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

import launch


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder of its own, without a .venv."""
    venv = tmp_path / ".venv"
    monkeypatch.setattr(launch, "ROOT", str(tmp_path))
    python = venv / Path(launch.PYTHON).relative_to(launch.VENV)
    monkeypatch.setattr(launch, "VENV", str(venv))
    monkeypatch.setattr(launch, "PYTHON", str(python))
    monkeypatch.setattr(launch, "STAMP", str(venv / "installed-%s.txt"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_names_both_commands() -> None:
    said = subprocess.run(
        [sys.executable, "launch.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "launch.py train" in said
    assert "launch.py test" in said


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["trian"]) == 2
    assert "'trian'" in capsys.readouterr().out


def test_an_old_python_is_sent_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert launch.main(["train"]) == 2
    assert "3.10" in capsys.readouterr().out


@pytest.mark.slow
def test_installs_once_and_says_what_it_is_at(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "requirements.txt").write_text("# nothing yet\n")
    assert launch.install("requirements.txt")
    assert "virtual environment" in capsys.readouterr().out
    monkeypatch.setattr(launch, "pip_install", lambda _: pytest.fail("installed again"))
    assert launch.install("requirements.txt")
    assert capsys.readouterr().out == ""
    assert launch.run("-c", "import sys; sys.exit(sys.prefix == sys.base_prefix)") == 0


@pytest.mark.slow
def test_a_failed_installation_is_explained_and_tried_again(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requirements = project / "requirements.txt"
    requirements.write_text("./no-such-package\n")
    assert not launch.install("requirements.txt")
    said = capsys.readouterr().out
    assert "no-such-package" in said
    assert "call the same command again" in said
    requirements.write_text("")
    assert launch.install("requirements.txt")


# Says that it listens; at SIGTERM it takes its time, as training does that finishes a step.
LISTENS = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("listening", flush=True)
time.sleep(60)
"""
LAUNCHES = f"""
import sys
import launch
launch.PYTHON = sys.executable
sys.exit(launch.run("-c", {LISTENS!r}))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM: what is killed there is gone")
def test_kill_is_handed_on_and_waited_for() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHES], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "listening\n"
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=30) == 130
        assert launcher.stdout.readline() == "saved\n"


def test_what_is_shown_of_pip() -> None:
    assert launch.progress_of("Collecting torch==2.13.0 (from -r requirements.txt)") == (
        "looking up torch==2.13.0"
    )
    assert launch.progress_of("  Downloading torch-2.13.0.whl (900.1 MB)") == (
        "downloading torch-2.13.0.whl (900.1 MB)"
    )
    assert launch.progress_of("  Downloading small.whl (20 kB)") is None
    assert launch.progress_of("Installing collected packages: a, b, c") == (
        "unpacking 3 packages (the longest part)"
    )
    assert launch.progress_of("Requirement already satisfied: x") is None
