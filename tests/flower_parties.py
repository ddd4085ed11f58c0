"""A Flower server behind a relay, or a client of it, as a process of its own.

    flower_parties.py server FOLDER [tls]
    flower_parties.py client ADDRESS NUMBERS [CERTIFICATE]

The server prints its address, leads one round with two clients and prints what each has moved, by
the number of values that the client says it has. A client trains nothing: it answers with so many
values of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from flwr.client import NumPyClient, start_client
from flwr.common import FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig, SimpleClientManager, start_server
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from lora.federated.wire import Relay, free_port

DOWN = 400_000  # values that the server sends to each client


class Claiming(SimpleClientManager):
    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self.relay = relay

    def register(self, client: ClientProxy) -> bool:
        self.relay.claim(client.cid)
        return super().register(client)


class Measuring(FedAvg):
    def __init__(self, relay: Relay) -> None:
        noise = np.random.default_rng(0).standard_normal(DOWN).astype(np.float32)
        super().__init__(
            min_fit_clients=2,
            min_available_clients=2,
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters([noise]),
        )
        self.relay = relay
        self.measured: dict[str, dict[str, int]] = {}

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: Any
    ) -> tuple[Parameters, dict]:
        assert not failures, failures
        for proxy, answer in results:
            values = parameters_to_ndarrays(answer.parameters)[0].size
            moved = self.relay.traffic(proxy.cid)
            self.measured[str(values)] = {"sent": moved.sent, "received": moved.received}
        return results[0][1].parameters, {}


class Echo(NumPyClient):
    def __init__(self, values: int) -> None:
        self.values = values

    def fit(self, parameters: Any, config: Any) -> Any:
        noise = np.random.default_rng(self.values).standard_normal(self.values)
        return [noise.astype(np.float32)], 1, {}


def serve(folder: Path, tls: bool) -> None:
    files = ("tls_ca.pem", "tls_certificate.pem", "tls_key.pem")
    certificates = tuple((folder / name).read_bytes() for name in files) if tls else None
    port = free_port()
    with Relay(("127.0.0.1", 0), ("127.0.0.1", port)) as relay:
        print("{}:{}".format(*relay.address), flush=True)
        strategy = Measuring(relay)
        start_server(
            server_address=f"127.0.0.1:{port}",
            config=ServerConfig(num_rounds=1, round_timeout=20),
            strategy=strategy,
            client_manager=Claiming(relay),
            certificates=certificates,  # type: ignore[arg-type]
        )
    total = relay.total()
    print(json.dumps(strategy.measured | {"total": {"sent": total.sent}}), flush=True)


def take_part(address: str, values: int, certificate: Path | None) -> None:
    start_client(
        server_address=address,
        client=Echo(values).to_client(),
        insecure=certificate is None,
        root_certificates=certificate.read_bytes() if certificate else None,
    )


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(Path(sys.argv[2]), sys.argv[3:] == ["tls"])
    else:
        take_part(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4:] else None)
