"""The files that other programs' trees are given need nothing but Python and PyTorch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import environment

from patches.payload import read_payload

PAYLOAD = read_payload()
MODULES = [name for name in PAYLOAD if name.endswith(".py")]
OTHERS = ("numpy", "bitsandbytes", "diffusers", "transformers", "accelerate", "safetensors")


def imported(path: str) -> Iterator[str]:
    """The modules that a file imports anywhere in it, by their full names."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(PAYLOAD[path], path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # What is imported from a package may be a module of it.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_given(module: str) -> bool:
    """Whether it is one of the files, or something in one."""
    parts = module.split(".")
    places = ["/".join(parts), "/".join(parts[:-1])]
    return any(f"{place}{end}" in PAYLOAD for place in places for end in (".py", "/__init__.py"))


@pytest.mark.parametrize("path", MODULES)
def test_they_import_python_pytorch_and_one_another(path):
    foreign = [
        module
        for module in imported(path)
        if module.split(".")[0] not in {*sys.stdlib_module_names, "torch"} and not is_given(module)
    ]
    assert not foreign


PROGRAM = f"""
import sys

for name in {OTHERS}:
    sys.modules[name] = None  # as if it were not installed
import torch
from library.optim.registry import create_optimizer, known_names

known_names()
for name in ("HinaAdamW", "AdaptiveHinaAdamW", "Automagic_CameAMP8bit"):
    for backend in ("auto", "eager"):
        params = [torch.nn.Parameter(torch.ones(64, 65)), torch.nn.Parameter(torch.ones(7))]
        groups = [{{"params": params, "named": ["x.lora_down.weight", "x.bias"]}}]
        _, _, optimizer = create_optimizer(name, groups, 0.1, {{"backend": backend}})
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8, "8-bit state"
        assert (params[0] < 1).all()
print(create_optimizer.__code__.co_filename)
"""


def test_they_run_without_any_other_package(tmp_path: Path) -> None:
    for name, content in PAYLOAD.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.strip() == str(tmp_path / "library" / "optim" / "registry.py")
