"""library/training/network.py: from options to an adapter on the model, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapt, difference, load, options_for, output, stir
from safetensors.torch import save_file
from torch import nn

from library.training.errors import UserError
from library.training.network import adapter_state_dict, build_adapter, check_network
from library.training.options import Options


class TestBuild:
    def test_groups_labels_and_names(self, tiny_sd1: Path) -> None:
        adapter = adapt(load(tiny_sd1), tiny_sd1, unet_lr=1e-4, text_encoder_lr=[1e-5])
        assert adapter.group_labels == ["text_encoder", "unet"]
        assert [group["lr"] for group in adapter.groups] == [1e-5, 1e-4]
        named = dict(adapter.network.named_parameters())
        for group in adapter.groups:
            assert all(named[n] is p for n, p in zip(group["named"], group["params"], strict=True))
            assert all(p.requires_grad and p.dtype == torch.float32 for p in group["params"])
        assert adapter.trains_text_encoder

    def test_sdxls_text_encoders_have_learning_rates_of_their_own(self, tiny_sdxl: Path) -> None:
        adapter = adapt(load(tiny_sdxl, True), tiny_sdxl, text_encoder_lr=[1e-5, 2e-5])
        assert adapter.group_labels == ["text_encoder 1", "text_encoder 2", "unet"]
        assert [group["lr"] for group in adapter.groups] == [1e-5, 2e-5, 1e-3]

    def test_lora_plus_has_labels(self, tiny_sd1: Path) -> None:
        adapter = adapt(load(tiny_sd1), tiny_sd1, args={"loraplus_unet_lr_ratio": 16})
        assert adapter.group_labels == ["text_encoder", "unet", "unet plus"]

    @pytest.mark.parametrize(
        ("options", "unet", "text"),
        [
            ({"network_train_unet_only": True}, True, False),
            ({"network_train_text_encoder_only": True}, False, True),
            ({"text_encoder_lr": [0.0]}, True, False),
        ],
    )
    def test_parts(self, tiny_sd1: Path, options: dict[str, Any], unet: bool, text: bool) -> None:
        model = load(tiny_sd1)
        adapter = adapt(model, tiny_sd1, **options)
        assert adapter.trains_text_encoder == text
        output(model).sum().backward()
        names = {n for n, p in adapter.network.named_parameters() if p.grad is not None}
        assert any(name.startswith("lora_unet") for name in names) == unet
        assert any(name.startswith("lora_te") for name in names) == text

    def test_nothing_to_train(self, tiny_sd1: Path) -> None:
        with pytest.raises(UserError, match="nothing is trained: every learning rate"):
            adapt(load(tiny_sd1), tiny_sd1, learning_rate=0.0)

    @pytest.mark.parametrize(
        ("options", "dtype"),
        [
            ({}, torch.float32),
            ({"full_bf16": True}, torch.bfloat16),
            ({"full_fp16": True}, torch.float16),
        ],
    )
    def test_precision(self, tiny_sd1: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
        model = load(tiny_sd1, dtype=torch.bfloat16)
        adapter = adapt(
            model, tiny_sd1, network_module="networks.kohya", args={"algo": "full"}, **options
        )
        assert {p.dtype for p in adapter.network.parameters()} == {dtype}

    @pytest.mark.parametrize("module", ["networks.lora", "networks.lokr", "lycoris.kohya"])
    def test_checkpointing_gives_the_same_gradients(self, tiny_sd1: Path, module: str) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = load(tiny_sd1)
            adapter = adapt(
                model, tiny_sd1, network_module=module, gradient_checkpointing=checkpointing
            )
            stir(adapter.network)
            calls = count_calls(model.text_encoders[0].encoder.layers[0].mlp.fc1)
            output(model).square().mean().backward()
            assert len(calls) == (2 if checkpointing else 1)  # recomputed
            gradients.append({n: p.grad for n, p in adapter.network.named_parameters()})
        for name, gradient in gradients[0].items():
            assert gradient is not None
            assert gradient.any()
            torch.testing.assert_close(gradient, gradients[1][name])

    def test_lycoris_by_its_own_name(self, tiny_sd1: Path) -> None:
        adapter = adapt(
            load(tiny_sd1), tiny_sd1, network_module="lycoris.kohya", args={"algo": "lokr"}
        )
        assert adapter.module_name == "lycoris.kohya"
        assert adapter.network_args == {"algo": "lokr"}
        names = [name for group in adapter.groups for name in group["named"]]
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lokr_w1" in names
        assert "lora_unet_time_embedding_linear_1.lokr_w2_b" in names  # of preset full
        assert len(names) == len(list(adapter.network.parameters()))


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


class TestTrainingState:
    @pytest.mark.parametrize(
        "args", [{"algo": "lora", "use_scalar": True}, {"algo": "full"}, {"algo": "loha"}]
    )
    def test_it_is_exact(self, tiny_sd1: Path, args: dict[str, Any]) -> None:
        """Also where a file folds a scalar into a weight or holds differences only."""
        outputs = []
        state: dict[str, torch.Tensor] = {}
        for _ in range(2):
            model = load(tiny_sd1)
            adapter = adapt(model, tiny_sd1, network_module="networks.kohya", args=args)
            network: Any = adapter.network
            if state:
                adapter.load_training_state(state)
            else:
                stir(network)
                network.apply_max_norm_regularization(0.3, "cpu")
                state = {name: tensor.clone() for name, tensor in adapter.training_state().items()}
            outputs.append(output(model))
            for name, tensor in adapter.training_state().items():
                assert torch.equal(tensor, state[name]), name
        assert difference(*outputs) == 0

    def test_of_another_network(self, tiny_sd1: Path) -> None:
        state = adapt(load(tiny_sd1), tiny_sd1, network_dim=8).training_state()
        with pytest.raises(UserError, match="--resume: the state holds another network"):
            adapt(load(tiny_sd1), tiny_sd1).load_training_state(state)


class ThirdPartyNetwork(nn.Module):
    """A network module as others write them: no names, one learning rate a part, labels missing."""

    def __init__(self, text_encoder: Any, unet: nn.Module, dropout: float | None) -> None:
        super().__init__()
        if isinstance(text_encoder, list):
            text_encoder = text_encoder[0]
        paths = [name for name, _ in text_encoder.named_modules() if name.endswith("q_proj")]
        self.dropout = dropout
        for path in paths:
            self.add_module("lora_te_" + path.replace(".", "_"), nn.Linear(2, 2))
        self.add_module("lora_unet_conv_in", nn.Linear(2, 2))

    def apply_to(self, text_encoder: Any, unet: Any, apply_te: bool, apply_unet: bool) -> None:
        pass

    def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any) -> list[dict[str, Any]]:
        parts = dict(self.named_children())
        unet = parts.pop("lora_unet_conv_in")
        text = (parameter for part in parts.values() for parameter in part.parameters())
        return [
            {"params": text, "lr": text_encoder_lr},
            {"params": unet.parameters(), "lr": unet_lr},
        ]


class TestThirdParty:
    @pytest.fixture(autouse=True)
    def _module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("their_network")

        def create_network(
            multiplier: float,
            dim: int,
            alpha: float,
            vae: Any,
            text_encoder: Any,
            unet: Any,
            **keys: Any,
        ) -> nn.Module:
            return ThirdPartyNetwork(text_encoder, unet, keys["dropout"])

        vars(module)["create_network"] = create_network
        monkeypatch.setitem(sys.modules, "their_network", module)

    def test_groups_get_names_and_labels(self, tiny_sd1: Path) -> None:
        options = {"network_module": "their_network", "unet_lr": 1e-4, "text_encoder_lr": [1e-5]}
        adapter = adapt(load(tiny_sd1), tiny_sd1, network_dropout=0.1, **options)
        assert adapter.group_labels == ["text_encoder", "unet"]
        assert [group["lr"] for group in adapter.groups] == [1e-5, 1e-4]
        # Stock's names reach it, whatever transformers calls its modules.
        name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.weight"
        assert adapter.groups[0]["named"][0] == name
        assert adapter.network.dropout == 0.1

    def test_one_group_for_all_trains_the_text_encoder_too(
        self, tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def one_group(self: nn.Module, *_: Any) -> list[dict[str, Any]]:
            return [{"params": self.parameters(), "lr": 1e-4}]

        monkeypatch.setattr(ThirdPartyNetwork, "prepare_optimizer_params", one_group)
        model = load(tiny_sd1)
        adapter = adapt(model, tiny_sd1, network_module="their_network")
        assert adapter.group_labels == ["unet and text_encoder"]
        assert adapter.trains_text_encoder
        unet_only = {"network_module": "their_network", "network_train_unet_only": True}
        assert not adapt(model, tiny_sd1, **unet_only).trains_text_encoder

    def test_it_is_called_as_stock_does(
        self, tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        arguments = {"prepare_network": 1, "prepare_grad_etc": 2}
        arguments |= {"on_epoch_start": 2, "on_step_start": 2}
        for hook, count in arguments.items():

            def called(self: nn.Module, *given: Any, hook: str = hook, count: int = count) -> None:
                assert len(given) == count
                calls.append(hook)

            monkeypatch.setattr(ThirdPartyNetwork, hook, called, raising=False)
        adapter = adapt(load(tiny_sd1), tiny_sd1, network_module="their_network")
        assert calls == ["prepare_network", "prepare_grad_etc"]
        adapter.begin_epoch()
        adapter.begin_step()
        assert calls[2:] == ["on_epoch_start", "on_step_start"]

    def test_it_writes_its_own_file(self, tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def save_weights(self: nn.Module, file: str, dtype: Any, metadata: Any) -> None:
            save_file({"theirs": torch.ones(2, dtype=dtype)}, file, metadata)

        monkeypatch.setattr(ThirdPartyNetwork, "save_weights", save_weights, raising=False)
        adapter = adapt(load(tiny_sd1), tiny_sd1, network_module="their_network")
        saved = adapter_state_dict(adapter, torch.float16)
        assert {name: (w.dtype, w.tolist()) for name, w in saved.items()} == {
            "theirs": (torch.float16, [1.0, 1.0])
        }

    def test_what_it_cannot_do_is_refused(self, tiny_sdxl: Path) -> None:
        model = load(tiny_sdxl, True)
        for options, message in (
            ({"scale_weight_norms": 1.0}, "--scale_weight_norms"),
            ({"text_encoder_lr": [1e-4, 1e-5]}, "one learning rate for all text encoders"),
        ):
            chosen = options_for(tiny_sdxl, network_module="their_network", **options)
            with pytest.raises(UserError, match=message):
                build_adapter(chosen, model)


def problems(*args: str, **options: Any) -> list[str]:
    chosen: dict[str, Any] = {"network_module": "networks.lora", **options}
    return check_network(Options.from_values(chosen | {"network_args": list(args) or None}))


# What a launcher writes for LoCon: every key that it knows.
LAUNCHER = """
preset=full conv_dim=1 conv_alpha=1 rank_dropout=0 bypass_mode=False dora_wd=False module_dropout=0
use_tucker=False use_scalar=False rank_dropout_scale=False constrain=0.0 rescaled=False algo=locon
train_norm=False
"""


class TestCheck:
    @pytest.mark.parametrize(
        ("module", "args"),
        [
            ("networks.lora", ["conv_dim=4", "conv_alpha=1", "loraplus_lr_ratio=16"]),
            ("networks.lora", ["block_dims=" + ",".join(["4"] * 25), "down_lr_weight=cosine+.25"]),
            ("networks.lora", ["up_lr_weight=1,,0.5", "mid_lr_weight=0.5"]),
            ("networks.lokr", ["factor=8", "decompose_both=True", "full_matrix=False"]),
            ("networks.loha", ["use_tucker=True", "rank_dropout=0.1", "train_norm=1"]),
            ("networks.kohya", ["algo=lokr", "preset=attn-mlp", "dora_wd=True"]),
            ("lycoris.kohya", ["algo=locon", "use_cp=True"]),
            (
                "lycoris.kohya",
                LAUNCHER.split(),
            ),
            ("tests.adapters", ["whatever=1"]),
        ],
    )
    def test_right(self, module: str, args: list[str]) -> None:
        assert problems(*args, network_module=module) == []

    @pytest.mark.parametrize(
        ("module", "arg", "answer"),
        [
            ("networks.lora", "conv_dmi=4", "Did you mean 'conv_dim'?"),
            ("networks.lora", "conv_dim", "conv_dim: must be key=value"),
            ("networks.lora", "conv_dim=four", "conv_dim=four: must be a whole number"),
            ("networks.lora", "conv_dim=-1", "must be a whole number, 0 for none"),
            ("networks.lora", "rank_dropout=1", "rank_dropout=1: must be a number from 0"),
            ("networks.lora", "module_dropout=nan", "module_dropout=nan: must be"),
            ("networks.lora", "train_norm=perhaps", "train_norm=perhaps: must be True or False"),
            ("networks.lora", "algo=lokr", "networks.lora has no such key, networks.kohya has"),
            ("networks.lora", "factor=8", "networks.lokr and networks.kohya has"),
            ("networks.lora", "block_dims=1,2", "block_dims: 2 numbers; SD 1.x and 2.x have 25"),
            (
                "networks.lora",
                "block_alphas=" + "1," * 24 + "1",
                "acts only together with block_dims",
            ),
            ("networks.lora", "down_lr_weight=cosin", "one of cosine, sine"),
            ("networks.lora", "rank_dropout_scale=True", "lora has no use for it"),
            ("networks.lokr", "loraplus_lr_ratio=4", "networks.lokr has no such key"),
            ("networks.kohya", "algo=lokrr", "choose from lora, locon"),
            ("networks.kohya", "algo=dylora", "algo=dylora is refused"),
            ("networks.kohya", "algo=tlora", "algo=tlora is refused"),
            ("networks.kohya", "preset=ful", "Did you mean 'full'?"),
            ("networks.kohya", "factor=8", "factor=8: lora has no use for it"),
        ],
    )
    def test_wrong(self, module: str, arg: str, answer: str) -> None:
        (problem,) = problems(arg, network_module=module)
        assert answer in problem

    def test_numbers(self) -> None:
        found = problems(network_dim=0, network_alpha=-1.0, network_dropout=1.0)
        assert [line.split()[0] for line in found] == [
            "--network_dim",
            "--network_alpha",
            "--network_dropout",
        ]

    def test_several_at_once(self) -> None:
        assert len(problems("conv_dim=x", "typo=1", "rank_dropout=2")) == 3

    def test_combinations(self) -> None:
        kohya = {"network_module": "networks.kohya"}
        (line,) = problems("dora_wd=True", "bypass_mode=True")
        assert "exclude each other" in line
        (line,) = problems("algo=full", network_dropout=0.1, **kohya)
        assert "--network_dropout 0.1: full has none" in line
        (line,) = problems("algo=ia3", scale_weight_norms=1.0, **kohya)
        assert "ia3 has no norm" in line
        (line,) = problems("algo=full", "loraplus_lr_ratio=4", **kohya)
        assert "full has no use for it" in line

    def test_modules(self) -> None:
        (line,) = problems(network_module="network.lora")
        assert "there is no such module. Did you mean 'networks.lora'?" in line
        (line,) = problems(network_module="networks.oft")
        assert "there is no such module" in line

    def test_files(self, tmp_path: Path) -> None:
        found = problems(network_weights=str(tmp_path / "a"), base_weights=[str(tmp_path / "b")])
        assert [line.split()[0] for line in found] == ["--network_weights", "--base_weights"]

    def test_preset_file(self, tmp_path: Path) -> None:
        file = tmp_path / "p.toml"
        for text, answer in (
            ("unet_target_modul = []", "Did you mean 'unet_target_module'?"),
            ('enable_conv = "yes"', "'enable_conv' must be a bool"),
            ('[module_algo_map.X]\nalgo = "lok"', "algo 'lok' is none of"),
            ("= 1", "cannot be read"),
        ):
            file.write_text(text)
            (line,) = problems(f"preset={file}", network_module="networks.kohya")
            assert answer in line

    def test_without_torch(self) -> None:
        program = (
            "import sys; from library.training.network_check import check_network; "
            "from library.training.options import Options; "
            "check_network(Options.from_values({'network_module': 'lycoris.kohya', "
            "'network_args': ['preset=full']})); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
