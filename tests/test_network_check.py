"""Adapter files are looked into while a run is checked, before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from library.training.network_check import check_network
from library.training.options import Options


def test_damage_is_found(tmp_path: Path) -> None:
    whole, cut, text = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut", "text"))
    save_file({"lora_unet_x.alpha": torch.zeros(9)}, whole)
    cut.write_bytes(whole.read_bytes()[:-4])
    text.write_bytes(b"no safetensors")
    chosen = Options.from_values(
        {
            "network_module": "networks.lora",
            "network_weights": str(cut),
            "base_weights": [str(whole), str(text)],
        }
    )
    weights, base = check_network(chosen)
    assert weights.startswith(f"--network_weights: {cut} is incomplete")
    assert base.startswith(f"--base_weights: {text} is no safetensors file")


def test_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({"lora_unet_x.alpha": torch.zeros(9)}, file)
    program = (
        "import sys; from library.training.network_check import check_network; "
        "from library.training.options import Options; "
        "assert not check_network(Options.from_values({'network_module': 'networks.lora', "
        f"'network_weights': {str(file)!r}"
        "})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
