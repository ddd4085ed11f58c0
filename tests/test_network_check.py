"""Adapter files that are damaged or fit no layer: named early, and never with a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapt, load, trained
from safetensors.torch import save_file
from torch import nn

from library.training.errors import UserError
from library.training.network_check import check_network
from library.training.options import Options
from networks import lokr
from networks.modules import LoKr, finish
from networks.weights import read_weights


def test_damage_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
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


class TestMisfits:
    def test_another_rank(self, tiny_sd1: Path, tmp_path: Path) -> None:
        tensors, _ = trained(tiny_sd1)
        file = tmp_path / "rank4.safetensors"
        save_file(tensors, file)
        with pytest.raises(
            UserError, match=r"lora_\w+\.weight is \(.*4.*\) .* Set --network_module"
        ):
            adapt(load(tiny_sd1), tiny_sd1, network_dim=8, network_weights=str(file))

    def test_another_algorithm(self, tiny_sd1: Path, tmp_path: Path) -> None:
        tensors, _ = trained(tiny_sd1, network_module="networks.loha")
        file = tmp_path / "loha.safetensors"
        save_file(tensors, file)
        with pytest.raises(UserError, match="--dim_from_weights"):
            adapt(load(tiny_sd1), tiny_sd1, network_weights=str(file))

    def test_another_model(self, tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
        file = tmp_path / "foreign.safetensors"
        save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, file)
        with pytest.raises(UserError, match="fits no layer that is trained here"):
            adapt(load(tiny_sd1), tiny_sd1, network_weights=str(file))

    @pytest.mark.parametrize(
        ("layer", "other", "keys"),
        [
            (nn.Linear(48, 64), nn.Linear(64, 64), {}),
            (nn.Linear(48, 64), nn.Linear(48, 32), {"full_matrix": True}),
            (nn.Linear(48, 64), nn.Linear(64, 64), {"decompose_both": True, "lora_dim": 1}),
            (nn.Conv2d(48, 64, 3), nn.Conv2d(64, 64, 3), {}),
            (nn.Conv2d(48, 64, 3), nn.Conv2d(48, 64, 1), {"full_matrix": True}),
            (nn.Conv2d(48, 64, 3), nn.Conv2d(64, 64, 3), {"use_tucker": True}),
        ],
    )
    def test_lokr_for_a_layer_of_another_size(
        self, layer: nn.Module, other: nn.Module, keys: dict[str, Any]
    ) -> None:
        keys = {"lora_dim": 2, "factor": 4, **keys}
        adapter = finish(LoKr("lora_unet_layer", layer, 1.0, **keys))
        tensors = {f"lora_unet_layer.{key}": t for key, t in adapter.state_dict().items()}

        def load_onto(unet: nn.Module) -> None:
            lokr.create_network_from_weights(
                1.0, "x.pt", None, None, nn.ModuleDict({"layer": unet}), tensors
            )

        load_onto(layer)
        with pytest.raises(UserError, match=r"lora_unet_layer is for weights of \(64, 4"):
            load_onto(other)

    def test_damaged_files(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(1)], tmp_path / "list.pt")
        torch.save({"lora_unet_x.alpha": 1.0}, tmp_path / "numbers.pt")
        (tmp_path / "text.ckpt").write_bytes(b"no pickle")
        (tmp_path / "empty.pt").touch()
        (tmp_path / "text.safetensors").write_bytes(b"no safetensors")
        for file in tmp_path.iterdir():
            with pytest.raises(UserError, match="cannot be read"):
                read_weights(file)

    def test_part_of_a_file_is_loaded_with_a_word(
        self, tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tensors, _ = trained(tiny_sd1)
        file = tmp_path / "both.safetensors"
        save_file(tensors, file)
        adapt(load(tiny_sd1), tiny_sd1, network_weights=str(file), network_train_unet_only=True)
        assert "18 of 66 layers are not trained here" in caplog.text
