"""What a user does wrong is answered by one clear message, before the model is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment, words, write_dataset

import train_network
from library.training import trainer


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(trainer, "load_model", load)
    monkeypatch.chdir(ROOT)


def answer(capsys: pytest.CaptureFixture[str], **options: object) -> str:
    """What a run with this mistake says."""
    assert train_network.main(words(**options)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    return said


def test_the_options_are_right_but_for_the_mistake(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d")
    with pytest.raises(AssertionError, match="the model was loaded"):
        train_network.main(words(dataset_config=dataset, output_dir=tmp_path))


def test_missing_image_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "images")
    said = answer(capsys, dataset_config=dataset, output_dir=tmp_path)
    assert str(tmp_path / "d" / "images") in said


def test_toml_syntax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "d")
    dataset.write_text(dataset.read_text().replace("[[datasets]]", "[[datasets]"))
    said = answer(capsys, dataset_config=dataset, output_dir=tmp_path)
    assert f"{dataset}:5:" in said


def test_unknown_option_in_the_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "d", extra="shufle_caption = true")
    said = answer(capsys, dataset_config=dataset, output_dir=tmp_path)
    assert "shufle_caption" in said
    assert "shuffle_caption" in said


def test_unknown_option_in_the_config_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[anything]\nlearning_rat = 1e-3\n")
    said = answer(capsys, config_file=config, output_dir=tmp_path)
    assert "learning_rat" in said
    assert "learning_rate" in said
    assert "run.toml" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer_type": "HinaAdmW"}, ["HinaAdmW", "HinaAdamW"]),
        ({"optimizer_args": ["use_spdd=False"]}, ["use_spdd", "use_spd"]),
        ({"optimizer_args": ["spd_lambda=-1"]}, ["spd_lambda", "-1"]),
        ({"optimizer_type": "Automagic_CameAP"}, ["Automagic_CameAP", "Automagic_CameAMP"]),
        ({"network_dim": 0}, ["--network_dim", "0"]),
        ({"network_module": "networks.lorra"}, ["networks.lorra", "networks.lora"]),
        ({"network_args": ["conv_dimm=4"]}, ["conv_dimm", "conv_dim"]),
        ({"lr_scheduler": "cosin"}, ["cosin", "cosine"]),
        ({"deepspeed": True}, ["--deepspeed"]),
        ({"pretrained_model_name_or_path": "no/such/model.safetensors"}, ["no/such/model"]),
    ],
)
def test_misspelt_and_impossible_values(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    expected: list[str],
) -> None:
    base = {"dataset_config": write_dataset(tmp_path / "d"), "output_dir": tmp_path}
    said = answer(capsys, **(base | options))
    for word in expected:
        assert word in said


def test_a_text_file_named_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "d")
    (tmp_path / "d" / "images" / "notes.png").write_text("this is no picture")
    (tmp_path / "d" / "images" / "empty.png").touch()
    said = answer(capsys, dataset_config=dataset, output_dir=tmp_path)
    assert "notes.png" in said
    assert "empty.png" in said
    assert "--skip_broken_images" in said


def test_resume_of_an_incomplete_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "x-state"
    state.mkdir()
    dataset = write_dataset(tmp_path / "d")
    said = answer(capsys, dataset_config=dataset, output_dir=tmp_path, resume=state)
    assert "--resume" in said
    assert str(state) in said


def test_output_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    dataset = write_dataset(tmp_path / "d")
    said = answer(capsys, dataset_config=dataset, output_dir=tmp_path / "file" / "out")
    assert "--output_dir" in said


def test_all_mistakes_are_listed_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d", extra="colour_aug = true")
    said = answer(
        capsys,
        dataset_config=dataset,
        output_dir=tmp_path,
        network_dim=-4,
        optimizer_type="AdamWW",
        max_train_steps=0,
    )
    for word in ("colour_aug", "--network_dim", "AdamWW", "--max_train_steps"):
        assert word in said


def test_a_misspelt_option_is_answered_at_once_by_the_process() -> None:
    finished = subprocess.run(
        [sys.executable, "train_network.py", "--learning_rat", "1e-4", "--netwrok_dim", "4"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert "--network_dim" in finished.stderr
    assert len(finished.stderr.splitlines()) < 6
    assert "Traceback" not in finished.stderr
