"""Every argument of AdaptiveHinaAdamW on the command line and in TOML: what arrives, what is
refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from acting import acting
from runs import ROOT, same_weights, words, write_dataset
from safetensors import safe_open

import train_network
from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.registry import create_optimizer
from library.training import trainer
from library.training.config import parse
from library.training.run_checks import check_optimizer

FLAG = "True or False"


class Argument(NamedTuple):
    """The default by spec 1 §4, another value, an impossible one, and what is allowed."""

    default: Any
    other: Any
    impossible: Any
    allowed: str


ARGUMENTS = {
    "betas": Argument((0.9, 0.999), (0.8, 0.95), (0.9, 1.0), "two values, each"),
    "eps": Argument(1e-8, 1e-6, 0, "a finite number >= 1.17549e-38"),
    "weight_decay": Argument(1e-2, 0, -0.1, "a finite number >= 0"),
    "use_orthogonal_grad": Argument(False, True, 1, FLAG),
    "use_agr": Argument(True, False, "no", FLAG),
    "use_adopt_stability": Argument(True, False, "off", FLAG),
    "use_tam": Argument(True, False, 0, FLAG),
    "tam_beta": Argument(0.999, 0.5, 1.0, "a finite number >= 0 and < 1"),
    "use_grams": Argument(True, False, None, FLAG),
    "use_cautious": Argument(True, False, 1.0, FLAG),
    "use_dynamic_adaptation": Argument(True, False, "yes", FLAG),
    "adaptation_strength": Argument(1.0, 1.5, 0, "a finite number > 0"),
    "relationship_discovery_interval": Argument(100, 7, 2.5, "a whole number >= 1"),
    "importance_decay": Argument(0.95, 0.5, 1.0, "a finite number >= 0 and < 1"),
    "compatibility_threshold": Argument(0.3, 0.6, 1.5, "a finite number >= 0 and <= 1"),
    "use_lr_mask": Argument(True, False, 2, FLAG),
    "lr_bump": Argument(3e-6, 1e-5, 0, "a finite number > 0"),
    "min_lr": Argument(1e-7, 1e-6, -1e-7, "a finite number >= 0"),
    "max_lr": Argument(1e-3, 5e-3, 0.0, "a finite number > 0"),
    "warmup_steps": Argument(500, 2, -1, "a whole number >= 0"),
    "dynamic_weight_decay": Argument(True, False, "none", FLAG),
    "wd_transition_steps": Argument(1000, 1, 0, "a whole number >= 1"),
    "wd_decay_factor": Argument(0.7, 0.25, 1.5, "a finite number > 0 and <= 1"),
    "wd_min_ratio": Argument(0.1, 0.2, 2, "a finite number >= 0 and <= 1"),
    "use_spd": Argument(True, False, 0, FLAG),
    "spd_lambda": Argument(0.06, 0.5, -1, "a finite number >= 0"),
    # Not in the list of spec 1 §4, but the engine's or, as the anchor, the technique's own.
    "spd_anchor": Argument("zero", "initial", "last", "'auto' or 'zero' or 'initial'"),
    "optim_bits": Argument(8, 32, 16, "8 or 32"),
    "min_8bit_size": Argument(4096, 0, 0.5, "a whole number >= 0"),
    "bf16_rounding": Argument("stochastic", "nearest", "up", "'stochastic' or 'nearest'"),
    "nonfinite": Argument("raise", "skip", "ignore", "'raise' or 'skip'"),
    "backend": Argument("auto", "eager", "gpu", "'auto' or 'compiled' or 'eager'"),
}
SWITCHES = [key for key, argument in ARGUMENTS.items() if argument.allowed is FLAG]

each_argument = pytest.mark.parametrize("key", ARGUMENTS)
each_way = pytest.mark.parametrize("way", ["command line", "TOML"])


def said(way: str, folder: Path, *arguments: str) -> dict[str, object]:
    """Options that choose the optimizer with `arguments`, on the command line or in a file."""
    if way == "command line":
        return {"optimizer_type": "AdaptiveHinaAdamW", "optimizer_args": arguments}
    file = folder / "optimizer.toml"
    file.write_text(
        '[optimizer]\noptimizer_type = "AdaptiveHinaAdamW"\n'
        f"optimizer_args = {json.dumps(arguments)}\n"
    )
    return {"config_file": file, "optimizer_type": None}


def test_the_table_has_them_all() -> None:
    parameters = inspect.signature(AdaptiveHinaAdamW).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    del defaults["params"]
    assert defaults.pop("lr") == 1e-3
    assert defaults == {key: argument.default for key, argument in ARGUMENTS.items()}


@each_way
@each_argument
def test_an_argument_arrives_and_the_others_stay(key: str, way: str, tmp_path: Path) -> None:
    value = ARGUMENTS[key].other
    options = parse(words(**said(way, tmp_path, f"{key}={value}")))
    problems: list[str] = []
    arguments = check_optimizer(options, problems)
    assert not problems
    groups = [{"params": [torch.zeros(2, 2)], "named": ["x"]}]
    _, text, optimizer = create_optimizer(
        options.optimizer_type, groups, options.learning_rate, arguments
    )
    assert isinstance(optimizer, AdaptiveHinaAdamW)
    assert text == f"{key}={value}"
    assert type(optimizer.settings[key]) is type(value)
    expected = {each: argument.default for each, argument in ARGUMENTS.items()} | {key: value}
    assert optimizer.settings == expected | {"lr": options.learning_rate}
    acts = acting(optimizer)
    assert key in acts  # only those of a technique that is off are missing
    assert acts == {each: expected.get(each, False) for each in acts}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_both_ways_train_alike(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the switches other than by default: a technique that is off would hide its own."""
    monkeypatch.chdir(ROOT)
    given = {key: a.other for key, a in ARGUMENTS.items() if key not in SWITCHES}
    arguments = [f"{key}={value}" for key, value in given.items()]
    for way in ("command line", "TOML"):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps it for a process
        options = said(way, tmp_path, *arguments) | {"output_name": way.replace(" ", "-")}
        assert (
            train_network.main(words(dataset_config=dataset, output_dir=tmp_path, **options)) == 0
        )
    files = [tmp_path / f"{name}.safetensors" for name in ("command-line", "TOML")]
    assert same_weights(*files)
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["ss_optimizer"].endswith(f"({','.join(arguments)})")


@pytest.fixture
def refusal(
    tmp_path: Path,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """What a run says that these arguments stop before its model is loaded."""

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    def stopped(way: str, *arguments: str) -> str:
        options = said(way, tmp_path, *arguments)
        assert (
            train_network.main(words(dataset_config=dataset, output_dir=tmp_path, **options)) == 2
        )
        told = capsys.readouterr().err
        assert told.count("error: ") == 1
        return told[told.index("error: ") :]

    monkeypatch.setattr(trainer, "load_model", load)
    monkeypatch.chdir(ROOT)
    return stopped


@each_way
@each_argument
def test_an_impossible_value_is_refused(refusal: Callable[..., str], key: str, way: str) -> None:
    argument = ARGUMENTS[key]
    told = refusal(way, f"{key}={argument.impossible}")
    assert f"--optimizer_args: AdaptiveHinaAdamW: {key}={argument.impossible!r} is not " in told
    assert f"{key} must be {argument.allowed}" in told


@each_way
@pytest.mark.parametrize(
    ("written", "meant"),
    [("use_lr_mask=Ture", "True"), ("backend=egaer", "eager"), ("nonfinite=skipp", "skip")],
)
def test_a_misspelt_value(refusal: Callable[..., str], way: str, written: str, meant: str) -> None:
    assert f"Did you mean '{meant}'?" in refusal(way, written)


@each_way
@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("adaption_strength=2", "adaptation_strength"),
        ("lr_bumb=1", "lr_bump"),
        ("relation_discovery_interval=5", "relationship_discovery_interval"),
        ("warmup_step=9", "warmup_steps"),
        ("Use_LR_Mask=False", "use_lr_mask"),
    ],
)
def test_an_unknown_key(refusal: Callable[..., str], way: str, written: str, nearest: str) -> None:
    told = refusal(way, written)
    key = written.partition("=")[0]
    assert f"AdaptiveHinaAdamW has no argument '{key}' (given {written})." in told
    assert f"Did you mean '{nearest}'?" in told
    allowed = told.partition("Allowed: ")[2].splitlines()[0].rstrip(".")
    assert set(ARGUMENTS) <= set(allowed.split(", "))


@each_way
def test_a_learning_rate_among_the_arguments(refusal: Callable[..., str], way: str) -> None:
    told = refusal(way, "lr=0.1")
    assert "lr=0.1 cannot be given as an optimizer argument; it is set by --learning_rate" in told


@each_way
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["min_lr=0.01"], "min_lr=0.01 is above max_lr=0.001"),
        (["max_lr=5e-8"], "min_lr=1e-07 is above max_lr=5e-08"),
        (["lr_bump=1e-8", "warmup_steps=20000"], "Give a larger lr_bump or fewer warmup_steps"),
    ],
)
def test_values_that_do_not_go_together(
    refusal: Callable[..., str], way: str, arguments: list[str], answer: str
) -> None:
    assert answer in refusal(way, *arguments)
