"""Options from a config file, those of the command line over them, and the file written back."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training.config import parse
from library.training.config_file import config_path
from library.training.errors import UserError
from library.training.options import setup_parser


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


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


def test_a_parser_of_ones_own_may_have_more(tmp_path: Path) -> None:
    parser = setup_parser()
    parser.add_argument("--my_strength", type=float, default=0.5)
    parser.add_argument("--my_name", default="x")
    file = write(tmp_path / "run.toml", "my_strength = 0.25\n")
    options = parse(["--config_file", file], parser)
    assert vars(options)["my_strength"] == 0.25
    assert vars(options)["my_name"] == "x"
    assert options.given == {"config_file", "my_strength"}
