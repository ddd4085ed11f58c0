"""The host model: loading, parameters as arrays, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_clip import batch, clip_config, host
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

from library.training.errors import UserError
from models.clip import FederatedCLIPModel


def test_logits_are_those_of_transformers_features():
    model, (images, _) = host(), batch()
    features = model.clip.get_image_features(images)
    features = getattr(features, "pooler_output", features)
    unit = features / features.norm(dim=-1, keepdim=True)
    expected = model.classifier(unit * model.clip.logit_scale.exp())
    torch.testing.assert_close(model(images), expected)
    plain = host(normalize_features=False)
    torch.testing.assert_close(plain(images), plain.classifier(features))


def test_the_head_begins_alike_everywhere_and_leaves_the_random_numbers_alone():
    torch.manual_seed(7)
    CLIPModel(clip_config())
    expected = torch.rand(1)
    torch.manual_seed(7)
    model = FederatedCLIPModel.from_config(clip_config(), 4)
    assert torch.rand(1) == expected
    assert torch.equal(model.classifier.weight, host(seed=3).classifier.weight)


def test_parameters_go_from_one_model_to_another():
    one, other, (images, _) = host(seed=0), host(seed=1), batch()
    assert not torch.equal(one(images), other(images))
    other.set_parameters(one.get_parameters())
    assert torch.equal(one(images), other(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop(), "expected .* arrays"),
        (lambda p: p.__setitem__(0, np.float32([np.nan])[0]), "'clip.logit_scale' holds 1 values"),
        (lambda p: p.__setitem__(-1, np.zeros(5, np.float32)), "'classifier.bias' has the shape"),
        (lambda p: p.__setitem__(-1, np.array(list("abcd"))), "'classifier.bias' takes numbers"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name_and_change_nothing(change, message):
    model = host()
    before = model.get_parameters()
    changed = [array + 1 for array in before]
    change(changed)
    with pytest.raises(ValueError, match=message):
        model.set_parameters(changed)
    for old, new in zip(before, model.get_parameters(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_training_lowers_the_loss_and_evaluation_counts_right_answers():
    model, (images, labels) = host(), batch()
    model.configure_optimizer(lambda named: torch.optim.Adam([t for _, t in named], 1e-2))
    first = model.train_step(images, labels)
    for _ in range(30):
        last = model.train_step(images, labels)
    assert last < first / 2
    found = model.evaluate(images, labels)
    right = (model.eval()(images).argmax(1) == labels).float().mean().item()
    assert found["accuracy"] == pytest.approx(right)
    assert found["num_samples"] == 6
    with pytest.raises(ValueError, match="0 images"):
        model.evaluate(images[:0], labels[:0])


def test_a_frozen_tower_stays():
    model = host(freeze_vision_encoder=True)
    tower = model.clip.vision_model.state_dict()
    before = {name: tensor.clone() for name, tensor in tower.items()}
    model.train_step(*batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.items())
    assert not torch.equal(model.classifier.weight, host().classifier.weight)


def test_the_optimizer_is_made_anew_when_other_tensors_train():
    model, made = host(), []

    def make(named):
        made.append([name for name, _ in named])
        return torch.optim.SGD([tensor for _, tensor in named], 1e-3)

    model.configure_optimizer(make)
    model.train_step(*batch())
    model.train_step(*batch())
    assert len(made) == 1
    model.clip.requires_grad_(False)
    model.train_step(*batch())
    assert made[1:] == [["classifier.weight", "classifier.bias"]]


def test_a_model_from_a_folder_in_half_precision(tmp_path):
    torch.manual_seed(0)
    CLIPModel(clip_config()).half().save_pretrained(tmp_path)
    model = FederatedCLIPModel(str(tmp_path), num_classes=3)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert model.image_size == 8
    assert model(batch()[0]).shape == (6, 3)


def test_models_that_cannot_be_loaded_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no/such-model.*cannot be loaded(.|\n)*or a folder"):
        FederatedCLIPModel("no/such-model")
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not of type 'clip'"):
        FederatedCLIPModel(str(tmp_path))


def test_weights_that_lack_tensors_are_refused(tmp_path):
    model = CLIPModel(clip_config())
    state = model.state_dict()
    state.pop("visual_projection.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lack 1 of CLIP's tensors: visual_projection\.weight"):
        FederatedCLIPModel(str(tmp_path))


def test_broken_weights_are_refused(tmp_path):
    model = CLIPModel(clip_config())
    model.visual_projection.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"broken: 'visual_projection\.weight' holds 1 values"):
        FederatedCLIPModel(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])  # a download that was interrupted
    with pytest.raises(UserError, match=r"cannot be loaded(.|\n)*model_name is"):
        FederatedCLIPModel(str(tmp_path))


@pytest.mark.parametrize("classes", [0, True, 2.5])
def test_an_impossible_number_of_classes(classes):
    with pytest.raises(ValueError, match="num_classes"):
        FederatedCLIPModel.from_config(clip_config(), classes)
