"""What the module's first documentation promises, block by block, as a user would type it.

`openai/clip-vit-base-patch32` is loaded by that name, from a hub cache that holds a tiny CLIP.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from tiny_clip import clip_config
from transformers import CLIPModel

from utils.model_factory import ROOT

NAME = "openai/clip-vit-base-patch32"
REVISION = "0123456789abcdef0123456789abcdef01234567"

QUICK = f"""
from lora import LoRAConfig, quick_clip_lora
model = quick_clip_lora(model_name="{NAME}", num_classes=10, lora_r=16)
"""
WRAP = f"""
from models.clip import FederatedCLIPModel
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.lora_config import LoRAConfig
original_model = FederatedCLIPModel(model_name="{NAME}", num_classes=10)
lora_config = LoRAConfig.for_clip_model(r=16, lora_alpha=32)
lora_wrapper = CLIPLoRAWrapper(
    federated_clip_model=original_model, lora_config=lora_config, target_components=['encoder'])
lora_wrapper.apply_lora_to_federated_model()
"""
BLOCKS = {
    "basic use": QUICK + "assert model.lora_config.r == 16 and model.lora_config.lora_alpha == 32",
    "wrapping": WRAP + "assert len(original_model.get_parameters()) == 24",
    "configurations": """
from lora.lora_config import LoRAConfig
from lora.factory import LoRAConfigManager
small_config = LoRAConfig.for_clip_model(r=8, lora_alpha=16)
large_config = LoRAConfig.for_clip_model(r=32, lora_alpha=64)
config_manager = LoRAConfigManager()
config_manager.save_config(small_config, "clip_small")
config_manager.save_config(large_config, "clip_large")
loaded_config = config_manager.load_config("clip_small")
assert loaded_config == small_config
""",
    "models": WRAP
    + """
from lora.factory import LoRAModelManager
model_manager = LoRAModelManager()
model_manager.save_model(lora_wrapper, "my_clip_lora_model")
model_manager.load_model("my_clip_lora_model", lora_wrapper)
info = model_manager.get_model_info("my_clip_lora_model")
print(info)
assert info["base_model"] == "openai/clip-vit-base-patch32"
""",
    "presets": """
from lora.lora_config import LoRAConfig
small_config = LoRAConfig.for_clip_model(r=8, lora_alpha=16)
medium_config = LoRAConfig.for_clip_model(r=16, lora_alpha=32)
large_config = LoRAConfig.for_clip_model(r=32, lora_alpha=64)
classifier_config = LoRAConfig.for_classification_head(r=8, lora_alpha=16)
assert (LoRAConfig().r, LoRAConfig().lora_alpha, LoRAConfig().lora_dropout) == (16, 32, 0.1)
assert (LoRAConfig().target_modules, LoRAConfig().bias) == (None, "none")
""",
    "federated use": QUICK
    + """
import torch
data, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
params = model.get_parameters()
model.set_parameters(params)
loss = model.train_step(data, labels)
metrics = model.evaluate(data, labels)
assert loss > 0 and 0 <= metrics["accuracy"] <= 1
""",
    "only what trains": """
from lora import LoRAConfig
lora_config = LoRAConfig.for_clip_model(r=16)
lora_config.save_only_trainable = True
assert lora_config.check() is None
""",
    "components": WRAP
    + f"""
for components in (['encoder'], ['encoder', 'classifier']):
    model = FederatedCLIPModel("{NAME}")
    lora_wrapper = CLIPLoRAWrapper(federated_clip_model=model, target_components=components)
    lora_wrapper.apply_lora_to_federated_model()
    assert len(lora_wrapper.targets) == 10 + len(components)
""",
    "checkpointing, switching, merging": WRAP
    + """
lora_wrapper.enable_gradient_checkpointing()
lora_wrapper.disable_gradient_checkpointing()
lora_wrapper.enable_lora_layers()
lora_wrapper.disable_lora_layers()
merged_model = lora_wrapper.merge_and_unload()
assert merged_model is original_model
""",
    "configuration file": f'''
from pathlib import Path
from utils.model_factory import create_model, load_config
Path("clip_lora.yaml").write_text("""
model:
  type: "clip_lora"
  model_name: "{NAME}"
  num_classes: 10

lora:
  enabled: true
  r: 16
  lora_alpha: 32
  target_components: ["encoder"]
  save_only_trainable: true
""")
config = load_config("clip_lora.yaml")
assert config.model.type == "clip_lora" and config.lora.r == 16
model = create_model(config)
assert len(model.get_parameters()) == 24
''',
    "factory of one's own": f"""
from types import SimpleNamespace
def create_model(config):
    if config.model.type == "clip_lora":
        from lora import quick_clip_lora
        return quick_clip_lora(
            model_name=config.model.model_name,
            num_classes=config.model.num_classes,
            lora_r=config.lora.r
        )
model = SimpleNamespace(type="clip_lora", model_name="{NAME}", num_classes=10)
model = create_model(SimpleNamespace(model=model, lora=SimpleNamespace(r=16)))
assert model.lora_config.r == 16
""",
}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def own_blocks() -> str:
    """The Python of the module's README as it is now, one block behind the other."""
    blocks = PYTHON.findall((ROOT / "lora" / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3
    pictures = "import torch\ndata, labels = torch.randn(4, 3, 8, 8), torch.arange(4)\n"
    return pictures + "\n".join(blocks)


def test_the_translated_readme_has_the_same_blocks():
    """But for their comments."""
    texts = [
        (ROOT / "lora" / name).read_text(encoding="utf-8")
        for name in ("README.md", "README.zh-TW.md")
    ]
    found = [
        [re.sub(r" *#.*", "", block) for block in re.findall(r"```.*?```", text, re.DOTALL)]
        for text in texts
    ]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """A hub cache as huggingface_hub lays it out, with the model by its name."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    torch.manual_seed(0)
    CLIPModel(clip_config()).save_pretrained(repository / "snapshots" / REVISION)
    return cache


def test_every_block_runs(hub_cache, tmp_path):
    """All in one process, each with names of its own: the imports take longest."""
    blocks = BLOCKS | {"README": own_blocks()}
    code = "\n".join(f"print({name!r})\nexec({block!r}, {{}})" for name, block in blocks.items())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(hub_cache),
             "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert all(name in done.stdout for name in blocks)
    assert (tmp_path / "lora_configs" / "clip_large.json").is_file()
    assert (tmp_path / "lora_models" / "my_clip_lora_model").is_dir()
