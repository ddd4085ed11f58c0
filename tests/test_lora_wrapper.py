"""LoRA around a CLIP: what trains, what travels, off and on, merged."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_clip import batch, host, trained, wrapped
from transformers import CLIPConfig

from library.optim.registry import create_optimizer
from lora import CLIPLoRAWrapper, LoRAConfig
from lora.base import LoRAError
from models.clip import FederatedCLIPModel

BOTH = ("encoder", "classifier")


@pytest.mark.parametrize(
    ("r", "millions", "percent"), [(8, 1.2, 0.8), (16, 2.4, 1.6), (32, 4.8, 3.2)]
)
def test_the_table_of_parameters_on_vit_b_32(r, millions, percent):
    with torch.device("meta"):
        base = FederatedCLIPModel.from_config(CLIPConfig())
        wrapper = CLIPLoRAWrapper(base, LoRAConfig.for_clip_model(r=r, lora_alpha=2 * r))
        wrapper.apply_lora_to_federated_model()
    count, total = wrapper.count_parameters()
    assert total == 151_277_313 + 512 * 10 + 10
    assert count == 148_736 * r + 512 * 10 + 10
    assert count == pytest.approx(millions * 1e6, rel=0.03)
    assert 100 * count / total == pytest.approx(percent, rel=0.03)


@pytest.mark.parametrize("components", [("encoder",), BOTH, ("classifier",)])
def test_disabled_is_the_host_and_merged_is_the_wrapper(components):
    images, _ = batch()
    untouched = host().eval()(images)
    wrapper = wrapped(components)
    assert torch.equal(wrapper(images), untouched)  # B begins at zero
    trained(wrapper)
    answer = wrapper(images)
    assert not torch.allclose(answer, untouched, atol=1e-3)
    wrapper.disable_lora_layers()
    assert torch.equal(wrapper(images), untouched)
    wrapper.enable_lora_layers()
    assert torch.equal(wrapper(images), answer)
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(merged(images), answer, atol=1e-5, rtol=0)
    plain = host()
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    assert len(merged.get_parameters()) == len(plain.get_parameters())
    assert all(tensor.requires_grad for tensor in merged.parameters())
    with pytest.raises(LoRAError, match="merged into the host already"):
        wrapper.merge_and_unload()


def test_only_what_trains_travels_and_the_rest_stays():
    wrapper = wrapped()
    names = list(wrapper.adapter_state())
    assert [name for name in names if not name.endswith(("lora_A.weight", "lora_B.weight"))] == [
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    ]
    assert len(names) == 2 * (5 * 2 + 1) + 2
    before = {n: t.clone() for n, t in wrapper.host.named_parameters() if not t.requires_grad}
    fingerprint = wrapper.fingerprint()
    trained(wrapper)
    after = dict(wrapper.host.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert wrapper.fingerprint() == fingerprint

    other = wrapped()
    other.set_parameters(wrapper.get_parameters())
    assert torch.equal(other(batch()[0]), wrapper(batch()[0]))
    assert list(wrapped(BOTH).adapter_state())[-2:] == [
        "base_model.model.classifier.lora_A.weight",
        "base_model.model.classifier.lora_B.weight",
    ]


def test_everything_travels_if_asked():
    wrapper, other = wrapped(save_only_trainable=False), wrapped(seed=1, save_only_trainable=False)
    assert len(wrapper.get_parameters()) == len(list(wrapper.host.parameters()))
    other.set_parameters(wrapper.get_parameters())
    assert torch.equal(other(batch()[0]), wrapper(batch()[0]))


def test_the_original_goes_on_in_the_wrappers_place():
    wrapper = wrapped()
    original = wrapper.host
    assert len(original.get_parameters()) == len(wrapper.get_parameters())
    original.train_step(*batch())
    original.set_parameters(original.get_parameters())
    assert original.evaluate(*batch()) == wrapper.evaluate(*batch())
    assert wrapper.image_size == 8
    with pytest.raises(AttributeError, match="nonsense"):
        wrapper.nonsense  # noqa: B018
    clone = copy.deepcopy(wrapper)
    clone.set_parameters([array + 1 for array in clone.host.get_parameters()])
    assert not np.array_equal(clone.get_parameters()[0], wrapper.get_parameters()[0])


@pytest.mark.parametrize("enabled_again", [False, True])
def test_a_frozen_a_neither_trains_nor_travels(enabled_again):
    wrapper = wrapped(freeze_a=True)
    if enabled_again:
        wrapper.disable_lora_layers()
        wrapper.enable_lora_layers()
    assert not any("lora_A" in name for name in wrapper.adapter_state())
    halves = {n: t.clone() for n, t in wrapper.adapter_tensors().items() if "lora_A" in n}
    fingerprint = wrapper.fingerprint()
    trained(wrapper)
    now = wrapper.adapter_tensors()
    assert len(halves) == 11
    assert all(torch.equal(tensor, now[name]) for name, tensor in halves.items())
    assert wrapper.fingerprint() == fingerprint
    assert wrapped(freeze_a=True, seed=0).fingerprint() == fingerprint


def test_fingerprints_tell_what_makes_adapters_mean_something_else():
    base = host()

    def fingerprint(**config):
        wrapper = CLIPLoRAWrapper(copy.deepcopy(base), LoRAConfig(**config))
        wrapper.apply_lora_to_federated_model()
        return wrapper.fingerprint()

    assert fingerprint() == fingerprint(seed=1)  # A travels
    assert fingerprint(freeze_a=True) != fingerprint(freeze_a=True, seed=1)
    assert fingerprint() != fingerprint(lora_alpha=8)
    for change in ({"hidden_act": "gelu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 1e-3}):
        assert wrapped(vision=change).fingerprint() != wrapped().fingerprint(), change
    assert wrapped(normalize_features=False).fingerprint() != wrapped().fingerprint()
    other = CLIPLoRAWrapper(host(seed=1), LoRAConfig())
    other.apply_lora_to_federated_model()
    assert fingerprint() != other.fingerprint()


def test_a_begins_from_its_own_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = CLIPLoRAWrapper(copy.deepcopy(host()), LoRAConfig(seed=3))
    torch.manual_seed(5)
    one.apply_lora_to_federated_model()
    assert torch.equal(torch.get_rng_state(), state)
    first = next(iter(one.adapter_state().values()))
    other = CLIPLoRAWrapper(host(), LoRAConfig(seed=3))
    other.apply_lora_to_federated_model()
    np.testing.assert_array_equal(first, next(iter(other.adapter_state().values())))


@pytest.mark.parametrize("bad", ["count", "shape", "nan"])
def test_parameters_that_do_not_fit_change_nothing(bad):
    wrapper = wrapped()
    before = wrapper.get_parameters()
    wrong = [array + 1 for array in before]
    if bad == "count":
        wrong.pop()
    elif bad == "shape":
        wrong[-1] = wrong[-1][:-1]
    else:
        wrong[-1][0] = np.nan
    with pytest.raises(ValueError, match=r"expected 24|classifier\.bias"):
        wrapper.set_parameters(wrong)
    for old, new in zip(before, wrapper.get_parameters(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "call",
    ["get_parameters", "adapter_state", "fingerprint", "disable_lora_layers",
     "enable_lora_layers", "merge_and_unload", "count_parameters"],
)  # fmt: skip
def test_before_it_is_applied(call):
    with pytest.raises(LoRAError, match="call apply_lora_to_federated_model"):
        getattr(CLIPLoRAWrapper(host()), call)()


def test_applying_twice():
    wrapper = wrapped()
    with pytest.raises(LoRAError, match="applied to this host already"):
        wrapper.apply_lora_to_federated_model()
    with pytest.raises(LoRAError, match="has LoRA layers already"):
        CLIPLoRAWrapper(wrapper.host)
    with pytest.raises(LoRAError, match="itself a wrapper"):
        CLIPLoRAWrapper(wrapper)
    with pytest.raises(ValueError, match="needs a FederatedCLIPModel; this is a CLIPModel"):
        CLIPLoRAWrapper(wrapper.host.clip)
    base = host()
    one, other = CLIPLoRAWrapper(base), CLIPLoRAWrapper(base)
    one.apply_lora_to_federated_model()
    with pytest.raises(LoRAError, match="has LoRA layers already"):
        other.apply_lora_to_federated_model()
    answer = one(batch()[0])
    again = CLIPLoRAWrapper(one.merge_and_unload())
    again.apply_lora_to_federated_model()
    torch.testing.assert_close(again(batch()[0]), answer, atol=1e-5, rtol=0)


def test_a_configuration_that_is_changed_later_changes_nothing():
    config = LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.0)
    wrapper = CLIPLoRAWrapper(host(), config)
    wrapper.apply_lora_to_federated_model()
    fingerprint = wrapper.fingerprint()
    config.r, config.lora_alpha, config.bias = 8, 64, "all"
    assert wrapper.fingerprint() == fingerprint == wrapped().fingerprint()
    assert (wrapper.made_with.r, wrapper.made_with.lora_alpha) == (4, 8)
    wrapper.disable_lora_layers()  # bias is none here


@pytest.mark.parametrize("before", [True, False])
def test_a_frozen_head_stays_and_lora_alone_travels(before):
    base = host()
    head = base.classifier.weight.clone()
    if before:
        base.classifier.requires_grad_(False)
    wrapper = CLIPLoRAWrapper(base, LoRAConfig(lora_dropout=0.0))
    wrapper.apply_lora_to_federated_model()
    if not before:
        wrapper.host.classifier.requires_grad_(False)
        wrapper.disable_lora_layers()
        wrapper.disable_lora_layers()  # twice is as once
        wrapper.enable_lora_layers()
    trained(wrapper)
    if before:
        assert all(".lora_" in name for name in wrapper.adapter_state())
    merged = wrapper.merge_and_unload()
    assert torch.equal(merged.classifier.weight, head)
    assert merged.classifier.weight.requires_grad != before


@pytest.mark.parametrize("config", [{}, {"bias": "all"}, {"bias": "lora_only"}, {"freeze_a": True}])
@pytest.mark.parametrize("components", [("encoder",), BOTH])
def test_the_host_counts_as_without_lora(components, config):
    own = sum(tensor.numel() for tensor in host().parameters())
    wrapper = wrapped(components, **config)
    assert wrapper.count_parameters()[1] == own
    assert wrapper.count_parameters()[0] == sum(a.size for a in wrapper.get_parameters())


def test_there_is_one_mode_of_training():
    wrapper = wrapped(lora_dropout=0.5)
    assert wrapper.eval().training is wrapper.host.training is False
    wrapper.train_step(*batch())
    assert wrapper.training is wrapper.host.training is True
    wrapper.evaluate(*batch())
    assert wrapper.training
    with pytest.raises(RuntimeError):
        wrapper.evaluate(batch()[0][:, :2], batch()[1])
    assert wrapper.training, "an error leaves it as it was"
    wrapper.eval()
    assert torch.equal(wrapper(batch()[0]), wrapper.host(batch()[0]))


def test_numbers_too_large_for_the_models_type_are_refused():
    wrapper = wrapped()
    wrong = [array.astype(np.float64) for array in wrapper.get_parameters()]
    wrong[-1][0] = 1e300
    with pytest.raises(ValueError, match=r"classifier\.bias.*infinite"):
        wrapper.set_parameters(wrong)


def test_targets_of_the_users_own(caplog):
    wrapper = wrapped(target_modules=["q_proj", "visual_projection", "nowhere"])
    assert wrapper.targets == [
        "clip.vision_model.encoder.layers.0.self_attn.q_proj",
        "clip.vision_model.encoder.layers.1.self_attn.q_proj",
        "clip.visual_projection",
    ]
    assert "nowhere" in caplog.text
    with pytest.raises(ValueError, match=r"Did you mean 'q_proj'.*visual_projection"):
        CLIPLoRAWrapper(host(), LoRAConfig(target_modules=["q_prj"]))
    head = CLIPLoRAWrapper(host(), LoRAConfig.for_classification_head())
    head.apply_lora_to_federated_model()
    assert head.targets == ["classifier"]
    with pytest.raises(ValueError, match=r"'encodr'.*Did you mean 'encoder'.*classifier"):
        CLIPLoRAWrapper(host(), target_components=["encodr"])


def test_biases_train_too_if_asked():
    wrapper = wrapped(bias="lora_only")
    names = [name for name in wrapper.adapter_state() if name.endswith("base_layer.bias")]
    assert len(names) == 10
    assert len(wrapped(bias="all").get_parameters()) > len(wrapper.get_parameters())
    assert not any("text" in name for name in wrapped(bias="all").adapter_state())
    answer = trained(wrapper)(batch()[0])
    with pytest.raises(ValueError, match="bias='lora_only'"):
        wrapper.disable_lora_layers()
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(merged(batch()[0]), answer, atol=1e-5, rtol=0)


def test_gradient_checkpointing_reaches_the_tower_and_changes_no_gradient():
    def gradients(checkpointing: bool):
        wrapper, runs = wrapped(), []
        layer = wrapper.host.clip.vision_model.encoder.layers[0].mlp.fc1
        layer.register_forward_hook(lambda *_: runs.append(1))
        if checkpointing:
            wrapper.enable_gradient_checkpointing()
        wrapper.configure_optimizer(lambda named: torch.optim.SGD([t for _, t in named], 0.5))
        losses = [wrapper.train_step(*batch()) for _ in range(2)]
        found = [t.grad for t in wrapper.parameters() if t.requires_grad]
        wrapper.disable_gradient_checkpointing()
        count = len(runs)
        wrapper.train_step(*batch())
        assert len(runs) == count + 1
        return losses, [grad.clone() for grad in found], count

    plain_losses, plain, once = gradients(False)
    losses, found, twice = gradients(True)
    assert (once, twice) == (2, 4)  # forward again in each backward
    assert losses == plain_losses
    assert all(torch.equal(one, two) for one, two in zip(plain, found, strict=True))


@pytest.mark.parametrize("name", ["HinaAdamW", "AdaptiveHinaAdamW"])
def test_the_projects_optimizers_find_the_pairs(name):
    from library.optim.roles import parse_name

    wrapper, names = wrapped(), []

    def make(named):
        names.extend(name for name, _ in named)
        return create_optimizer(name, named, 1e-2, {})[2]

    wrapper.configure_optimizer(make)
    first = wrapper.evaluate(*batch())["loss"]
    trained(wrapper, 12)
    parsed = [parse_name(name) for name in names]
    bases = {p.base for p in parsed if p.role == "lora_a"}
    assert len(bases) == 11
    assert bases == {p.base for p in parsed if p.role == "lora_b"}
    assert wrapper.evaluate(*batch())["loss"] < first


def test_nothing_to_train_while_disabled():
    wrapper = wrapped()
    wrapper.disable_lora_layers()
    with pytest.raises(RuntimeError, match="nothing is trainable"):
        wrapper.train_step(*batch())


def test_nan_is_not_merged():
    wrapper = wrapped()
    with torch.no_grad():
        wrapper.adapter_tensors()["base_model.model.clip.visual_projection.lora_B.weight"][0] = (
            float("nan")
        )
    with pytest.raises(ValueError, match=r"visual_projection\.lora_B\.weight"):
        wrapper.merge_and_unload()
    assert wrapper.applied
