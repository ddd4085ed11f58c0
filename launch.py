#!/usr/bin/env python3
"""The two commands of this project, with nothing installed but Python.

    python launch.py train [any option of train_network.py]
    python launch.py test [any option of pytest]

Both make a virtual environment in `.venv`, install what is needed there, and run. A later call
finds it installed and starts at once, without a network.

`train` without an option runs `configs/quickstart.toml`: a LoKr on the model and the pictures that
come with the project, in about two minutes on two processor cores.
"""
# This file must be readable by an old Python, which it has to send away with a clear word.

import hashlib
import os
import signal
import subprocess
import sys
import time

OLDEST_PYTHON = (3, 10)
ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
STAMP = os.path.join(VENV, "installed-%s.txt")
QUICKSTART = os.path.join("configs", "quickstart.toml")


def main(arguments: "list[str]") -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in ("train", "test"):
        print("launch.py: there is no command %r; it is 'train' or 'test'." % command)
        return 2
    if sys.version_info < OLDEST_PYTHON:
        print("This project needs Python 3.10 or newer; this is %s." % sys.version.split()[0])
        print("Install a newer one from python.org and call it: python3.12 launch.py %s" % command)
        return 2
    os.chdir(ROOT)
    if not install("requirements.txt"):
        return 1
    if command == "test":
        return test(rest)
    return run("train_network.py", *(rest or ["--config_file", QUICKSTART]))


def test(rest: "list[str]") -> int:
    """Run the checks of style and types, then the tests; with options, only pytest with them."""
    if not (install("requirements-federated.txt") and install("requirements-dev.txt")):
        return 1
    if rest:
        return run("-m", "pytest", *rest)
    # Several at a time; one more than have cores, because some wait for processes and for clocks.
    workers = str(min(4, (os.cpu_count() or 1) + 1))
    # The examples that Hypothesis draws are the same each time; `launch.py test -q` draws others.
    tests = ("pytest", "-n", workers, "--dist", "worksteal", "--hypothesis-seed=0")
    checks = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), tests)
    codes = []
    for check in checks:
        print("\n" + " ".join(check), flush=True)
        codes.append(run("-m", *check))
        if codes[-1] < 0:  # by a signal: whoever stopped this check wants no further one
            break
    return next((code for code in codes if code), 0)


def install(requirements: str) -> bool:
    """Install a requirements file into .venv, unless that very file was installed before."""
    with open(os.path.join(ROOT, requirements), "rb") as file:
        wanted = hashlib.sha256(file.read()).hexdigest()
    stamp = STAMP % requirements.split(".")[0]
    if os.path.exists(PYTHON) and read(stamp) == wanted:
        return True
    if not os.path.exists(PYTHON) and not make_environment():
        return False
    print("Installing %s into .venv (once; some minutes, up to 3 GB)" % requirements, flush=True)
    if not pip_install(requirements):
        return False
    with open(stamp, "w") as file:
        file.write(wanted)
    return True


def make_environment() -> bool:
    print("Making a virtual environment in .venv", flush=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if made.returncode == 0:
        return True
    print(made.stdout.decode(errors="replace"))
    print("Python could not make a virtual environment in %s." % VENV)
    print("On Debian and Ubuntu: sudo apt install python3-venv; then call this command again.")
    return False


def pip_install(requirements: str) -> bool:
    """Run pip, showing what it is at; what it said in full is kept for the case that it fails."""
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-r", requirements]
    if not sys.dont_write_bytecode:  # most modules are never imported; Python compiles the others
        command.append("--no-compile")
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    started = time.monotonic()
    said = []  # type: list[str]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as pip:
        for raw in pip.stdout or ():
            line = raw.decode(errors="replace").rstrip()
            said.append(line)
            shown = progress_of(line)
            if shown:
                print("  %4d s  %s" % (time.monotonic() - started, shown), flush=True)
    if pip.returncode == 0:
        print("Installed in %d s." % (time.monotonic() - started), flush=True)
        return True
    print("\n".join(said[-25:]))
    print("\nInstalling %s failed; pip's words are above." % requirements)
    print("Check the network and the free disk space, then call the same command again:")
    print("what was downloaded is kept. To start over, delete the folder .venv.")
    return False


def progress_of(line: str) -> "str | None":
    """What of pip's line a person wants to see, or None."""
    words = line.strip().split(" ")
    if words[0] == "Collecting":
        return "looking up " + words[1]
    if words[0] == "Downloading" and "kB" not in line:
        return "downloading " + " ".join(words[1:])
    if words[0] == "Installing" and "collected" in words:
        return "unpacking %d packages (the longest part)" % (len(line.split(",")))
    return None


def read(path: str) -> "str | None":
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


def run(*arguments: str) -> int:
    """Run the environment's Python in the project's folder; the child answers Ctrl-C and `kill`."""
    child = subprocess.Popen([PYTHON, *arguments], cwd=ROOT)
    # Ctrl-C reaches the child by itself, as every process of the terminal; `kill` only this one.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
