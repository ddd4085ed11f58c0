"""library/training/metadata.py against what stock writes."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_folders import options_for, write_folder
from safetensors import safe_open
from safetensors.torch import save_file

from library.training.config import parse
from library.training.data import TrainingData
from library.training.metadata import (
    MINIMUM_KEYS,
    DatasetFacts,
    RunFacts,
    SubsetFacts,
    file_hashes,
    file_metadata,
    model_spec,
    training_metadata,
)
from library.training.options import Options
from library.training.provenance import Provenance

# Every ss_ key that stock's train_network.py writes, whatever the data …
STOCK_KEYS = """
session_id training_started_at output_name learning_rate text_encoder_lr unet_lr num_train_images
num_validation_images num_reg_images num_batches_per_epoch num_epochs gradient_checkpointing
gradient_accumulation_steps max_train_steps lr_warmup_steps lr_scheduler network_module network_dim
network_alpha network_dropout mixed_precision full_fp16 v2 base_model_version clip_skip
max_token_length cache_latents seed lowram noise_offset multires_noise_iterations
multires_noise_discount adaptive_noise_scale zero_terminal_snr training_comment
sd_scripts_commit_hash optimizer max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs
caption_tag_dropout_rate face_crop_aug_range prior_loss_weight min_snr_gamma scale_weight_norms
ip_noise_gamma debiased_estimation noise_offset_random_strength ip_noise_gamma_random_strength
loss_type huber_schedule huber_scale huber_c fp8_base fp8_base_unet validation_seed validation_split
max_validation_steps validate_every_n_epochs validate_every_n_steps resize_interpolation
"""
# … with a dataset config, and without one.
CONFIG_KEYS = "datasets tag_frequency dataset_dirs"
FOLDER_KEYS = """
batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption
enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens dataset_dirs
reg_dataset_dirs tag_frequency bucket_info
"""


def keys(*words: str) -> set[str]:
    return {f"ss_{key}" for text in words for key in text.split()}


def dataset(**changes: Any) -> DatasetFacts:
    facts: dict[str, Any] = {
        "batch_size_per_device": 2,
        "num_train_images": 20,
        "num_reg_images": 6,
        "resolution": (512, 768),
        "enable_bucket": True,
        "bucket_no_upscale": False,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "tag_frequency": {"10_cat": {"cat": 2, "red": 1}},
        "bucket_counts": {(512, 512): 12, (512, 768): 8},
        "mean_img_ar_error": 0.25,
        "subsets": [
            SubsetFacts(img_count=2, num_repeats=10, image_dir="/data/10_cat", class_tokens="cat"),
            SubsetFacts(img_count=6, num_repeats=1, image_dir="/data/1_animal", is_reg=True),
        ],
    }
    return DatasetFacts(**facts | changes)


RUN = RunFacts(
    started_at=1700000000.5,
    session_id=123,
    num_epochs=3,
    num_batches_per_epoch=10,
    total_batch_size=4,
    optimizer="library.custom_hina_adamw_optimizer.HinaAdamWOptimizer(use_agr=False)",
    network_args={"conv_dim": "4"},
)


def metadata(*datasets: DatasetFacts, **options: Any) -> dict[str, str]:
    chosen = Options.from_values({"network_module": "networks.lora", **options})
    return training_metadata(chosen, "sd1", RUN, datasets or [dataset()])


COMMAND = """
--pretrained_model_name_or_path some/model --vae some/vae --output_name cats --training_comment try
--train_data_dir pictures --resolution 512 --face_crop_aug_range 2,4 --enable_bucket
--network_module networks.lora --network_dim 8 --network_alpha 4 --network_dropout 0.1
--network_args conv_dim=4 --scale_weight_norms 1 --learning_rate 1e-4 --unet_lr 2e-4
--text_encoder_lr 5e-5 --lr_scheduler cosine --lr_warmup_steps 5% --max_train_steps 100
--mixed_precision bf16 --gradient_checkpointing --cache_latents_to_disk --clip_skip 2
--max_token_length 225 --seed 42 --noise_offset 0.05 --min_snr_gamma 5 --caption_dropout_rate 0.1
"""
EXPECTED = {
    "ss_session_id": "123",
    "ss_training_started_at": "1700000000.5",
    "ss_output_name": "cats",
    "ss_training_comment": "try",
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0002",
    "ss_text_encoder_lr": "5e-05",
    "ss_lr_scheduler": "cosine",
    "ss_lr_warmup_steps": "0.05",
    "ss_optimizer": "library.custom_hina_adamw_optimizer.HinaAdamWOptimizer(use_agr=False)",
    "ss_max_grad_norm": "1.0",
    "ss_max_train_steps": "100",
    "ss_num_epochs": "3",
    "ss_num_batches_per_epoch": "10",
    "ss_batch_size_per_device": "1",
    "ss_total_batch_size": "4",
    "ss_gradient_accumulation_steps": "1",
    "ss_gradient_checkpointing": "True",
    "ss_mixed_precision": "bf16",
    "ss_full_fp16": "False",
    "ss_fp8_base": "False",
    "ss_fp8_base_unet": "False",
    "ss_lowram": "False",
    "ss_cache_latents": "True",
    "ss_seed": "42",
    "ss_sd_model_name": "some/model",
    "ss_vae_name": "some/vae",
    "ss_v2": "False",
    "ss_base_model_version": "sd_v1",
    "ss_clip_skip": "2",
    "ss_max_token_length": "225",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_network_dropout": "0.1",
    "ss_network_args": '{"conv_dim": "4", "dropout": 0.1}',
    "ss_scale_weight_norms": "1.0",
    "ss_noise_offset": "0.05",
    "ss_noise_offset_random_strength": "False",
    "ss_adaptive_noise_scale": "None",
    "ss_multires_noise_iterations": "None",
    "ss_multires_noise_discount": "0.3",
    "ss_ip_noise_gamma": "None",
    "ss_ip_noise_gamma_random_strength": "False",
    "ss_zero_terminal_snr": "False",
    "ss_loss_type": "l2",
    "ss_huber_schedule": "snr",
    "ss_huber_scale": "1.0",
    "ss_huber_c": "0.1",
    "ss_min_snr_gamma": "5.0",
    "ss_debiased_estimation": "False",
    "ss_prior_loss_weight": "1.0",
    "ss_caption_dropout_rate": "0.1",
    "ss_caption_dropout_every_n_epochs": "0",
    "ss_caption_tag_dropout_rate": "0.0",
    "ss_validation_seed": "None",
    "ss_validation_split": "0.0",
    "ss_max_validation_steps": "None",
    "ss_validate_every_n_epochs": "None",
    "ss_validate_every_n_steps": "None",
    "ss_num_train_images": "20",
    "ss_num_reg_images": "6",
    "ss_num_validation_images": "0",
    "ss_resolution": "(512, 512)",
    "ss_face_crop_aug_range": "(2.0, 4.0)",
    "ss_resize_interpolation": "None",
    "ss_color_aug": "False",
    "ss_flip_aug": "False",
    "ss_random_crop": "False",
    "ss_shuffle_caption": "False",
    "ss_keep_tokens": "0",
    "ss_enable_bucket": "True",
    "ss_bucket_no_upscale": "False",
    "ss_min_bucket_reso": "256",
    "ss_max_bucket_reso": "1024",
    "ss_dataset_dirs": '{"10_cat": {"n_repeats": 10, "img_count": 2}}',
    "ss_reg_dataset_dirs": '{"1_animal": {"n_repeats": 1, "img_count": 6}}',
    "ss_tag_frequency": '{"10_cat": {"cat": 2, "red": 1}}',
    "ss_bucket_info": (
        '{"buckets": {"0": {"resolution": [512, 512], "count": 12}, '
        '"1": {"resolution": [512, 768], "count": 8}}, "mean_img_ar_error": 0.25}'
    ),
}


class TestTrainingMetadata:
    def test_folders_give_stocks_keys(self) -> None:
        assert metadata().keys() == keys(STOCK_KEYS, FOLDER_KEYS)

    def test_dataset_config_gives_stocks_keys(self) -> None:
        assert metadata(dataset_config="a.toml").keys() == keys(STOCK_KEYS, CONFIG_KEYS)

    def test_values_are_stocks_texts(self) -> None:
        """Of a whole command line; what is expected was read in stock's sources."""
        found = training_metadata(parse(COMMAND.split()), "sd1", RUN, [dataset()])
        del found["ss_sd_scripts_commit_hash"]
        assert found == EXPECTED

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ({}, "None"),
            ({"text_encoder_lr": []}, "None"),
            ({"text_encoder_lr": [5e-5]}, "5e-05"),
            ({"text_encoder_lr": [5e-5, 1e-5]}, "[5e-05, 1e-05]"),  # stock goes by the first alone
        ],
    )
    def test_text_encoder_lr(self, given: dict[str, Any], text: str) -> None:
        assert metadata(**given)["ss_text_encoder_lr"] == text

    def test_adafactor_with_steps_of_its_own(self) -> None:
        rates = {"learning_rate": 1e-3, "unet_lr": 1e-4, "text_encoder_lr": [1e-5]}
        found = metadata(optimizer_type="Adafactor", lr_scheduler="cosine", **rates)
        assert found["ss_lr_scheduler"] == "adafactor:0.001"
        for key in ("ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr"):
            assert found[key] == "None"
        given = ["relative_step=False"]
        found = metadata(optimizer_type="Adafactor", optimizer_args=given, **rates)
        assert (found["ss_lr_scheduler"], found["ss_learning_rate"]) == ("constant", "0.001")

    def test_network_args_with_the_dropout_that_stock_adds(self) -> None:
        given = {"network_args": ["conv_dim=4"], "dim_from_weights": True}
        assert metadata(**given)["ss_network_args"] == '{"conv_dim": "4"}'
        given["dim_from_weights"] = False
        assert metadata(**given)["ss_network_args"] == '{"conv_dim": "4", "dropout": null}'
        assert "ss_network_args" not in metadata()

    def test_several_datasets(self) -> None:
        second = dataset(
            tag_frequency={"10_cat": {"other": 1}, "dog": {"dog": 1}},
            enable_bucket=False,
            subsets=[SubsetFacts(img_count=3, num_repeats=1, image_dir="/else/10_cat")],
        )
        found = metadata(dataset(), second, dataset_config="a.toml")
        entries = json.loads(found["ss_datasets"])
        assert [entry["num_train_images"] for entry in entries] == [20, 20]
        assert entries[0]["subsets"][0]["image_dir"] == "10_cat"
        assert entries[0]["is_dreambooth"] is True
        assert entries[1]["bucket_info"] is None
        # A folder's tags count once; folders of one name are told apart; no regularization.
        assert json.loads(found["ss_tag_frequency"])["10_cat"] == {"cat": 2, "red": 1}
        assert json.loads(found["ss_dataset_dirs"]).keys() == {"10_cat", "10_cat (2)"}
        assert found["ss_num_train_images"] == "40"

    def test_metadata_file_dataset(self) -> None:
        subset = SubsetFacts(img_count=3, num_repeats=1, metadata_file="/data/meta.json")
        found = metadata(dataset(subsets=[subset]), dataset_config="a.toml")
        (entry,) = json.loads(found["ss_datasets"])
        assert entry["is_dreambooth"] is False
        assert entry["subsets"][0]["metadata_file"] == "meta.json"
        assert "is_reg" not in entry["subsets"][0]

    def test_model_file_has_the_web_uis_hashes(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        content = bytes(range(256)) * 5000
        file.write_bytes(content)
        found = metadata(pretrained_model_name_or_path=str(file), vae="some/hub-id")
        window = content[0x100000 : 0x100000 + 0x10000]
        assert found["ss_sd_model_hash"] == hashlib.sha256(window).hexdigest()[:8]
        assert found["ss_new_sd_model_hash"] == hashlib.sha256(content).hexdigest()
        assert found["ss_sd_model_name"] == "model.safetensors"
        assert found["ss_vae_name"] == "some/hub-id"
        assert "ss_vae_hash" not in found

    @pytest.mark.parametrize(
        ("kind", "v", "version"),
        [
            ("sd1", False, "sd_v1"),
            ("sd1", True, "sd_v1_v"),
            ("sd2", True, "sd_v2_v"),
            ("sdxl", False, "sdxl_base_v1-0"),
        ],
    )
    def test_base_model_version(self, kind: Any, v: bool, version: str) -> None:
        options = Options.from_values({"v_parameterization": v})
        found = training_metadata(options, kind, RUN, [dataset()])
        assert found["ss_base_model_version"] == version


class TestProvenance:
    def test_without_buckets_their_limits_are_nothing(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "2_cat", 3)
        options = options_for(tmp_path, bucket_no_upscale=True)
        data, _ = TrainingData.open(options)
        facts = Provenance(options, "sd1", data, None, {}, "torch.optim.adamw.AdamW", 3, 1)
        found = facts.metadata({"a": torch.zeros(1)}, steps=5, epoch=2)
        assert (found["ss_steps"], found["ss_epoch"]) == ("5", "2")
        assert found["ss_enable_bucket"] == "False"
        assert found["ss_bucket_no_upscale"] == "False"
        assert found["ss_min_bucket_reso"] == found["ss_max_bucket_reso"] == "None"
        assert found["ss_bucket_info"] == "null"
        assert found["ss_dataset_dirs"] == '{"2_cat": {"n_repeats": 2, "img_count": 3}}'


class TestFileMetadata:
    def test_a_file_says_where_it_stands(self) -> None:
        found = file_metadata(Options(), "sd1", metadata(), steps=30, epoch=2)
        assert (found["ss_steps"], found["ss_epoch"]) == ("30", "2")
        assert float(found["ss_training_finished_at"]) > 1.7e9

    def test_no_metadata_keeps_the_minimum(self) -> None:
        options = Options.from_values({"no_metadata": True, "output_name": "x"})
        found = file_metadata(options, "sd1", metadata(network_args=["a=b"]), 30, 2)
        assert {key for key in found if key.startswith("ss_")} == set(MINIMUM_KEYS)
        assert found["modelspec.title"] == "x"


class TestModelSpec:
    def spec(self, kind: Any = "sd1", **options: Any) -> dict[str, str]:
        return model_spec(Options.from_values(options), kind, 1700000000.0)

    def test_required_keys(self) -> None:
        found = self.spec(output_name="cats")
        assert found["modelspec.sai_model_spec"] == "1.0.1"
        assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert found["modelspec.implementation"] == "diffusers"
        assert found["modelspec.title"] == "cats"
        assert found["modelspec.resolution"] == "512x512"
        assert found["modelspec.prediction_type"] == "epsilon"
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d$", found["modelspec.date"])
        assert "modelspec.author" not in found

    def test_kinds(self) -> None:
        sdxl = self.spec("sdxl")
        assert sdxl["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert sdxl["modelspec.implementation"].endswith("generative-models")
        assert sdxl["modelspec.resolution"] == "1024x1024"
        v2 = self.spec("sd2", v_parameterization=True)
        assert v2["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
        assert (v2["modelspec.resolution"], v2["modelspec.prediction_type"]) == ("768x768", "v")

    def test_every_metadata_option_is_written(self, tmp_path: Path) -> None:
        names = [name for name in vars(Options()) if name.startswith("metadata_")]
        options = {name: f"{name} text" for name in names}
        picture = tmp_path / "thumbnail.png"
        picture.write_bytes(b"abc")
        found = self.spec(**options | {"metadata_thumbnail": str(picture)})
        for name in set(names) - {"metadata_thumbnail"}:
            assert found[f"modelspec.{name.removeprefix('metadata_')}"] == f"{name} text"
        assert found["modelspec.thumbnail"] == "data:image/png;base64,YWJj"
        assert len(names) == 11

    def test_timesteps_clip_skip_and_resolution(self) -> None:
        found = self.spec(min_timestep=100, clip_skip=2, resolution="512,768")
        assert found["modelspec.timestep_range"] == "100,1000"
        assert found["modelspec.encoder_layer"] == "2"
        assert found["modelspec.resolution"] == "512x768"


class TestHashes:
    def test_they_are_those_of_the_written_file(self, tmp_path: Path) -> None:
        tensors = {"b": torch.randn(300_000), "a": torch.randn(3).half()}
        header = {"ss_steps": "1", "modelspec.title": "not hashed"}
        hashes = file_hashes(tensors, header)
        file = tmp_path / "x.safetensors"
        save_file(tensors, file, header | hashes)
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        assert hashes["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
        # The old hash reads 64 KiB at 1 MiB of the file with the ss_ keys alone.
        save_file(tensors, file, {"ss_steps": "1"})
        window = file.read_bytes()[0x100000:0x110000]
        assert hashes["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]

    def test_a_files_metadata_can_be_read_back(self, tmp_path: Path) -> None:
        found = file_metadata(Options(), "sd1", metadata(), 1, 1)
        file = tmp_path / "x.safetensors"
        save_file({"a": torch.zeros(1)}, file, found)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == found
