"""The files in configs/optimizers: their figures, and that each trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from acting import acting
from runs import ROOT, words, write_dataset
from safetensors import safe_open
from safetensors.torch import load_file

import train_network
from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.engine import ChainOptimizer
from library.optim.registry import parse_optimizer_args
from library.training import trainer
from library.training.config import parse

FOLDER = ROOT / "configs" / "optimizers"


class Configuration(NamedTuple):
    """One of the configurations that the project began from, as its documents have it."""

    optimizer: type[ChainOptimizer]
    lr: float
    arguments: dict[str, Any]
    network: str | None = None


CONFIGURATIONS = {
    "adaptive-general": Configuration(
        AdaptiveHinaAdamW,
        1e-3,
        {
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 1e-2,
            "use_dynamic_adaptation": True,
            "adaptation_strength": 1.0,
            "relationship_discovery_interval": 100,
            "importance_decay": 0.95,
            "compatibility_threshold": 0.3,
            "use_lr_mask": True,
            "lr_bump": 3e-6,
            "min_lr": 1e-7,
            "max_lr": 1e-3,
            "warmup_steps": 500,
            "use_spd": True,
            "spd_lambda": 0.06,
            "use_cautious": True,
            "use_adopt_stability": True,
            "use_tam": True,
            "dynamic_weight_decay": True,
            "wd_transition_steps": 800,
            "wd_decay_factor": 0.75,
            "wd_min_ratio": 0.1,
        },
    ),
    "adaptive-large-model": Configuration(
        AdaptiveHinaAdamW,
        5e-4,
        {
            "weight_decay": 5e-3,
            "adaptation_strength": 0.8,
            "relationship_discovery_interval": 200,
            "importance_decay": 0.98,
            "compatibility_threshold": 0.35,
            "lr_bump": 1e-6,
            "warmup_steps": 1000,
            "use_cautious": True,
            "use_adopt_stability": True,
            "use_orthogonal_grad": False,
            "wd_transition_steps": 1500,
            "wd_decay_factor": 0.8,
            "wd_min_ratio": 0.15,
        },
    ),
    "adaptive-sd-lora": Configuration(
        AdaptiveHinaAdamW,
        8e-4,
        {
            "weight_decay": 1e-2,
            "adaptation_strength": 1.2,
            "relationship_discovery_interval": 150,
            "compatibility_threshold": 0.25,
            "lr_bump": 5e-6,
            "warmup_steps": 300,
            "wd_transition_steps": 600,
            "wd_decay_factor": 0.7,
            "wd_min_ratio": 0.1,
            "use_spd": True,
            "spd_lambda": 0.08,
            "use_grams": True,
            "use_agr": True,
        },
        network="networks.lora",
    ),
    "adaptive-low-memory": Configuration(
        AdaptiveHinaAdamW,
        1e-3,
        {
            "relationship_discovery_interval": 300,
            "compatibility_threshold": 0.4,
            "use_orthogonal_grad": False,
            "use_grams": False,
            "lr_bump": 1e-6,
            "warmup_steps": 200,
            "wd_transition_steps": 500,
            "wd_decay_factor": 0.6,
        },
    ),
    "hina-sd-lora": Configuration(
        HinaAdamWOptimizer,
        8e-4,
        {
            "alora_ratio": 16.0,
            "wd_transition_steps": 800,
            "wd_decay_factor": 0.75,
            "use_spd": True,
            "spd_lambda": 0.06,
        },
        network="networks.lora",
    ),
    "hina-llm": Configuration(
        HinaAdamWOptimizer,
        5e-4,
        {
            "alora_ratio": 20.0,
            "wd_transition_steps": 1200,
            "wd_decay_factor": 0.8,
            "use_adopt_stability": True,
        },
    ),
    "hina-lokr": Configuration(
        HinaAdamWOptimizer,
        1e-3,
        {
            "alora_ratio": 18.0,
            "wd_transition_steps": 600,
            "wd_decay_factor": 0.8,
            "wd_min_ratio": 0.18,
        },
        network="networks.lokr",
    ),
    "hina-lokr-sd": Configuration(
        HinaAdamWOptimizer,
        8e-4,
        {
            "alora_ratio": 16.0,
            "wd_transition_steps": 500,
            "wd_decay_factor": 0.75,
            "wd_min_ratio": 0.15,
            "use_spd": True,
            "spd_lambda": 0.06,
            "use_cautious": True,
            "use_grams": True,
        },
        network="networks.lokr",
    ),
    "hina-lokr-llm": Configuration(
        HinaAdamWOptimizer,
        5e-4,
        {
            "alora_ratio": 20.0,
            "wd_transition_steps": 800,
            "wd_decay_factor": 0.85,
            "wd_min_ratio": 0.20,
            "use_spd": True,
            "spd_lambda": 0.10,
            "use_cautious": True,
            "use_adopt_stability": True,
        },
        network="networks.lokr",
    ),
    "hina-lokr-experimental": Configuration(
        HinaAdamWOptimizer,
        1.2e-3,
        {
            "alora_ratio": 22.0,
            "wd_transition_steps": 400,
            "wd_decay_factor": 0.70,
            "wd_min_ratio": 0.12,
            "use_spd": True,
            "spd_lambda": 0.12,
            "use_cautious": True,
            "use_orthogonal_grad": True,
            "use_grams": True,
            "use_agr": True,
            "use_tam": True,
        },
        network="networks.lokr",
    ),
}

each_file = pytest.mark.parametrize("name", CONFIGURATIONS)


def test_there_are_no_others() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == set(CONFIGURATIONS)


@each_file
def test_a_file_says_what_its_configuration_says_and_no_more(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    options = parse(["--config_file", str(FOLDER / f"{name}.toml")])
    assert not options.notes
    network = {"network_module"} if configuration.network else set()
    chosen = {"optimizer_type", "learning_rate", "optimizer_args", *network}
    assert options.given == {"config_file", *chosen}
    assert options.network_module == configuration.network
    assert options.learning_rate == configuration.lr
    arguments = parse_optimizer_args(options.optimizer_args)
    assert len(arguments) == len(options.optimizer_args or [])
    assert arguments == configuration.arguments
    assert list(map(type, arguments.values())) == [
        type(configuration.arguments[key]) for key in arguments
    ]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[ChainOptimizer]:
    """The optimizers that runs of this test build."""
    made: list[ChainOptimizer] = []

    def create(*arguments: Any) -> Any:
        result = create_optimizer(*arguments)
        made.append(result[2])
        return result

    create_optimizer = trainer.create_optimizer
    monkeypatch.setattr(trainer, "create_optimizer", create)
    return made


@pytest.mark.slow
@each_file
def test_a_file_trains(
    name: str, tmp_path: Path, built: list[ChainOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it: the rest of the options on the command line."""
    configuration = CONFIGURATIONS[name]
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps it for a process
    in_the_file = dict.fromkeys(("optimizer_type", "learning_rate"))
    if configuration.network:
        in_the_file["network_module"] = None
    command = words(
        config_file=f"configs/optimizers/{name}.toml",
        dataset_config=write_dataset(tmp_path / "data"),
        output_dir=tmp_path,
        max_train_steps=3,
        **in_the_file,
    )
    assert train_network.main(command) == 0

    (optimizer,) = built
    assert type(optimizer) is configuration.optimizer
    defaults = acting(configuration.optimizer([("x", torch.zeros(1))]))
    assert acting(optimizer) == defaults | configuration.arguments
    assert {group["initial_lr"] for group in optimizer.param_groups} == {configuration.lr}
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {3}

    trained = load_file(tmp_path / "short.safetensors")
    starts_at_zero = "lokr_w2" if configuration.network == "networks.lokr" else "lora_up"
    assert any(tensor.any() for key, tensor in trained.items() if starts_at_zero in key)
    assert all(tensor.isfinite().all() for tensor in trained.values())
    with safe_open(tmp_path / "short.safetensors", "pt") as file:
        metadata = file.metadata()
    assert float(metadata["ss_learning_rate"]) == configuration.lr
    path = f"{configuration.optimizer.__module__}.{configuration.optimizer.__name__}"
    arguments = ",".join(f"{key}={value}" for key, value in configuration.arguments.items())
    assert metadata["ss_optimizer"] == f"{path}({arguments})"
