"""Command line and config file to options; every mistake in them found before a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.training.config import check, parse
from library.training.config_file import config_path
from library.training.errors import UserError
from library.training.option_checks import option_problems
from library.training.option_notes import option_notes
from library.training.options import OPTIONS, Options, setup_parser
from library.training.paths import clean_path, folder_problem
from library.training.refusals import REFUSED
from library.training.settle import settle


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


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


class TestConfigFile:
    def test_sections_are_flattened_and_the_command_line_wins(self, tmp_path: Path) -> None:
        text = "network_dim = 8\n[a]\nunet_lr = 1e-4\n[b]\nseed = 1\ncache_latents = true\n"
        file = write(tmp_path / "run.toml", text)
        options = parse(["--config_file", file, "--seed", "2"])
        assert (options.network_dim, options.unet_lr, options.cache_latents) == (8, 1e-4, True)
        assert options.seed == 2
        assert options.given == {"config_file", "network_dim", "unet_lr", "cache_latents", "seed"}

    def test_a_default_on_the_command_line_wins_too(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", "max_train_steps = 5\n")
        assert parse(["--config_file", file, "--max_train_steps", "1600"]).max_train_steps == 1600

    def test_the_ending_may_be_left_out(self, tmp_path: Path) -> None:
        write(tmp_path / "run.toml", "seed = 3\n")
        assert parse(["--config_file", str(tmp_path / "run")]).seed == 3
        assert config_path("run.v2") == Path("run.v2.toml")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"there is no file .*nowhere\.toml"):
            parse(["--config_file", str(tmp_path / "nowhere")])
        (tmp_path / "quickstart.toml").touch()
        with pytest.raises(UserError, match=r"Did you mean .*/quickstart\.toml\?"):
            parse(["--config_file", str(tmp_path / "quickstart.tml")])

    def test_a_syntax_error_has_file_line_and_column(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", "seed = 1\nnetwork_dim = = 4\n")
        with pytest.raises(UserError) as caught:
            parse(["--config_file", file])
        assert str(caught.value).startswith(f"{file}:2:15: ")

    def test_a_windows_path_in_double_quotes_is_explained(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", 'train_data_dir = "C:\\Users\\me"\n')
        with pytest.raises(UserError, match="single quotes"):
            parse(["--config_file", file])

    def test_unknown_names_are_all_refused_with_the_nearest(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", "lerning_rate = 1\nnetwork-dim = 4\nqqqq = 1\n")
        with pytest.raises(UserError) as caught:
            parse(["--config_file", file])
        answer = str(caught.value)
        assert f"{file}: 'lerning_rate' is not an option. Did you mean 'learning_rate'?" in answer
        assert "'network-dim' is not an option. Did you mean 'network_dim'?" in answer
        assert "'qqqq' is not an option.\n" in answer + "\n"

    @pytest.mark.parametrize(
        ("line", "answer"),
        [
            ('network_dim = "8"', 'network_dim = "8": expected a whole number'),
            ("network_dim = 8.5", "network_dim = 8.5: expected a whole number"),
            ("seed = true", "seed = true: expected a whole number"),
            ('cache_latents = "true"', 'cache_latents = "true": expected true or false'),
            ("output_dir = 3", "output_dir = 3: expected text in quotes"),
            ('learning_rate = "1e-4"', 'learning_rate = "1e-4": expected a number'),
            ("text_encoder_lr = ['x']", "text_encoder_lr = ['x']: expected a list, each a number"),
            ("lr_warmup_steps = 1.5", "lr_warmup_steps = 1.5: 1.5 is neither"),
            ('loss_type = "l3"', "loss_type l3: choose one of l1, l2, huber, smooth_l1"),
        ],
    )
    def test_wrong_types_name_key_value_and_what_was_expected(
        self, tmp_path: Path, line: str, answer: str
    ) -> None:
        file = write(tmp_path / "run.toml", line + "\n")
        with pytest.raises(UserError) as caught:
            parse(["--config_file", file])
        assert str(caught.value).startswith(f"{file}: ")
        assert answer in str(caught.value)

    def test_values_as_front_ends_write_them(self, tmp_path: Path) -> None:
        """What kohya_ss and lora-scripts write for their defaults."""
        text = """
            text_encoder_lr = 5e-5
            resolution = [512, 768]
            network_dim = 8.0
            persistent_data_loader_workers = 0
            max_token_length = 75
            dynamo_backend = "no"
            reg_data_dir = ""
            huggingface_repo_id = ""
            network_args = []
            lr_warmup_steps = 0.1
            learning_rate = 1
        """
        options = parse(["--config_file", write(tmp_path / "run.toml", text)])
        assert options.text_encoder_lr == [5e-5]
        assert options.resolution == "512,768"
        assert options.network_dim == 8
        assert isinstance(options.network_dim, int)
        assert options.persistent_data_loader_workers is False
        assert options.max_token_length is None
        assert options.dynamo_backend == "inductor"
        assert options.reg_data_dir is options.huggingface_repo_id is None
        assert options.network_args == []
        assert options.lr_warmup_steps == 0.1

    def test_keys_that_stock_leaves_unread_are_noted(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", "epoch = 4\nnoise_offset_type = 'Original'\n")
        remarks = parse(["--config_file", file]).notes
        assert len(remarks) == 2
        assert "'epoch' is left unread" in remarks[0]

    def test_one_name_with_two_values(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", "[a]\nseed = 1\n[b]\nseed = 2\n")
        with pytest.raises(UserError, match=r"'seed' stands there twice, as 1 in \[a\] and as 2"):
            parse(["--config_file", file])
        write(tmp_path / "run.toml", "[a]\nseed = 1\n[b]\nseed = 1\n")
        assert parse(["--config_file", file]).seed == 1

    def test_a_dataset_config_in_its_place(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", "[[datasets]]\nresolution = 512\n")
        with pytest.raises(UserError, match="Give it to --dataset_config"):
            parse(["--config_file", file])

    def test_a_byte_order_mark_is_no_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 1\r\n")
        assert parse(["--config_file", str(tmp_path / "run.toml")]).seed == 1


class TestOutputConfig:
    def test_what_was_written_is_read_back(self, tmp_path: Path) -> None:
        file = tmp_path / "run.toml"
        words = [
            *("--network_dim", "8", "--unet_lr", "1e-05", "--cache_latents"),
            *("--optimizer_args", "a=1", 'b="x"', "--caption_prefix", 'é "quoted" \\ \x7f 🎈'),
            *("--text_encoder_lr", "1e-4", "2e-4", "--lr_warmup_steps", "5%"),
        ]
        written = [*words, "--config_file", str(file), "--output_config"]
        with pytest.raises(SystemExit) as stopped:
            parse([*written, "--wandb_api_key", "secret", "--max_train_steps", "1600"])
        assert stopped.value.code == 0
        text = file.read_text(encoding="utf-8")
        assert "secret" not in text
        assert "max_train_steps" not in text  # its default
        direct, read = parse(words), parse(["--config_file", str(file)])
        assert read.changed({"config_file": None}) == direct

    def test_a_file_that_is_there_stays(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", "seed = 1\n")
        with pytest.raises(UserError, match="is there already"):
            parse(["--config_file", file, "--output_config", "--seed", "2"])
        assert Path(file).read_text(encoding="utf-8") == "seed = 1\n"

    def test_it_needs_a_name(self) -> None:
        assert any("--output_config needs --config_file" in p for p in problems(output_config=True))


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


def test_a_parser_of_ones_own_may_have_more(tmp_path: Path) -> None:
    parser = setup_parser()
    parser.add_argument("--my_strength", type=float, default=0.5)
    parser.add_argument("--my_name", default="x")
    file = write(tmp_path / "run.toml", "my_strength = 0.25\n")
    options = parse(["--config_file", file], parser)
    assert options.my_strength == 0.25  # type: ignore[attr-defined]
    assert options.my_name == "x"  # type: ignore[attr-defined]
    assert options.given == {"config_file", "my_strength"}


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


NON_DEFAULT: dict[Any, Any] = {bool: True, int: 1, str: "x"}


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
        config = write(
            tmp_path / "data.toml",
            f"""
            [[datasets]]
            resolution = 64
            [[datasets.subsets]]
            image_dir = '{tmp_path / "data" / "2_red cat"}'
            class_tokens = "cat"
            shuffle_caption = true
            """,
        )
        cached = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}
        with pytest.raises(UserError, match="excludes shuffle_caption"):
            check(options.changed({**cached, "dataset_config": config}))

    def test_fp16_without_a_gpu(self, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(UserError, match="fp16 needs a GPU"):
            check(options.changed({"mixed_precision": "fp16"}))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        check(options.changed({"mixed_precision": "fp16"}))
