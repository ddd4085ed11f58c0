"""Training in a folder of sd-scripts with the plugin in it, by the miniature's own script."""

import json
import subprocess
import sys
from typing import Any

import pytest
from sd_scripts_copies import ROOT, miniature, patches

# Calls the tree's own trainer once for each list of arguments, and tells what came of it.
_RUNS = """
import json, logging, re, sys
import torch
import sdxl_train_network, train_network

class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

logging.getLogger().addHandler(Lines())
logging.getLogger().setLevel(logging.INFO)
logging.captureWarnings(True)
trainers = {
    "sd": train_network.NetworkTrainer, "sdxl": sdxl_train_network.SdxlNetworkTrainer
}
told = []
for script, *words in json.loads(sys.argv[1]):
    lines = []
    trainer = trainers[script]()
    run = {"lines": lines}
    told.append(run)
    try:
        trainer.train(train_network.setup_parser().parse_args(words))
    except Exception as error:
        run["error"] = re.sub(" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
        continue
    groups = trainer.optimizer.param_groups
    run["class"], run["arguments"], run["loss"] = trainer.described
    run["groups"] = [
        {"lr": g["lr"], "keys": sorted(g), "names": list(g.get("param_names", []))} for g in groups
    ]
    run["saved"] = {k: v.double().sum().item() for k, v in trainer.network.state_dict().items()}
print(json.dumps(told))
"""

LORA = ["--network_module", "networks.lora", "--learning_rate", "1e-3"]
THIRD_PARTY = ["--network_module", "networks.third_party", "--learning_rate", "1e-3"]


def train(tree, runs: list[list[str]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _RUNS, json.dumps(runs)],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hina(network, *words, script="sd", kind="HinaAdamW"):
    return [script, *network, "--optimizer_type", kind, *words]


RUNS = {
    "plain": hina(LORA),
    "lora+": hina(LORA, "--network_args", "loraplus_lr_ratio=16"),
    "two rates": hina(LORA, "--unet_lr", "1e-4", "--text_encoder_lr", "5e-5"),
    "sdxl": hina(LORA, script="sdxl"),
    "any case": hina(LORA, kind="hinaadamw"),
    "alias": hina(LORA, kind="CustomAdamW"),
    "third party": hina(THIRD_PARTY),
    "adaptive": hina(LORA, kind="AdaptiveHinaAdamW"),
    "path": hina(LORA, kind="library.custom_hina_adamw_optimizer.HinaAdamWOptimizer"),
    "bare word": hina(LORA, "--optimizer_args", "spd_anchor=zero", "optim_bits=32"),
    "unknown key": hina(LORA, "--optimizer_args", "use_grans=True"),
    "not a word": hina(LORA, "--optimizer_args", "spd_anchor=ze ro"),
    "contradiction": hina(LORA, "--use_8bit_adam"),
    "fused": hina(LORA, "--fused_backward_pass"),
    "cameamp": hina(LORA, kind="Automagic_CameAMP8bit"),
}
STOCK = {
    "AdamW": ["sd", *LORA],
    "SGD": ["sd", *LORA, "--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9"],
    "path": ["sd", *LORA, "--optimizer_type", "torch.optim.RAdam"],
    "bitsandbytes": ["sd", *LORA, "--optimizer_type", "AdamW8bit"],
    "unknown": ["sd", *LORA, "--optimizer_type", "NoSuch"],
    "unknown path": ["sd", *LORA, "--optimizer_type", "no_such_module.Optimizer"],
    "unknown class": ["sd", *LORA, "--optimizer_type", "torch.optim.NoSuch"],
    "word": ["sd", *LORA, "--optimizer_type", "SGD", "--optimizer_args", "maximize=false"],
}


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    tree = miniature(tmp_path_factory.mktemp("patched") / "sd-scripts")
    assert patches("apply", "--target", tree).returncode == 0
    return tree


@pytest.fixture(scope="module")
def runs(patched):
    told = train(patched, [*RUNS.values(), *STOCK.values()])
    return dict(zip([*RUNS, *(f"stock {name}" for name in STOCK)], told, strict=True))


def log(run):
    return "\n".join(run["lines"])


@pytest.mark.parametrize(
    "name", ["plain", "lora+", "two rates", "sdxl", "any case", "alias", "path"]
)
def test_every_parameter_of_every_group_has_its_name(runs, name):
    run = runs[name]
    assert run["class"].endswith("custom_hina_adamw_optimizer.HinaAdamWOptimizer")
    names = [name for group in run["groups"] for name in group["names"]]
    assert sorted(names) == sorted(run["saved"])
    assert f"names for 12 of 12 parameters in {len(run['groups'])} groups" in log(run)
    assert "'lora_pairs': 6" in log(run)
    assert not any("given no parameter names" in line for line in run["lines"])


def test_loraplus_keeps_its_ratio_and_the_names_of_its_halves(runs):
    slow = {name: g["lr"] for g in runs["lora+"]["groups"] for name in g["names"]}
    assert {lr for name, lr in slow.items() if "lora_up" in name} == {16e-3}
    assert {lr for name, lr in slow.items() if "lora_down" in name} == {1e-3}


def test_learning_rates_of_the_parts_are_kept(runs):
    rates = {
        name.split("_")[1]: g["lr"] for g in runs["two rates"]["groups"] for name in g["names"]
    }
    assert rates == {"te": 5e-5, "unet": 1e-4}


def test_a_third_partys_network_has_names_too(runs):
    run = runs["third party"]
    assert "names for 7 of 8 parameters in 1 groups" in log(run)  # one is outside of the network
    assert "'lokr_pairs': 2" in log(run)
    assert "'norm_pairs': 1" in log(run)
    assert "group0.param7" in run["groups"][0]["names"]


def test_the_log_shows_the_role_features_at_work(runs):
    """Halves of a LoRA have rates of their own, and weight decay follows the role."""
    [line] = [line for line in runs["plain"]["lines"] if line.startswith("step 10:")]
    figures = {k: float(v) for k, v in (word.split("=") for word in line.split()[2:])}
    assert figures["effective_lr/lora_b"] == pytest.approx(
        21 * figures["effective_lr/lora_a"], rel=0.05
    )
    assert figures["effective_lr/lora_a"] < 1e-3
    assert figures["weight_decay/lora_a"] == 0.01
    [line] = [line for line in runs["third party"]["lines"] if line.startswith("step 10:")]
    figures = {k: float(v) for k, v in (word.split("=") for word in line.split()[2:])}
    assert figures["effective_lr/lokr_w2"] > 5 * figures["effective_lr/lokr_w1"]
    assert figures["effective_lr/regular"] == figures["effective_lr/w_norm"] == 1e-3


def test_short_names_in_any_case_and_paths_are_the_same_optimizer(runs):
    losses = {runs[name]["loss"] for name in ("plain", "any case", "alias", "path", "sdxl")}
    assert len(losses) == 1


def test_adaptive_trains(runs):
    assert runs["adaptive"]["class"].endswith("AdaptiveHinaAdamW")
    assert "relations are looked for" in log(runs["adaptive"])
    assert "early warm-up until step 250" in log(runs["cameamp"])


def test_bare_words_and_mistakes_in_arguments(runs):
    assert runs["bare word"]["arguments"] == "spd_anchor=zero,optim_bits=32"
    assert "Did you mean 'use_grams'?" in runs["unknown key"]["error"]
    assert "spd_anchor=ze ro" in runs["not a word"]["error"]
    assert "--use_8bit_adam does not go with" in runs["contradiction"]["error"]
    assert "--fused_backward_pass does not go with" in runs["fused"]["error"]


def test_stocks_optimizers_do_the_same_as_without_the_plugin(runs, tmp_path):
    unpatched = train(miniature(tmp_path / "stock"), list(STOCK.values()))
    for name, expected in zip(STOCK, unpatched, strict=True):
        assert runs[f"stock {name}"] == expected, name
    assert "No bitsandbytes" in runs["stock bitsandbytes"]["error"]
    assert "names" in runs["stock AdamW"]["groups"][0]
    assert runs["stock AdamW"]["groups"][0]["names"] == []


def test_the_files_alone_work_by_their_path_and_say_what_is_off(tmp_path):
    """Without any patch: library/optim and library/custom_*.py copied by hand."""
    tree = miniature(tmp_path / "sd-scripts")
    copied = [*(ROOT / "library/optim").rglob("*.*"), *(ROOT / "library").glob("custom_*.py")]
    for file in copied:
        if "__pycache__" not in file.parts:
            target = tree / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    [run] = train(tree, [RUNS["path"]])
    assert run["class"].endswith("HinaAdamWOptimizer")
    assert any("given no parameter names" in line for line in run["lines"])
    assert not any(name for group in run["groups"] for name in group["names"])


def test_the_signature_is_stocks(patched):
    program = (
        "import inspect, library.train_util as t; "
        "print(inspect.signature(t.get_optimizer), t.get_optimizer.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=patched, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("(args, trainable_params) -> ")
    assert done.stdout.endswith("get_optimizer\n")
