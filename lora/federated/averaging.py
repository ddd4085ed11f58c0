"""The part of Flower's strategies that computes the mean of sound answers."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

from flwr.common import (
    EvaluateIns,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from .aggregation import AGGREGATIONS, product_error

Answers = list[tuple[ClientProxy, FitRes]]
Failures = list[tuple[ClientProxy, FitRes] | BaseException]


class ServerEvaluates(Strategy):
    """Asks no client to evaluate: the server has test pictures of its own, and sending costs."""

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        return []

    def aggregate_evaluate(
        self, server_round: int, results: Any, failures: Any
    ) -> tuple[float | None, dict[str, Scalar]]:
        return None, {}


class Averaging(ServerEvaluates):
    """Averages sound answers by one of `AGGREGATIONS`.

    Args:
        names: of the tensors, in the order in which they travel.
        weighted: by numbers of pictures; else all alike, for which noise is calibrated.

    Attributes:
        invited: the clients of the next round, and its number: `Rounds` sets them.
        error: the last round's `product_error`; None where no pairs travel whole.
    """

    def __init__(self, names: Sequence[str], aggregation: str, weighted: bool) -> None:
        self.names, self.weighted = list(names), weighted
        self.combine = AGGREGATIONS[aggregation]
        self.has_pairs = any(name.endswith("lora_A.weight") for name in names)
        self.invited: tuple[list[ClientProxy], int] = ([], 0)
        self.error: float | None = None

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        return None

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        proxies, number = self.invited
        return [(proxy, FitIns(parameters, {"round": number})) for proxy in proxies]

    def aggregate_fit(
        self, server_round: int, results: Answers, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        updates = [
            (
                float(answer.num_examples) if self.weighted else 1.0,
                dict(zip(self.names, parameters_to_ndarrays(answer.parameters), strict=True)),
            )
            for _, answer in results
        ]
        combined = self.combine(updates)
        error = product_error(updates, combined) if self.has_pairs else inf
        self.error = error if isfinite(error) else None  # infinite: the mean is zero
        return ndarrays_to_parameters([combined[name] for name in self.names]), {}

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        return None
