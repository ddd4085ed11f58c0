"""A command line to a run: its options settled, and every mistake found before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from library.training.config import check, parse
from library.training.errors import UserError
from library.training.options import Options, setup_parser
from library.training.settle import settle


def test_a_misspelt_option_is_answered_without_torch() -> None:
    code = (
        "import sys\n"
        "from library.training.config import parse\n"
        "from library.training.errors import UserError\n"
        "try: parse(['--lerning_rate', '1'])\n"
        "except UserError as error: print(error)\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Did you mean --learning_rate?" in result.stdout
    assert result.stdout.endswith("[]\n")


class TestSettle:
    def test_stocks_aliases(self) -> None:
        options = parse(["--caption_extention", ".txt", "--use_8bit_adam"])
        assert (options.caption_extension, options.caption_extention) == (".txt", None)
        assert options.optimizer_type == "AdamW8bit"
        assert parse(["--use_lion_optimizer"]).optimizer_type == "Lion"
        assert parse([]).optimizer_type == "AdamW"

    def test_disk_caches_imply_the_memory_ones(self) -> None:
        options = parse(["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"])
        assert options.cache_latents
        assert options.cache_text_encoder_outputs

    def test_settling_twice_changes_nothing(self) -> None:
        once = parse(["--sample_every_n_steps", "0", "--use_8bit_adam", "--vae", "~/vae/"])
        twice = settle(once)
        assert (twice, twice.notes, twice.given) == (once, once.notes, once.given)
        assert once.sample_every_n_steps is None
        assert "--sample_every_n_steps 0" in once.notes[0]


class TestCheck:
    """`check` on a complete run: a real model folder, real pictures, real packages."""

    @pytest.fixture
    def options(self, tmp_path: Path, tiny_sd1: Path) -> Options:
        pictures = tmp_path / "data" / "2_red cat"
        pictures.mkdir(parents=True)
        for shade in (0, 100, 200):
            Image.new("RGB", (64, 64), (shade, 0, 0)).save(pictures / f"{shade}.png")
        return Options(
            pretrained_model_name_or_path=str(tiny_sd1),
            network_module="networks.lora",
            network_dim=4,
            network_args=["conv_dim=2"],
            output_dir=str(tmp_path / "output"),
            train_data_dir=str(tmp_path / "data"),
            resolution="64",
            optimizer_type="HinaAdamW",
            optimizer_args=["weight_decay=0.02"],
            seed=1,
        )

    def test_a_run_that_can_start(self, options: Options, tmp_path: Path) -> None:
        run = check(options)
        assert len(run.train_data.records) == 3
        assert run.validation_data is None
        assert run.options.optimizer_type == "HinaAdamW"
        assert run.optimizer_kwargs == {"weight_decay": 0.02}
        assert run.notes == []
        assert not (tmp_path / "output").exists()

    def test_a_namespace_of_stocks_parser(self, options: Options) -> None:
        words = ["--train_data_dir", str(options.train_data_dir), "--resolution", "64"]
        words += ["--pretrained_model_name_or_path", str(options.pretrained_model_name_or_path)]
        words += [
            "--network_module",
            "networks.lora",
            "--output_dir",
            "o",
            "--use_8bit_adam",
            "--seed",
            "1",
        ]
        run = check(setup_parser().parse_args(words))
        assert run.options.optimizer_type == "AdamW8bit"

    def test_everything_wrong_is_in_one_error(self, options: Options, tmp_path: Path) -> None:
        (tmp_path / "data" / "2_red cat" / "notes.png").write_text("no picture")
        (tmp_path / "state").mkdir()
        (tmp_path / "prompts.txt").write_text("a cat --w wide\n")
        wrong = options.changed(
            {
                "network_dim": 0,
                "train_batch_size": 0,
                "network_module": "networks.lorra",
                "optimizer_type": "HinaAdamWW",
                "lr_scheduler": "cosin",
                "network_weights": str(tmp_path / "nowhere.safetensors"),
                "pretrained_model_name_or_path": str(tmp_path / "no_model"),
                "resume": str(tmp_path / "state"),
                "sample_prompts": str(tmp_path / "prompts.txt"),
                "output_dir": str(tmp_path / "prompts.txt"),
                "mixed_precision": "bf17",
                "fp8_base": True,
                "log_with": "tensorboard",
            }
        )
        with pytest.raises(UserError) as caught:
            check(wrong)
        answer = str(caught.value)
        for word in (
            "--network_dim 0: must be 1 or more",
            "--train_batch_size 0: must be 1 or more",
            "networks.lorra: there is no such module",
            "'HinaAdamWW'. Did you mean 'HinaAdamW'?",
            "--lr_scheduler cosin: there is no such schedule. Did you mean 'cosine'?",
            "--network_weights",
            "no_model",
            "--resume",
            "prompts.txt",
            "--output_dir",
            "--mixed_precision bf17: choose one of no, fp16, bf16",
            "--fp8_base",
            "--logging_dir",
        ):
            assert word in answer
        assert answer.count("--network_dim") == 1
        assert answer.count("--train_batch_size") == 1
        assert answer.count("--output_dir") == 1

    def test_broken_pictures_are_listed_with_the_rest(
        self, options: Options, tmp_path: Path
    ) -> None:
        (tmp_path / "data" / "2_red cat" / "notes.png").write_text("no picture")
        with pytest.raises(UserError) as caught:
            check(options.changed({"optimizer_args": ["weight_decai=1"]}))
        answer = str(caught.value)
        assert answer.startswith("2 problems:\n  - --optimizer_args: ")
        assert "Did you mean 'weight_decay'?" in answer
        assert "notes.png" in answer
        assert "--skip_broken_images" in answer

    def test_captions_that_vary_cannot_be_cached(self, options: Options, tmp_path: Path) -> None:
        config = tmp_path / "data.toml"
        config.write_text(
            f"""
            [[datasets]]
            resolution = 64
            [[datasets.subsets]]
            image_dir = '{tmp_path / "data" / "2_red cat"}'
            class_tokens = "cat"
            shuffle_caption = true
            """
        )
        cached = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}
        with pytest.raises(UserError, match="excludes shuffle_caption"):
            check(options.changed({**cached, "dataset_config": str(config)}))

    def test_fp16_without_a_gpu(self, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(UserError, match="fp16 needs a GPU"):
            check(options.changed({"mixed_precision": "fp16"}))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        check(options.changed({"mixed_precision": "fp16"}))
