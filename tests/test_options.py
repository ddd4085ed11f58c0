"""The options: the same command line as stock's, and answers to mistakes in it."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from pathlib import Path

import pytest

from library.training.dataset_keys import DATASET_KEYS, SUBSET_KEYS
from library.training.errors import UserError
from library.training.options import OPTIONS, Options, setup_parser
from library.training.options.fields import int_or_float
from library.training.refusals import REFUSED

STOCK = json.loads(
    (Path(__file__).parent / "data" / "stock_train_network_options.json").read_text("utf-8")
)
EXTRAS = {
    "skip_broken_images",
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "disable_mmap_load_safetensors",
}
ACTIONS = {string: action for action in setup_parser()._actions for string in action.option_strings}


@pytest.mark.parametrize("stock", STOCK, ids=lambda stock: stock["options"][0])
def test_option_is_stocks(stock: dict) -> None:
    action = ACTIONS[stock["options"][0]]
    kind = "flag" if isinstance(action, argparse._StoreTrueAction) else action.type.__name__
    assert action.option_strings == stock["options"]
    assert kind == stock["kind"]
    assert action.nargs == stock["nargs"]
    assert action.default == stock["default"]
    assert type(action.default) is type(stock["default"])
    assert action.choices == stock["choices"]


def test_nothing_but_stocks_options_and_ours() -> None:
    names = {stock["options"][0].removeprefix("--") for stock in STOCK}
    assert len(names) == 193
    assert OPTIONS.keys() - names == EXTRAS


def test_fields_parser_and_table_agree() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    parsed = vars(setup_parser().parse_args([]))
    assert fields == parsed == {name: option.default for name, option in OPTIONS.items()}


def test_help_says_something_of_its_own_about_each_option() -> None:
    texts = [option.help for option in OPTIONS.values()]
    assert all(8 <= len(text) <= 200 for text in texts)
    assert len(set(texts)) == len(texts)
    shown = setup_parser().format_help()
    assert all(option.flag in shown for option in OPTIONS.values())


def test_every_kind_of_value_is_parsed() -> None:
    words = "--network_dim 8 --network_alpha 4 --cache_latents --optimizer_args a=1 b=2"
    words += " --text_encoder_lr 1e-4 2e-4 --dataset_config data.toml --lr_warmup_steps 5%"
    parsed = setup_parser().parse_args(words.split())
    assert (parsed.network_dim, parsed.network_alpha, parsed.cache_latents) == (8, 4.0, True)
    assert parsed.optimizer_args == ["a=1", "b=2"]
    assert parsed.text_encoder_lr == [1e-4, 2e-4]
    assert parsed.dataset_config == Path("data.toml")
    assert parsed.lr_warmup_steps == pytest.approx(0.05)


def test_abbreviations_work_as_in_stock() -> None:
    assert setup_parser().parse_args(["--network_di", "8"]).network_dim == 8


@pytest.mark.parametrize(
    ("word", "value"),
    [("500", 500), ("0.05", 0.05), ("5%", 0.05), ("0", 0.0), ("100.0", 100), ("1", 1)],
)
def test_steps_and_ratios(word: str, value: float) -> None:
    assert int_or_float(word) == pytest.approx(value)
    assert type(int_or_float(word)) is type(value)


@pytest.mark.parametrize("word", ["1.5", "many", "x%", ""])
def test_what_is_neither_steps_nor_ratio(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        int_or_float(word)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--lerning_rate 1e-4", "--lerning_rate is not an option. Did you mean --learning_rate?"),
        ("--network-dims=4", "--network-dims is not an option. Did you mean --network_dim?"),
        ("--qqq", "--qqq is not an option. --help lists all options."),
        ("my pictures", "'my' belongs to no option"),
        ("--network_dim four", "--network_dim: invalid int value: 'four'"),
        ("--network_dim", "--network_dim: expected one argument"),
        ("--lr_warmup_steps soon", "--lr_warmup_steps: 'soon' is neither"),
        ("--loss_type l3", "--loss_type l3: choose one of l1, l2, huber, smooth_l1."),
        ("--loss_type fourier", "--loss_type fourier: the Fourier feature loss compares images"),
        ("--max_token_length 75", "--max_token_length 75: 75 is what you get without"),
        ("--network_d 4", "ambiguous option: --network_d could match"),
    ],
)
def test_mistakes_are_answered_in_one_line(words: str, answer: str) -> None:
    with pytest.raises(UserError) as caught:
        setup_parser().parse_args(words.split())
    assert str(caught.value).startswith(answer) or answer in str(caught.value).splitlines()[1]


def test_all_unknown_options_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        setup_parser().parse_args(["--lerning_rate", "1", "--unet_lrr", "2"])
    assert "--learning_rate?" in str(caught.value)
    assert "--unet_lr?" in str(caught.value)


def test_a_stock_namespace_becomes_options() -> None:
    stock = argparse.Namespace(
        network_dim=8,
        dataset_config=Path("data.toml"),
        resolution=(512, 768),
        text_encoder_lr=1e-4,
        my_own=3,
    )
    options = Options.from_namespace(stock)
    assert options.network_dim == 8
    assert options.dataset_config == "data.toml"
    assert options.resolution == "512,768"
    assert options.text_encoder_lr == [1e-4]
    assert options.learning_rate == 2e-6  # a default the namespace lacks
    assert vars(options)["my_own"] == 3
    assert options.given >= {"network_dim", "my_own"}
    assert "learning_rate" not in options.given


# Modules that check options, settle them or tell about them: to be named there is not to act.
ABOUT_OPTIONS = {"option_checks.py", "option_notes.py", "settle.py", "refusals.py", "metadata.py"}
# Options that act although no other module reads them as an attribute of the options.
READ_BY_NAME = {
    # settle.py turns them into others.
    *("use_8bit_adam", "use_lion_optimizer", "cache_text_encoder_outputs_to_disk"),
    # What they ask for is so in any case; option_notes.py says it, and the help of --sdpa.
    *("sdpa", "xformers", "mem_eff_attn", "lowram", "highvram", "tokenizer_cache_dir"),
    *("ddp_gradient_as_bucket_view", "ddp_static_graph", "persistent_data_loader_workers"),
    # config.py reads them among the words that were typed.
    *("config_file", "output_config"),
    # They are for the file's header alone.
    *("no_metadata", "training_comment"),
    *(name for name in OPTIONS if name.startswith("metadata_")),
}
# The dataset config's name for an option, where it has another one.
DATASET_NAMES = {"dataset_repeats": "num_repeats", "train_batch_size": "batch_size"}


def attributes_read() -> tuple[set[str], set[str]]:
    """The attributes that the sources read: those of options, and those of anything."""
    root = Path(__file__).parent.parent
    sources = [*root.glob("*.py"), *(root / "library").rglob("*.py")]
    of_options, of_anything = set(), set()
    for file in sources:
        if "options" in file.parts or file.name in ABOUT_OPTIONS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=owner, attr=name, ctx=ast.Load()):
                    pass
                case ast.Call(ast.Name("getattr"), [owner, ast.Constant(str(name)), *_]):
                    pass
                case _:
                    continue
            of_anything.add(name)
            match owner:
                case ast.Name("options" | "args") | ast.Attribute(attr="options"):
                    of_options.add(name)
    return of_options, of_anything


def test_every_option_is_read_somewhere() -> None:
    """An option is refused, or read from the options, or by way of a dataset's description."""
    of_options, of_anything = attributes_read()
    assert READ_BY_NAME & of_options == set()
    for name in OPTIONS.keys() - REFUSED.keys() - READ_BY_NAME - of_options:
        key = DATASET_NAMES.get(name, name)
        assert key in {**DATASET_KEYS, **SUBSET_KEYS}, name
        assert key in of_anything, name


def test_changed_options_leave_the_original_alone() -> None:
    options = Options.from_values({"network_dim": 8}, notes=["a note"])
    other = options.changed({"network_dim": 4})
    assert (options.network_dim, other.network_dim) == (8, 4)
    assert (other.given, other.notes) == (options.given, options.notes)
