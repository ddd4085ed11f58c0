"""A federated run without processes: what a round takes and refuses, keeps and goes on from."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from federated_runs import QUICK
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from PIL import Image

from library.training.errors import UserError
from lora.federated import __main__ as command
from lora.federated.client import FederatedClient, seed_of, serve
from lora.federated.journal import STATE, Journal, Round
from lora.federated.report import draw
from lora.federated.roster import Roster
from lora.federated.server import FederatedServer
from lora.federated.settings import DEFAULT_CONFIG, Settings
from lora.federated.strategy import Rounds, problem_of
from lora.federated.wire import Traffic

SHAPES = {"m.lora_A.weight": (4, 30), "m.lora_B.weight": (50, 4), "classifier.bias": (10,)}


def tensors(value: float = 0.0) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def settings(**given: Any) -> Settings:
    return Settings.of_file(DEFAULT_CONFIG, **{**QUICK, **given})


class Proxy:
    """One of Flower's clients, as the roster sees it; `given` settings are its own."""

    def __init__(self, cid: str, name: str = "", fingerprint: str = "same", **given: Any) -> None:
        agreed = json.dumps(settings(**given).agreed())
        self.cid = cid
        self.told = {"name": name or cid, "fingerprint": fingerprint, "settings": agreed}

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
    """A server's model that takes anything; its loss is NaN from a million on."""

    def set_parameters(self, arrays: Any) -> None:
        self.arrays = arrays

    def evaluate(self, *_: Any) -> dict[str, float]:
        largest = max(float(np.abs(array).max()) for array in self.arrays)
        return {"loss": 1.0 if largest < 1e6 else math.nan, "accuracy": 0.5}


def roster(*proxies: Proxy, chosen: Settings | None = None) -> Roster:
    made = Roster(Wire(), "same", chosen or settings())  # type: ignore[arg-type]
    for proxy in proxies:
        made.register(proxy)  # type: ignore[arg-type]
    return made


def answer(arrays: list[np.ndarray], pictures: int = 10) -> FitRes:
    status = Status(Code.OK, "")
    return FitRes(status, ndarrays_to_parameters(arrays), pictures, {"loss": 1.0})


def rounds(folder: Path, chosen: Settings, *names: str) -> tuple[Rounds, list[Proxy]]:
    proxies = [Proxy(name, clients=chosen.clients) for name in names]
    known = roster(*proxies, chosen=chosen)
    journal = Journal.of_folder(folder, chosen, tensors())
    none = SimpleNamespace(images=None, labels=None)
    made = Rounds(chosen, Model(), none, known, journal)  # type: ignore[arg-type]
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
    (lambda a: [a[0], a[1].astype(np.float64) * 1e300, a[2]], "'m.lora_B.weight' holds NaN or inf"),
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


def test_an_answer_that_spoils_the_model_is_named_and_left_out(tmp_path):
    names = ["client-0", "client-1", "client-2"]
    made, proxies = rounds(tmp_path, settings(clients=3), *names)
    arrays = [list(tensors(value).values()) for value in (1.0, 1e9, 3.0)]
    results = [(proxy, answer(each)) for proxy, each in zip(proxies, arrays, strict=True)]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    assert all((array == 2.0).all() for array in parameters_to_ndarrays(averaged))
    assert made.now.left_out == {"client-1": "with its answer the loss is not finite"}
    made.evaluate(1, averaged)
    assert made.journal.rounds[-1].clients.keys() == {"client-0", "client-2"}


def test_a_round_without_a_sound_answer_leaves_the_adapter_as_it_was(tmp_path):
    made, proxies = rounds(tmp_path, settings(clients=1), "client-0")
    results = [(proxies[0], answer(list(tensors(1e9).values())))]
    assert made.aggregate_fit(1, results, [])[0] is None  # type: ignore[arg-type]
    made.evaluate(1, made.initialize_parameters(made.roster))
    last = made.journal.rounds[-1]
    assert (last.number, last.clients, last.product_error) == (1, {}, None)
    assert all((array == 0.0).all() for array in made.journal.tensors.values())
    told = json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)
    assert len(told["rounds"]) == 2


@pytest.mark.parametrize("aggregation", ["fedavg", "product"])
@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
def test_what_travels_keeps_its_type(tmp_path, aggregation, dtype):
    chosen = settings(clients=2, aggregation=aggregation)
    made, proxies = rounds(tmp_path, chosen, "client-0", "client-1")
    given = [array.astype(dtype) for array in tensors(3.0).values()]
    results = [(proxy, answer(given)) for proxy in proxies]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    arrays = parameters_to_ndarrays(averaged)
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    a, b, head = arrays
    np.testing.assert_allclose(b @ a, np.full((50, 30), 36.0), rtol=1e-5)
    assert (head == 3.0).all()


def test_a_frozen_a_that_has_changed_is_its_clients_problem(tmp_path):
    chosen = settings(clients=2, aggregation="frozen_a")
    made, proxies = rounds(tmp_path, chosen, "client-0", "client-1")
    good = tensors(3.0) | {"m.lora_A.weight": tensors()["m.lora_A.weight"]}
    results = [
        (proxies[0], answer(list(good.values()))),
        (proxies[1], answer(list(tensors(1.0).values()))),
    ]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    assert (parameters_to_ndarrays(averaged)[1] == 3.0).all()
    assert made.now.left_out == {
        "client-1": "'m.lora_A.weight' is not the server's, though A is frozen"
    }


def test_a_client_may_tell_anything_of_its_training(tmp_path):
    made, proxies = rounds(tmp_path, settings(clients=1), "client-0")
    told = answer(list(tensors(1.0).values()))
    told.metrics = {"device": "H100", "pictures": -1, "epochs": 2, "loss": math.nan}
    averaged, _ = made.aggregate_fit(1, [(proxies[0], told)], [])  # type: ignore[arg-type]
    made.evaluate(1, averaged)
    assert made.journal.rounds[-1].clients["client-0"] == {"pictures": 10, "epochs": 2}


def test_differential_privacy_clips_and_counts_alike(tmp_path):
    """Flower's: each change is cut to the norm `dp_clip`, whatever its number of pictures."""
    chosen = settings(clients=2, dp_noise=1e-4, dp_clip=2.0)
    made, proxies = rounds(tmp_path, chosen, "client-0", "client-1")
    up, down = (list(tensors(value).values()) for value in (100.0, -1e-3))
    results = [(proxies[0], answer(up, 1)), (proxies[1], answer(down, 1000))]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    numbers = np.concatenate([array.ravel() for array in parameters_to_ndarrays(averaged)])
    expected = (2.0 / math.sqrt(numbers.size) - 1e-3) / 2  # the second is within the norm
    assert numbers.mean() == pytest.approx(expected, abs=1e-4)
    made.evaluate(1, averaged)
    assert made.journal.rounds[-1].product_error is None, "noise is in none of what was compared"


def test_differential_privacy_adds_noise(tmp_path):
    """Of `dp_noise`·`dp_clip`/clients."""
    chosen = settings(clients=2, dp_noise=0.5, dp_clip=2.0)
    made, proxies = rounds(tmp_path, chosen, "client-0", "client-1")
    results = [(proxy, answer(list(tensors(100.0).values()))) for proxy in proxies]
    averaged, _ = made.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    numbers = np.concatenate([array.ravel() for array in parameters_to_ndarrays(averaged)])
    assert numbers.std() == pytest.approx(0.5, rel=0.15)
    made.evaluate(1, averaged)
    assert all(array.dtype == np.float32 for array in made.journal.tensors.values())


def test_differential_privacy_leaves_out_what_has_not_changed(tmp_path):
    chosen = settings(clients=2, dp_noise=1e-4)
    made, proxies = rounds(tmp_path, chosen, "client-0", "client-1")
    results = [
        (proxies[0], answer(list(tensors().values()))),
        (proxies[1], answer(list(tensors(1.0).values()))),
    ]
    assert made.aggregate_fit(1, results, [])[0] is not None  # type: ignore[arg-type]
    assert "has sent back what it got" in made.now.left_out["client-0"]


def test_a_roster_knows_names_and_refuses_strangers(caplog):
    known = roster(Proxy("1", "client-1"), Proxy("2", "client-0"), Gone("3", "client-2"))
    assert list(known.present()) == ["client-0", "client-1"]
    known.register(Proxy("4", "client-1"))  # type: ignore[arg-type]
    assert known.present()["client-1"].cid == "4", "of two connections the newer"
    assert known.present()
    assert caplog.text.count("client-1 is there twice") == 1
    assert caplog.text.count("left before it told its name") <= 1, "and is not asked again"
    known.register(Proxy("5", "client-3", "another model"))  # type: ignore[arg-type]
    assert "client-3" not in known.present()
    assert "another base model" in known.refused["client-3"]
    known.register(Proxy("6", "client-1", "another model"))  # type: ignore[arg-type]
    assert known.present()["client-1"].cid == "4", "a stranger by its name does not drive it out"
    assert "client-1" not in known.refused
    known.unregister(known.clients["4"])
    known.unregister(known.clients["1"])
    assert "client-1" not in known.present(), "nor does it come in when that has left"
    known.relay.moved = {cid: Traffic(10, 1) for cid in "12456"}  # type: ignore[attr-defined]
    assert known.traffic()["client-1"] == Traffic(30, 3), "all its connections"
    assert known.traffic()["client-1"] == Traffic(0, 0), "since it was last asked"


def test_clients_with_other_settings_are_refused():
    known = roster(Proxy("1", "client-1", clients=8, epochs=9), Proxy("2", "client-4"))
    wordless = Proxy("3", "client-2")
    del wordless.told["settings"]
    known.register(wordless)  # type: ignore[arg-type]
    assert known.present() == {}
    assert (
        "clients is 8 there and 4 here; epochs is 9 there and 1 here" in known.refused["client-1"]
    )
    assert known.refused["client-4"] == "the run has 4 clients, of which it is none"
    assert "seed is None there and 0 here" in known.refused["client-2"]
    known.register(Proxy("4", "client-1", rounds=99, aggregation="product"))  # type: ignore[arg-type]
    assert known.present()["client-1"].cid == "4", "these are the server's matter"


def test_a_journal_is_gone_on_from_or_refused(tmp_path):
    chosen = settings()
    journal = Journal.of_folder(tmp_path / "run", chosen, tensors())
    journal.tensors = tensors(2.0)
    journal.rounds.append(Round(1, 0.5, 1.0, {"client-0": {"pictures": 3}}, {"client-1": "why"}))
    journal.save()
    (tmp_path / "run" / ".federation.7.tmp.safetensors").write_bytes(b"killed while it was written")
    again = Journal.of_folder(tmp_path / "run", chosen.but(rounds=9), tensors())
    assert again.rounds == journal.rounds
    assert list(again.tensors) == list(SHAPES), "in the order in which they travel"
    assert all((again.tensors[name] == 2.0).all() for name in SHAPES)
    with pytest.raises(UserError, match=r"aggregation was 'fedavg', now 'product'.*--output"):
        Journal.of_folder(tmp_path / "run", chosen.but(aggregation="product"), tensors())
    with pytest.raises(UserError, match="other tensors"):
        Journal.of_folder(tmp_path / "run", chosen, {"m": np.zeros(3)})


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_between_its_files_loses_no_round(tmp_path, monkeypatch, at):
    chosen, calls = settings(), []
    journal = Journal.of_folder(tmp_path, chosen, tensors())
    journal.rounds.append(Round(1, 0.5, 1.0))
    journal.save()
    replace = os.replace

    def killed(old: Path, new: Path) -> None:
        calls.append(new)
        if len(calls) == at:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    journal.tensors, journal.rounds = tensors(2.0), [*journal.rounds, Round(2, 0.6, 0.9)]
    with pytest.raises(KeyboardInterrupt):
        journal.save()
    monkeypatch.undo()
    again = Journal.of_folder(tmp_path, chosen, tensors())
    assert again.last == at, "either the old adapter and its rounds, or the new"
    assert all((array == (2.0 if at == 2 else 0.0)).all() for array in again.tensors.values())


@pytest.mark.parametrize("spoil", ["tensor", "loss"])
def test_nan_is_never_written(tmp_path, spoil):
    journal = Journal.of_folder(tmp_path, settings(), tensors())
    journal.save()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if spoil == "tensor":
        journal.tensors["m.lora_B.weight"][3, 2] = np.nan
    else:
        journal.rounds.append(Round(1, 0.5, math.nan))
    with pytest.raises(ValueError, match=r"'m\.lora_B\.weight' holds NaN|not JSON compliant"):
        journal.save()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_no_run_is_told(tmp_path):
    (tmp_path / STATE).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"is not what a run has written .* --output"):
        Journal.of_folder(tmp_path, settings(), tensors())
    with pytest.raises(UserError, match="is no folder"):
        Journal.of_folder(tmp_path / STATE, settings(), tensors())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--optimizer=Foo"], "Foo"),
        (["--clients=2000"], "pictures"),
        (["--patience=nan"], "invalid seconds value: 'nan'"),
        (["--patience=0"], "invalid seconds value: '0'"),
    ],
)
def test_what_would_fail_in_every_client_fails_before_they_come(tmp_path, words, told, capsys):
    try:
        code = command.main(["server", f"--output={tmp_path / 'run'}", *words])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_in_which_nobody_trained_has_failed(tmp_path, monkeypatch, capsys):
    def nobody(server: FederatedServer) -> Journal:
        server.journal.rounds = [Round(0, 0.1, 2.0), Round(1, 0.1, 2.0, left_out={"client-0": "?"})]
        return server.journal

    monkeypatch.setattr(FederatedServer, "run", nobody)
    tmp_path.joinpath("run").mkdir()
    assert command.main(["server", f"--output={tmp_path / 'run'}"]) == 2
    told = capsys.readouterr()
    assert "No client has trained" in told.err
    assert "less" not in told.out


def test_patience_is_counted_from_the_last_contact(monkeypatch):
    class Unavailable(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    now, tries = [0.0], []
    client = SimpleNamespace(to_client=lambda: None)

    def silent(**_: Any) -> None:
        tries.append(now[0])
        now[0] += 20.0  # a blocked attempt
        if len(tries) == 2:
            client.heard = now[0]
        raise Unavailable

    monkeypatch.setattr("lora.federated.client.start_client", silent)
    monkeypatch.setattr(
        "lora.federated.client.time",
        SimpleNamespace(
            monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
        ),
    )
    with pytest.raises(Unavailable):
        serve(client, "here:1", None, patience=30.0)
    assert tries == [0.0, 21.0, 42.0, 63.0]


BAD_SETTINGS = [
    ({"optimizer_args": 5}, r"optimizer_args must be names and values"),
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
