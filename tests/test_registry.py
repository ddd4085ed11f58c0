"""Names and arguments of optimizers, refused or accepted before anything is built."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.arguments import OptimizerArgumentError
from library.optim.cameamp import CameAMP
from library.optim.registry import (
    MissingPackageError,
    UnknownOptimizerError,
    check_arguments,
    create_optimizer,
    known_names,
    of_family,
    parse_optimizer_args,
    relative_step,
    resolve,
)


def one_parameter() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([1.5, 1.5]))]


# Class paths as sd-scripts' own test of get_optimizer expects them.
STOCK = [
    ("", "torch.optim.adamw.AdamW"),
    ("AdamW", "torch.optim.adamw.AdamW"),
    ("SGD", "torch.optim.sgd.SGD"),
    ("SGDNesterov", "torch.optim.sgd.SGD"),
    ("AdaFactor", "transformers.optimization.Adafactor"),
    ("AdamW8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
    ("Lion8bit", "bitsandbytes.optim.lion.Lion8bit"),
    ("PagedAdamW", "bitsandbytes.optim.adamw.PagedAdamW"),
    ("PagedAdamW8bit", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
    ("PagedAdamW32bit", "bitsandbytes.optim.adamw.PagedAdamW32bit"),
    ("PagedLion8bit", "bitsandbytes.optim.lion.PagedLion8bit"),
    ("SGDNesterov8bit", "bitsandbytes.optim.sgd.SGD8bit"),
    ("AdEMAMix8bit", "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
    ("PagedAdEMAMix8bit", "bitsandbytes.optim.ademamix.PagedAdEMAMix8bit"),
    ("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
    ("torch.optim.RAdam", "torch.optim.radam.RAdam"),
    ("transformers.Adafactor", "transformers.optimization.Adafactor"),
    ("Lion", "lion_pytorch.lion_pytorch.Lion"),
    ("DAdaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"),
    ("DAdaptAdamPreprint", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"),
    ("DAdaptAdaGrad", "dadaptation.dadapt_adagrad.DAdaptAdaGrad"),
    ("DAdaptAdam", "dadaptation.dadapt_adam.DAdaptAdam"),
    ("DAdaptAdan", "dadaptation.dadapt_adan.DAdaptAdan"),
    ("DAdaptAdanIP", "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP"),
    ("DAdaptLion", "dadaptation.dadapt_lion.DAdaptLion"),
    ("DAdaptSGD", "dadaptation.dadapt_sgd.DAdaptSGD"),
    ("Prodigy", "prodigyopt.prodigy.Prodigy"),
    ("RAdamScheduleFree", "schedulefree.radam_schedulefree.RAdamScheduleFree"),
    ("AdamWScheduleFree", "schedulefree.adamw_schedulefree.AdamWScheduleFree"),
    ("SGDScheduleFree", "schedulefree.sgd_schedulefree.SGDScheduleFree"),
]
OPTIONAL = ("bitsandbytes", "lion_pytorch", "dadaptation", "prodigyopt", "schedulefree")


@pytest.mark.parametrize("written", [str, str.lower, str.upper])
@pytest.mark.parametrize(("name", "path"), STOCK)
def test_every_stock_name_resolves(name, path, written):
    spec = resolve(name if "." in name else written(name))
    assert path.split(".")[0] == spec.module.split(".")[0]
    assert path.rsplit(".", 1)[1] == spec.attribute


@pytest.mark.parametrize(("name", "path"), STOCK)
def test_stock_optimizers_are_built(name, path):
    if path.startswith(OPTIONAL):
        pytest.importorskip(path.split(".")[0])
    class_path, _, optimizer = create_optimizer(name, one_parameter(), 1e-3, {})
    assert class_path == path
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_nesterov_is_set_with_stocks_momentum():
    _, text, optimizer = create_optimizer("sgdnesterov", one_parameter(), 1e-3, {})
    assert text == "momentum=0.9"
    assert optimizer.defaults["nesterov"] is True
    _, text, optimizer = create_optimizer("SGDNesterov", one_parameter(), 1e-3, {"momentum": 0.5})
    assert optimizer.defaults["momentum"] == 0.5
    with pytest.raises(OptimizerArgumentError, match="nesterov=False cannot be given"):
        create_optimizer("SGDNesterov", one_parameter(), 1e-3, {"nesterov": False})


def test_adafactor_follows_stocks_rules():
    groups = [{"params": one_parameter(), "lr": 1e-4}]
    _, text, optimizer = create_optimizer("AdaFactor", groups, 1e-3, {})
    assert text == "relative_step=True"
    assert optimizer.param_groups[0]["lr"] is None
    assert groups[0]["lr"] == 1e-4  # the caller's groups are left alone
    _, _, optimizer = create_optimizer("adafactor", one_parameter(), 1e-3, {"relative_step": False})
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert relative_step("adafactor", {"relative_step": False, "warmup_init": True})
    assert not relative_step("adafactor", {"relative_step": False})
    assert not relative_step("AdamW", {})


def test_torchs_own_adafactor_keeps_its_learning_rate():
    groups = [{"params": one_parameter(), "lr": 1e-4}]
    _, text, optimizer = create_optimizer("torch.optim.Adafactor", groups, 1e-3, {"d": 2.0})
    assert text == "d=2.0"
    assert isinstance(optimizer, torch.optim.Adafactor)
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert not relative_step("torch.optim.Adafactor", {})
    assert relative_step("transformers.Adafactor", {})


def test_dadaptation_advises(caplog):
    pytest.importorskip("prodigyopt")
    groups = [{"params": one_parameter(), "lr": lr} for lr in (1e-4, 1.0)]
    create_optimizer("Prodigy", groups, 1e-4, {})
    assert "1.0 is recommended" in caplog.text
    assert "only the first" in caplog.text


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("HinaAdamW", HinaAdamWOptimizer),
        ("hinaadamwoptimizer", HinaAdamWOptimizer),
        ("CustomAdamW", HinaAdamWOptimizer),
        ("AdaptiveHinaAdamW", AdaptiveHinaAdamW),
        ("adaptivehinaadamw", AdaptiveHinaAdamW),
    ],
)
def test_our_own(name, cls):
    params = [("x.w_norm", one_parameter()[0])]
    args = parse_optimizer_args(["use_agr=False", "spd_anchor=initial"])
    path, text, optimizer = create_optimizer(name, params, 1e-3, args)
    assert path == f"{cls.__module__}.{cls.__name__}"
    assert text == "use_agr=False,spd_anchor=initial"
    assert type(optimizer) is cls
    assert resolve(path).load() is cls


@pytest.mark.parametrize(
    "name",
    [
        "automagic_cameamp",
        "Automagic_CameAMP_8bit",
        "Automagic_CameAMP_COptim8bit",
        "Automagic_CameAMP_Improved_8Bit",
        "RefactoredAutomagicCameAMP",
        "library.custom_automagic_cameamp_optimizer.Automagic_CameAMP",
        "automagic_cameamp_refactored.RefactoredAutomagicCameAMP",
    ],
)
def test_members_of_the_cameamp_family(name):
    """By short name in any letter case or by path; checked before they are built."""
    cls = resolve(name).load()
    assert issubclass(cls, CameAMP)
    assert of_family(name)
    check_arguments(cls, {"warmup_steps": 10, "profile": "balanced"})
    with pytest.raises(OptimizerArgumentError, match=r"warmup_stepps.*Did you mean 'warmup_steps'"):
        check_arguments(cls, {"warmup_stepps": 10})
    with pytest.raises(OptimizerArgumentError, match=r"memory_optimised.*'memory_optimized'"):
        check_arguments(cls, {"profile": "memory_optimised"})
    kind, _, optimizer = create_optimizer(name, [torch.nn.Parameter(torch.ones(2))], 1e-4, {})
    assert type(optimizer) is cls
    assert kind.endswith(cls.__name__)
    assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(("name", "hint"), [("HinaAdam", "HinaAdamW"), ("adamw9bit", "AdamW8bit")])
def test_unknown_names_are_refused_with_the_nearest(name, hint):
    with pytest.raises(UnknownOptimizerError, match=f"'{name}'. Did you mean '{hint}'"):
        resolve(name)
    assert hint in known_names()


def test_missing_packages_modules_and_classes():
    with pytest.raises(MissingPackageError, match="pip install no_such_package"):
        resolve("no_such_package.optim.Thing").load()
    with pytest.raises(UnknownOptimizerError, match=r"no module 'torch\.optimum'"):
        resolve("torch.optimum.Adam").load()
    with pytest.raises(UnknownOptimizerError, match=r"'torch\.optim' has no class 'AdamV'.*Adam"):
        resolve("torch.optim.AdamV").load()


def test_a_missing_package_is_called_what_pip_calls_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(MissingPackageError, match="pip install lion-pytorch"):
        resolve("Lion").load()


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        (None, {}),
        (["betas=0.9,0.99", "eps=1e-7"], {"betas": (0.9, 0.99), "eps": 1e-7}),
        (["profile=balanced"], {"profile": "balanced"}),
        (["a=True", "b=None", "c='x y'"], {"a": True, "b": None, "c": "x y"}),
        (["a=[1, 5]", "a=2"], {"a": 2}),
    ],
)
def test_arguments_parse(arguments, parsed):
    assert parse_optimizer_args(arguments) == parsed


@pytest.mark.parametrize("argument", ["foo", "=3", "a b=1", "betas=(0.9,", "x="])
def test_malformed_arguments_are_named(argument):
    with pytest.raises(OptimizerArgumentError) as error:
        parse_optimizer_args([argument])
    assert f"'{argument}'" in str(error.value)


@pytest.mark.parametrize(
    ("cls", "kwargs", "words"),
    [
        (
            HinaAdamWOptimizer,
            {"use_arg": True},
            ["use_arg=True", "Did you mean 'use_agr'", "tam_beta"],
        ),
        (HinaAdamWOptimizer, {"use_agr": "false"}, ["use_agr='false'", "True or False", "'False'"]),
        (HinaAdamWOptimizer, {"optim_bits": 4}, ["optim_bits=4", "8 or 32"]),
        (HinaAdamWOptimizer, {"lr": 1e-3}, ["lr=0.001", "--learning_rate"]),
        (torch.optim.AdamW, {"weight_deca": 1}, ["weight_deca", "'weight_decay'", "amsgrad"]),
        (torch.optim.AdamW, {"betas": (0.9, 1.5)}, ["betas=(0.9, 1.5)", "< 1"]),
        (torch.optim.AdamW, {"amsgrad": "yes"}, ["amsgrad='yes'", "True or False"]),
        (torch.optim.AdamW, {"eps": "small"}, ["eps='small'", "a finite number >= 0"]),
        (torch.optim.SGD, {"dampening": "x"}, ["dampening='x'", "a finite number"]),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(cls, kwargs, words):
    with pytest.raises(OptimizerArgumentError) as error:
        check_arguments(cls, kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_right_arguments_pass():
    check_arguments(HinaAdamWOptimizer, {"betas": [0.9, 0.99], "weight_decay": 0, "use_tam": False})
    check_arguments(torch.optim.AdamW, {"betas": (0.9, 0.99), "fused": None, "amsgrad": True})

    class Anything(torch.optim.SGD):
        def __init__(self, params, **kwargs):
            super().__init__(params, **kwargs)

    check_arguments(Anything, {"whatever": 1})


@pytest.mark.parametrize("short_name", ["HinaAdamW", "AdaptiveHinaAdamW"])
def test_the_package_stands_alone(tmp_path, short_name):
    """It is copied into other trees: nothing of `library` beside it may be needed."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").touch()
    source = Path(__file__).parent.parent / "library"
    (tmp_path / "library" / "optim").symlink_to(source / "optim")
    name = resolve(short_name).module.rpartition(".")[2] + ".py"
    (tmp_path / "library" / name).symlink_to(source / name)
    code = (
        f"from library.optim.registry import resolve; resolve('{short_name}').load()\n"
        "import library.optim.telemetry, sys\n"
        "heavy = {'bitsandbytes', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
