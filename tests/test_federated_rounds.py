"""A federated run without processes: what a round takes and refuses, keeps and goes on from."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from federated_runs import QUICK
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from PIL import Image

from library.training.errors import UserError
from lora.federated import __main__ as command
from lora.federated.client import FederatedClient, seed_of
from lora.federated.journal import STATE, Journal, Round
from lora.federated.report import draw
from lora.federated.roster import Roster
from lora.federated.settings import DEFAULT_CONFIG, Settings
from lora.federated.strategy import Rounds, problem_of
from lora.federated.wire import Traffic

SHAPES = {"m.lora_A.weight": (4, 30), "m.lora_B.weight": (50, 4), "classifier.bias": (10,)}


def tensors(value: float = 0.0) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def settings(**given: Any) -> Settings:
    return Settings.of_file(DEFAULT_CONFIG, **{**QUICK, **given})


class Proxy:
    """One of Flower's clients, as the roster sees it."""

    def __init__(self, cid: str, name: str = "", fingerprint: str = "same") -> None:
        self.cid, self.told = cid, {"name": name or cid, "fingerprint": fingerprint}

    def get_properties(self, *_: Any) -> Any:
        return SimpleNamespace(properties=self.told)


class Gone(Proxy):
    def get_properties(self, *_: Any) -> Any:
        raise ConnectionError("gone")


class Wire:
    """A relay on which everybody has sent and received as much as it was told."""

    def __init__(self) -> None:
        self.moved: dict[str, Traffic] = {}

    def claim(self, cid: str) -> None:
        self.moved[cid] = Traffic(0, 0)

    def traffic(self, cid: str) -> Traffic:
        return self.moved[cid]


class Model:
    """A server's model that takes anything."""

    def set_parameters(self, arrays: Any) -> None:
        self.arrays = arrays

    def evaluate(self, *_: Any) -> dict[str, float]:
        return {"loss": 1.0, "accuracy": 0.5}


def roster(*proxies: Proxy) -> Roster:
    made = Roster(Wire(), "same")  # type: ignore[arg-type]
    for proxy in proxies:
        made.register(proxy)  # type: ignore[arg-type]
    return made


def answer(arrays: list[np.ndarray], pictures: int = 10) -> FitRes:
    status = Status(Code.OK, "")
    return FitRes(status, ndarrays_to_parameters(arrays), pictures, {"loss": 1.0})


def rounds(folder: Path, chosen: Settings, *names: str) -> tuple[Rounds, list[Proxy]]:
    proxies = [Proxy(name) for name in names]
    journal = Journal.of_folder(folder, chosen, tensors())
    none = SimpleNamespace(images=None, labels=None)
    made = Rounds(chosen, Model(), none, roster(*proxies), journal)  # type: ignore[arg-type]
    begun = made.initialize_parameters(made.roster)
    assert begun is not None
    made.evaluate(0, begun)
    invited = made.configure_fit(1, begun, made.roster)
    assert [proxy.cid for proxy, _ in invited] == sorted(names)
    assert all(ins.config == {"round": made.now.number} for _, ins in invited)
    return made, proxies


WRONG = [
    (lambda a: a[:-1], "2 of 3 tensors"),
    (
        lambda a: [a[0][:, 1:], *a[1:]],
        r"'m.lora_A.weight' has shape \(4, 29\) instead of \(4, 30\)",
    ),
    (lambda a: [a[0], a[1] * np.float32("nan"), a[2]], "'m.lora_B.weight' holds NaN"),
    (lambda a: [a[0], a[1], a[2] + np.float32("inf")], "'classifier.bias' holds NaN or infinity"),
    (lambda a: [a[0].astype(np.int64), *a[1:]], "int64 instead of floating-point"),
    (lambda a: [], "0 of 3 tensors"),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_what_cannot_be_averaged_is_told(change, told, tmp_path):
    import re

    arrays = list(tensors(1.0).values())
    assert problem_of(arrays, tensors()) is None
    problem = problem_of(change(arrays), tensors())
    assert problem is not None
    assert re.search(told, problem)
    # And in a round: the other client's answer is what comes out.
    chosen = settings(clients=2, min_clients=1)
    made, (bad, good) = rounds(tmp_path, chosen, "client-0", "client-1")
    results = [(bad, answer(change(arrays))), (good, answer(list(tensors(3.0).values())))]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    assert averaged is not None
    assert all((array == 3.0).all() for array in parameters_to_ndarrays(averaged))
    assert made.now.left_out == {"client-0": problem}


def test_errors_pictures_and_garbage(tmp_path):
    chosen = settings(clients=3, min_clients=2)
    made, proxies = rounds(tmp_path, chosen, "client-0", "client-1", "client-2")
    arrays = list(tensors(1.0).values())
    failed = answer(arrays)
    failed.status = Status(Code.FIT_NOT_IMPLEMENTED, "out of memory")
    torn = answer(arrays)
    torn.parameters.tensors[0] = b"no array"
    results = [(proxies[1], answer(arrays, pictures=0)), (proxies[2], torn)]
    averaged, _ = made.aggregate_fit(1, results, [(proxies[0], failed)])  # type: ignore[arg-type]
    assert averaged is None, "fewer sound answers than min_clients change nothing"
    left_out = made.now.left_out
    assert left_out["client-0"] == "it answers with an error: out of memory"
    assert left_out["client-1"] == "it has trained on 0 pictures"
    assert left_out["client-2"].startswith("its answer cannot be read")


def test_means_are_weighted_by_pictures(tmp_path):
    made, proxies = rounds(tmp_path, settings(clients=2), "client-0", "client-1")
    results = [
        (proxies[0], answer(list(tensors(1.0).values()), pictures=30)),
        (proxies[1], answer(list(tensors(5.0).values()), pictures=10)),
    ]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    assert all((array == 2.0).all() for array in parameters_to_ndarrays(averaged))
    made.evaluate(1, averaged)
    assert made.journal.rounds[-1].clients["client-0"]["pictures"] == 30


def test_differential_privacy_clips_and_adds_noise(tmp_path):
    """Flower's: each change is cut to the norm `dp_clip`; noise is `dp_noise`·`dp_clip`/clients."""
    chosen = settings(clients=2, dp_noise=0.5, dp_clip=2.0)
    made, proxies = rounds(tmp_path, chosen, "client-0", "client-1")
    arrays = list(tensors(100.0).values())
    results = [(proxies[0], answer(arrays, 1)), (proxies[1], answer(arrays, 1000))]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    numbers = np.concatenate([array.ravel() for array in parameters_to_ndarrays(averaged)])
    mean = 2.0 / math.sqrt(numbers.size)
    assert numbers.mean() == pytest.approx(mean, abs=4 * 0.5 / math.sqrt(numbers.size))
    assert numbers.std() == pytest.approx(0.5, rel=0.15)
    made.evaluate(1, averaged)
    assert all(array.dtype == np.float32 for array in made.journal.tensors.values())


def test_a_roster_knows_names_and_refuses_strangers():
    known = roster(Proxy("1", "client-1"), Proxy("2", "client-0"), Gone("3", "client-2"))
    assert list(known.present()) == ["client-0", "client-1"]
    known.register(Proxy("4", "client-1"))  # type: ignore[arg-type]
    assert known.present()["client-1"].cid == "4", "of two connections the newer"
    known.register(Proxy("5", "client-3", "another model"))  # type: ignore[arg-type]
    assert "client-3" not in known.present()
    assert "another base model" in known.refused["client-3"]
    known.relay.moved = {cid: Traffic(10, 1) for cid in "1245"}  # type: ignore[attr-defined]
    assert known.traffic()["client-1"] == Traffic(20, 2), "both its connections"
    assert known.traffic()["client-1"] == Traffic(0, 0), "since it was last asked"


def test_a_journal_is_gone_on_from_or_refused(tmp_path):
    chosen = settings()
    journal = Journal.of_folder(tmp_path / "run", chosen, tensors())
    journal.tensors = tensors(2.0)
    journal.rounds.append(Round(1, 0.5, 1.0, {"client-0": {"pictures": 3}}, {"client-1": "why"}))
    journal.save()
    (tmp_path / "run" / f"{STATE}.new").write_bytes(b"killed while this was written")
    again = Journal.of_folder(tmp_path / "run", chosen.but(rounds=9), tensors())
    assert again.rounds == journal.rounds
    assert list(again.tensors) == list(SHAPES), "in the order in which they travel"
    assert all((again.tensors[name] == 2.0).all() for name in SHAPES)
    with pytest.raises(UserError, match=r"aggregation was 'fedavg', now 'product'.*--output"):
        Journal.of_folder(tmp_path / "run", chosen.but(aggregation="product"), tensors())
    with pytest.raises(UserError, match="other tensors"):
        Journal.of_folder(tmp_path / "run", chosen, {"m": np.zeros(3)})


BAD_SETTINGS = [
    ({"clients": 0}, r"clients=0 is not possible"),
    ({"aggregation": "fedavgg"}, r"did you mean 'fedavg'"),
    ({"min_clients": 5}, r"min_clients=5 is more than clients=4"),
    ({"dp_noise": 1.0, "aggregation": "product"}, r"noise of differential privacy"),
    ({"dirichlet_alpha": 0.0}, r"dirichlet_alpha"),
]


@pytest.mark.parametrize(("given", "told"), BAD_SETTINGS)
def test_impossible_settings_are_named(given, told):
    with pytest.raises((UserError, ValueError), match=f"(?i){told}"):
        settings(**given)


def test_files_that_are_none_are_named(tmp_path, capsys):
    with pytest.raises(UserError, match="no configuration"):
        Settings.of_file(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("federated: {clinets: 3}\nmodel: {type: clip_lora}")
    with pytest.raises(ValueError, match=r"(?i)clinets.*did you mean 'clients'"):
        Settings.of_file(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("model: [")
    with pytest.raises(UserError, match="no YAML"):
        Settings.of_file(tmp_path / "b.yaml")
    assert command.main(["client", "--number", "0"]) == 2
    assert "--address" in capsys.readouterr().err
    assert command.main(["client", "--address", "localhost:1", "--number", "4"]) == 2
    assert "0 to 3" in capsys.readouterr().err
    assert command.main(["server", "--address", "here", f"--output={tmp_path}"]) == 2
    assert "host:port" in capsys.readouterr().err


def test_with_a_frozen_a_nothing_of_it_travels():
    chosen = settings(aggregation="frozen_a", clients=2)
    clients = [FederatedClient.of(chosen, number) for number in range(2)]
    names = list(clients[0].model.adapter_state())
    assert names
    assert not any("lora_A" in name for name in names)
    assert any("lora_B" in name for name in names)
    assert clients[0].fingerprint == clients[1].fingerprint
    other = FederatedClient.of(settings(aggregation="frozen_a", clients=2, seed=1), 0)
    assert other.fingerprint != clients[0].fingerprint, "another A"


def test_a_round_depends_on_nothing_but_its_number():
    client = FederatedClient.of(settings(), 1)
    start = client.get_parameters({})
    first, _, _ = client.fit(start, {"round": 1})
    client.fit(first, {"round": 2})
    again, count, told = client.fit(start, {"round": 1})
    assert all(map(np.array_equal, first, again))
    assert count == len(client.pictures)
    assert told["loss"] > 0
    assert not all(map(np.array_equal, first, client.fit(start, {"round": 3})[0]))
    assert seed_of(0, "client-1", 1) != seed_of(0, "client-11", 1)


def test_the_picture_of_a_run(tmp_path):
    done = [Round(0, 0.1, 2.0)]
    traffic = {"client-0": {"sent": 1000, "received": 2000}}
    done += [Round(k, 0.3 * k, 1.0, {"client-0": {"pictures": 1}}, {}, traffic) for k in (1, 2)]
    file = draw(done, 100_000, tmp_path / "rounds.png")
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture).std() > 10, "something is drawn"
