"""The plugin in a real folder of sd-scripts: its own trainer, with every kind of network it has.

    SD_SCRIPTS_DIR=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/python pytest -m stock

The folder is copied; half a minute a network on two processor cores, and 2 GB of disk for a model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import rig
from rig import ROOT, Run
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = [pytest.mark.stock, pytest.mark.slow]

# LyCORIS alone: its full preset names a layer twice in newer versions, and 3.x takes for quantized
# what is not; both without the plugin.
LYCORIS = (
    "--network_module",
    "lycoris.kohya",
    "--network_args",
    "preset=attn-mlp",
    "bypass_mode=False",
)
NETWORKS: dict[str, tuple[str, ...]] = {
    "lora": ("--network_module", "networks.lora"),
    "lora conv": ("--network_module", "networks.lora", "--network_args", "conv_dim=4"),
    "lora+": ("--network_module", "networks.lora", "--network_args", "loraplus_lr_ratio=16"),
    "dylora": ("--network_module", "networks.dylora", "--network_args", "unit=2"),
    "lora_fa": ("--network_module", "networks.lora_fa"),
    "oft": ("--network_module", "networks.oft", "--network_dim", "64"),
    "lycoris lora": (*LYCORIS, "algo=lora"),
    "lycoris loha": (*LYCORIS, "algo=loha"),
    "lycoris lokr": (*LYCORIS, "algo=lokr"),
    "lycoris lokr decomposed": (*LYCORIS, "algo=lokr", "decompose_both=True", "factor=16"),
    "lycoris lokr norms": (*LYCORIS, "algo=lokr", "train_norm=True"),
    "lycoris full": (*LYCORIS, "algo=full"),
    "lycoris diag-oft": (*LYCORIS, "algo=diag-oft"),
}
HINA = ("--optimizer_type", "HinaAdamW", "--optimizer_args", "wd_transition_steps=1")


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """The tree as it is."""
    return rig.working_copy(tmp_path_factory.mktemp("stock") / "sd-scripts")


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """The tree with the plugin in it."""
    tree = rig.working_copy(tmp_path_factory.mktemp("patched") / "sd-scripts")
    patches("apply", tree)
    return tree


def patches(command: str, tree: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "patches", command, "--target", str(tree)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def must_train(run: Run, stock: Path, output: Path, *words: str) -> None:
    """Fail if a run has failed that the tree itself can do; skip what it cannot do either."""
    if run.returncode == 0:
        return
    alone = rig.train(stock, output, *words, "--optimizer_type", "AdamW", steps=1)
    if alone.returncode:
        pytest.skip(f"sd-scripts itself cannot: {error_of(alone)}")
    pytest.fail(run.log[-4000:])


def error_of(run: Run) -> str:
    """The error that a run ended with."""
    found = re.findall(r"^\w*(?:Error|Exception)\b.*", run.log, re.MULTILINE)
    return found[-1] if found else run.log[-500:]


def keys_of(adapter: Path) -> list[str]:
    with safe_open(adapter, "pt") as file:
        return list(file.keys())


def counts(keys: list[str]) -> Counter[str]:
    """How many tensors of each kind there are, by the last word of their names that tells one."""
    kinds = r"lora_down|lora_up|lokr_w1|lokr_w2|lokr_t2|w_norm|b_norm"
    return Counter(match[0] for key in keys if (match := re.search(kinds, key)))


def stats(run: Run) -> dict[str, int]:
    """`lora_stats` and `lokr_stats` of the log."""
    words = [run.line("lora_stats:"), run.line("lokr_stats:")]
    return {
        k: v
        for word in words
        for k, v in json.loads(word[: word.index("}") + 1].replace("'", '"')).items()
    }


def figures(run: Run, step: int) -> dict[str, float]:
    """What the log says of a step."""
    return {k: float(v) for k, v in re.findall(r"([\w/]+)=(\S+)", run.line(f"step {step}:"))}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_trains_with_names_and_roles(stock, patched, tmp_path, network):
    words = NETWORKS[network]
    if network == "lora+" and "loraplus" not in (stock / "networks/lora.py").read_text():
        pytest.skip("this version of sd-scripts has no LoRA+")
    run = rig.train(patched, tmp_path, *words, *HINA)
    must_train(run, stock, tmp_path / "alone", *words)
    named, total, groups = re.search(
        r"names for (\d+) of (\d+) parameters in (\d+) groups", run.log
    ).groups()
    print(f"TABLE | {network} | {named} of {total} in {groups} | {stats(run)}")
    assert named == total
    assert int(total) > 0
    found, saved = stats(run), counts(keys_of(run.adapter))
    check_counts(network, found, saved)
    check_figures(network, figures(run, 2))


def check_counts(network: str, found: dict[str, int], saved: Counter[str]) -> None:
    """What the optimizer found is what was created: what is in the file."""
    lokr_modules = found["lokr_groups"]
    if network == "dylora":  # each of the four ranks is a pair; in the file they are one
        assert found["lora_pairs"] == 4 * saved["lora_down"] > 0
    elif network == "lora_fa":  # only one half is trained
        assert found["lora_b_params"] == saved["lora_up"] > 0
        assert found["lora_a_params"] == found["lora_pairs"] == 0
    elif "lora" in network:
        assert found["lora_pairs"] == found["lora_a_params"] == saved["lora_down"] > 0
        assert found["lora_b_params"] == saved["lora_up"]
    elif "lokr" in network:
        assert found["lokr_pairs"] == lokr_modules > 0
        assert found["lokr_w1_params"] == saved["lokr_w1"]
        assert found["lokr_w2_params"] == saved["lokr_w2"] + saved["lokr_t2"]
        assert found["w_norm_params"] == found["norm_pairs"] == saved["w_norm"]
        assert (found["norm_pairs"] > 0) == ("norms" in network)
    else:
        assert not any(found.values())


def check_figures(network: str, step: dict[str, float]) -> None:
    """Scales and weight decay act: roles differ as docs/optimizers.md says they do."""
    decay = {role.split("/")[1]: v for role, v in step.items() if role.startswith("weight_decay")}
    assert all(0 < value <= 0.01 for value in decay.values())
    if network == "lora_fa":
        assert decay["lora_b"] < 0.01
    elif "lora" in network:
        ratio = 21 * (16 if network == "lora+" else 1)
        assert step["effective_lr/lora_b"] == pytest.approx(
            ratio * step["effective_lr/lora_a"], rel=0.1
        )
        assert decay["lora_a"] < 0.01
    elif "lokr" in network:
        assert step["effective_lr/lokr_w2"] > 1.5 * step["effective_lr/lokr_w1"]
        assert decay["lokr_w1"] < 0.01


def test_adaptive_trains(patched, tmp_path):
    words = ("--optimizer_type", "AdaptiveHinaAdamW", "--optimizer_args", "warmup_steps=2")
    words += ("relationship_discovery_interval=2", "max_lr=2e-3")
    run = rig.train(patched, tmp_path, *NETWORKS["lora"], *words)
    assert run.returncode == 0, run.log[-4000:]
    assert "names for 528 of 528 parameters" in run.log
    assert figures(run, 2)["lr_mask/factor"] > 0


def test_the_path_of_the_class_is_the_same_as_its_name(patched, tmp_path):
    path = "library.custom_hina_adamw_optimizer.HinaAdamWOptimizer"
    by_path = rig.train(patched, tmp_path / "path", *NETWORKS["lora"], "--optimizer_type", path)
    by_name = rig.train(
        patched, tmp_path / "name", *NETWORKS["lora"], "--optimizer_type", "hinaadamw"
    )
    assert by_path.returncode == by_name.returncode == 0
    assert same(by_path.adapter, by_name.adapter)


def test_a_saved_state_is_resumed(patched, tmp_path):
    words = (*NETWORKS["lora"], *HINA, "--save_state")
    first = rig.train(patched, tmp_path, *words, steps=2)
    assert first.returncode == 0, first.log[-4000:]
    [state] = tmp_path.glob("*-state")
    # Versions count the steps of a resumed run differently: from the first, or from the state.
    resumed = rig.train(patched, tmp_path / "next", *words, "--resume", str(state), steps=4)
    assert resumed.returncode == 0, resumed.log[-4000:]
    assert "names for 528 of 528 parameters" in resumed.log
    assert not same(first.adapter, resumed.adapter)


@pytest.mark.parametrize(
    "kind", ["AdamW", "Lion", "Prodigy", "Adafactor", "AdamW8bit", "torch.optim.RAdam"]
)
def test_its_own_optimizers_do_the_same_as_before(stock, patched, tmp_path, kind):
    words = (*NETWORKS["lora"], "--optimizer_type", kind)
    before = rig.train(stock, tmp_path / "before", *words)
    after = rig.train(patched, tmp_path / "after", *words)
    assert before.returncode == after.returncode
    if before.returncode:
        assert error_of(before) == error_of(after)
        pytest.skip(f"sd-scripts itself cannot: {error_of(before)}")
    assert same(before.adapter, after.adapter)
    assert "names for" not in after.log


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, to the bit."""
    tensors, others = load_file(one), load_file(other)
    return tensors.keys() == others.keys() and all(
        tensor.equal(others[name]) for name, tensor in tensors.items()
    )


def test_its_own_tests_come_out_the_same(stock, patched):
    if not (stock / "tests").is_dir():
        pytest.skip("this version of sd-scripts has no tests")
    before, after = own_tests(stock), own_tests(patched)
    print("TABLE | own tests |", Counter(line.split()[0] for line in before))
    assert any(line.startswith("PASSED") for line in before)
    assert after == before


def own_tests(tree: Path) -> list[str]:
    """The outcome of each of the tree's tests."""
    done = subprocess.run(
        [rig.stock_python(), "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "tests"],
        cwd=tree,
        env=rig.environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    outcomes = re.findall(
        r"^(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b\s+\S+", done.stdout, re.MULTILINE
    )
    return sorted(outcomes)


def test_networks_of_other_models_have_names(patched):
    """SDXL, SD3, Flux and the others, whose trainers derive from the one that was tried above."""
    done = subprocess.run(
        [rig.stock_python(), str(Path(__file__).with_name("make_networks.py"))],
        cwd=patched,
        env=rig.environment(),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for case, network in told.items():
        names = [name for group in network["names"] for name in group]
        info = network["info"]
        print(f"TABLE | {case} | {len(names)} in {len(network['names'])} | {info['lora_stats']}")
        trained = {name for name, trains in network["expected"].items() if trains}
        assert set(names) == trained if "lora_fa" not in case else set(names) < trained, case
        assert network["kept"] == network["rates"], case
        if "lora_fa" not in case and "oft" not in case:
            assert info["lora_stats"]["lora_pairs"] == len(names) // 2, case
            assert network["report"]["weight_decay/lora_a"] < 0.01, case
    for script in stock_scripts(patched):
        assert re.search(r"class \w+\((?:train_network\.)?NetworkTrainer\)", script.read_text()), (
            script
        )


def stock_scripts(tree: Path) -> list[Path]:
    """The scripts that train adapters for other models than Stable Diffusion 1 and 2."""
    scripts = list(tree.glob("*_train_network.py"))
    assert scripts
    return scripts


def test_zz_revert_gives_back_every_byte(patched):
    """Last: after all these runs, what is left is what git knows."""
    patches("revert", patched)
    seen = subprocess.run(
        ["git", "status", "--porcelain", "--ignored"], cwd=patched, capture_output=True, text=True
    ).stdout.splitlines()
    compiled = [line for line in seen if line.endswith("__pycache__/")]
    assert seen == compiled
    assert not (patched / "library/optim").exists()
    subprocess.run(["git", "diff", "--exit-code"], cwd=patched, check=True, capture_output=True)
