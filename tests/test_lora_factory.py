"""Adapters by name, models from files, and what is said where a package is missing."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import batch, clip_config, host, trained, wrapped
from transformers import CLIPModel

from library.training.errors import UserError
from lora import CLIPLoRAWrapper, LoRAModelManager
from lora.base import LoRAError
from lora.factory import INFO, WEIGHTS
from models.clip import FederatedCLIPModel
from utils.model_factory import ROOT, create_model, load_config

BOTH = ("encoder", "classifier")


@pytest.fixture
def manager(tmp_path):
    return LoRAModelManager(tmp_path / "models")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(clip_config()).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("components", "config"),
    [(("encoder",), {}), (BOTH, {}), (("encoder",), {"freeze_a": True, "bias": "all"})],
)
def test_an_adapter_comes_back(manager, components, config):
    one = trained(wrapped(components, **config))
    manager.save_model(one, "mine")
    other = wrapped(components, **config)
    assert not torch.equal(other(batch()[0]), one(batch()[0]))
    assert manager.load_model("mine", other) is other
    assert torch.equal(other(batch()[0]), one(batch()[0]))
    info = manager.get_model_info("mine")
    assert (info["r"], info["lora_alpha"], info["num_classes"]) == (4, 8, 4)
    assert info["target_components"] == list(components)
    assert info["trainable_parameters"] == one.count_parameters()[0]
    assert manager.list() == ["mine"]
    manager.delete("mine")
    assert manager.list() == []


def test_peft_reads_the_folder(manager):
    one = trained(wrapped())
    read = peft.PeftModel.from_pretrained(host(), str(manager.save_model(one, "mine")))
    assert torch.equal(read.eval()(batch()[0]), one(batch()[0]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 8}, "r is 4 in the file and 8 in the wrapper: make the wrapper with the file's r"),
        ({"lora_alpha": 4}, "lora_alpha is 8 in the file and 4"),
        ({"seed_of_base": 1}, "base_weights is .* load the base model"),
        ({"num_classes": 3}, "num_classes is 4 in the file and 3"),
        ({"components": BOTH}, r"targets is \[.*\(12\)\] in the wrapper"),
        ({"target_modules": ["q_proj"]}, "targets is"),
        ({"normalize_features": False}, "normalize_features is True in the file and False"),
        ({"bias": "lora_only"}, "bias is 'none' in the file and 'lora_only'"),
        (
            {"vision": {"hidden_act": "gelu"}},
            "architecture .*'quick_gelu'.* file and .*'gelu'",
        ),
        ({"vision": {"num_attention_heads": 4}}, "architecture is"),
        ({"dtype": torch.float64}, "dtype is 'float32' in the file and 'float64'.*model.float"),
    ],
)
def test_an_adapter_for_something_else_is_refused(manager, other, message):
    manager.save_model(trained(wrapped()), "mine")
    settings = dict(other)
    dtype = settings.pop("dtype", torch.float32)
    seed = settings.pop("seed_of_base", 0)
    wrapper = (
        wrapped(**settings) if not seed else CLIPLoRAWrapper(host(seed), wrapped().lora_config)
    )
    if seed:
        wrapper.apply_lora_to_federated_model()
    wrapper.to(dtype)
    before = wrapper(batch()[0].to(dtype))
    with pytest.raises(UserError, match=message) as caught:
        manager.load_model("mine", wrapper)
    if "bias" not in other:  # trained biases are no longer the base's
        assert len(caught.value.problems) == 1
    assert torch.equal(wrapper(batch()[0].to(dtype)), before)


def test_an_adapter_in_half_precision_comes_back(manager):
    one = trained(wrapped())
    one.to(torch.bfloat16)
    manager.save_model(one, "mine")
    other = manager.load_model("mine", wrapped().to(torch.bfloat16).eval())
    images = batch()[0].bfloat16()
    assert torch.equal(other(images), one(images))
    other.set_parameters(one.get_parameters())  # bfloat16 goes over the wire as float32


def test_a_folder_of_something_else_is_not_replaced(manager):
    precious = manager.directory / "mine" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("text")
    with pytest.raises(UserError, match=r"mine is there already and is no LoRA model"):
        manager.save_model(wrapped(), "mine")
    assert precious.read_text() == "text"
    assert manager.list() == []


def test_a_changed_configuration_does_not_reach_the_file(manager):
    one = trained(wrapped())
    one.lora_config.r = 16
    manager.save_model(one, "mine")
    assert manager.get_model_info("mine")["r"] == 4
    manager.load_model("mine", wrapped())


def test_nan_is_never_saved_and_the_earlier_file_stays(manager):
    one = trained(wrapped())
    file = manager.save_model(one, "mine") / WEIGHTS
    before = file.read_bytes()
    one.adapter_tensors()["base_model.model.classifier.bias"].data[1] = float("nan")
    with pytest.raises(ValueError, match=r"classifier\.bias.*NaN"):
        manager.save_model(one, "mine")
    assert file.read_bytes() == before
    assert [path.name for path in file.parents[1].iterdir()] == ["mine"]


def test_nan_in_a_file_is_not_loaded(manager):
    one = trained(wrapped())
    file = manager.save_model(one, "mine") / WEIGHTS
    tensors = load_file(file)
    tensors["base_model.model.classifier.bias"][0] = float("inf")
    save_file(tensors, file)
    before = one(batch()[0])
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        manager.load_model("mine", one)
    assert torch.equal(one(batch()[0]), before)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        manager.load_model("mine", one)


def test_a_failed_write_leaves_the_earlier_one(manager, monkeypatch):
    one = trained(wrapped())
    file = manager.save_model(one, "mine") / WEIGHTS
    before = file.read_bytes()

    def full(*_args, **_rest):
        raise OSError("no space left")

    monkeypatch.setattr("lora.factory.save_file", full)
    with pytest.raises(OSError, match="no space"):
        manager.save_model(trained(one), "mine")
    assert file.read_bytes() == before


def test_names(manager):
    with pytest.raises(LoRAError, match="apply_lora_to_federated_model"):
        manager.save_model(CLIPLoRAWrapper(host()), "mine")
    with pytest.raises(UserError, match="cannot be a name"):
        manager.save_model(wrapped(), "../mine")
    manager.save_model(wrapped(), "mine")
    for call in (manager.get_model_info, manager.delete):
        with pytest.raises(UserError, match="Did you mean 'mine'"):
            call("mines")
        with pytest.raises(UserError, match="cannot be a name"):
            call("..")


def sections(folder, **lora):
    return {
        "model": {"type": "clip_lora", "model_name": str(folder), "num_classes": 3},
        "lora": {"r": 2, "lora_alpha": 6, "target_components": list(BOTH), **lora},
        "federated": {"clients": 3},
    }


def test_models_from_configurations(folder, tmp_path):
    given = sections(folder, save_only_trainable=False)
    objects = SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in given.items()})
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(given))  # JSON is YAML
    for config in (given, objects, str(file), load_config(file)):
        model = create_model(config)
        assert isinstance(model, CLIPLoRAWrapper)
        assert (model.lora_config.r, model.lora_config.lora_alpha) == (2, 6)
        assert not model.lora_config.save_only_trainable
        assert model.target_components == BOTH
        assert model(batch()[0]).shape == (6, 3)
    assert type(create_model(sections(folder, enabled=False))) is FederatedCLIPModel
    given["model"]["type"] = "clip"
    assert type(create_model(given)) is FederatedCLIPModel


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [("model", "type", "clip_lroa", "Did you mean 'clip_lora'"),
     ("model", "num_clases", 3, "Did you mean 'num_classes'"),
     ("lora", "lora_alfa", 3, "Did you mean 'lora_alpha'"),
     ("lora", "r", 0, "r=0 is not possible"), ("lora", "enabled", "no", "enabled='no'"),
     ("lora", "target_components", None, "target_components=None is not possible"),
     ("lora", "target_components", {"encoder": False}, "target_components=.* must be a list"),
     ("lora", "seed", 2**64, "seed="),
     ("model", "normalize_features", "false", "normalize_features='false' is not possible"),
     ("model", "freeze_vision_encoder", "no", "freeze_vision_encoder='no'"),
     ("model", "num_classes", 0, "num_classes=0 is not possible"),
     ("model", "model_name", None, "model_name=None is not possible; model_name must be a name"),
     ("model", "model_name", "", "model_name='' is not possible")],
)  # fmt: skip
def test_what_a_configuration_cannot_hold(folder, section, key, value, message):
    given = sections(folder)
    given[section][key] = value
    with pytest.raises((UserError, ValueError), match=message):
        create_model(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lroa:\n  r: 4\n", "no section 'lroa'. Did you mean 'lora'"),
        ("federatd:\n  dp_noise: 1.0\n", "no section 'federatd'. Did you mean 'federated'"),
        ("lora:\n  on: 4\n", "True is no name"),
        ("lora: 4\n", "has to consist of sections"),
        ("lora: {\n", "is no YAML"),
        ("\xff", "is no YAML"),
    ],
)
def test_what_a_file_cannot_hold(tmp_path, text, message):
    file = tmp_path / "one.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        load_config(file)


def test_numbers_and_sections_of_others_are_read(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("lora: {lora_dropout: 1e-1}\nfederated: {learning_rate: 3E+2}\ndata: {}\n")
    found = load_config(file)
    assert (found.lora.lora_dropout, found.federated.learning_rate) == (0.1, 300.0)


def test_the_shipped_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its model_name is relative to the repository
    model = create_model(ROOT / "configs" / "clip_lora.yaml")
    assert isinstance(model, CLIPLoRAWrapper)
    assert model.num_classes == 10
    with pytest.raises(UserError, match="There is no configuration"):
        create_model("configs/clip_lora.yml")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


MISSING = """
import sys
for name in ("peft", "transformers", "flwr"):
    sys.modules[name] = None
from lora import LoRAConfig
LoRAConfig.for_clip_model(r=8)
for statement in ("from lora import quick_clip_lora", "from models.clip import FederatedCLIPModel",
                  "import lora.clip_wrapper", "import lora.federated.client"):
    try:
        exec(statement)
    except ImportError as error:
        assert "pip install -r requirements-federated.txt" in str(error), error
    else:
        raise SystemExit(f"no error: {statement}")
"""


def test_without_the_packages_it_says_what_to_install():
    done = python(MISSING)
    assert done.returncode == 0, done.stderr


def test_the_self_check_from_its_own_folder():
    done = subprocess.run(
        [sys.executable, "test_lora.py"],
        cwd=ROOT / "lora",
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 5


def test_the_self_check_tells_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "lora" / "test_lora.py"), run_name="__main__")
    assert ended.value.code == 0
    monkeypatch.setattr(LoRAModelManager, "save_model", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "lora" / "test_lora.py"), run_name="__main__")
    assert ended.value.code == 1
    assert "FAILED  factory" in capsys.readouterr().out


def test_info_lies_beside_the_weights(manager):
    folder = Path(manager.save_model(wrapped(), "mine"))
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".md") == sorted(
        ["adapter_config.json", WEIGHTS, INFO]
    )
