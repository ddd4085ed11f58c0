"""networks/: which layers get an adapter, under which names, and what it computes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import OneBlock, difference, load, output, stir
from diffusers import UNet2DConditionModel
from lycoris.modules.locon import LoConModule
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.training.errors import UserError
from networks import kohya, loha, lokr, lora
from networks.blocks import block_index
from networks.build import MODULE_CLASSES
from networks.layers import from_original_layout
from networks.modules import LoRA, finish
from networks.presets import ALGORITHMS

DATA = Path(__file__).parent / "data"
MODULES = {"lora": lora, "loha": loha, "lokr": lokr, "kohya": kohya}


def text_encoder(width: int, layers: int, heads: int, projection: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


@pytest.fixture(scope="module")
def sd15() -> tuple[nn.Module, nn.Module]:
    """The architecture of SD 1.5, without weights."""
    with torch.device("meta"):
        return text_encoder(768, 12, 12), UNet2DConditionModel(cross_attention_dim=768)


@pytest.fixture(scope="module")
def sdxl() -> tuple[list[nn.Module], nn.Module]:
    """The architecture of SDXL, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        return [text_encoder(768, 12, 12), text_encoder(1280, 32, 20, projection=True)], unet


def create(
    module: str, encoders: Any, unet: Any, dim: int = 4, alpha: float = 2, **keys: Any
) -> Any:
    torch.manual_seed(0)
    return MODULES[module].create_network(1.0, dim, alpha, None, encoders, unet, **keys)


def names(network: Any) -> list[str]:
    return [adapter.lora_name for adapter in network.loras]


@pytest.mark.parametrize("module", MODULES.values())
def test_every_module_has_stocks_functions(module: Any) -> None:
    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    parts = ["vae", "text_encoder", "unet"]
    assert parameters(module.create_network) == [
        *("multiplier", "network_dim", "network_alpha", *parts, "neuron_dropout", "kwargs")
    ]
    assert parameters(module.create_network_from_weights) == [
        *("multiplier", "file", *parts, "weights_sd", "for_inference", "kwargs")
    ]
    with pytest.raises(UserError, match=f"module: {module.__name__} has no such key"):
        module.create_network(1.0, 4, 1.0, None, None, OneBlock(), module="x")


class TestStockLayers:
    def test_sdxl_gives_the_complete_list_with_sizes(self, sdxl: Any) -> None:
        wanted = json.loads((DATA / "sdxl_lora_modules.json").read_text("utf-8"))
        network = create("lora", *sdxl)
        found = [
            [a.lora_name, a.lora_down.weight.shape[1], a.lora_up.weight.shape[0]]
            for a in network.loras
        ]
        assert len(found) == 986
        assert sorted(found) == sorted(wanted)

    @pytest.mark.parametrize("module", ["lora", "loha", "lokr"])
    def test_sd15_has_192_unet_and_72_text_encoder_modules(self, sd15: Any, module: str) -> None:
        network = create(module, *sd15, dim=1)
        assert (len(network.unet_loras), len(network.text_encoder_loras)) == (192, 72)
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names(network)
        assert len(set(names(network))) == 264

    def test_conv_dim_adds_resnets_and_samplers(self, sd15: Any) -> None:
        network = create("lora", *sd15, conv_dim="2", conv_alpha="1")
        assert len(network.unet_loras) == 278
        by_name = {a.lora_name: a for a in network.loras}
        conv = by_name["lora_unet_down_blocks_0_resnets_0_conv1"]
        assert conv.lora_down.weight.shape == (2, 320, 3, 3)
        assert (conv.lora_dim, float(conv.alpha)) == (2, 1.0)
        shortcut = by_name["lora_unet_down_blocks_1_resnets_0_conv_shortcut"]  # 1×1: a linear one
        assert (shortcut.lora_dim, float(shortcut.alpha)) == (4, 2.0)

    def test_conv_dim_zero_is_as_if_it_were_not_there(self) -> None:
        conv = "lora_unet_resnets_conv1"
        assert conv not in names(create("lora", None, OneBlock(), conv_dim="0"))
        network = create("kohya", None, OneBlock(), conv_dim="0")  # there it is the network's rank
        assert {a.lora_name: a.lora_dim for a in network.loras}[conv] == 4

    def test_one_text_encoder_in_a_list_is_a_lone_one(self, sd15: Any) -> None:
        assert names(create("lora", [sd15[0]], sd15[1], dim=1))[0].startswith("lora_te_text_model_")

    def test_no_text_encoder(self, sd15: Any) -> None:
        assert len(create("lora", None, sd15[1], dim=1).loras) == 192


class TestBlocks:
    def test_numbers_are_stocks(self) -> None:
        sd = {
            "down_blocks_0_resnets_0_conv1": 1,
            "down_blocks_0_downsamplers_0_conv": 3,
            "down_blocks_2_attentions_1_proj_in": 8,
            "mid_block_attentions_0_proj_in": 12,
            "up_blocks_1_upsamplers_0_conv": 18,
            "up_blocks_3_attentions_2_proj_out": 24,
        }
        xl = {
            "down_blocks_1_attentions_0_proj_in": 5,  # input_blocks_4
            "down_blocks_1_downsamplers_0_conv": 7,
            "mid_block_resnets_0_conv1": 10,
            "mid_block_attentions_0_proj_in": 11,
            "mid_block_resnets_1_conv1": 12,
            "up_blocks_0_attentions_0_proj_in": 13,
            "up_blocks_2_resnets_2_conv2": 21,
        }
        assert {name: block_index(f"lora_unet_{name}", False) for name in sd} == sd
        assert {name: block_index(f"lora_unet_{name}", True) for name in xl} == xl

    def test_dims_and_alphas_by_block(self, sd15: Any) -> None:
        dims = ["2"] * 25
        dims[1], dims[12] = "8", "0"
        alphas = ["1"] * 25
        alphas[1] = "4"
        network = create("lora", *sd15, block_dims=",".join(dims), block_alphas=",".join(alphas))
        by_name = {a.lora_name: a for a in network.loras}
        first = by_name["lora_unet_down_blocks_0_attentions_0_proj_in"]
        assert (first.lora_dim, float(first.alpha)) == (8, 4.0)
        assert by_name["lora_unet_down_blocks_0_attentions_1_proj_in"].lora_dim == 2
        assert not any("mid_block" in name for name in by_name)
        assert by_name["lora_te_text_model_encoder_layers_0_mlp_fc1"].lora_dim == 4

    def test_conv_dims_by_block(self, tiny_sdxl: Path) -> None:
        keys = {"block_dims": ",".join(["1"] * 23), "conv_block_dims": ",".join(["3"] * 23)}
        network = create("lora", None, load(tiny_sdxl, True).unet, **keys)
        by_name = {a.lora_name: a for a in network.loras}
        assert by_name["lora_unet_mid_block_resnets_0_conv1"].lora_dim == 3
        assert by_name["lora_unet_mid_block_resnets_0_time_emb_proj"].lora_dim == 1

    def test_learning_rates_by_block(self, sd15: Any) -> None:
        network = create(
            "lora", *sd15, dim=1, down_lr_weight="linear+.5", up_lr_weight=",".join(["0"] * 12)
        )
        network.apply_to(None, None)
        groups, labels = network.prepare_optimizer_params(None, 1e-3, 1e-4)
        rates = dict(zip(labels, (group["lr"] for group in groups), strict=True))
        assert rates["textencoder"] == 1e-4
        assert rates["unet_block1"] == pytest.approx((1 / 11 + 0.5) * 1e-3)
        assert rates["unet_block8"] == pytest.approx((8 / 11 + 0.5) * 1e-3)
        assert rates["unet_block12"] == pytest.approx(1e-3)
        assert not any("up_blocks" in name for name in names(network))

    def test_wrong_number_of_blocks(self, sdxl: Any) -> None:
        with pytest.raises(
            UserError, match=r"block_dims: 25 numbers, but this model has 23 blocks"
        ):
            create("lora", *sdxl, block_dims=",".join(["1"] * 25))


def test_original_layout_of_sdxl() -> None:
    pairs = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        ),
        "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
        "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
        "input_blocks_4_0_in_layers_0": "down_blocks_1_resnets_0_norm1",
        "middle_block_0_out_layers_0": "mid_block_resnets_0_norm2",
        "output_blocks_5_1_norm": "up_blocks_1_attentions_2_norm",
        "out_0": "conv_norm_out",
        "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
        "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
        "output_blocks_0_1_proj_in": "up_blocks_0_attentions_0_proj_in",
        "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks_8_0_out_layers_3": "up_blocks_2_resnets_2_conv2",
        "label_emb_0_2": "add_embedding_linear_2",
    }
    for original, diffusers in pairs.items():
        assert from_original_layout(f"lora_unet_{original}") == f"lora_unet_{diffusers}"
    kept = "lora_unet_down_blocks_1_attentions_0_proj_in"
    assert from_original_layout(kept) == kept
    assert from_original_layout("lora_te1_text_model_x") == "lora_te1_text_model_x"


CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"use_tucker": True, "rs_lora": True}),
    ("lora", {"dora_wd": True, "wd_on_output": False}),
    ("loha", {}),
    ("loha", {"dora_wd": True}),
    ("lokr", {"factor": 4}),
    ("lokr", {"dora_wd": True}),
    ("full", {}),
    ("glora", {}),
    ("diag-oft", {"rescaled": True, "constraint": 0.01}),
    ("boft", {}),
    ("ia3", {"preset": "ia3"}),
]


class TestAlgorithms:
    def test_all_are_tested(self) -> None:
        assert {algorithm for algorithm, _ in CASES} == set(ALGORITHMS) - {"locon"}

    @pytest.mark.parametrize(("algorithm", "keys"), CASES)
    def test_in_bfloat16_with_checkpoints_gradients_flow_and_the_output_is_right(
        self, algorithm: str, keys: dict[str, Any]
    ) -> None:
        outputs = []
        for dtype, autocast in (
            (torch.float32, False),
            (torch.bfloat16, True),
            (torch.bfloat16, False),
        ):
            block = OneBlock().to(dtype)
            network = create("kohya", None, block, algo=algorithm, train_norm=True, **keys)
            network.apply_to(None, block)
            stir(network)
            network.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                prediction = block.output()
            prediction.square().mean().backward()
            assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
            parameters = network.named_parameters()
            assert not [name for name, p in parameters if p.grad is None or not p.grad.any()]
            outputs.append(prediction.detach())
        scale = outputs[0].abs().max()
        assert difference(outputs[0], outputs[1]) < 0.05 * scale
        assert difference(outputs[0], outputs[2]) < 0.05 * scale

    @pytest.mark.parametrize(
        "algorithm", ["lora", "loha", "lokr", "glora", "diag-oft", "boft", "ia3"]
    )
    def test_a_change_below_the_base_weights_rounding_acts(self, algorithm: str) -> None:
        """In bfloat16 W + ΔW - W is zero for |ΔW| < |W| / 512: a young adapter would do nothing."""
        weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        deltas = []
        for dtype in (torch.float32, torch.bfloat16):
            layer = nn.Linear(16, 16, bias=False)
            layer.weight = nn.Parameter(weight.bfloat16().to(dtype), requires_grad=False)
            torch.manual_seed(0)
            adapter = finish(MODULE_CLASSES[algorithm]("a", layer, 1.0, 4, 4, factor=4))
            stir(adapter, strength=1e-3)
            adapter.org_forward = lambda x: torch.zeros_like(x)  # leaves what the adapter adds
            deltas.append(adapter(torch.eye(16, dtype=dtype)).float())
        assert difference(deltas[0], deltas[1]) < 0.03 * deltas[0].abs().max()
        assert deltas[0].abs().max() > 0

    def test_without_our_care_lycoris_loses_it(self) -> None:
        """What the test above guards against; if this fails, LyCORIS no longer needs the care."""
        layer = nn.Linear(16, 16, bias=False).bfloat16()
        adapter = LoConModule("a", layer, 1.0, 4, 4)
        stir(adapter, strength=1e-3)
        adapter.org_forward = lambda x: torch.zeros_like(x)
        exact = adapter.make_weight()
        assert (
            difference(adapter(torch.eye(16).bfloat16()).float().T, exact) > 0.3 * exact.abs().max()
        )


class TestDropouts:
    def delta(self, layer: nn.Module, x: Tensor, **keys: Any) -> Tensor:
        torch.manual_seed(0)
        dropout = keys.pop("dropout", 0.0)
        adapter = finish(LoRA("a", layer, 1.0, 8, 8, **keys), dropout)
        stir(adapter, strength=1.0)
        adapter.train()
        return adapter(x) - layer(x)

    @pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1)])
    @pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
    def test_the_mean_is_kept_and_samples_differ(self, layer: nn.Module, kind: str) -> None:
        shape = (4000, 6) if isinstance(layer, nn.Linear) else (4000, 6, 1, 1)
        x = torch.ones(shape)
        exact = self.delta(layer, x)
        dropped = self.delta(layer, x, **{kind: 0.5})
        assert difference(dropped.mean(0), exact.mean(0)) < 0.15 * exact.abs().max()
        assert dropped.std(0).max() > 0.3 * exact.abs().max()

    def test_rank_dropout_drops_whole_ranks_of_a_sample(self) -> None:
        x = torch.randn(3, 7, 6)  # samples × tokens × width
        adapter = finish(LoRA("a", nn.Linear(6, 5), 1.0, 8, 8, rank_dropout=0.5))
        mask = adapter._rank_mask(torch.ones(3, 7, 8))
        assert mask.shape == (3, 1, 8)
        assert set(mask.unique().tolist()) <= {0.0, 2.0}
        assert adapter(x).shape == (3, 7, 5)

    @pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
    def test_module_dropout(self, algorithm: str) -> None:
        layer = nn.Linear(8, 8)
        adapter = finish(MODULE_CLASSES[algorithm]("a", layer, 1.0, 2, 2, module_dropout=0.5))
        stir(adapter, strength=1.0)
        x = torch.randn(4, 8)
        adapter.train()
        results = [torch.equal(adapter(x), layer(x)) for _ in range(40)]
        assert 8 < sum(results) < 32
        adapter.eval()
        assert not torch.equal(adapter(x), layer(x))

    def test_lokr_rank_dropout_drops_outputs(self) -> None:
        layer = nn.Linear(8, 64)
        adapter = finish(MODULE_CLASSES["lokr"]("a", layer, 1.0, 2, 2, rank_dropout=0.5))
        stir(adapter, strength=1.0)
        x = torch.randn(4, 8)
        adapter.train()
        delta = adapter(x) - layer(x)
        silent = (delta == 0).all(dim=0)
        assert 16 < int(silent.sum()) < 48


class TestMaxNorm:
    @pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
    def test_norms_are_limited_in_the_model_and_in_the_file(
        self, tiny_sd1: Path, algorithm: str
    ) -> None:
        model = load(tiny_sd1)
        network = create(
            "kohya", model.text_encoders[0], model.unet, algo=algorithm, train_norm=True
        )
        network.apply_to(model.text_encoders, model.unet)
        stir(network, 0.2)
        scaled, mean, most = network.apply_max_norm_regularization(0.5, "cpu")
        assert 0 < scaled <= len(network.loras)
        assert mean <= most <= 0.5 + 1e-4
        limited = output(model)
        again, _, _ = network.apply_max_norm_regularization(0.51, "cpu")
        assert again == 0
        tensors = network.state_dict()
        other = load(tiny_sd1)
        copied, _ = kohya.create_network_from_weights(
            1.0, None, None, other.text_encoders[0], other.unet, weights_sd=tensors
        )
        copied.apply_to(other.text_encoders, other.unet)
        assert difference(output(other), limited) < 1e-5

    @pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
    def test_dropout_has_no_part_in_it(self, algorithm: str) -> None:
        keys = {"algo": algorithm, "use_scalar": True, "preset": "attn-mlp"}
        block = OneBlock()
        network = create("kohya", None, block, rank_dropout=0.5, **keys)
        network.apply_to(None, block)
        stir(network, 0.5)
        network.train()
        before = torch.get_rng_state()
        most = network.apply_max_norm_regularization(1000)[2]
        assert torch.equal(torch.get_rng_state(), before)
        assert all(adapter.training for adapter in network.loras)
        for factor in (0.5, 0.25):  # of the greatest norm
            scaled, _, limited = network.apply_max_norm_regularization(factor * most)
            assert scaled > 0
            assert limited == pytest.approx(factor * most, rel=1e-4)
        network.eval()
        deltas = [adapter.get_diff_weight()[0] for adapter in network.loras]
        scales = [1 if algorithm == "lora" else adapter.scale for adapter in network.loras]
        norms = [float(d.norm()) / scale for d, scale in zip(deltas, scales, strict=True)]
        if algorithm != "lora":  # LyCORIS scales these twice and leaves out the scalar
            norms = [n * abs(float(a.scalar)) for n, a in zip(norms, network.loras, strict=True)]
        assert max(norms) == pytest.approx(0.25 * most, rel=1e-4)


class TestGroups:
    def network(self, folder: Path, sdxl: bool = False, **keys: Any) -> Any:
        model = load(folder, sdxl)
        network = create("lora", model.text_encoders, model.unet, dim=1, **keys)
        network.apply_to(model.text_encoders, model.unet)
        return network

    def test_names_are_those_of_the_parameters(self, tiny_sdxl: Path) -> None:
        network = self.network(tiny_sdxl, True)
        groups, labels = network.prepare_optimizer_params(1e-4, 1e-3, 1e-5)
        by_name = dict(network.named_parameters())
        assert labels == ["textencoder", "unet"]
        assert sum(len(group["params"]) for group in groups) == len(by_name)
        for group in groups:
            pairs = zip(group["named"], group["params"], strict=True)
            assert all(by_name[name] is parameter for name, parameter in pairs)

    def test_a_learning_rate_for_each_text_encoder(self, tiny_sdxl: Path) -> None:
        network = self.network(tiny_sdxl, True)
        prepare = network.prepare_optimizer_params_with_multiple_te_lrs
        groups, labels = prepare([1e-4, 2e-4], None, 1e-3)
        assert labels == ["textencoder 1", "textencoder 2", "unet"]
        assert [group["lr"] for group in groups] == [1e-4, 2e-4, 1e-3]
        assert groups[1]["named"][0].startswith("lora_te2_")
        groups, _ = prepare([5e-4], 0, 1e-3)
        assert [group["lr"] for group in groups] == [5e-4, 5e-4]
        with pytest.raises(UserError, match="3 values"):
            prepare([1e-4] * 3, None, 1e-3)
        network.text_encoder_loras = []  # not trained: its learning rates mean nothing
        assert prepare([1e-4] * 2, None, 1e-3)[1] == ["unet"]

    def test_lora_plus(self, tiny_sd1: Path) -> None:
        network = self.network(tiny_sd1, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16")
        groups, labels = network.prepare_optimizer_params(1e-4, 1e-3, None)
        assert labels == ["textencoder", "textencoder plus", "unet", "unet plus"]
        assert [group["lr"] for group in groups] == pytest.approx([1e-4, 4e-4, 1e-3, 16e-3])
        assert all("lora_up" in name for name in groups[3]["named"])
        assert all("lora_down" in name for name in groups[2]["named"])

    def test_a_part_at_learning_rate_zero_is_not_trained(self, tiny_sd1: Path) -> None:
        network = self.network(tiny_sd1)
        _, labels = network.prepare_optimizer_params(0, 1e-3, 1e-3)
        assert labels == ["unet"]
        assert len(network.get_trainable_params()) == 2 * 48
