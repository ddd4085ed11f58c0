"""Checks that LoRA works on this machine, without a network: `python lora/test_lora.py`.

The project's own tests are in `tests/`; this one is for those who have just installed it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if sys.path[1:] and Path(sys.path[1]).resolve() == Path(__file__).resolve().parent:
    del sys.path[1]  # this folder: its `config` and `base` are no modules of their own

import torch

from lora.config import LoRAConfig


def check_dependencies() -> str:
    """The packages that LoRA needs."""
    import lora.clip_wrapper  # noqa: F401  # says what is missing, and what to install

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "transformers"))


def check_config_management() -> str:
    """Settings come back as they were saved."""
    from lora.factory import LoRAConfigManager

    with tempfile.TemporaryDirectory() as folder:
        manager = LoRAConfigManager(folder)
        for name in ("small", "medium", "large"):
            manager.save_config(manager.preset(name), name)
            _expect(manager.load_config(name) == manager.preset(name), f"{name} came back changed")
        LoRAConfig.for_clip_model(r=8).save(Path(folder) / "one.yaml")
        _expect(LoRAConfig.load(Path(folder) / "one.yaml").r == 8, "YAML came back changed")
        return f"saved and loaded {', '.join(manager.list())}, and YAML"


def check_wrapper_creation() -> str:
    """LoRA goes on, off, and into the weights."""
    wrapper, images, _ = _tiny()
    _expect(len(wrapper.get_parameters()) > 0, "nothing travels")
    trained, total = wrapper.count_parameters()
    before = wrapper(images)
    wrapper.disable_lora_layers()
    _expect(torch.equal(wrapper(images), before), "a new LoRA changes the answer")
    wrapper.enable_lora_layers()
    merged = wrapper.merge_and_unload()
    _expect(torch.allclose(merged(images), before, atol=1e-5), "merging changes the answer")
    return f"{trained} of {total} parameters are trained; disabled and merged give the same"


def check_factory() -> str:
    """An adapter comes back as it was saved."""
    from lora.factory import LoRAModelManager

    wrapper, images, labels = _tiny()
    wrapper.train_step(images, labels)
    with tempfile.TemporaryDirectory() as folder:
        manager = LoRAModelManager(folder)
        manager.save_model(wrapper, "adapter")
        other, _, _ = _tiny()
        manager.load_model("adapter", other)
        rank = manager.get_model_info("adapter")["r"]
    _expect(torch.equal(other.eval()(images), wrapper.eval()(images)), "it came back changed")
    return f"an adapter of rank {rank} saved and loaded"


def check_clip_integration() -> str:
    """A CLIP with LoRA learns, by the calls of a federated client."""
    wrapper, images, labels = _tiny()
    first = wrapper.evaluate(images, labels)["loss"]
    for _ in range(10):
        wrapper.train_step(images, labels)
    last = wrapper.evaluate(images, labels)["loss"]
    _expect(last < first, f"the loss went from {first:.3f} to {last:.3f}")
    wrapper.set_parameters(wrapper.get_parameters())
    return f"ten steps: loss {first:.3f} to {last:.3f}"


def _tiny() -> tuple:
    """A tiny CLIP with LoRA of rank 4 and random weights, four images, four labels."""
    from transformers import CLIPConfig

    from lora.clip_wrapper import CLIPLoRAWrapper
    from models.clip import FederatedCLIPModel

    layer = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={
            **layer,
            "vocab_size": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={**layer, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    host = FederatedCLIPModel.from_config(config, num_classes=4)
    wrapper = CLIPLoRAWrapper(host, LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.0))
    wrapper.apply_lora_to_federated_model()
    return wrapper, torch.randn(4, 3, 8, 8), torch.arange(4)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


CHECKS: dict[str, Callable[[], str]] = {
    "dependencies": check_dependencies,
    "config management": check_config_management,
    "wrapper creation": check_wrapper_creation,
    "factory": check_factory,
    "CLIP integration": check_clip_integration,
}


def main() -> int:
    """Run all checks; the exit status is 1 if one failed."""
    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"ok      {name}: {check()}")
        except Exception as error:  # the next check can still tell something
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
