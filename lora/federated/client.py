"""A client: trains the adapter on its own pictures, whenever the server asks."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from typing import Any

import numpy as np
import torch
from flwr.client import NumPyClient, start_client
from grpc import RpcError

from library.optim.registry import create_optimizer
from lora.clip_wrapper import CLIPLoRAWrapper

from .data import Pictures, dirichlet, shares
from .model import lora_model
from .settings import Settings

logger = logging.getLogger(__name__)

MESSAGE = 2**31 - 1  # bytes, as many as gRPC can send; a whole CLIP has more than Flower's 512 MB
PAUSE = 1.0  # seconds between attempts to reach the server


class FederatedClient(NumPyClient):
    """Client number `number` of a run.

    A round depends on nothing but the settings, the round's number and the adapter that comes: a
    client that was started again gives the same answer.

    Args:
        model: LoRA applied.
        pictures: its own share.
    """

    def __init__(
        self, settings: Settings, number: int, model: CLIPLoRAWrapper, pictures: Pictures
    ) -> None:
        self.settings, self.number, self.model, self.pictures = settings, number, model, pictures
        self.fingerprint = model.fingerprint()
        self.heard = time.monotonic()  # when the server last asked for something

    @classmethod
    def of(cls, settings: Settings, number: int) -> FederatedClient:
        """With its model loaded and its share dealt."""
        model = lora_model(settings)
        pictures = shares(model.image_size).clients
        parts = dirichlet(
            pictures.labels, settings.clients, settings.dirichlet_alpha, settings.seed
        )
        return cls(settings, number, model, pictures[parts[number]])

    @property
    def name(self) -> str:
        return name_of(self.number)

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Who it is, a fingerprint of all that it does not send, and its settings."""
        self.heard = time.monotonic()
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "settings": json.dumps(self.settings.agreed()),
        }

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
        return self.model.get_parameters()

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """Train from the server's adapter; `config` has the number of the `round`."""
        self.model.set_parameters(parameters)
        self.model.configure_optimizer(self.make_optimizer)
        torch.manual_seed(seed_of(self.settings.seed, self.name, int(config["round"])))
        started = time.monotonic()
        losses = [
            self.model.train_step(batch.images, batch.labels)
            for _ in range(self.settings.epochs)
            for batch in self._batches()
        ]
        if hasattr(self._optimizer, "eval"):  # of those that train elsewhere than where they are
            self._optimizer.eval()
        self.heard = time.monotonic()
        loss = float(np.mean(losses))
        logger.info("%s: round %s, loss %.4f", self.name, config["round"], loss)
        seconds = time.monotonic() - started
        return self.model.get_parameters(), len(self.pictures), {"loss": loss, "seconds": seconds}

    def evaluate(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """The server's adapter on the client's own pictures."""
        self.model.set_parameters(parameters)
        found = self.model.evaluate(self.pictures.images, self.pictures.labels)
        return found["loss"], len(self.pictures), {"accuracy": found["accuracy"]}

    def _batches(self) -> list[Pictures]:
        order = torch.randperm(len(self.pictures))
        return [self.pictures[part] for part in order.split(self.settings.batch_size)]

    def make_optimizer(self, named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """That of the settings.

        Raises:
            ValueError, UserError: an unknown one, or impossible arguments.
        """
        arguments = dict(self.settings.optimizer_args)
        self._optimizer: Any = create_optimizer(
            self.settings.optimizer, named, self.settings.learning_rate, arguments
        )[2]
        return self._optimizer


def name_of(number: int) -> str:
    """What the log calls a client."""
    return f"client-{number}"


def seed_of(*parts: object) -> int:
    """A seed of its own for each combination, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def serve(
    client: FederatedClient, address: str, certificate: bytes | None, patience: float
) -> None:
    """Answer the server until it says that the run is over.

    A server that does not answer is tried again, for `patience` seconds after the last contact: it
    may have been killed, and started again.

    Raises:
        RpcError: no server for that long.
    """
    client.heard = time.monotonic()
    while True:
        try:
            start_client(
                server_address=address,
                client=client.to_client(),
                insecure=certificate is None,
                root_certificates=certificate,
                grpc_max_message_length=MESSAGE,
            )
            return
        except RpcError as error:
            if time.monotonic() - client.heard > patience:
                raise
            logger.info("no server at %s (%s): trying again", address, error.code().name)
            time.sleep(PAUSE)
