"""Adapter files: other programs load ours with the same result, and ours load theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import OneBlock, adapt, difference, load, output, stir, trained
from lycoris import LycorisNetwork, create_lycoris_from_weights
from lycoris import kohya as lycoris_kohya
from lycoris.kohya import LycorisNetworkKohya
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.training.models import DiffusionModel
from library.training.network import adapter_state_dict
from networks import kohya, lora
from networks.layers import with_stock_paths


class TestKeys:
    def test_lora_has_stocks(self, tiny_sd1: Path) -> None:
        tensors, _ = trained(tiny_sd1, args={"conv_dim": 2})
        layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        assert tensors[f"{layer}.lora_down.weight"].shape == (4, 32)
        assert tensors[f"{layer}.lora_up.weight"].shape == (32, 4)
        assert float(tensors[f"{layer}.alpha"]) == 2.0
        assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape == (
            2,
            64,
            3,
            3,
        )
        assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in tensors
        kinds = {key.split(".", 1)[1] for key in tensors}
        assert kinds == {"lora_down.weight", "lora_up.weight", "alpha"}

    def test_sdxls_text_encoders_are_numbered(self, tiny_sdxl: Path) -> None:
        tensors, _ = trained(tiny_sdxl, sdxl=True)
        parts = {key.split("_text_model_")[0] for key in tensors if "text_model" in key}
        assert parts == {"lora_te1", "lora_te2"}

    def test_lokr_has_lycoriss(self, tiny_sd1: Path) -> None:
        tensors, _ = trained(tiny_sd1, network_module="networks.lokr", args={"factor": 4})
        kinds = {key.split(".", 1)[1] for key in tensors}
        assert kinds == {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"}

    def test_parameters_are_named_as_keys(self, tiny_sd1: Path) -> None:
        for module in ("networks.lora", "networks.lokr"):
            adapter = adapt(load(tiny_sd1), tiny_sd1, network_module=module)
            named = {name for name, _ in adapter.network.named_parameters()}
            assert named == {k for k in adapter_state_dict(adapter, None) if ".alpha" not in k}

    def test_precision(self, tiny_sd1: Path) -> None:
        adapter = adapt(
            load(tiny_sd1), tiny_sd1, network_dim=100000, network_module="networks.lokr"
        )
        half = adapter_state_dict(adapter, torch.float16)
        for key, tensor in half.items():
            assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.float16)
            assert torch.isfinite(tensor).all()
        assert all(t.dtype == torch.float32 for t in adapter_state_dict(adapter, None).values())


class TestDiffusers:
    @pytest.mark.parametrize(
        "args", [{}, {"conv_dim": 2, "conv_alpha": 1}], ids=["linear", "convolutions"]
    )
    def test_sd1(self, tiny_sd1: Path, tmp_path: Path, args: dict[str, Any]) -> None:
        tensors, wanted = trained(tiny_sd1, args=args)
        assert difference(self.loaded(load(tiny_sd1), tensors, tmp_path), wanted) < 1e-4

    def test_sdxl(self, tiny_sdxl: Path, tmp_path: Path) -> None:
        tensors, wanted = trained(tiny_sdxl, sdxl=True)
        assert difference(self.loaded(load(tiny_sdxl, True), tensors, tmp_path), wanted) < 1e-4

    def loaded(self, model: DiffusionModel, tensors: dict[str, Tensor], folder: Path) -> Tensor:
        file = folder / "adapter.safetensors"
        save_file(tensors, file)
        model.pipeline().load_lora_weights(file)
        return output(model)


class TestLycoris:
    """LyCORIS's own loaders; on diffusers' UNet 4.1.3 needs a preset without names for that."""

    @pytest.fixture(autouse=True)
    def _presets(self) -> Any:
        saved = {
            cls: {key: value for key, value in vars(cls).items() if key.isupper()}
            for cls in (LycorisNetwork, LycorisNetworkKohya)
        }
        yield
        for cls, attributes in saved.items():
            for key, value in attributes.items():
                setattr(cls, key, value)

    @pytest.mark.parametrize(
        ("module", "args"),
        [
            ("networks.lora", {"conv_dim": 2}),
            ("networks.loha", {}),
            ("networks.lokr", {"conv_dim": 2}),
            ("networks.lokr", {"factor": 4}),
            ("networks.lokr", {"full_matrix": True}),
            ("networks.lokr", {"dora_wd": True}),
        ],
    )
    def test_in_a_trainer(
        self, tiny_sd1: Path, tmp_path: Path, module: str, args: dict[str, Any]
    ) -> None:
        tensors, wanted = trained(tiny_sd1, network_module=module, args=args)
        file = tmp_path / "adapter.safetensors"
        save_file(tensors, file)
        model = load(tiny_sd1)
        encoder = with_stock_paths(model.text_encoders[0])
        LycorisNetworkKohya.apply_preset(
            {"unet_target_name": [], "unet_target_module": ["Transformer2DModel"]}
        )
        network, _ = lycoris_kohya.create_network_from_weights(
            1.0, str(file), None, encoder, model.unet
        )
        network.apply_to(encoder, model.unet, True, True)
        assert difference(output(model), wanted) < 1e-4

    def test_outside_of_a_trainer(self, tiny_sd1: Path, tmp_path: Path) -> None:
        options = {"network_module": "networks.lokr", "network_train_unet_only": True}
        tensors, wanted = trained(tiny_sd1, **options)
        file = tmp_path / "adapter.safetensors"
        save_file(tensors, file)
        model = load(tiny_sd1)
        LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})
        network, _ = create_lycoris_from_weights(1.0, str(file), model.unet)
        network.apply_to()
        assert difference(output(model), wanted) < 1e-4


# What a file can hold, with alpha / rank other than 1.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"conv_dim": 2, "use_tucker": True}),
    ("lora", {"dora_wd": True, "wd_on_output": False}),
    ("lora", {"use_scalar": True, "rs_lora": True}),
    ("loha", {"use_tucker": True, "rs_lora": True}),
    ("loha", {"dora_wd": True}),
    ("lokr", {}),
    ("lokr", {"factor": 4, "decompose_both": True, "dim": 1}),
    ("lokr", {"factor": 4, "use_tucker": True, "dim": 1}),
    ("lokr", {"full_matrix": True}),
    ("lokr", {"full_matrix": True, "rs_lora": True}),
    ("lokr", {"dora_wd": True, "wd_on_output": False}),
    ("lokr", {"unbalanced_factorization": True, "decompose_both": True, "factor": 4}),
    ("full", {}),
    ("glora", {}),
    ("diag-oft", {"constraint": 0.01, "rescaled": True}),
    ("boft", {"rescaled": True}),
    ("ia3", {"preset": "ia3"}),
]


@pytest.mark.parametrize(("algorithm", "keys"), FORMS)
def test_a_file_gives_the_same_output_in_every_way(
    tmp_path: Path, algorithm: str, keys: dict[str, Any]
) -> None:
    """Loaded into a new network, as a network of its own, and merged into the model."""

    def new_network(block: OneBlock, alpha: float) -> Any:
        args = {"algo": algorithm, "train_norm": True, **keys}
        return kohya.create_network(1.0, args.pop("dim", 4), alpha, None, None, block, **args)

    def from_file(block: OneBlock) -> Any:
        return kohya.create_network_from_weights(1.0, str(file), None, None, block)[0]

    block = OneBlock()
    plain = block.output()
    network = new_network(block, 2.0)
    network.apply_to(None, block)
    stir(network)
    network.eval()
    wanted = block.output()
    assert difference(wanted, plain) > 0.01
    file = tmp_path / "adapter.safetensors"
    network.save_weights(file, None, None)

    block = OneBlock()
    loaded = new_network(block, 8.0)  # the file's own alpha has to win
    loaded.apply_to(None, block)
    loaded.load_weights(file)
    assert difference(block.output(), wanted) < 1e-5

    block = OneBlock()
    from_file(block).apply_to(None, block)
    assert difference(block.output(), wanted) < 1e-5

    block = OneBlock()
    from_file(block).merge_to(None, block)
    assert difference(block.output(), wanted) < 1e-5


class TestFull:
    """`algo=full`, whose parameters hold base weight and difference together."""

    def file(self, folder: Path) -> Path:
        """Differences of about what bfloat16 rounds a base weight by."""
        network = kohya.create_network(1.0, 4, 4, None, None, OneBlock(), algo="full")
        for adapter in network.loras:
            network.add_module(adapter.lora_name, adapter)
        stir(network, 1e-3)
        file = folder / "full.safetensors"
        save_file(
            {
                f"{adapter.lora_name}.{key}": tensor.detach()
                for adapter in network.loras
                for key, tensor in (("diff", adapter.weight), ("diff_b", adapter.bias))
                if tensor is not None
            },
            file,
        )
        return file

    def worst(self, network: Any, file: Path) -> float:
        """How far what the network would write is from the file."""
        written = network.state_dict()
        return max(difference(written[key], tensor) for key, tensor in load_file(file).items())

    @pytest.mark.parametrize("half", [False, True])
    def test_a_file_is_not_rounded_to_the_bases_precision(self, tmp_path: Path, half: bool) -> None:
        file = self.file(tmp_path)
        if half:
            save_file({key: t.half() for key, t in load_file(file).items()}, file)
        for made_from_file in (False, True):
            block = OneBlock().bfloat16()
            if made_from_file:
                made, _ = kohya.create_network_from_weights(1.0, str(file), None, None, block)
                made.apply_to(None, block)
            else:
                made = kohya.create_network(1.0, 4, 4, None, None, block, algo="full")
                made.apply_to(None, block)
                made.load_weights(file)
            assert self.worst(made, file) < 1e-6

    def test_loading_replaces_what_was_there(self, tmp_path: Path) -> None:
        file = self.file(tmp_path)
        block = OneBlock()
        network = kohya.create_network(1.0, 4, 4, None, None, block, algo="full")
        network.apply_to(None, block)
        stir(network)
        for _ in range(2):
            network.load_weights(file)
            assert self.worst(network, file) < 1e-6


class TestStockFiles:
    """Files as stock writes them: float16, and SDXL's UNet in its original layout."""

    def sdxl_file(self, folder: Path, file: Path) -> tuple[dict[str, Tensor], Tensor]:
        tensors, wanted = trained(folder, sdxl=True)
        renamed = {}
        for key, tensor in tensors.items():
            # The tiny model's levels: attention in the second one down and the first one up.
            key = key.replace("lora_unet_down_blocks_1_attentions_0", "lora_unet_input_blocks_4_1")
            key = key.replace("lora_unet_mid_block_attentions_0", "lora_unet_middle_block_1")
            for layer in (0, 1):
                key = key.replace(
                    f"lora_unet_up_blocks_0_attentions_{layer}",
                    f"lora_unet_output_blocks_{layer}_1",
                )
            renamed[key] = tensor
        assert not any("attentions" in key for key in renamed)
        save_file(renamed, file)
        return renamed, wanted

    def test_sdxl_in_the_original_layout_loads_and_trains_on(
        self, tiny_sdxl: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "stock.safetensors"
        _, wanted = self.sdxl_file(tiny_sdxl, file)
        model = load(tiny_sdxl, True)
        adapter = adapt(model, tiny_sdxl, network_weights=str(file))
        assert difference(output(model), wanted) < 1e-5
        optimizer = torch.optim.SGD(adapter.groups, lr=0.1)
        adapter.network.train()
        losses = []
        for _ in range(3):
            loss = output(model).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[2] < losses[0]

    def test_a_file_without_alpha_has_alpha_equal_to_rank(self, tiny_sd1: Path) -> None:
        tensors, _ = trained(tiny_sd1, network_alpha=4)
        without = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
        outputs = []
        for weights in (tensors, without):
            model = load(tiny_sd1)
            network, _ = lora.create_network_from_weights(
                1.0, None, None, model.text_encoders[0], model.unet, weights_sd=weights
            )
            network.apply_to(model.text_encoders, model.unet)
            outputs.append(output(model))
        assert difference(*outputs) == 0

    def test_pickled_files(self, tiny_sd1: Path, tmp_path: Path) -> None:
        tensors, wanted = trained(tiny_sd1)
        file = tmp_path / "stock.pt"
        torch.save(tensors, file)
        model = load(tiny_sd1)
        adapt(model, tiny_sd1, network_weights=str(file))
        assert difference(output(model), wanted) < 1e-5

    def test_saved_by_the_network_itself_with_hashes(self, tiny_sd1: Path, tmp_path: Path) -> None:
        adapter = adapt(load(tiny_sd1), tiny_sd1)
        file = tmp_path / "own.safetensors"
        network: Any = adapter.network
        network.save_weights(file, torch.float16, {"ss_steps": "1"})
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            assert opened.metadata().keys() == {"ss_steps", "sshs_model_hash", "sshs_legacy_hash"}
        assert load_file(file).keys() == adapter_state_dict(adapter, None).keys()


def test_base_weights_have_strengths_and_any_algorithm(tiny_sd1: Path, tmp_path: Path) -> None:
    tensors, wanted = trained(tiny_sd1, network_module="networks.lokr")
    file = tmp_path / "lokr.safetensors"
    save_file(tensors, file)
    model = load(tiny_sd1)
    adapter = adapt(
        model,
        tiny_sd1,
        base_weights=[str(file), str(file)],
        base_weights_multiplier=[0.25, 0.75],
    )
    assert difference(output(model), wanted) < 1e-4
    assert not any("lokr" in name for name, _ in adapter.network.named_parameters())
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_multiplier_scales_what_is_added(tiny_sd1: Path) -> None:
    for module in ("networks.lora", "networks.lokr"):
        model = load(tiny_sd1)
        plain = output(model)
        adapter = adapt(model, tiny_sd1, network_module=module)
        stir(adapter.network)
        network: Any = adapter.network
        network.set_multiplier(0.0)
        assert difference(output(model), plain) == 0
        network.set_multiplier(1.0)
        full = output(model)
        assert difference(full, plain) > 0.02
        network.restore()
        assert difference(output(model), plain) == 0
    assert kohya.create_network is not lora.create_network
