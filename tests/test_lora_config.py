"""LoRA's settings: checked, saved, loaded, by name."""

from __future__ import annotations

import json

import pytest

from library.training.errors import UserError
from lora.config import LoRAConfig
from lora.factory import LoRAConfigManager

ODD = LoRAConfig(r=3, lora_alpha=0.1 + 0.2, lora_dropout=1e-5, target_modules=["q_proj", "fc1"],
                 bias="all", save_only_trainable=False, freeze_a=True, seed=9)  # fmt: skip


def test_both_import_paths_give_the_same():
    import lora
    from lora import lora_config

    assert lora.LoRAConfig is lora_config.LoRAConfig is LoRAConfig


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
@pytest.mark.parametrize("config", [LoRAConfig(), ODD])
def test_files_come_back_exactly(tmp_path, suffix, config):
    assert LoRAConfig.load(config.save(tmp_path / f"one.{suffix}")) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 0), ("r", 1.5), ("r", True), ("lora_alpha", 0), ("lora_alpha", float("nan")),
     ("lora_dropout", 1), ("lora_dropout", -0.1), ("target_modules", "q_proj"),
     ("target_modules", []), ("target_modules", [3]), ("bias", "some"), ("seed", -1),
     ("save_only_trainable", "yes"), ("freeze_a", 1)],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.* must be"):
        LoRAConfig(**{field: value})
    config = LoRAConfig()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        config.check()


def test_a_misspelt_key_in_a_file(tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"r": 4, "lora_alhpa": 8}))
    with pytest.raises(ValueError, match="Did you mean 'lora_alpha'"):
        LoRAConfig.load(file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.json", "{", "no JSON"), ("a.yaml", "r: [", "no YAML"), ("a.yaml", "- 3", "names and"),
     ("a.toml", "r = 3", r"ends in \.json")],
)  # fmt: skip
def test_files_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        LoRAConfig.load(tmp_path / name)


def test_the_manager_keeps_presets_by_name(tmp_path):
    manager = LoRAConfigManager(tmp_path / "configs")
    assert manager.list() == []
    for name, r, alpha in [("small", 8, 16), ("medium", 16, 32), ("large", 32, 64)]:
        preset = manager.preset(name)
        assert (preset.r, preset.lora_alpha) == (r, alpha)
        manager.save_config(preset, name)
        assert manager.load_config(name) == preset
    assert manager.list() == ["large", "medium", "small"]
    with pytest.raises(UserError, match="Did you mean 'small'"):
        manager.load_config("smal")
    with pytest.raises(ValueError, match="Did you mean 'medium'"):
        manager.preset("medum")


@pytest.mark.parametrize("name", ["../out", "a/b", "a\\b", "..", "", ".hidden", "c:d"])
def test_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(UserError, match="cannot be a name"):
        LoRAConfigManager(tmp_path).save_config(LoRAConfig(), name)
    assert list(tmp_path.rglob("*")) == []
