"""Options that are impossible, that contradict each other, or that act otherwise than expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from library.training.option_checks import option_problems
from library.training.option_notes import option_notes
from library.training.options import OPTIONS, Options
from library.training.paths import clean_path, folder_problem
from library.training.refusals import REFUSED
from library.training.settle import settle

NON_DEFAULT: dict[Any, Any] = {bool: True, int: 1, str: "x"}


def problems(sdxl: bool = False, **values: Any) -> list[str]:
    """What is wrong with options that are otherwise complete."""
    complete = {
        "pretrained_model_name_or_path": "model",
        "network_module": "networks.lora",
        "output_dir": "output",
        "train_data_dir": "data",
    }
    return option_problems(settle(Options.from_values({**complete, **values})), sdxl)


def notes(sdxl: bool = False, **values: Any) -> list[str]:
    options = settle(Options.from_values(values))
    return [*options.notes, *option_notes(options, sdxl)]


class TestProblems:
    def test_complete_options_have_none(self) -> None:
        assert problems() == []

    def test_required_options(self) -> None:
        found = "\n".join(option_problems(Options(), sdxl=False))
        assert all(f"--{name} is missing" in found for name in ("network_module", "output_dir"))

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused_options_are_named_with_the_reason(self, name: str) -> None:
        option = OPTIONS[name]
        others = [choice for choice in option.choices or () if choice != option.default]
        value = others[-1] if others else NON_DEFAULT[option.kind]
        found = problems(**{name: value})
        assert len(found) == 1
        assert found[0].startswith(f"--{name}")
        assert REFUSED[name] in found[0]
        assert problems(**{name: option.default}) == []

    def test_refused_options_of_one_reason_share_a_line(self) -> None:
        found = problems(deepspeed=True, zero_stage=3, fp8_base=True)
        assert [line.split(":")[0] for line in found] == [
            "--deepspeed, --zero_stage 3",
            "--fp8_base",
        ]

    def test_secrets_are_not_shown(self) -> None:
        assert "hf_abc" not in problems(huggingface_token="hf_abc")[0]

    @pytest.mark.parametrize(
        ("values", "answer"),
        [
            ({"network_dim": 0}, "--network_dim 0: must be 1 or more"),
            ({"network_alpha": -1.0}, "--network_alpha -1.0: must be 0 or more"),
            ({"max_train_steps": 0}, "--max_train_steps 0: must be 1 or more"),
            ({"max_train_epochs": -1}, "--max_train_epochs -1: must be 1 or more"),
            ({"train_batch_size": 0}, "--train_batch_size 0: must be 1 or more"),
            ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0"),
            ({"save_every_n_steps": 0}, "--save_every_n_steps 0: must be 1 or more"),
            ({"learning_rate": float("nan")}, "--learning_rate nan: must be 0 or more"),
            ({"learning_rate": float("inf")}, "--learning_rate inf: must be 0 or more"),
            ({"text_encoder_lr": [1e-4, -1.0]}, "--text_encoder_lr 0.0001 -1.0: must be 0 or"),
            ({"caption_dropout_rate": 1.5}, "--caption_dropout_rate 1.5: must be between 0 and 1"),
            ({"network_dropout": -0.1}, "--network_dropout -0.1: must be between 0 and 1"),
            ({"huber_c": 0.0}, "--huber_c 0.0: must be greater than 0"),
            ({"max_timestep": 1001}, "--max_timestep 1001: must be between 1 and 1000"),
            ({"lr_warmup_steps": 1.5}, "--lr_warmup_steps 1.5: a ratio is at most 1"),
            ({"loss_type": "fourier"}, "--loss_type fourier: the Fourier feature loss"),
            ({"mixed_precision": "fp8"}, "--mixed_precision fp8: choose one of no, fp16, bf16"),
            ({"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500 is above"),
            ({"full_fp16": True}, "--full_fp16 needs --mixed_precision fp16"),
            ({"full_bf16": True, "mixed_precision": "fp16"}, "--full_bf16 needs --mixed_precision"),
            ({"cache_text_encoder_outputs": True}, "needs --network_train_unet_only"),
            ({"adaptive_noise_scale": 0.1}, "--adaptive_noise_scale needs --noise_offset"),
            ({"scale_v_pred_loss_like_noise_pred": True}, "needs --v_parameterization"),
            ({"v_pred_like_loss": 0.1, "v_parameterization": True}, "exclude each other"),
            ({"v2": True, "sdxl": True}, "--v2 is for Stable Diffusion 2.x"),
            (
                {"network_train_unet_only": True, "network_train_text_encoder_only": True},
                "nothing would be trained",
            ),
            ({"dim_from_weights": True}, "--dim_from_weights needs --network_weights"),
            ({"base_weights_multiplier": [1.0]}, "has 1 values for 0 --base_weights"),
            ({"use_8bit_adam": True, "optimizer_type": "Lion"}, "choose different optimizers"),
            ({"use_8bit_adam": True, "use_lion_optimizer": True}, "choose different optimizers"),
            ({"initial_step": 1600}, "leaves nothing of --max_train_steps 1600"),
            ({"initial_epoch": 4, "max_train_epochs": 3}, "leaves nothing of --max_train_epochs"),
            ({"validation_split": 1.0}, "no picture is left to train on"),
            ({"sample_every_n_steps": 5}, "--sample_every_n_steps: give the prompts to draw"),
            ({"output_config": True}, "--output_config needs --config_file"),
            ({"output_name": "a/b"}, "--output_name a/b: a name without folders"),
            ({"metadata_thumbnail": "nowhere.png"}, "--metadata_thumbnail nowhere.png: there is"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_impossible_values_and_contradictions(
        self, values: dict[str, Any], answer: str
    ) -> None:
        found = problems(**values)
        assert len(found) == 1
        assert answer in found[0]

    @pytest.mark.parametrize(
        "values",
        [
            {"min_timestep": 500, "max_timestep": 500},
            {"noise_offset": 0.05, "adaptive_noise_scale": 0.1},
            {"adaptive_noise_scale": 0.0},
            {"full_bf16": True, "mixed_precision": "bf16"},
            {"initial_epoch": 3, "max_train_epochs": 3},
            {"metadata_thumbnail": "data:image/png;base64,xyz"},
            {"cache_text_encoder_outputs": True, "network_train_unet_only": True},
            {"save_n_epoch_ratio": 0, "min_snr_gamma": 0.0, "max_grad_norm": 0.0},
        ],
        ids=lambda values: "-".join(values),
    )
    def test_what_is_allowed(self, values: dict[str, Any]) -> None:
        assert problems(**values) == []

    def test_all_are_found_at_once(self) -> None:
        found = problems(network_dim=0, train_batch_size=0, full_fp16=True, deepspeed=True)
        assert len(found) == 4


class TestNotes:
    def test_plain_options_need_none(self) -> None:
        assert notes() == []

    @pytest.mark.parametrize(
        ("values", "answer"),
        [
            ({"xformers": True}, "scaled_dot_product_attention"),
            ({"v2": True, "clip_skip": 2}, "--clip_skip with --v2"),
            ({"clip_skip": 2, "sdxl": True}, "--clip_skip has no effect on SDXL"),
            ({"zero_terminal_snr": True}, "without --v_parameterization"),
            ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "both act"),
            ({"learning_rate": 0.0}, "nothing will be learned"),
            ({"max_train_epochs": 1, "max_train_steps": 5}, "so --max_train_steps is not used"),
            ({"huber_c": 0.2}, "--huber_c acts only with --loss_type huber or smooth_l1"),
            ({"save_last_n_steps": 5}, "--save_last_n_steps acts only with --save_every_n_steps"),
            ({"lr_warmup_steps": 500, "max_train_steps": 100}, "longer than the run of 100 steps"),
            ({"lowram": True}, "--lowram changes nothing"),
            ({"ddp_static_graph": True}, "--ddp_static_graph: processes exchange"),
            (
                {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0},
                "there are none to keep",
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_what_acts_otherwise_than_expected(self, values: dict[str, Any], answer: str) -> None:
        found = notes(**values)
        assert len(found) == 1
        assert answer in found[0]

    def test_a_dataset_config_may_hold_what_the_command_line_lacks(self) -> None:
        assert notes(min_bucket_reso=128, dataset_config="data.toml") == []
        assert len(notes(min_bucket_reso=128)) == 1


class TestPaths:
    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ('"models/a b"', "models/a b"),
            ("'models/a'", "models/a"),
            (" models/a ", "models/a"),
            ("models/a/", "models/a"),
            ("models/a\\", "models/a"),
            ('C:\\models\\a"', "C:\\models\\a"),
            ("C:\\", "C:\\"),
            ("/", "/"),
            ("", None),
            ('""', None),
            ("~", str(Path.home())),
            ("~/a", str(Path.home() / "a")),
        ],
    )
    def test_paths_as_they_were_meant(self, typed: str, meant: str | None) -> None:
        assert clean_path(typed) == meant
        assert meant is None or clean_path(meant) == meant

    def test_a_name_that_exists_is_taken_as_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "odd\\").mkdir()
        assert clean_path("odd\\") == "odd\\"

    def test_a_swallowed_quotation_mark_is_explained(self) -> None:
        found = problems(output_dir='C:\\out" --seed 1')
        assert any("leave the last backslash out" in line for line in found)

    def test_an_output_folder_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
            found = problems(output_dir=str(folder))
            assert len(found) == 1
            assert f"{tmp_path / 'file'} is a file" in found[0]

    def test_an_output_folder_that_refuses_files(self) -> None:
        if not Path("/proc/self").is_dir():
            pytest.skip("needs a folder that even root cannot write to")
        problem = folder_problem("--output_dir", "/proc/self/out")
        assert problem is not None
        assert problem.startswith("--output_dir /proc/self/out: cannot be written to")

    def test_probing_leaves_nothing_behind(self, tmp_path: Path) -> None:
        assert folder_problem("--output_dir", str(tmp_path / "new" / "folder")) is None
        assert list(tmp_path.iterdir()) == []
