"""What the server does in a round: hand out the adapter, sort out answers that are none, average.

`Rounds` is led by Flower's server. It knows clients by name and gives what is sound to an inner
strategy, which averages: `Averaging`, or Flower's differential privacy around it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite

import numpy as np
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy

from library.training.errors import UserError
from lora.clip_wrapper import CLIPLoRAWrapper
from models.clip import Metrics

from .averaging import Answers, Averaging, Failures, ServerEvaluates
from .client import name_of
from .data import Pictures
from .journal import Journal, Round
from .roster import Roster
from .settings import Settings

logger = logging.getLogger(__name__)


class Rounds(ServerEvaluates):
    """The rounds of a run, from the journal's last one on.

    Args:
        model: the server's, LoRA applied.
        test: what it is evaluated on after each round.
    """

    def __init__(
        self,
        settings: Settings,
        model: CLIPLoRAWrapper,
        test: Pictures,
        roster: Roster,
        journal: Journal,
    ) -> None:
        self.settings, self.model, self.test = settings, model, test
        self.roster, self.journal = roster, journal
        self.behind = journal.last
        self.now = Round(self.behind)
        self.asked: dict[str, str] = {}
        self.began = 0.0
        self._measured: tuple[Parameters, Metrics] | None = None
        names = list(journal.tensors)
        self.averaging = Averaging(names, settings.aggregation, weighted=not settings.dp_noise)
        self.private: DifferentialPrivacyServerSideFixedClipping | None = None
        if settings.dp_noise:
            self.private = DifferentialPrivacyServerSideFixedClipping(
                self.averaging, settings.dp_noise, settings.dp_clip, settings.clients
            )
        self.inner: Strategy = self.private or self.averaging

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """The journal's adapter: what the run began with, or its last round's."""
        return ndarrays_to_parameters(list(self.journal.tensors.values()))

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Invite whoever is there: before the first round all clients are waited for.

        Raises:
            UserError: fewer than `min_clients` come.
        """
        settings, first = self.settings, server_round == 1
        wanted = settings.clients if first else settings.min_clients
        present = self.roster.await_clients(wanted, settings.join_timeout)
        number = self.behind + server_round
        if len(present) < settings.min_clients:
            raise UserError(
                f"round {number}: {len(present)} of at least {settings.min_clients} clients are "
                f"there after {settings.join_timeout:g} s. What the rounds before gave is in "
                f"{self.journal.folder}; the same command goes on from there."
            )
        self.now, self.began, self.averaging.error = Round(number), time.monotonic(), None
        self.asked = {proxy.cid: name for name, proxy in present.items()}
        self.now.left_out = dict(self.roster.refused)
        expected = {name_of(k) for k in range(settings.clients)}
        for name in sorted(expected - present.keys() - self.roster.refused.keys()):
            self._leave_out(name, "it is not there")
        self.averaging.invited = list(present.values()), number
        return self.inner.configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(
        self, server_round: int, results: Answers, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Average what is sound; name who has given nothing, or what is none."""
        answered = {self.asked[proxy.cid]: (proxy, answer) for proxy, answer in results}
        self._name_the_silent(answered.keys(), failures)
        sound: Answers = []
        # In order of names: a sum's rounding depends on it.
        for name, (proxy, answer) in sorted(answered.items()):
            if problem := self._problem_of(answer):
                self._leave_out(name, problem)
                continue
            sound.append((proxy, replace(answer, parameters=self._as_kept(answer.parameters))))
        mean = self._mean_that_works(server_round, sound)
        if mean is None:
            return None, {}
        # What a client tells of itself may be anything, if somebody else wrote it.
        for proxy, answer in sound:
            told = {
                key: float(value)
                for key, value in answer.metrics.items()
                if isinstance(value, int | float) and isfinite(value)
            }
            self.now.clients[self.asked[proxy.cid]] = {**told, "pictures": answer.num_examples}
        return mean, {}

    def _mean_that_works(self, server_round: int, sound: Answers) -> Parameters | None:
        """The average; None if there is none. Answers with which the model gives no finite loss
        are taken out of `sound`, if the average has none."""
        while len(sound) >= self.settings.min_clients:
            if self.private is not None:
                self.private.num_sampled_clients = len(sound)  # the mean's noise is for so many
            given = [(proxy, replace(answer)) for proxy, answer in sound]  # Flower clips in place
            mean, _ = self.inner.aggregate_fit(server_round, given, [])
            assert mean is not None
            mean = self._as_kept(mean)
            if self._works(mean):
                return mean
            spoilt = [one for one in sound if not self._works(one[1].parameters)]
            if not spoilt:
                logger.warning("round %d changes nothing: its mean is not finite", self.now.number)
                return None
            for one in spoilt:
                sound.remove(one)
                self._leave_out(self.asked[one[0].cid], "with its answer the loss is not finite")
        logger.warning(
            "round %d changes nothing: %d of at least %d answers are sound",
            *(self.now.number, len(sound), self.settings.min_clients),
        )
        return None

    def _as_kept(self, parameters: Parameters) -> Parameters:
        """In the types in which the journal keeps and the wire carries them."""
        held = self.journal.tensors.values()
        with np.errstate(over="ignore"):
            arrays = [
                array.astype(kept.dtype)
                for array, kept in zip(parameters_to_ndarrays(parameters), held, strict=True)
            ]
        return ndarrays_to_parameters(arrays)

    def _works(self, parameters: Parameters) -> bool:
        """Whether the model with these has a finite loss."""
        arrays = parameters_to_ndarrays(parameters)
        finite = all(np.isfinite(array).all() for array in arrays)
        return finite and isfinite(self._measure(parameters)["loss"])

    def _measure(self, parameters: Parameters) -> Metrics:
        """Loss and accuracy of the server's model with these; asked twice, measured once."""
        if self._measured is None or self._measured[0] is not parameters:
            self.model.set_parameters(parameters_to_ndarrays(parameters))
            found = self.model.evaluate(self.test.images, self.test.labels)
            self._measured = parameters, found
        return self._measured[1]

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]]:
        """Accuracy on the test pictures; the end of a round, which is saved."""
        found = self._measure(parameters)
        if server_round > 0 or not self.journal.rounds:
            self._close_round(parameters_to_ndarrays(parameters), found)
        return found["loss"], {"accuracy": found["accuracy"]}

    def _close_round(self, arrays: list[np.ndarray], found: Metrics) -> None:
        now = self.now
        now.accuracy, now.loss = found["accuracy"], found["loss"]
        now.traffic = {
            name: {"sent": moved.sent, "received": moved.received}
            for name, moved in self.roster.traffic().items()
        }
        if now.number:
            now.seconds = time.monotonic() - self.began
            # Of a mean with noise it would tell nothing.
            now.product_error = None if self.private or not now.clients else self.averaging.error
        self.journal.tensors = dict(zip(self.journal.tensors, arrays, strict=True))
        self.journal.rounds.append(now)
        self.journal.save()
        for line in lines_of(now):
            logger.info(line)

    def _name_the_silent(self, answered: Iterable[str], failures: Failures) -> None:
        """Those that were asked and have not answered, or with an error."""
        errors = {
            self.asked[one[0].cid]: f"it answers with an error: {one[1].status.message}"
            for one in failures
            if not isinstance(one, BaseException)
        }
        for cid, name in sorted(self.asked.items(), key=lambda item: item[1]):
            if name not in answered:
                self._leave_out(name, errors.get(name) or self._silence_of(cid))

    def _silence_of(self, cid: str) -> str:
        left, limit = self.roster.left_at(cid), self.settings.round_timeout
        if left is not None and left - self.began < limit:
            return f"its connection was lost {max(0.0, left - self.began):.1f} s into the round"
        if time.monotonic() - self.began < limit:
            return "its connection was lost, or what it sent could not be read"
        return f"no answer within {limit:g} s"

    def _leave_out(self, name: str, problem: str) -> None:
        self.now.left_out[name] = problem
        logger.warning("round %d: %s is left out: %s", self.now.number, name, problem)

    def _problem_of(self, answer: FitRes) -> str | None:
        """What is wrong with an answer; None for a sound one."""
        if answer.status.code != Code.OK:
            return f"it answers with an error: {answer.status.message}"
        if answer.num_examples < 1:
            return f"it has trained on {answer.num_examples} pictures"
        try:
            arrays = parameters_to_ndarrays(answer.parameters)
        except (ValueError, EOFError, OSError) as error:  # bytes that are no arrays
            return f"its answer cannot be read: {error}"
        if problem := problem_of(arrays, self.journal.tensors):
            return problem
        same = {
            name: np.array_equal(array, held)
            for array, (name, held) in zip(arrays, self.journal.tensors.items(), strict=True)
        }
        if self.settings.aggregation == "frozen_a":
            for name, alike in same.items():
                if name.endswith("lora_A.weight") and not alike:
                    return f"'{name}' is not the server's, though A is frozen"
        if self.private is not None and all(same.values()):
            return "it has sent back what it got, which differential privacy cannot clip"
        return None


def problem_of(arrays: list[np.ndarray], expected: Mapping[str, np.ndarray]) -> str | None:
    """What keeps tensors from being averaged with others: too few, other shapes, not numbers, not
    finite; None if nothing does."""
    if len(arrays) != len(expected):
        return f"it has sent {len(arrays)} of {len(expected)} tensors"
    for array, (name, held) in zip(arrays, expected.items(), strict=True):
        if array.shape != held.shape:
            return f"'{name}' has shape {array.shape} instead of {held.shape}"
        if array.dtype.kind != "f":
            return f"'{name}' holds {array.dtype} instead of floating-point numbers"
        with np.errstate(over="ignore"):  # what is too large for the model's type is infinite there
            kept = array.astype(held.dtype)
        if not np.isfinite(kept).all():
            return f"'{name}' holds NaN or infinity"
    return None


def lines_of(one: Round) -> list[str]:
    """A round as the log tells it."""
    if not one.number:
        return [f"before the first round: accuracy {one.accuracy:.3f}, loss {one.loss:.3f}"]
    lines = [
        f"round {one.number}: accuracy {one.accuracy:.3f}, loss {one.loss:.3f}, "
        f"{len(one.clients)} clients, {one.seconds:.1f} s"
    ]
    for name, moved in one.traffic.items():
        told = one.clients.get(name)
        did = f"{told['pictures']:.0f} pictures, " if told else ""
        did += f"loss {told['loss']:.3f}, " if told and "loss" in told else ""
        lines.append(
            f"  {name}: {did}sent {moved['sent']:,} bytes, received {moved['received']:,} bytes"
        )
    if one.product_error is not None:
        lines.append(f"  B·A is {one.product_error:.1%} off the mean of the clients' B·A")
    return lines
