"""networks/presets.py: which layers a preset reaches, and what a file may say about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import OneBlock, load
from lycoris.config import PRESET
from lycoris.kohya import LycorisNetworkKohya
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from torch import nn

from library.training.errors import UserError
from networks import kohya
from networks.modules import LoRA
from networks.presets import PRESETS, Selection, Targets, check_preset, preset_selection

FEED_FORWARD = "lora_unet_attentions_transformer_blocks_0_ff_net_"


def adapters(folder: Path, text: str, alpha: float = 2, **keys: Any) -> dict[str, Any]:
    """The adapters of a network with the preset `text`, by name; rank 4."""
    file = folder / "preset.toml"
    file.write_text(text)
    made = create(None, OneBlock(), alpha, preset=str(file), **keys)
    return {adapter.lora_name: adapter for adapter in made.loras}


def create(text_encoder: Any, unet: Any, alpha: float = 2, **keys: Any) -> Any:
    return kohya.create_network(1.0, 4, alpha, None, text_encoder, unet, **keys)


def names(network: Any) -> list[str]:
    return [adapter.lora_name for adapter in network.loras]


class TestNetworks:
    """Whole presets, on a model with every kind of layer."""

    @pytest.fixture(scope="class")
    def parts(self, tiny_sd1: Path) -> tuple[nn.Module, nn.Module]:
        """Text encoder and UNet, to which nothing is applied."""
        model = load(tiny_sd1)
        return model.text_encoders[0], model.unet

    def test_the_list_is_lycoriss(self) -> None:
        assert set(PRESETS) == set(PRESET)

    @pytest.mark.parametrize(
        ("preset", "unet", "text"),
        [
            # Transformers 48, resnets and samplers 31, conv_in, conv_out, time embedding 2.
            ("full", 83, 18),
            ("full-lin", 63, 18),
            ("attn-mlp", 50, 18),
            ("attn-only", 32, 12),
            ("unet-only", 83, 0),
            ("unet-transformer-only", 50, 0),
            ("unet-convblock-only", 33, 0),
            ("ia3", 20, 9),
        ],
    )
    def test_every_preset_works(self, parts: Any, preset: str, unet: int, text: int) -> None:
        network = create(*parts, preset=preset)
        assert (len(network.unet_loras), len(network.text_encoder_loras)) == (unet, text)

    def test_a_file(self, parts: Any, tmp_path: Path) -> None:
        file = tmp_path / "preset.toml"
        file.write_text(
            'unet_target_module = ["Transformer2DModel"]\nunet_target_name = ["conv_in"]\n'
            'text_encoder_target_module = []\nexclude_name = [".*attn2.*"]\n'
            '[module_algo_map.FeedForward]\nalgo = "lokr"\nfactor = 4\n'
            "[name_algo_map.conv_in]\ndim = 2\n"
        )
        network = create(*parts, preset=str(file))
        by_name = {a.lora_name: a for a in network.loras}
        assert not any("attn2" in name for name in by_name)
        feed_forward = by_name["lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"]
        assert feed_forward.lokr_w1.shape == (4, 4)
        assert by_name["lora_unet_conv_in"].lora_dim == 2
        assert isinstance(by_name["lora_unet_mid_block_attentions_0_proj_in"], LoRA)

    def test_networks_dont_disturb_each_other_or_lycoris(self, parts: Any) -> None:
        before = {k: v for k, v in vars(LycorisNetworkKohya).items() if k.isupper()}
        first = create(*parts, preset="attn-mlp")
        create(*parts, algo="ia3", preset="ia3")
        again = create(*parts, preset="attn-mlp")
        assert names(first) == names(again)
        assert {k: v for k, v in vars(LycorisNetworkKohya).items() if k.isupper()} == before


class TestLayers:
    """Settings of one class or one name; the layers in it get them, and nothing else does."""

    def test_rank_and_algorithm_of_a_class(self, tmp_path: Path) -> None:
        made = adapters(
            tmp_path, '[module_algo_map.FeedForward]\nalgo = "lokr"\ndim = 10000\nfactor = 4\n'
        )
        lokrs = {name for name, adapter in made.items() if isinstance(adapter, LokrModule)}
        assert lokrs == {f"{FEED_FORWARD}0_proj", f"{FEED_FORWARD}2"}
        assert made[f"{FEED_FORWARD}2"].lokr_w1.shape == (4, 4)
        assert made["lora_unet_attentions_proj_in"].lora_dim == 4

    def test_rank_of_a_pattern(self, tmp_path: Path) -> None:
        text = (
            'unet_target_name = ["attentions.*"]\n[name_algo_map."attentions\\\\.transformer.*"]\n'
            "dim = 2\n"
        )
        made = adapters(tmp_path, text)
        assert made[f"{FEED_FORWARD}2"].lora_dim == 2
        assert made["lora_unet_attentions_proj_in"].lora_dim == 4

    def test_a_convolution_with_a_rank_of_its_own_has_the_convolutions_alpha(
        self, tmp_path: Path
    ) -> None:
        made = adapters(
            tmp_path,
            "enable_conv = false\n[module_algo_map.ResnetBlock2D]\ndim = 2\n",
            conv_alpha=1.0,
        )
        assert float(made["lora_unet_resnets_conv1"].alpha) == 1.0
        assert float(made["lora_unet_resnets_conv_shortcut"].alpha) == 2.0  # 1×1

    def test_alpha_zero_is_the_rank_of_each_layer(self, tmp_path: Path) -> None:
        made = adapters(tmp_path, "[module_algo_map.FeedForward]\ndim = 2\n", alpha=0)
        assert {adapter.scale for adapter in made.values()} == {1.0}

    def test_other_settings(self, tmp_path: Path) -> None:
        text = (
            "[module_algo_map.FeedForward]\nuse_scalar = true\nrank_dropout = 0.5\ndropout = 0.25\n"
            '[module_algo_map.ResnetBlock2D]\nalgo = "full"\n'
            "[module_algo_map.Attention]\nweight_decompose = true\nwd_on_out = false\ndropout = 0\n"
        )
        made = adapters(tmp_path, text, dropout=0.1, use_tucker=True)
        feed_forward = made[f"{FEED_FORWARD}2"]
        assert "scalar" in dict(feed_forward.named_parameters())
        assert (feed_forward.rank_dropout, feed_forward.drop.p) == (0.5, 0.25)
        assert isinstance(made["lora_unet_resnets_conv1"], FullModule)
        attention = made["lora_unet_attentions_transformer_blocks_0_attn1_to_q"]
        assert isinstance(attention, LoConModule)
        assert attention.wd
        assert not attention.wd_on_out
        plain = made["lora_unet_attentions_proj_in"]
        assert (plain.rank_dropout, plain.drop.p) == (0.0, 0.1)


class TestNames:
    """LyCORIS's rule, from the start of the path; names of targets also mean the end of one."""

    def reached(self, path: str, wildcards: bool = False, **keys: Any) -> Any:
        targets = Targets(frozenset({"Block"}), keys.pop("targets", ()))
        selection = Selection(targets, targets, wildcards=wildcards, **keys)
        return selection.config(targets, path, ["Block", "Conv2d"])

    def test_excluded(self) -> None:
        conv = "down_blocks.0.resnets.0.conv1"
        assert self.reached(conv, excluded=("conv1",)) == {}
        for pattern in (conv, ".*conv1", "down_blocks"):
            assert self.reached(conv, excluded=(pattern,)) is None
        assert self.reached(conv, excluded=("down_blocks",), wildcards=True) == {}
        assert self.reached(conv, excluded=("*.conv1",), wildcards=True) is None

    def test_targets(self) -> None:
        targets = Targets(frozenset(), ("to_k", "conv_in", "mid.*"))
        selection = Selection(targets, targets)
        reached = {
            path: selection.config(targets, path, []) is not None
            for path in ("a.to_k", "conv_in", "mid_block.x", "a.to_kk", "a.mid_block")
        }
        assert list(reached.values()) == [True, True, True, False, False]

    def test_settings_by_name(self) -> None:
        by_name = {"a.*": {"dim": 1}, "a.conv": {"dim": 2}, "conv": {"dim": 3}}
        keys: dict[str, Any] = {"by_name": by_name, "targets": ("conv", "to_k")}
        assert self.reached("a.conv", **keys) == {"dim": 2}  # the whole path before a pattern
        assert self.reached("a.b.conv", **keys) == {"dim": 1}
        assert self.reached("b.conv", **keys) == {}

    def test_ia3s_own_preset_means_ends_of_paths(self) -> None:
        selection = preset_selection("ia3", "ia3")
        config = selection.config(selection.unet, "mid_block.ff.net.2", [])
        assert config == {"train_on_input": True}
        assert selection.config(selection.unet, "mid_block.attn1.to_k", []) == {}


class TestCheck:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ('[module_algo_map.X]\nalgo = "lokr"\nfactr = 4', "Did you mean 'factor'?"),
            ("[name_algo_map.conv_in]\nfactor = 4", "[name_algo_map.conv_in] factor: lora has no"),
            ('[module_algo_map.X]\nalgo = "lok"', "algo 'lok' is none of"),
            ("[module_algo_map.X]\ndim = 0", "dim=0: must be a whole number of at least 1"),
            ("[module_algo_map.X]\nuse_tucker = 2", "use_tucker=2: must be True or False"),
            ("[module_algo_map.X]\nconv_dim = 2", "conv_dim: lora has no such key"),
            ("[module_algo_map]\nX = 4", "[module_algo_map.X] must be a table"),
            ('exclude_name = ["*attn2*"]', "'*attn2*' is no regular expression"),
        ],
    )
    def test_wrong(self, tmp_path: Path, text: str, answer: str) -> None:
        file = tmp_path / "p.toml"
        file.write_text(text)
        (line,) = check_preset(str(file), "lora")
        assert answer in line
        assert str(file) in line

    def test_right(self, tmp_path: Path) -> None:
        file = tmp_path / "p.toml"
        file.write_text(
            'use_fnmatch = true\nexclude_name = ["*attn2*"]\n'
            '[module_algo_map.FeedForward]\nalgo = "lokr"\ndim = 4\nalpha = 0\nfull_matrix = true\n'
            "[name_algo_map.conv_in]\ndora_wd = true\nmodule_dropout = 0.1\n"
        )
        assert check_preset(str(file), "lora") == []

    def test_dora_and_the_networks_dropout(self, tmp_path: Path) -> None:
        text = "[module_algo_map.FeedForward]\ndora_wd = true\n"
        with pytest.raises(UserError, match=r"FeedForward\] dora_wd=True and dropout=0.1 exclude"):
            adapters(tmp_path, text, dropout=0.1)
