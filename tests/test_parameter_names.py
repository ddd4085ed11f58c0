"""What figures call parameters: kinds, modules and blocks."""

from __future__ import annotations

import json

import pytest
from runs import ROOT

from library.training.parameter_names import MOST_BLOCKS, blocks, kind, module


@pytest.mark.parametrize(
    ("name", "its_kind", "its_module"),
    [
        ("lora_unet_mid_to_q.lora_down.weight", "lora_a", "lora_unet_mid_to_q"),
        ("lora_unet_mid_to_q.lora_up.weight", "lora_b", "lora_unet_mid_to_q"),
        ("lycoris_unet_mid_to_q.lokr_w2_a", "lokr_w2_a", "lycoris_unet_mid_to_q"),
        (
            "layers.3.attention.in_proj_weight",
            "in_proj_weight",
            "layers.3.attention.in_proj_weight",
        ),
        ("blocks.3.conv1.weight", "conv1", "blocks.3.conv1"),
        ("net.0.bias", "net", "net.0"),
        ("weight", "", "weight"),
        ("", "", ""),
    ],
)
def test_kind_and_module(name: str, its_kind: str, its_module: str) -> None:
    assert kind(name) == its_kind
    assert module(name) == its_module


def test_blocks_end_at_the_first_number_and_leave_out_what_all_have() -> None:
    names = ["lora_unet_down_blocks_1_x.lora_up.weight", "lora_unet_down_blocks_2_x.lora_up.weight"]
    assert blocks([*names, "lora_te1_layers_0_fc.lora_up.weight", "lora_unet_conv_in.alpha"]) == [
        "unet_down_blocks 1",
        "unet_down_blocks 2",
        "te1_layers 0",
        "unet_conv_in",
    ]
    assert blocks(["features.0.weight", "features.3.weight"]) == ["features 0", "features 3"]
    assert blocks(["head.weight", "head.bias", "body.weight"]) == ["head", "head", "body"]


def test_many_numbered_blocks_count_as_one() -> None:
    listed = json.loads((ROOT / "tests" / "data" / "sdxl_lora_modules.json").read_text("utf-8"))
    found = blocks([f"{name}.lora_up.weight" for name, _, _ in listed])
    assert sorted(set(found)) == [
        "te1_text_model_encoder_layers",
        "te2_text_model_encoder_layers",
        "unet_down_blocks 1",
        "unet_down_blocks 2",
        "unet_mid_block_attentions 0",
        "unet_up_blocks 0",
        "unet_up_blocks 1",
    ]


@pytest.mark.parametrize(("count", "size"), [(1, 10), (240, 10), (241, 100), (1972, 100)])
def test_parameters_without_names_are_counted_off(count: int, size: int) -> None:
    found = blocks([""] * count)
    assert found[0] == f"0 to {min(size, count) - 1}"
    assert found[-1].endswith(f" to {count - 1}")
    assert len(set(found)) == -(-count // size) <= MOST_BLOCKS
